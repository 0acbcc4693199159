"""Small steps that several backends share."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_moe_accel.experts.base import ExpertsSpec, ExpertWeights
from hf_moe_accel.ops.gates import GateFormula, find_formula


def as_in_out(spec: ExpertsSpec, weights: ExpertWeights) -> tuple[Tensor, Tensor]:
    """Both projections as [e, in, out], by a view."""
    if spec.is_transposed:
        return weights.up, weights.down
    return weights.up.transpose(1, 2), weights.down.transpose(1, 2)


def weighted(rows_R: Tensor, weights_R: Tensor, out: Tensor | None = None) -> Tensor:
    """Rows times their fp32 routing weight, in fp32 and rounded once, in one pass over memory."""
    return torch.mul(rows_R, weights_R[:, None], out=torch.empty_like(rows_R) if out is None else out)


def dot(a_R: Tensor, b_R: Tensor) -> Tensor:
    """[R] inner products by row, in fp32."""
    return torch.mul(a_R.float(), b_R).sum(1)


class Formulas(dict[ExpertsSpec, GateFormula | None]):
    """What the gates of experts compute, found once each."""

    def __missing__(self, spec: ExpertsSpec) -> GateFormula | None:
        found = self[spec] = find_formula(spec.gate, spec.pre_activation_size, spec.intermediate_size)
        return found


def detached(weight: Tensor | None) -> Tensor:
    """A parameter that is known to be there, without autograd."""
    assert weight is not None
    return weight.detach()
