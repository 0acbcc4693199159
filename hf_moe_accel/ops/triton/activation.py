"""The gate and the routing weight, forward and backward, each one pass over memory.

What adapters add to the pre-activation and to the gradient of the result, a product with a rank so low that its
operands stay in the cache, is computed in the kernels: it is never written, nor added in a pass of its own.

[Note: tiles of one expert]
With a bias or such a product, a tile's rows are of one expert, which each program finds in the experts' ends. Expert
e has the tiles from `start[e] // BLOCK_R + e` on: never fewer than it needs, since
`n // B + 1 >= ceil(n / B)`, and `R // BLOCK_R + E` in all, which is known without reading a count back. A tile
that is not needed has no rows.
"""

from __future__ import annotations

import math
import os
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from hf_moe_accel.ops.gates import GateFormula

# A tile: enough values for each thread of four warps to load 16 bytes of a bf16 row at a time.
_BLOCK_R, _BLOCK_I = 8, 256
# With a product: tall, so that factors are read seldom, and narrow, for the sums to fit into registers.
_TALL_R, _TALL_I = 32, 64
# `tl.dot` takes no less than 16 of a rank, and a row of more than 128 bytes leaves too few registers.
_LEAST_RANK, _MOST_BYTES = 16, 128

Product = tuple[Tensor, Tensor]


@triton.jit
def _act(x, ALPHA: tl.constexpr, ACT: tl.constexpr):
    """An activation's value and slope."""
    if ACT == "swish":
        sigmoid = tl.sigmoid(ALPHA * x)
        value = x * sigmoid
        slope = sigmoid + ALPHA * value * (1 - sigmoid)
    elif ACT == "gelu":
        cdf = 0.5 + 0.5 * tl.erf(x * 0.7071067811865476)
        value = x * cdf
        slope = cdf + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)
    elif ACT == "gelu_tanh":
        # (1 + tanh(y)) / 2 is sigmoid(2 y).
        cdf = tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
        value = x * cdf
        slope = cdf + value * (1 - cdf) * 1.5957691216057308 * (1 + 0.134145 * x * x)
    else:
        positive = tl.maximum(x, 0.0)
        value = positive
        slope = tl.where(x > 0, 1.0, 0.0)
        if ACT == "relu2":
            value = positive * positive
            slope = 2 * positive
    return value, slope


@triton.jit
def _tile(ends_ptr, num_rows, num_experts, BLOCK_R: tl.constexpr, BLOCK_E: tl.constexpr):
    """The rows of this program, one past the last of them, and their expert; see [Note: tiles of one expert]."""
    tile = tl.program_id(0)
    if ends_ptr is None:
        first = tile * BLOCK_R
        end = num_rows
        expert = 0
    else:
        index = tl.arange(0, BLOCK_E)
        ends = tl.load(ends_ptr + index, mask=index < num_experts, other=0)
        before = (index < num_experts) & (ends // BLOCK_R + index + 1 <= tile)
        expert = tl.sum(before.to(tl.int32), 0)
        start = tl.load(ends_ptr + expert - 1, mask=expert > 0, other=0)
        end = tl.load(ends_ptr + expert)
        first = start + (tile - start // BLOCK_R - expert) * BLOCK_R
    return first.to(tl.int64) + tl.arange(0, BLOCK_R), end, expert


@triton.jit
def _load_thin(thin_ptr, row, inside, RANK: tl.constexpr, BLOCK_K: tl.constexpr):
    """A tile's rows of a product's first operand, or anything if there is no product."""
    thin = inside
    if thin_ptr is not None:
        k = tl.arange(0, BLOCK_K)
        mask = inside[:, None] & (k < RANK)[None, :]
        thin = tl.load(thin_ptr + row[:, None] * RANK + k[None, :], mask=mask, other=0.0)
    return thin


@triton.jit
def _with_product(
    base,
    thin,
    factor_ptr,
    expert,
    col,
    col_mask,
    width,
    step_rank,
    step_col,
    RANK: tl.constexpr,
    BLOCK_K: tl.constexpr,
    IN_FP32: tl.constexpr,
):
    """A tile in fp32, plus that of `thin @ factor[expert]`, if there is one."""
    total = base.to(tl.float32)
    if factor_ptr is not None:
        k = tl.arange(0, BLOCK_K)
        factor_ptr += expert.to(tl.int64) * RANK * width
        mask = (k < RANK)[:, None] & col_mask[None, :]
        factor = tl.load(factor_ptr + k[:, None] * step_rank + col[None, :] * step_col, mask=mask, other=0.0)
        if IN_FP32:
            total = tl.dot(thin.to(tl.float32), factor.to(tl.float32), total, input_precision="tf32x3")
        else:
            total = tl.dot(thin, factor, total)
    return total


@triton.jit
def _whole_h(
    h,
    bias_ptr,
    thin,
    factor_ptr,
    expert,
    col,
    col_mask,
    width,
    step_rank,
    step_col,
    RANK: tl.constexpr,
    BLOCK_K: tl.constexpr,
    IN_FP32: tl.constexpr,
):
    """Values of the pre-activation in fp32, rounded to its dtype after the bias, as torch would add it."""
    whole = _with_product(
        h, thin, factor_ptr, expert, col, col_mask, width, step_rank, step_col, RANK, BLOCK_K, IN_FP32
    )
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + expert.to(tl.int64) * width + col, mask=col_mask, other=0.0)
        whole = (whole + bias.to(tl.float32)[None, :]).to(h.dtype).to(tl.float32)
    return whole


@triton.jit(do_not_specialize=["num_rows"])
def _forward_kernel(
    h_ptr,
    bias_ptr,
    thin_ptr,
    factor_ptr,
    ends_ptr,
    weight_ptr,
    out_ptr,
    num_rows,
    num_experts,
    size,
    width,
    to_up,
    step_rank,
    step_col,
    ACT: tl.constexpr,
    GATED: tl.constexpr,
    STEP: tl.constexpr,
    CLAMPED: tl.constexpr,
    ALPHA: tl.constexpr,
    LIMIT: tl.constexpr,
    SHIFT: tl.constexpr,
    RANK: tl.constexpr,
    BLOCK_K: tl.constexpr,
    IN_FP32: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    row, end, expert = _tile(ends_ptr, num_rows, num_experts, BLOCK_R, BLOCK_E)
    inside = row < end
    thin = _load_thin(thin_ptr, row, inside, RANK, BLOCK_K)
    for first in range(tl.program_id(1) * BLOCK_I, size, tl.num_programs(1) * BLOCK_I):
        col = first + tl.arange(0, BLOCK_I)
        col_h, col_mask = col * STEP, col < size
        mask = inside[:, None] & col_mask[None, :]
        place_h = row[:, None] * width + col_h[None, :]
        # All loads from far away first.
        g = tl.load(h_ptr + place_h, mask=mask, other=0.0)
        if GATED:
            u = tl.load(h_ptr + place_h + to_up, mask=mask, other=0.0)
        g = _whole_h(
            g, bias_ptr, thin, factor_ptr, expert, col_h, col_mask, width, step_rank, step_col, RANK, BLOCK_K, IN_FP32
        )
        value, _ = _act(tl.minimum(g, LIMIT) if CLAMPED else g, ALPHA, ACT)
        if GATED:
            u = _whole_h(
                u,
                bias_ptr,
                thin,
                factor_ptr,
                expert,
                col_h + to_up,
                col_mask,
                width,
                step_rank,
                step_col,
                RANK,
                BLOCK_K,
                IN_FP32,
            )
            if CLAMPED:
                u = tl.minimum(tl.maximum(u, -LIMIT), LIMIT)
            value *= u + SHIFT
        if weight_ptr is not None:
            value *= tl.load(weight_ptr + row, mask=inside, other=0.0)[:, None]
        tl.store(out_ptr + row[:, None] * size + col[None, :], value.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["num_rows"])
def _backward_kernel(
    h_ptr,
    bias_ptr,
    thin_ptr,
    factor_ptr,
    ends_ptr,
    weight_ptr,
    grad_ptr,
    grad_thin_ptr,
    grad_factor_ptr,
    grad_h_ptr,
    grad_weight_ptr,
    out_ptr,
    num_rows,
    num_experts,
    size,
    width,
    to_up,
    step_rank,
    step_col,
    grad_step_rank,
    grad_step_col,
    ACT: tl.constexpr,
    GATED: tl.constexpr,
    STEP: tl.constexpr,
    CLAMPED: tl.constexpr,
    ALPHA: tl.constexpr,
    LIMIT: tl.constexpr,
    SHIFT: tl.constexpr,
    RANK: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GRAD_RANK: tl.constexpr,
    GRAD_BLOCK_K: tl.constexpr,
    IN_FP32: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    row, end, expert = _tile(ends_ptr, num_rows, num_experts, BLOCK_R, BLOCK_E)
    inside = row < end
    thin = _load_thin(thin_ptr, row, inside, RANK, BLOCK_K)
    grad_thin = _load_thin(grad_thin_ptr, row, inside, GRAD_RANK, GRAD_BLOCK_K)
    if weight_ptr is not None:
        weight = tl.load(weight_ptr + row, mask=inside, other=0.0)[:, None]
    of_weight = tl.zeros([BLOCK_R], tl.float32)
    for first in range(0, size, BLOCK_I):
        col = first + tl.arange(0, BLOCK_I)
        col_h, col_mask = col * STEP, col < size
        mask = inside[:, None] & col_mask[None, :]
        place, place_h = row[:, None] * size + col[None, :], row[:, None] * width + col_h[None, :]
        # All loads from far away first.
        g = tl.load(h_ptr + place_h, mask=mask, other=0.0)
        if GATED:
            u = tl.load(h_ptr + place_h + to_up, mask=mask, other=0.0)
        grad = tl.load(grad_ptr + place, mask=mask, other=0.0)
        g = _whole_h(
            g, bias_ptr, thin, factor_ptr, expert, col_h, col_mask, width, step_rank, step_col, RANK, BLOCK_K, IN_FP32
        )
        value, slope = _act(tl.minimum(g, LIMIT) if CLAMPED else g, ALPHA, ACT)
        if CLAMPED:
            slope = tl.where(g <= LIMIT, slope, 0.0)
        grad = _with_product(
            grad,
            grad_thin,
            grad_factor_ptr,
            expert,
            col,
            col_mask,
            size,
            grad_step_rank,
            grad_step_col,
            GRAD_RANK,
            GRAD_BLOCK_K,
            IN_FP32,
        )
        out = value
        of_g = grad * slope
        if GATED:
            u = _whole_h(
                u,
                bias_ptr,
                thin,
                factor_ptr,
                expert,
                col_h + to_up,
                col_mask,
                width,
                step_rank,
                step_col,
                RANK,
                BLOCK_K,
                IN_FP32,
            )
            of_u = grad * value
            if CLAMPED:
                of_u = tl.where((u >= -LIMIT) & (u <= LIMIT), of_u, 0.0)
                u = tl.minimum(tl.maximum(u, -LIMIT), LIMIT)
            out *= u + SHIFT
            of_g *= u + SHIFT
        if weight_ptr is not None:
            of_weight += tl.sum(grad * out, 1)
            out *= weight
            of_g *= weight
            if GATED:
                of_u *= weight
        tl.store(grad_h_ptr + place_h, of_g.to(grad_h_ptr.dtype.element_ty), mask=mask)
        if GATED:
            tl.store(grad_h_ptr + place_h + to_up, of_u.to(grad_h_ptr.dtype.element_ty), mask=mask)
        tl.store(out_ptr + place, out.to(out_ptr.dtype.element_ty), mask=mask)
    if weight_ptr is not None:
        tl.store(grad_weight_ptr + row, of_weight, mask=inside)


def activate(
    formula: GateFormula,
    h_RM: Tensor,
    weights_R: Tensor | None,
    ends_e: Tensor,
    *,
    bias_eM: Tensor | None = None,
    product: Product | None = None,
) -> Tensor:
    """[R, I] `weight * gate(h + thin @ factor + bias)`, in fp32 and rounded once.

    Args:
        formula: the gate.
        h_RM: [R, 2I or I] contiguous, rows ordered by expert.
        weights_R: [R] fp32, or None for the gate alone.
        ends_e: [e] int32, the row after the last one of each expert; the last entry is R.
        bias_eM: [e, 2I or I] contiguous, or None.
        product: ([R, r] thin, [e, r, 2I or I] factors) of which each row's product is added, or None. Both in the
            dtype of `h_RM`; the factors contiguous, or a transposed view of what is. See `takes`.
    """
    num_rows, width = h_RM.shape
    size = width // 2 if formula.gated else width
    out_RI = h_RM.new_empty(num_rows, size)
    if num_rows:
        tiles, ends, blocks = _tiles(num_rows, ends_e, bias_eM is not None, product is not None)
        # Where a program has to find its expert, it stays with its rows.
        across = triton.cdiv(size, _BLOCK_I) if ends is None else 1
        steps, ranks = _sizes_of(product)
        _forward_kernel[(tiles, across)](
            h_RM,
            bias_eM,
            *_pair(product),
            ends,
            weights_R,
            out_RI,
            num_rows,
            ends_e.numel(),
            *_widths(formula, width),
            *steps,
            *_constants(formula),
            *ranks,
            _in_fp32(h_RM),
            *blocks,
        )
    return out_RI


def activate_backward(
    formula: GateFormula,
    h_RM: Tensor,
    weights_R: Tensor | None,
    ends_e: Tensor,
    grad_RI: Tensor,
    *,
    bias_eM: Tensor | None = None,
    product: Product | None = None,
    grad_product: Product | None = None,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """The gradients of `activate`, and its result once more.

    Args:
        formula: as in `activate`.
        h_RM: as in `activate`.
        weights_R: as in `activate`.
        ends_e: as in `activate`.
        grad_RI: [R, I] contiguous gradient of the result, without `grad_product`.
        bias_eM: as in `activate`.
        product: as in `activate`.
        grad_product: ([R, r], [e, r, I]) of which each row's product is added to its gradient, or None.

    Returns:
        (gradient of `h_RM`; [R] fp32 gradient of `weights_R`, None without weights; [R, I] the result).
    """
    num_rows, width = h_RM.shape
    grad_h_RM, out_RI = torch.empty_like(h_RM), torch.empty_like(grad_RI)
    grad_weights_R = None if weights_R is None else torch.empty_like(weights_R)
    if num_rows:
        any_product = product is not None or grad_product is not None
        tiles, ends, blocks = _tiles(num_rows, ends_e, bias_eM is not None, any_product)
        steps, ranks = _sizes_of(product)
        grad_steps, grad_ranks = _sizes_of(grad_product)
        _backward_kernel[(tiles,)](
            h_RM,
            bias_eM,
            *_pair(product),
            ends,
            weights_R,
            grad_RI,
            *_pair(grad_product),
            grad_h_RM,
            grad_weights_R,
            out_RI,
            num_rows,
            ends_e.numel(),
            *_widths(formula, width),
            *steps,
            *grad_steps,
            *_constants(formula),
            *ranks,
            *grad_ranks,
            _in_fp32(h_RM),
            *blocks,
        )
    return grad_h_RM, grad_weights_R, out_RI


def takes(product: Product) -> bool:
    """Whether the rank of a product is low enough to be computed in these kernels."""
    thin_Rr = product[0]
    return thin_Rr.size(1) * thin_Rr.element_size() <= _MOST_BYTES


def _tiles(
    num_rows: int, ends_e: Tensor, bias: bool, product: bool
) -> tuple[int, Tensor | None, tuple[int, int, int]]:
    """How many tiles of rows there are, the ends of experts where they cut them, and the sizes of blocks."""
    block_r, block_i = (_TALL_R, _TALL_I) if product else (_BLOCK_R, _BLOCK_I)
    if not (bias or product):
        return triton.cdiv(num_rows, block_r), None, (block_r, block_i, 1)
    num_experts = ends_e.numel()
    return num_rows // block_r + num_experts, ends_e, (block_r, block_i, triton.next_power_of_2(num_experts))


def _pair(product: Product | None) -> tuple[Tensor | None, Tensor | None]:
    return (None, None) if product is None else product


def _sizes_of(product: Product | None) -> tuple[tuple[int, int], tuple[int, int]]:
    """The factors' strides of rank and column; the rank, and how much of it a step takes."""
    if product is None:
        return (0, 0), (0, _LEAST_RANK)
    factor_erM = product[1]
    rank = factor_erM.size(1)
    return (factor_erM.stride(1), factor_erM.stride(2)), (rank, max(triton.next_power_of_2(rank), _LEAST_RANK))


def _in_fp32(h_RM: Tensor) -> bool:
    """How products are taken: in bf16, `tl.dot` is silently wrong in Triton's interpreter."""
    return h_RM.dtype == torch.float32 or os.environ.get("TRITON_INTERPRET") == "1"


def _widths(formula: GateFormula, width: int) -> tuple[int, int, int]:
    """Columns of the result and of the pre-activation, and from those of g to those of u."""
    size = width // 2 if formula.gated else width
    return size, width, 1 if formula.interleaved else size


def _constants(formula: GateFormula) -> tuple[Any, ...]:
    """What kernels are compiled for of the gate."""
    clamped = not math.isinf(formula.limit)
    return (
        formula.act,
        formula.gated,
        2 if formula.interleaved else 1,
        clamped,
        formula.alpha,
        formula.limit if clamped else 0.0,
        formula.shift,
    )
