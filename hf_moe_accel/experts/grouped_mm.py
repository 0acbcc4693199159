"""torch's grouped matrix product, with the passes around it kept few.

Kept for backward: the received rows and the pre-activation; the activation is computed again. The routing weight goes
onto the activation, in fp32 before the cast, where that is the same function, so no [R, D] output is kept either
(the form of Megatron-Core and NeMo AutoModel).
"""

from __future__ import annotations

import torch
from torch import Tensor

from hf_moe_accel.experts.base import ExpertBackend, ExpertsSpec, ExpertWeights, NeededGrads, RowGrads, WeightGrads
from hf_moe_accel.ops import grouped_mm
from hf_moe_accel.ops.grouped_mm import grouped_linear, grouped_outer
from hf_moe_accel.ops.permutation import Dispatched, sum_segments


class GroupedMMBackend(ExpertBackend):
    """Needs no vendor beside torch; CPU and CUDA."""

    @staticmethod
    def why_not(spec: ExpertsSpec, dtype: torch.dtype, device: torch.device) -> str | None:
        """Alignment, dtype, device."""
        return grouped_mm.why_not(spec.hidden_size, spec.intermediate_size, dtype, device)

    def forward(
        self, spec: ExpertsSpec, weights: ExpertWeights, rows: Dispatched
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Gather, up, gate and weight, down, sum. Keeps the pre-activation, and the output where it is weighted."""
        ends_e = _ends(rows)
        up_eDM, down_eID = _as_in_out(spec, weights)
        h_RM = grouped_linear(rows.x_ND.index_select(0, rows.row_of_R), up_eDM, ends_e)
        if weights.up_bias is not None:
            h_RM += _by_row(weights.up_bias, rows)
        a_RI = spec.gate(h_RM)
        if spec.weights_before_down:
            y_RD = grouped_linear(_weighted(a_RI, rows.weights_R), down_eID, ends_e)
            return sum_segments(y_RD, rows.r_of_P, rows.start_of_N), (h_RM,)
        y_RD = grouped_linear(a_RI, down_eID, ends_e)
        if weights.down_bias is not None:
            y_RD += _by_row(weights.down_bias, rows)
        normed_RD = _post_norm(spec, weights, y_RD)
        out_ND = sum_segments(_weighted(normed_RD, rows.weights_R), rows.r_of_P, rows.start_of_N)
        return out_ND, (h_RM, y_RD)

    def backward_rows(
        self,
        spec: ExpertsSpec,
        weights: ExpertWeights,
        rows: Dispatched,
        saved: tuple[Tensor, ...],
        grad_ND: Tensor,
        *,
        need_x: bool,
        need_routing: bool,
    ) -> RowGrads:
        """Down, gate (through autograd, on the recomputed activation), up, sum."""
        ends_e = _ends(rows)
        up_eDM, down_eID = _as_in_out(spec, weights)
        h_RM = saved[0]
        grad_RD = grad_ND.index_select(0, rows.row_of_R)
        grad_routing: Tensor | None = None
        grad_norm: tuple[Tensor, ...] = ()
        if not spec.weights_before_down:
            y_RD = saved[1]
            if spec.post_norm is None:
                grad_routing = _dot(grad_RD, y_RD)
                grad_RD = _weighted(grad_RD, rows.weights_R)
            else:
                leaf, norm_leaf = y_RD.detach().requires_grad_(), _detached(weights.post_norm).requires_grad_()
                with torch.enable_grad():
                    normed_RD = spec.post_norm(leaf, norm_leaf)
                grad_routing = _dot(grad_RD, normed_RD.detach())
                grad_RD, of_norm = torch.autograd.grad(
                    normed_RD, (leaf, norm_leaf), _weighted(grad_RD, rows.weights_R)
                )
                grad_norm = (of_norm,)
        h_leaf = h_RM.detach().requires_grad_()
        with torch.enable_grad():
            a_RI = spec.gate(h_leaf)
        grad_a_RI = grouped_linear(grad_RD, down_eID.transpose(1, 2), ends_e)
        into_down_RI = a_RI.detach()
        if spec.weights_before_down:
            grad_routing = _dot(grad_a_RI, into_down_RI) if need_routing else None
            into_down_RI = _weighted(into_down_RI, rows.weights_R)
            grad_a_RI = _weighted(grad_a_RI, rows.weights_R)
        (grad_h_RM,) = torch.autograd.grad(a_RI, h_leaf, grad_a_RI)
        grad_x: Tensor | None = None
        if need_x:
            grad_x = sum_segments(
                grouped_linear(grad_h_RM, up_eDM.transpose(1, 2), ends_e), rows.r_of_P, rows.start_of_N
            )
        return RowGrads(grad_x, grad_routing if need_routing else None, (grad_RD, into_down_RI, grad_h_RM, *grad_norm))

    def backward_weights(
        self, spec: ExpertsSpec, weights: ExpertWeights, rows: Dispatched, grads: RowGrads, needs: NeededGrads
    ) -> WeightGrads:
        """Outer products by expert; nothing at all for frozen weights."""
        ends_e = _ends(rows)
        grad_RD, into_down_RI, grad_h_RM, *grad_norm = grads.for_weights

        def outer(into_RK: Tensor, grad_RM: Tensor) -> Tensor:
            if spec.is_transposed:
                return grouped_outer(into_RK, grad_RM, ends_e)
            return grouped_outer(grad_RM, into_RK, ends_e)

        return WeightGrads(
            up=outer(rows.x_ND.index_select(0, rows.row_of_R), grad_h_RM) if needs.up else None,
            down=outer(into_down_RI, grad_RD) if needs.down else None,
            up_bias=_sum_by_expert(grad_h_RM, ends_e) if needs.up_bias else None,
            down_bias=_sum_by_expert(grad_RD, ends_e) if needs.down_bias else None,
            post_norm=grad_norm[0] if needs.post_norm else None,
        )


def _ends(rows: Dispatched) -> Tensor:
    return torch.cumsum(rows.counts_e, 0, dtype=torch.int32)


def _as_in_out(spec: ExpertsSpec, weights: ExpertWeights) -> tuple[Tensor, Tensor]:
    """Both projections as [e, in, out], by a view."""
    if spec.is_transposed:
        return weights.up, weights.down
    return weights.up.transpose(1, 2), weights.down.transpose(1, 2)


def _weighted(rows_R: Tensor, weights_R: Tensor) -> Tensor:
    """Rows times their fp32 routing weight, in fp32 and rounded once, in one pass over memory."""
    return torch.mul(rows_R, weights_R[:, None], out=torch.empty_like(rows_R))


def _dot(a_R: Tensor, b_R: Tensor) -> Tensor:
    """[R] inner products by row, in fp32."""
    return torch.mul(a_R.float(), b_R).sum(1)


def _by_row(bias_e: Tensor, rows: Dispatched) -> Tensor:
    return bias_e.repeat_interleave(rows.counts_e, dim=0, output_size=rows.row_of_R.numel())


def _sum_by_expert(grad_R: Tensor, ends_e: Tensor) -> Tensor:
    starts_e = torch.cat([ends_e.new_zeros(1), ends_e[:-1]]).long()
    return sum_segments(grad_R, torch.arange(grad_R.size(0), device=grad_R.device), starts_e)


def _post_norm(spec: ExpertsSpec, weights: ExpertWeights, y_RD: Tensor) -> Tensor:
    if spec.post_norm is None:
        return y_RD
    return spec.post_norm(y_RD, _detached(weights.post_norm))


def _detached(weight: Tensor | None) -> Tensor:
    assert weight is not None
    return weight.detach()
