"""Norms by the root mean square (https://arxiv.org/abs/1910.07467), in one kernel each way.

As models write them, such a norm is seven kernels forward and more backward, and keeps the rows in fp32. Here the rows
are kept as they are. The formula of a norm is found by what it returns, since a module cannot be read.

Shape letters: N rows, D their size.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class NormFormula(NamedTuple):
    """`(weight + offset) * x / sqrt(mean(x^2) + eps)`, of which all but the last product is in fp32.

    Attributes:
        eps: as above.
        offset: 1 where a weight of zero leaves a row its size (Gemma, Qwen3-Next), else 0.
        rounds: whether a row is rounded to its dtype before the weight, with which it then takes the wider of both
            dtypes (Llama and most others). Otherwise the product is in fp32 and rounded to the row's dtype (GPT-OSS).
    """

    eps: float
    offset: float = 0.0
    rounds: bool = True

    def __call__(self, x: Tensor, weight: Tensor) -> Tensor:
        """[.., D] what the formula makes of rows, operation by operation."""
        row = x.float()
        row = row * torch.rsqrt(row.pow(2).mean(-1, keepdim=True) + self.eps)
        return weight * row.to(x.dtype) if self.rounds else ((weight.float() + self.offset) * row).to(x.dtype)

    def out_dtype(self, x: Tensor, weight: Tensor) -> torch.dtype:
        """Of the result."""
        return torch.promote_types(x.dtype, weight.dtype) if self.rounds else x.dtype


def find_formula(norm: nn.Module) -> NormFormula | None:
    """The formula that agrees with a module on random rows, to the bit; None if none of ours does.

    Runs on the CPU, with a weight of its own: the module may be anywhere, and whole or not.

    Args:
        norm: with one parameter, `weight`, [D].
    """
    eps = getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
    own = norm._parameters.get("weight")
    if not isinstance(eps, float) or len(norm._parameters) != 1 or own is None or own.dim() != 1:
        return None
    drawn = torch.randn(25, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float32, device="cpu")
    rows, weight = torch.cat([scale * drawn[:24] for scale in (1e-3, 1.0, 30.0)]), drawn[24]
    # Not a copy, which FSDP2 forbids; its hooks are not called.
    bare: Any = object.__new__(type(norm))
    bare.__dict__.update(norm.__dict__)
    for formula in (NormFormula(eps), NormFormula(eps, rounds=False), NormFormula(eps, 1.0, rounds=False)):
        try:
            if all(_agrees(bare, formula, rows.to(of_rows), weight.to(of_weight)) for of_rows, of_weight in _DTYPES):
                return formula
        except Exception:  # it needs a GPU, or more than rows, or anything else that ours does not
            return None
    return None


_DTYPES = ((torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float32), (torch.float32, torch.float32))


@torch.no_grad()
def _agrees(bare: Any, formula: NormFormula, rows: Tensor, weight: Tensor) -> bool:
    bare._parameters = {"weight": nn.Parameter(weight)}
    theirs, ours = type(bare).forward(bare, rows), formula(rows, weight)
    return isinstance(theirs, Tensor) and theirs.dtype == ours.dtype and torch.equal(theirs, ours)


def takes(x: Any, weight: Any) -> bool:
    """Whether the kernels can serve rows and a weight, if they run where those are."""
    from hf_moe_accel.ops.triton.norm import LONGEST

    return (
        type(x) is Tensor
        and type(weight) in (Tensor, nn.Parameter)
        and x.numel() > 0
        and x.shape[-1:] == weight.shape
        and weight.is_contiguous()
        and x.size(-1) <= LONGEST
        and x.dtype in _FLOATS
        and weight.dtype in _FLOATS
    )


_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def rms_norm(x: Tensor, weight_D: Tensor, formula: NormFormula) -> Tensor:
    """[.., D] the formula, in one kernel; its gradients are reproducible.

    Args:
        x: [.., D] floating point, on a device with Triton.
        weight_D: [D].
        formula: of the norm.
    """
    out: Tensor = _RMSNorm.apply(x, weight_D, formula)  # type: ignore[no-untyped-call]
    return out


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_D: Tensor, formula: NormFormula) -> Tensor:
        from hf_moe_accel.ops.triton.norm import forward

        x_ND = x.reshape(-1, x.size(-1)).contiguous()
        out = x.new_empty(x.shape, dtype=formula.out_dtype(x, weight_D))
        inverse_N = forward(x_ND, weight_D, formula.eps, formula.offset, formula.rounds, out)
        ctx.save_for_backward(x, weight_D, inverse_N)
        ctx.formula = formula
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None]:
        from hf_moe_accel.ops.triton.norm import backward

        x, weight_D, inverse_N = ctx.saved_tensors
        x_ND = x.reshape(-1, x.size(-1)).contiguous()
        grad_x, grad_weight = backward(
            grad.contiguous(),
            x_ND,
            weight_D,
            inverse_N,
            ctx.formula.offset,
            ctx.formula.rounds,
            wants_weight=ctx.needs_input_grad[1],
        )
        return grad_x.view(x.shape), None if grad_weight is None else grad_weight.to(weight_D.dtype), None
