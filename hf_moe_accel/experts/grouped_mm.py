"""torch's grouped matrix product, with the passes around it kept few.

Kept for backward: the received rows and the pre-activation; the activation is computed again. The routing weight goes
onto the activation, in fp32 before the cast, where that is the same function, so no [R, D] output is kept either
(the form of Megatron-Core and NeMo AutoModel). LoRA keeps `scaling * x @ a.T` [R, r] as well: so narrow a tensor is
the cheap place for the scaling, and no other pass over wide ones is needed than to add its products.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from hf_moe_accel.experts.base import (
    ExpertBackend,
    ExpertsSpec,
    ExpertWeights,
    Factors,
    LoraPair,
    NeededGrads,
    RowGrads,
    WeightGrads,
)
from hf_moe_accel.experts.common import as_in_out, detached, dot, weighted
from hf_moe_accel.ops import grouped_mm
from hf_moe_accel.ops.grouped_mm import grouped_linear, grouped_outer
from hf_moe_accel.ops.permutation import Dispatched, sum_segments


class GroupedMMBackend(ExpertBackend):
    """Needs no vendor beside torch; CPU and CUDA."""

    reads_counts = False

    @staticmethod
    def why_not(spec: ExpertsSpec, dtype: torch.dtype, device: torch.device) -> str | None:
        """Alignment, dtype, device."""
        return grouped_mm.why_not(spec.hidden_size, spec.intermediate_size, dtype, device)

    def forward(
        self, spec: ExpertsSpec, weights: ExpertWeights, rows: Dispatched
    ) -> tuple[Callable[[], Tensor], tuple[Tensor, ...]]:
        """Gather, up, gate and weight, down, sum. Keeps the pre-activation, and the output where it is weighted."""
        ends_e = _ends(rows)
        _, down_eID = as_in_out(spec, weights)
        h_RM, up_thin = self._up(spec, weights, rows, ends_e)
        if spec.weights_before_down:

            @cache
            def activated_RI() -> Tensor:
                return weighted(spec.gate(h_RM), rows.weights_R)

            down_thin = _thin(activated_RI(), weights.down_lora, ends_e) if weights.down_lora else ()

            def sum_ND() -> Tensor:
                products = [(activated_RI(), down_eID), *_from_thin(down_thin, weights.down_lora)]
                return _sum_products(products, rows, ends_e)

            return sum_ND, (*up_thin, *down_thin, h_RM)
        a_RI = spec.gate(h_RM)
        y_RD, down_thin = _linear(a_RI, down_eID, weights.down_lora, ends_e)
        if weights.down_bias is not None:
            y_RD += _by_row(weights.down_bias, rows)

        def weighted_sum_ND() -> Tensor:
            normed_RD = _post_norm(spec, weights, y_RD)
            return sum_segments(weighted(normed_RD, rows.weights_R), rows.r_of_P, rows.start_of_N)

        return weighted_sum_ND, (*up_thin, *down_thin, h_RM, y_RD)

    def backward_rows(
        self,
        spec: ExpertsSpec,
        weights: ExpertWeights,
        rows: Dispatched,
        saved: tuple[Tensor, ...],
        grad_ND: Tensor,
        needs: NeededGrads,
        *,
        need_x: bool,
        need_routing: bool,
    ) -> RowGrads:
        """Down, gate (through autograd, on the recomputed activation), up, sum."""
        ends_e = _ends(rows)
        up_eDM, down_eID = as_in_out(spec, weights)
        num_thin = _num_thin(weights)
        thin, (h_RM, *outputs) = saved[:num_thin], saved[num_thin:]
        grad_RD = grad_ND.index_select(0, rows.row_of_R)
        grad_routing: Tensor | None = None
        grad_norm: tuple[Tensor, ...] = ()
        if not spec.weights_before_down:
            (y_RD,) = outputs
            if spec.post_norm is None:
                grad_routing = dot(grad_RD, y_RD)
                grad_RD = weighted(grad_RD, rows.weights_R)
            else:
                leaf, norm_leaf = y_RD.detach().requires_grad_(), detached(weights.post_norm).requires_grad_()
                with torch.enable_grad():
                    normed_RD = spec.post_norm(leaf, norm_leaf)
                grad_routing = dot(grad_RD, normed_RD.detach())
                grad_RD, of_norm = torch.autograd.grad(normed_RD, (leaf, norm_leaf), weighted(grad_RD, rows.weights_R))
                grad_norm = (of_norm,)
        h_leaf = h_RM.detach().requires_grad_()
        with torch.enable_grad():
            a_RI = spec.gate(h_leaf)
        grad_down_thin = _grad_thin(grad_RD, weights.down_lora, ends_e)
        grad_a_RI = grouped_linear(grad_RD, down_eID.transpose(1, 2), ends_e)
        for grad_thin, a_erI in _grad_from_thin(grad_down_thin, weights.down_lora):
            grad_a_RI += grouped_linear(grad_thin, a_erI, ends_e)
        into_down_RI = a_RI.detach()
        if spec.weights_before_down:
            grad_routing = dot(grad_a_RI, into_down_RI) if need_routing else None
            into_down_RI = weighted(into_down_RI, rows.weights_R)
            grad_a_RI = weighted(grad_a_RI, rows.weights_R)
        (grad_h_RM,) = torch.autograd.grad(a_RI, h_leaf, grad_a_RI)
        grad_up_thin = _grad_thin(grad_h_RM, weights.up_lora, ends_e)
        grad_x: Tensor | None = None
        if need_x:
            products = [(grad_h_RM, up_eDM.transpose(1, 2)), *_grad_from_thin(grad_up_thin, weights.up_lora)]
            grad_x = _sum_products(products, rows, ends_e)
        for_weights = (grad_RD, into_down_RI, grad_h_RM, *thin, *grad_up_thin, *grad_down_thin, *grad_norm)
        return RowGrads(grad_x, grad_routing if need_routing else None, for_weights)

    def backward_weights(
        self, spec: ExpertsSpec, weights: ExpertWeights, rows: Dispatched, grads: RowGrads, needs: NeededGrads
    ) -> WeightGrads:
        """Outer products by expert; nothing at all for frozen weights."""
        ends_e = _ends(rows)
        grad_RD, into_down_RI, grad_h_RM, *others = grads.for_weights
        num_thin = _num_thin(weights)
        thin, grad_thin, grad_norm = others[:num_thin], others[num_thin : 2 * num_thin], others[2 * num_thin :]

        @cache
        def into_up_RD() -> Tensor:
            return rows.x_ND.index_select(0, rows.row_of_R)

        def outer(into_RK: Tensor, grad_RM: Tensor) -> Tensor:
            if spec.is_transposed:
                return grouped_outer(into_RK, grad_RM, ends_e)
            return grouped_outer(grad_RM, into_RK, ends_e)

        return WeightGrads(
            up=outer(into_up_RD(), grad_h_RM) if needs.up else None,
            down=outer(into_down_RI, grad_RD) if needs.down else None,
            up_bias=_sum_by_expert(grad_h_RM, ends_e) if needs.up_bias else None,
            down_bias=_sum_by_expert(grad_RD, ends_e) if needs.down_bias else None,
            post_norm=grad_norm[0] if needs.post_norm else None,
            up_lora=_grads_of_factors(
                weights.up_lora, needs.up_lora, into_up_RD, grad_h_RM, thin[:1], grad_thin[:1], ends_e
            ),
            down_lora=_grads_of_factors(
                weights.down_lora, needs.down_lora, lambda: into_down_RI, grad_RD, thin[-1:], grad_thin[-1:], ends_e
            ),
        )

    @staticmethod
    def _up(
        spec: ExpertsSpec, weights: ExpertWeights, rows: Dispatched, ends_e: Tensor
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The pre-activation, and LoRA's thin product."""
        up_eDM, _ = as_in_out(spec, weights)
        h_RM, up_thin = _linear(rows.x_ND.index_select(0, rows.row_of_R), up_eDM, weights.up_lora, ends_e)
        if weights.up_bias is not None:
            h_RM += _by_row(weights.up_bias, rows)
        return h_RM, up_thin


def _ends(rows: Dispatched) -> Tensor:
    return torch.cumsum(rows.counts_e, 0, dtype=torch.int32)


def _num_thin(weights: ExpertWeights) -> int:
    """How many projections have LoRA pairs: as many thin tensors there are, that of `up` first."""
    return bool(weights.up_lora) + bool(weights.down_lora)


def _linear(
    x_RK: Tensor, weight_eKM: Tensor, lora: tuple[LoraPair, ...], ends_e: Tensor
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """A projection without its bias, and what `_thin` makes of its input."""
    y_RM = grouped_linear(x_RK, weight_eKM, ends_e)
    thin = _thin(x_RK, lora, ends_e)
    for thin_Rr, b_erM in _from_thin(thin, lora):
        y_RM += grouped_linear(thin_Rr, b_erM, ends_e)
    return y_RM, thin


def _sum_products(products: list[tuple[Tensor, Tensor]], rows: Dispatched, ends_e: Tensor) -> Tensor:
    """[N, D] products by expert, summed by row. Each apart: adding them up first is a pass over [R, D] more."""
    first, *others = (
        sum_segments(grouped_linear(x_RK, weight_eKD, ends_e), rows.r_of_P, rows.start_of_N)
        for x_RK, weight_eKD in products
    )
    for other in others:
        first += other
    return first


def _thin(x_RK: Tensor, lora: tuple[LoraPair, ...], ends_e: Tensor) -> tuple[Tensor, ...]:
    """`scaling * x @ a.T` [R, r], if there are LoRA pairs."""
    if not lora:
        return ()
    a_erK, _ = _joined(lora)
    return (_scale(grouped_linear(x_RK, a_erK.transpose(1, 2), ends_e), lora),)


def _from_thin(thin: tuple[Tensor, ...], lora: tuple[LoraPair, ...]) -> list[tuple[Tensor, Tensor]]:
    """The product that adapters add to a projection's: ([R, r], [e, r, out])."""
    return [(thin_Rr, _joined(lora)[1].transpose(1, 2)) for thin_Rr in thin]


def _grad_thin(grad_RM: Tensor, lora: tuple[LoraPair, ...], ends_e: Tensor) -> tuple[Tensor, ...]:
    """The gradient of `x @ a.T` [R, r], if there are LoRA pairs."""
    if not lora:
        return ()
    _, b_eMr = _joined(lora)
    return (_scale(grouped_linear(grad_RM, b_eMr, ends_e), lora),)


def _grad_from_thin(grad_thin: tuple[Tensor, ...], lora: tuple[LoraPair, ...]) -> list[tuple[Tensor, Tensor]]:
    """The product that adapters add to the gradient of a projection's input: ([R, r], [e, r, in])."""
    return [(grad_Rr, _joined(lora)[0]) for grad_Rr in grad_thin]


def _grads_of_factors(
    lora: tuple[LoraPair, ...],
    needs: tuple[Factors[bool], ...],
    input_RK: Callable[[], Tensor],
    grad_RM: Tensor,
    thin: list[Tensor],
    grad_thin: list[Tensor],
    ends_e: Tensor,
) -> tuple[Factors[Tensor | None], ...]:
    """Outer products by expert, for the factors that train."""
    found: list[Factors[Tensor | None]] = []
    for pair, need, columns in zip(lora, needs, _columns(lora), strict=True):
        rank = pair.a.size(1)
        a = grouped_outer(grad_thin[0][:, columns], input_RK(), ends_e)[:, :rank] if need.a else None
        b = grouped_outer(grad_RM, thin[0][:, columns], ends_e)[:, :, :rank] if need.b else None
        found.append(Factors(a, b))
    return tuple(found)


def _joined(lora: tuple[LoraPair, ...]) -> tuple[Tensor, Tensor]:
    """All pairs of a projection as one, [e, r, in] and [e, out, r], so that a wide tensor is added to once.

    Each pair's rank is padded with zeros to whole multiples of 16 bytes, which grouped_mm needs of rows.
    """
    a, b = [], []
    for pair, columns in zip(lora, _columns(lora), strict=True):
        padding = columns.stop - columns.start - pair.a.size(1)
        a.append(torch.nn.functional.pad(pair.a, (0, 0, 0, padding)) if padding else pair.a)
        b.append(torch.nn.functional.pad(pair.b, (0, padding)) if padding else pair.b)
    return (torch.cat(a, 1), torch.cat(b, 2)) if len(lora) > 1 else (a[0], b[0])


def _columns(lora: tuple[LoraPair, ...]) -> list[slice]:
    """Where each pair stands among the columns of the joined rank, with its padding."""
    columns, end = [], 0
    for pair in lora:
        multiple = 16 // pair.a.element_size()
        start, end = end, end + -(-pair.a.size(1) // multiple) * multiple
        columns.append(slice(start, end))
    return columns


def _scale(thin_Rr: Tensor, lora: tuple[LoraPair, ...]) -> Tensor:
    """Each pair's columns times its scaling, in place."""
    for pair, columns in zip(lora, _columns(lora), strict=True):
        # Not `*=`, which would copy the columns onto themselves afterwards.
        thin_Rr[:, columns].mul_(pair.scaling)
    return thin_Rr


def _by_row(bias_e: Tensor, rows: Dispatched) -> Tensor:
    return bias_e.repeat_interleave(rows.counts_e, dim=0, output_size=rows.row_of_R.numel())


def _sum_by_expert(grad_R: Tensor, ends_e: Tensor) -> Tensor:
    starts_e = torch.cat([ends_e.new_zeros(1), ends_e[:-1]]).long()
    return sum_segments(grad_R, torch.arange(grad_R.size(0), device=grad_R.device), starts_e)


def _post_norm(spec: ExpertsSpec, weights: ExpertWeights, y_RD: Tensor) -> Tensor:
    if spec.post_norm is None:
        return y_RD
    return spec.post_norm(y_RD, detached(weights.post_norm))
