"""torch's grouped matrix product with all that stands around it in Triton, each one pass over memory.

Kept for backward: the received rows, the pre-activation without its bias, and LoRA's thin products. Gates are computed
in fp32, times the routing weight, and rounded once. A down bias does not keep the weight from going onto the
activation: `w * (a @ W + b)` is `(w * a) @ W + w * b`, and the sum by row adds `w * b`. Only a post-norm does.

What adapters add is never a pass of its own: the gate's kernels compute it for the pre-activation (forward and
backward, so it is kept without) and for the activation's gradient, and the sum by row takes it as a second operand.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from hf_moe_accel.experts.base import (
    ExpertBackend,
    ExpertsSpec,
    ExpertWeights,
    NeededGrads,
    RowGrads,
    WeightGrads,
)
from hf_moe_accel.experts.common import Formulas, as_in_out
from hf_moe_accel.experts.grouped_mm import (
    _ends,
    _from_thin,
    _grad_from_thin,
    _grad_thin,
    _grads_of_factors,
    _num_thin,
    _thin,
)
from hf_moe_accel.ops import grouped_mm
from hf_moe_accel.ops import triton as triton_ops
from hf_moe_accel.ops.grouped_mm import grouped_linear, grouped_outer
from hf_moe_accel.ops.permutation import Dispatched

# ([R, r] thin, [e, r, M] factors): each row's product with the factors of its expert.
Product = tuple[Tensor, Tensor]
# [R, *] rows by expert, or what a backend's products take in their place: see `_take`.
Rows = Any
# ([e] int32 the row after the last one of each expert, what else a backend's products with the weights need of it).
Groups = tuple[Tensor, ...]


class FusedBackend(ExpertBackend):
    """CUDA. A gate that is none of the known formulas runs as it is, and the rest stays fused.

    Attributes:
        num_groups: how many tensors `_arrange` returns as groups.
    """

    device_types = ("cuda",)
    reads_counts = False
    num_groups: ClassVar[int] = 1

    def __init__(self) -> None:
        # Not with the module, since `why_not` answers where triton is missing, too.
        from hf_moe_accel.ops.triton.activation import activate, activate_backward, takes
        from hf_moe_accel.ops.triton.rows import gather, sum_segments

        self._gate, self._gate_backward, self._gate_takes = activate, activate_backward, takes
        self._gather, self._sum_segments = gather, sum_segments
        self._formulas = Formulas()

    @staticmethod
    def why_not(spec: ExpertsSpec, dtype: torch.dtype, device: torch.device) -> str | None:
        """Triton and its device, then what torch's grouped_mm needs."""
        return triton_ops.why_not(device) or grouped_mm.why_not(
            spec.hidden_size, spec.intermediate_size, dtype, device
        )

    def forward(
        self, spec: ExpertsSpec, weights: ExpertWeights, rows: Dispatched
    ) -> tuple[Callable[[], Tensor], tuple[Tensor, ...]]:
        """Gather, up, gate and weight, down, sum. Keeps the pre-activation, and the output before a post-norm."""
        rows, groups = self._arrange(rows)
        ends_e = groups[0]
        _, down_eID = as_in_out(spec, weights)
        h_RM, up_thin, product = self._up(spec, weights, rows, groups)
        if spec.post_norm is None:

            @cache
            def activated_RI() -> Tensor:
                return self._activate(spec, h_RM, rows.weights_R, ends_e, weights.up_bias, product)

            down_thin = _thin(activated_RI(), weights.down_lora, ends_e) if weights.down_lora else ()

            def sum_ND() -> Tensor:
                thin_products = _from_thin(down_thin, weights.down_lora)
                return self._sum_products(activated_RI(), down_eID, thin_products, rows, groups, weights.down_bias)

            return sum_ND, (*groups, *up_thin, *down_thin, h_RM)
        a_RI = self._activate(spec, h_RM, None, ends_e, weights.up_bias, product)
        y_RD = self._linear(a_RI, down_eID, groups)
        down_thin = _thin(a_RI, weights.down_lora, ends_e)
        for of_adapters in _from_thin(down_thin, weights.down_lora):
            _add(y_RD, of_adapters, ends_e)
        if weights.down_bias is not None:
            y_RD += _of_rows(weights.down_bias, ends_e, y_RD.size(0))
        assert weights.post_norm is not None
        norm = partial(spec.post_norm, y_RD, weights.post_norm.detach())

        def weighted_sum_ND() -> Tensor:
            return self._sum_segments(norm(), rows.r_of_P, rows.start_of_N, weights_R=rows.weights_R)

        return weighted_sum_ND, (*groups, *up_thin, *down_thin, h_RM, y_RD)

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
        """Down, gate and weight, up, sum."""
        groups, kept = saved[: self.num_groups], saved[self.num_groups :]
        ends_e = groups[0]
        up_eDM, down_eID = as_in_out(spec, weights)
        num_thin = _num_thin(weights)
        thin, (h_RM, *outputs) = kept[:num_thin], kept[num_thin:]
        grad_routing: Tensor | None = None
        grad_norm: tuple[Tensor, ...] = ()
        weights_R: Tensor | None = rows.weights_R
        if spec.post_norm is None:
            gathered = bool(weights.down_lora) or weights.down_bias is not None
            grad_RD: Rows = self._take(grad_ND, rows, groups, gathered=gathered)
        else:
            assert weights.post_norm is not None
            leaf, norm_leaf = (t.detach().requires_grad_() for t in (outputs[0], weights.post_norm))
            with torch.enable_grad():
                normed_RD = spec.post_norm(leaf, norm_leaf)
            grad_normed_RD = self._gather(grad_ND, rows.row_of_R, rows.weights_R)
            grad_RD, of_norm = torch.autograd.grad(normed_RD, (leaf, norm_leaf), grad_normed_RD)
            grad_norm = (of_norm,)
            if need_routing:
                grad_RD_unweighted = self._gather(grad_ND, rows.row_of_R)
                grad_routing = torch.mul(grad_RD_unweighted.float(), normed_RD.detach()).sum(1)
            weights_R = None
        grad_down_thin = _grad_thin(grad_RD, weights.down_lora, ends_e)
        grad_a_RI = self._linear(grad_RD, down_eID.transpose(1, 2), groups, of_grads=True)
        into_a = self._split(spec, _grad_from_thin(grad_down_thin, weights.down_lora))
        _add(grad_a_RI, into_a.apart, ends_e)
        into_up = self._split(spec, _from_thin(thin[:1] if weights.up_lora else (), weights.up_lora))
        grad_h_RM, of_weights_R, a_RI = self._activate_backward(
            spec, h_RM, weights_R, ends_e, weights.up_bias, into_up.fused, grad_a_RI, into_a.fused
        )
        del grad_a_RI
        if need_routing and of_weights_R is not None:
            grad_routing = of_weights_R
            if weights.down_bias is not None:
                by_expert_Ne = grad_ND.float() @ weights.down_bias.float().t()
                grad_routing += by_expert_Ne[rows.row_of_R, _expert_of_rows(ends_e, rows.row_of_R.numel())]
        grad_up_thin = _grad_thin(grad_h_RM, weights.up_lora, ends_e)
        grad_x: Tensor | None = None
        if need_x:
            thin_products = _grad_from_thin(grad_up_thin, weights.up_lora)
            grad_x = self._sum_products(
                grad_h_RM, up_eDM.transpose(1, 2), thin_products, rows, groups, None, of_grads=True
            )
        for_weights = (*groups, grad_RD, a_RI, grad_h_RM, *thin, *grad_up_thin, *grad_down_thin, *grad_norm)
        return RowGrads(grad_x, grad_routing, for_weights)

    def backward_weights(
        self, spec: ExpertsSpec, weights: ExpertWeights, rows: Dispatched, grads: RowGrads, needs: NeededGrads
    ) -> WeightGrads:
        """Outer products by expert; nothing at all for frozen weights."""
        groups = grads.for_weights[: self.num_groups]
        ends_e = groups[0]
        grad_RD, into_down_RI, grad_h_RM, *others = grads.for_weights[self.num_groups :]
        num_thin = _num_thin(weights)
        thin, grad_thin, grad_norm = others[:num_thin], others[num_thin : 2 * num_thin], others[2 * num_thin :]

        @cache
        def into_up_RD() -> Rows:
            return self._take(rows.x_ND, rows, groups, gathered=bool(weights.up_lora))

        def by_expert(grad_R: Tensor, weights_R: Tensor | None) -> Tensor:
            starts_e = torch.cat([ends_e.new_zeros(1), ends_e[:-1]]).long()
            return self._sum_segments(grad_R, None, starts_e, weights_R=weights_R)

        return WeightGrads(
            up=self._outer(spec, into_up_RD(), grad_h_RM, groups) if needs.up else None,
            down=self._outer(spec, into_down_RI, grad_RD, groups) if needs.down else None,
            up_bias=by_expert(grad_h_RM, None) if needs.up_bias else None,
            # Where a post-norm took the weight, the gradient has it already.
            down_bias=by_expert(grad_RD, None if spec.post_norm else rows.weights_R) if needs.down_bias else None,
            post_norm=grad_norm[0] if needs.post_norm else None,
            up_lora=_grads_of_factors(
                weights.up_lora, needs.up_lora, into_up_RD, grad_h_RM, thin[:1], grad_thin[:1], ends_e
            ),
            down_lora=_grads_of_factors(
                weights.down_lora, needs.down_lora, lambda: into_down_RI, grad_RD, thin[-1:], grad_thin[-1:], ends_e
            ),
        )

    def _up(
        self, spec: ExpertsSpec, weights: ExpertWeights, rows: Dispatched, groups: Groups
    ) -> tuple[Tensor, tuple[Tensor, ...], Product | None]:
        """The pre-activation without its bias, LoRA's thin product, and what the gate's kernel is to add."""
        up_eDM, _ = as_in_out(spec, weights)
        x_RD = self._take(rows.x_ND, rows, groups, gathered=bool(weights.up_lora))
        h_RM = self._linear(x_RD, up_eDM, groups)
        up_thin = _thin(x_RD, weights.up_lora, groups[0])
        del x_RD  # as large as what comes out of the second projection
        into_up = self._split(spec, _from_thin(up_thin, weights.up_lora))
        _add(h_RM, into_up.apart, groups[0])
        return h_RM, up_thin, into_up.fused

    def _arrange(self, rows: Dispatched) -> tuple[Dispatched, Groups]:
        """The rows as the products with the weights take them, and where those of each expert are."""
        return rows, (_ends(rows),)

    def _take(self, source_ND: Tensor, rows: Dispatched, groups: Groups, *, gathered: bool) -> Rows:
        """[R, D] the rows of each expert. Not `gathered`: for `_linear` and `_outer` alone, in a form of their own."""
        return self._gather(source_ND, rows.row_of_R)

    def _linear(self, x_RK: Rows, weight_eKM: Tensor, groups: Groups, *, of_grads: bool = False) -> Tensor:
        """[R, M] rows of each expert times its weight, which may be a transposed view."""
        return grouped_linear(x_RK, weight_eKM, groups[0])

    def _outer(self, spec: ExpertsSpec, into_RK: Rows, grad_RM: Rows, groups: Groups) -> Tensor:
        """The gradient of a stacked weight from its rows and their gradients: zeros for an expert without rows."""
        if spec.is_transposed:
            return grouped_outer(into_RK, grad_RM, groups[0])
        return grouped_outer(grad_RM, into_RK, groups[0])

    def _split(self, spec: ExpertsSpec, thin_products: list[Product]) -> _Split:
        """Says which kernel computes what adapters add to rows around the gate, if they add anything."""
        if not thin_products:
            return _Split(None, None)
        (product,) = thin_products
        fused = self._formulas[spec] is not None and self._gate_takes(product)
        return _Split(product, None) if fused else _Split(None, product)

    def _activate(
        self,
        spec: ExpertsSpec,
        h_RM: Tensor,
        weights_R: Tensor | None,
        ends_e: Tensor,
        bias_eM: Tensor | None,
        product: Product | None,
    ) -> Tensor:
        """[R, I] the gate of the pre-activation and what is added to it, weighted where there are weights."""
        formula = self._formulas[spec]
        if formula is not None:
            return self._gate(formula, h_RM, weights_R, ends_e, bias_eM=bias_eM, product=product)
        return _weighted(spec.gate(_biased(h_RM, bias_eM, ends_e)), weights_R)

    def _activate_backward(
        self,
        spec: ExpertsSpec,
        h_RM: Tensor,
        weights_R: Tensor | None,
        ends_e: Tensor,
        bias_eM: Tensor | None,
        product: Product | None,
        grad_RI: Tensor,
        grad_product: Product | None,
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """The gradients of the pre-activation and of the weights, and what `_activate` returned."""
        formula = self._formulas[spec]
        if formula is not None:
            return self._gate_backward(
                formula,
                h_RM,
                weights_R,
                ends_e,
                grad_RI,
                bias_eM=bias_eM,
                product=product,
                grad_product=grad_product,
            )
        leaf = _biased(h_RM, bias_eM, ends_e).detach().requires_grad_()
        with torch.enable_grad():
            a_RI = spec.gate(leaf)
        (grad_h_RM,) = torch.autograd.grad(a_RI, leaf, _weighted(grad_RI, weights_R))
        a_RI = a_RI.detach()
        of_weights = None if weights_R is None else torch.mul(grad_RI.float(), a_RI).sum(1)
        return grad_h_RM, of_weights, _weighted(a_RI, weights_R)

    def _sum_products(
        self,
        x_RK: Tensor,
        weight_eKD: Tensor,
        thin_products: list[Product],
        rows: Dispatched,
        groups: Groups,
        bias_eD: Tensor | None,
        *,
        of_grads: bool = False,
    ) -> Tensor:
        """[N, D] products by expert with what adapters and weighted biases add, summed by row."""
        ends_e = groups[0]
        y_RD = self._linear(x_RK, weight_eKD, groups, of_grads=of_grads)
        return self._sum_segments(
            y_RD,
            rows.r_of_P,
            rows.start_of_N,
            other_RD=grouped_linear(*thin_products[0], ends_e) if thin_products else None,
            weights_R=None if bias_eD is None else rows.weights_R,
            bias=None if bias_eD is None else (bias_eD, _expert_of_rows(ends_e, y_RD.size(0))),
        )


class _Split(NamedTuple):
    """A product for the gate's kernels to compute, or one that is computed and added apart."""

    fused: Product | None
    apart: Product | None


def _add(rows_RM: Tensor, product: Product | None, ends_e: Tensor) -> None:
    """In place."""
    if product is not None:
        rows_RM += grouped_linear(*product, ends_e)


def _expert_of_rows(ends_e: Tensor, num_rows: int) -> Tensor:
    """[R] int64."""
    rows = torch.arange(num_rows, dtype=ends_e.dtype, device=ends_e.device)
    return torch.searchsorted(ends_e, rows, right=True)


def _of_rows(bias_eM: Tensor, ends_e: Tensor, num_rows: int) -> Tensor:
    return bias_eM.index_select(0, _expert_of_rows(ends_e, num_rows))


def _biased(h_RM: Tensor, bias_eM: Tensor | None, ends_e: Tensor) -> Tensor:
    return h_RM if bias_eM is None else h_RM + _of_rows(bias_eM, ends_e, h_RM.size(0))


def _weighted(rows_R: Tensor, weights_R: Tensor | None) -> Tensor:
    """Rows times their fp32 routing weight, in fp32 and rounded once."""
    if weights_R is None:
        return rows_R
    return torch.mul(rows_R, weights_R[:, None], out=torch.empty_like(rows_R))
