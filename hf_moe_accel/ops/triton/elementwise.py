"""What a step does to large parameters and gradients, each one pass over memory."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 2048
_WARPS = 8
_BLOCKS_A_PROGRAM = 8


@triton.jit(do_not_specialize=["which"])
def _adamw_kernel(
    param_ptr,
    grad_ptr,
    mean_ptr,
    square_ptr,
    corrections_ptr,
    factor_ptr,
    which,
    size,
    lr,
    decay,
    beta1,
    rest1,
    beta2,
    rest2,
    eps,
    BLOCK: tl.constexpr,
    CLIPS: tl.constexpr,
):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < size
    param = tl.load(param_ptr + i, mask=inside).to(tl.float32)
    grad = tl.load(grad_ptr + i, mask=inside).to(tl.float32)
    mean = tl.load(mean_ptr + i, mask=inside).to(tl.float32)
    square = tl.load(square_ptr + i, mask=inside).to(tl.float32)
    of_mean = tl.load(corrections_ptr + 2 * which)
    of_root = tl.load(corrections_ptr + 2 * which + 1)
    if CLIPS:
        factor = tl.load(factor_ptr)
        grad *= tl.where(factor >= 1.0, 1.0, factor)
    mean = beta1 * mean + rest1 * grad
    square = beta2 * square + rest2 * grad * grad
    param -= decay * param
    param -= (lr / of_mean) * mean / (tl.sqrt(square) / of_root + eps)
    tl.store(param_ptr + i, param.to(param_ptr.dtype.element_ty), mask=inside)
    tl.store(mean_ptr + i, mean.to(mean_ptr.dtype.element_ty), mask=inside)
    tl.store(square_ptr + i, square.to(square_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _shrink_kernel(x_ptr, factor_ptr, size, BLOCK: tl.constexpr, BLOCKS: tl.constexpr):
    factor = tl.load(factor_ptr)
    # Written so that NaN goes on to all that it stands for.
    if (factor >= 1.0) == 0:
        first = tl.program_id(0).to(tl.int64) * BLOCK * BLOCKS
        for block in range(BLOCKS):
            i = first + block * BLOCK + tl.arange(0, BLOCK)
            x = tl.load(x_ptr + i, mask=i < size).to(tl.float32) * factor
            tl.store(x_ptr + i, x.to(x_ptr.dtype.element_ty), mask=i < size)


def adamw_(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    *,
    corrections_P2: Tensor,
    which: int,
    factor: Tensor | None,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> None:
    """A step of AdamW (Loshchilov and Hutter, arXiv 1711.05101) in place, computed in fp32, each tensor rounded once.

    Args:
        param: floating point, contiguous, as are `grad`, `exp_avg` and `exp_avg_sq`, of the same number of elements.
        corrections_P2: [P, 2] fp32, of each parameter `1 - beta1**step` and `sqrt(1 - beta2**step)`.
        which: of its rows.
        factor: scalar, fp32; what the gradient is multiplied by where it is below 1 or NaN. None: 1.
    """
    (beta1, beta2), size = betas, param.numel()
    _adamw_kernel[(triton.cdiv(size, _BLOCK),)](
        param,
        grad,
        exp_avg,
        exp_avg_sq,
        corrections_P2,
        corrections_P2 if factor is None else factor,
        which,
        size,
        lr,
        lr * weight_decay,
        # In fp32 1 - 0.999 would be off by 5e-5 of itself.
        beta1,
        1 - beta1,
        beta2,
        1 - beta2,
        eps,
        _BLOCK,
        factor is not None,
        num_warps=_WARPS,
    )


def shrink_(x: Tensor, factor: Tensor) -> None:
    """`x *= factor` where the factor is below 1 or NaN, else nothing at all, without a look at it from the host.

    Args:
        x: floating point, contiguous.
        factor: scalar, fp32.
    """
    size = x.numel()
    grid = (triton.cdiv(size, _BLOCK * _BLOCKS_A_PROGRAM),)
    _shrink_kernel[grid](x, factor, size, _BLOCK, _BLOCKS_A_PROGRAM, num_warps=_WARPS)
