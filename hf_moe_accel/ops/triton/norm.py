"""Norms by the root mean square: each of their two directions one pass over memory."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor, cuda, empty, empty_like, float32

# Elements of a program, and the longest row that one can hold.
_TILE, LONGEST = 4096, 16384
_PROGRAMS_A_MULTIPROCESSOR = 4


@triton.jit(do_not_specialize=["num_rows"])
def _forward_kernel(
    x_ptr,
    weight_ptr,
    out_ptr,
    inverse_ptr,
    num_rows,
    eps,
    offset,
    SIZE: tl.constexpr,
    ROUNDS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    mask = (n < num_rows)[:, None] & (d < SIZE)[None, :]
    place = n[:, None] * SIZE + d[None, :]
    x = tl.load(x_ptr + place, mask=mask, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + d, mask=d < SIZE, other=0.0).to(tl.float32) + offset
    inverse = 1.0 / tl.sqrt(tl.sum(x * x, 1) / SIZE + eps)
    x *= inverse[:, None]
    if ROUNDS:
        x = x.to(x_ptr.dtype.element_ty).to(tl.float32)
    tl.store(out_ptr + place, (x * weight[None, :]).to(out_ptr.dtype.element_ty), mask=mask)
    tl.store(inverse_ptr + n, inverse, mask=n < num_rows)


@triton.jit(do_not_specialize=["num_rows"])
def _backward_kernel(
    grad_ptr,
    x_ptr,
    weight_ptr,
    inverse_ptr,
    grad_x_ptr,
    grad_weights_ptr,
    num_rows,
    offset,
    SIZE: tl.constexpr,
    ROUNDS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    d = tl.arange(0, BLOCK_D)
    weight = tl.load(weight_ptr + d, mask=d < SIZE, other=0.0).to(tl.float32) + offset
    grad_weight = tl.zeros([BLOCK_D], tl.float32)
    for first in range(tl.program_id(0) * BLOCK_N, num_rows, tl.num_programs(0) * BLOCK_N):
        n = first + tl.arange(0, BLOCK_N).to(tl.int64)
        mask = (n < num_rows)[:, None] & (d < SIZE)[None, :]
        place = n[:, None] * SIZE + d[None, :]
        grad = tl.load(grad_ptr + place, mask=mask, other=0.0).to(tl.float32)
        inverse = tl.load(inverse_ptr + n, mask=n < num_rows, other=0.0)
        x = tl.load(x_ptr + place, mask=mask, other=0.0).to(tl.float32) * inverse[:, None]
        if grad_weights_ptr is not None:
            if ROUNDS:
                grad_weight += tl.sum(grad * x.to(x_ptr.dtype.element_ty).to(tl.float32), 0)
            else:
                grad_weight += tl.sum(grad * x, 0)
        grad *= weight[None, :]
        if ROUNDS:
            grad = grad.to(x_ptr.dtype.element_ty).to(tl.float32)
        grad = inverse[:, None] * (grad - x * (tl.sum(grad * x, 1) / SIZE)[:, None])
        tl.store(grad_x_ptr + place, grad.to(grad_x_ptr.dtype.element_ty), mask=mask)
    if grad_weights_ptr is not None:
        tl.store(grad_weights_ptr + tl.program_id(0).to(tl.int64) * SIZE + d, grad_weight, mask=d < SIZE)


def _sizes(size: int) -> dict[str, int]:
    columns = triton.next_power_of_2(size)
    rows = max(1, _TILE // columns)
    return {"SIZE": size, "BLOCK_N": rows, "BLOCK_D": columns, "num_warps": 8 if rows * columns <= 8192 else 16}


def forward(x_ND: Tensor, weight_D: Tensor, eps: float, offset: float, rounds: bool, out_ND: Tensor) -> Tensor:
    """Write the norm of each row.

    Args:
        x_ND: [N, D] floating point, contiguous, D at most `LONGEST`.
        weight_D: [D] floating point, contiguous.
        eps: added to the mean square.
        offset: added to the weight.
        rounds: whether rows are rounded to their dtype before the weight.
        out_ND: [N, D], where to.

    Returns:
        [N] fp32 what each row was multiplied by.
    """
    num_rows, size = x_ND.shape
    inverse_N = empty(num_rows, dtype=float32, device=x_ND.device)
    sizes = _sizes(size)
    grid = (triton.cdiv(num_rows, sizes["BLOCK_N"]),)
    _forward_kernel[grid](x_ND, weight_D, out_ND, inverse_N, num_rows, eps, offset, ROUNDS=rounds, **sizes)
    return inverse_N


def backward(
    grad_ND: Tensor,
    x_ND: Tensor,
    weight_D: Tensor,
    inverse_N: Tensor,
    offset: float,
    rounds: bool,
    *,
    wants_weight: bool,
) -> tuple[Tensor, Tensor | None]:
    """The gradients of the rows, as they are, and of the weight, in fp32, if it is wanted. Reproducible."""
    num_rows, size = x_ND.shape
    sizes = _sizes(size)
    programs = triton.cdiv(num_rows, sizes["BLOCK_N"])
    partial_PD = None
    if wants_weight:
        # Each sums up rows of its own, a few times as many as can run at a time.
        device = x_ND.device
        count = cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
        programs = min(programs, _PROGRAMS_A_MULTIPROCESSOR * count)
        partial_PD = empty(programs, size, dtype=float32, device=device)
    grad_x_ND = empty_like(x_ND)
    _backward_kernel[(programs,)](
        grad_ND, x_ND, weight_D, inverse_N, grad_x_ND, partial_PD, num_rows, offset, ROUNDS=rounds, **sizes
    )
    return grad_x_ND, None if partial_PD is None else partial_PD.sum(0)
