"""The gate and the routing weight, forward and backward, each one pass over memory."""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from hf_moe_accel.ops.gates import GateFormula

# A tile: enough values for each thread of four warps to load 16 bytes of a bf16 row at a time.
_BLOCK_R, _BLOCK_I = 8, 256


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
def _load_h(h_ptr, bias_ptr, expert, row, col, mask, width):
    """Values of the pre-activation in fp32, rounded to its dtype after the bias, as torch would add it."""
    h = tl.load(h_ptr + row[:, None] * width + col[None, :], mask=mask, other=0.0)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + expert[:, None] * width + col[None, :], mask=mask, other=0.0)
        h = (h.to(tl.float32) + bias.to(tl.float32)).to(h.dtype)
    return h.to(tl.float32)


@triton.jit
def _forward_kernel(
    h_ptr,
    bias_ptr,
    expert_ptr,
    weight_ptr,
    out_ptr,
    num_rows,
    size,
    width,
    to_up,
    ACT: tl.constexpr,
    GATED: tl.constexpr,
    STEP: tl.constexpr,
    CLAMPED: tl.constexpr,
    ALPHA: tl.constexpr,
    LIMIT: tl.constexpr,
    SHIFT: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    col = tl.program_id(1) * BLOCK_I + tl.arange(0, BLOCK_I)
    mask = (row < num_rows)[:, None] & (col < size)[None, :]
    expert = row
    if bias_ptr is not None:
        expert = tl.load(expert_ptr + row, mask=row < num_rows, other=0)
    g = _load_h(h_ptr, bias_ptr, expert, row, col * STEP, mask, width)
    if CLAMPED:
        g = tl.minimum(g, LIMIT)
    value, _ = _act(g, ALPHA, ACT)
    if GATED:
        u = _load_h(h_ptr, bias_ptr, expert, row, col * STEP + to_up, mask, width)
        if CLAMPED:
            u = tl.minimum(tl.maximum(u, -LIMIT), LIMIT)
        value *= u + SHIFT
    if weight_ptr is not None:
        value *= tl.load(weight_ptr + row, mask=row < num_rows, other=0.0)[:, None]
    tl.store(out_ptr + row[:, None] * size + col[None, :], value.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _backward_kernel(
    h_ptr,
    bias_ptr,
    expert_ptr,
    weight_ptr,
    grad_ptr,
    grad_h_ptr,
    grad_weight_ptr,
    out_ptr,
    num_rows,
    size,
    width,
    to_up,
    ACT: tl.constexpr,
    GATED: tl.constexpr,
    STEP: tl.constexpr,
    CLAMPED: tl.constexpr,
    ALPHA: tl.constexpr,
    LIMIT: tl.constexpr,
    SHIFT: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    expert = row
    if bias_ptr is not None:
        expert = tl.load(expert_ptr + row, mask=row < num_rows, other=0)
    if weight_ptr is not None:
        weight = tl.load(weight_ptr + row, mask=row < num_rows, other=0.0)[:, None]
    of_weight = tl.zeros([BLOCK_R], tl.float32)
    for first in range(0, size, BLOCK_I):
        col = first + tl.arange(0, BLOCK_I)
        mask = (row < num_rows)[:, None] & (col < size)[None, :]
        g = _load_h(h_ptr, bias_ptr, expert, row, col * STEP, mask, width)
        value, slope = _act(tl.minimum(g, LIMIT) if CLAMPED else g, ALPHA, ACT)
        if CLAMPED:
            slope = tl.where(g <= LIMIT, slope, 0.0)
        grad = tl.load(grad_ptr + row[:, None] * size + col[None, :], mask=mask, other=0.0).to(tl.float32)
        out = value
        of_g = grad * slope
        if GATED:
            u = _load_h(h_ptr, bias_ptr, expert, row, col * STEP + to_up, mask, width)
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
        place = row[:, None] * width + (col * STEP)[None, :]
        tl.store(grad_h_ptr + place, of_g.to(grad_h_ptr.dtype.element_ty), mask=mask)
        if GATED:
            tl.store(grad_h_ptr + place + to_up, of_u.to(grad_h_ptr.dtype.element_ty), mask=mask)
        tl.store(out_ptr + row[:, None] * size + col[None, :], out.to(out_ptr.dtype.element_ty), mask=mask)
    if weight_ptr is not None:
        tl.store(grad_weight_ptr + row, of_weight, mask=row < num_rows)


def activate(
    formula: GateFormula,
    h_RM: Tensor,
    weights_R: Tensor | None,
    bias: tuple[Tensor, Tensor] | None,
) -> Tensor:
    """[R, I] `weight * gate(h + bias)`, in fp32 and rounded once.

    Args:
        formula: the gate.
        h_RM: [R, 2I or I] contiguous.
        weights_R: [R] fp32, or None for the gate alone.
        bias: ([e, 2I or I], [R] int64 which of them a row has), or None.
    """
    num_rows, width = h_RM.shape
    size = width // 2 if formula.gated else width
    out_RI = h_RM.new_empty(num_rows, size)
    if num_rows:
        grid = (triton.cdiv(num_rows, _BLOCK_R), triton.cdiv(size, _BLOCK_I))
        _forward_kernel[grid](h_RM, *_pair(bias), weights_R, out_RI, num_rows, *_shape_of(formula, width))
    return out_RI


def activate_backward(
    formula: GateFormula,
    h_RM: Tensor,
    weights_R: Tensor | None,
    bias: tuple[Tensor, Tensor] | None,
    grad_RI: Tensor,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """The gradients of `activate`, and its result once more.

    Args:
        formula: as in `activate`.
        h_RM: as in `activate`.
        weights_R: as in `activate`.
        bias: as in `activate`.
        grad_RI: [R, I] contiguous gradient of the result.

    Returns:
        (gradient of `h_RM`; [R] fp32 gradient of `weights_R`, None without weights; [R, I] the result).
    """
    num_rows, width = h_RM.shape
    grad_h_RM, out_RI = torch.empty_like(h_RM), torch.empty_like(grad_RI)
    grad_weights_R = None if weights_R is None else torch.empty_like(weights_R)
    if num_rows:
        _backward_kernel[(triton.cdiv(num_rows, _BLOCK_R),)](
            h_RM,
            *_pair(bias),
            weights_R,
            grad_RI,
            grad_h_RM,
            grad_weights_R,
            out_RI,
            num_rows,
            *_shape_of(formula, width),
        )
    return grad_h_RM, grad_weights_R, out_RI


def _pair(bias: tuple[Tensor, Tensor] | None) -> tuple[Tensor | None, Tensor | None]:
    return (None, None) if bias is None else bias


def _shape_of(formula: GateFormula, width: int) -> tuple[Any, ...]:
    """What both kernels are told of the gate."""
    size = width // 2 if formula.gated else width
    clamped = not math.isinf(formula.limit)
    return (
        size,
        width,
        1 if formula.interleaved else size,
        formula.act,
        formula.gated,
        2 if formula.interleaved else 1,
        clamped,
        formula.alpha,
        formula.limit if clamped else 0.0,
        formula.shift,
        _BLOCK_R,
        _BLOCK_I,
    )
