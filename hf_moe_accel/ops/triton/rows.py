"""Moving rows: gather by index, and sums of rows by segment, each one pass over memory."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

# A mean segment of more rows than this is summed by tiles of rows, for there are few segments to share out.
_LONG_SEGMENT = 64


# Numbers of rows differ from pass to pass. Triton would compile a kernel for multiples of 16 and another one for the
# rest, each where the first such number comes.
@triton.jit(do_not_specialize=["num_pairs"])
def _gather_kernel(x_ptr, row_ptr, weight_ptr, out_ptr, num_pairs, size, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr):
    r = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    col = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    row = tl.load(row_ptr + r, mask=r < num_pairs, other=0)
    mask = (r < num_pairs)[:, None] & (col < size)[None, :]
    x = tl.load(x_ptr + row[:, None] * size + col[None, :], mask=mask)
    if weight_ptr is not None:
        weight = tl.load(weight_ptr + r, mask=r < num_pairs, other=0.0)
        x = x.to(tl.float32) * weight[:, None]
    tl.store(out_ptr + r[:, None] * size + col[None, :], x.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["num_pairs", "num_segments"])
def _sum_kernel(
    rows_ptr,
    other_ptr,
    index_ptr,
    weight_ptr,
    bias_ptr,
    expert_ptr,
    start_ptr,
    out_ptr,
    num_pairs,
    num_segments,
    start_step,
    size,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64)
    col = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    start = tl.load(start_ptr + n * start_step)
    end = tl.load(start_ptr + (n + 1) * start_step, mask=n + 1 < num_segments, other=num_pairs)
    total = tl.zeros([BLOCK_P, BLOCK_D], tl.float32)
    for first in range(start, end, BLOCK_P):
        p = first + tl.arange(0, BLOCK_P)
        inside = p < end
        if index_ptr is None:
            r = p
        else:
            r = tl.load(index_ptr + p, mask=inside, other=0)
        mask = inside[:, None] & (col < size)[None, :]
        place = r[:, None] * size + col[None, :]
        values = tl.load(rows_ptr + place, mask=mask, other=0.0).to(tl.float32)
        if other_ptr is not None:
            values += tl.load(other_ptr + place, mask=mask, other=0.0).to(tl.float32)
        if weight_ptr is not None:
            weight = tl.load(weight_ptr + r, mask=inside, other=0.0)[:, None]
        if bias_ptr is not None:
            expert = tl.load(expert_ptr + r, mask=inside, other=0)
            bias = tl.load(bias_ptr + expert[:, None] * size + col[None, :], mask=mask, other=0.0).to(tl.float32)
            values += weight * bias
        elif weight_ptr is not None:
            values *= weight
        total += values
    out = tl.sum(total, 0)
    tl.store(out_ptr + n * size + col, out.to(out_ptr.dtype.element_ty), mask=col < size)


def gather(x_ND: Tensor, row_of_R: Tensor, weights_R: Tensor | None = None) -> Tensor:
    """[R, D] rows by index, times an fp32 weight each where there are weights (rounded once).

    Args:
        x_ND: [N, D] floating point.
        row_of_R: [R] int64.
        weights_R: [R] fp32.
    """
    num_pairs, size = row_of_R.numel(), x_ND.size(1)
    out_RD = x_ND.new_empty(num_pairs, size)
    if num_pairs:
        block_d = min(triton.next_power_of_2(size), 512)
        block_r = 4
        grid = (triton.cdiv(num_pairs, block_r), triton.cdiv(size, block_d))
        _gather_kernel[grid](x_ND.contiguous(), row_of_R, weights_R, out_RD, num_pairs, size, block_r, block_d)
    return out_RD


def sum_segments(
    rows_RD: Tensor,
    index_P: Tensor | None,
    start_of_N: Tensor,
    *,
    other_RD: Tensor | None = None,
    weights_R: Tensor | None = None,
    bias: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """out[n] = sum of rows_RD[index_P[p]] over the pairs p of segment n, in fp32, in a fixed order, rounded once.

    Args:
        rows_RD: [R, D] floating point, contiguous.
        index_P: [P] int64 rows to read, or None for all in order.
        start_of_N: [N] int64 offsets of the segments, with any stride; an empty segment sums to zero.
        other_RD: [R, D] contiguous, added to the rows.
        weights_R: [R] fp32 weight of each row; with `bias`, of its bias only.
        bias: ([e, D], [R] int64 which of them a row has): `weight * bias` is added to each row. Needs weights.

    Returns:
        [N, D] in the dtype of `rows_RD`.
    """
    num_pairs = rows_RD.size(0) if index_P is None else index_P.numel()
    num_segments, size = start_of_N.numel(), rows_RD.size(1)
    out_ND = rows_RD.new_empty(num_segments, size)
    if num_segments:
        long = num_pairs > _LONG_SEGMENT * num_segments
        block_p = 32 if long else 1
        block_d = min(triton.next_power_of_2(size), 128 if long else 2048)
        grid = (num_segments, triton.cdiv(size, block_d))
        bias_eD, expert_of_R = (None, None) if bias is None else bias
        _sum_kernel[grid](
            rows_RD,
            other_RD,
            index_P,
            weights_R,
            bias_eD,
            expert_of_R,
            start_of_N,
            out_ND,
            num_pairs,
            num_segments,
            start_of_N.stride(0),
            size,
            block_p,
            block_d,
        )
    return out_ND
