"""The slow oracle: a loop over experts in transformers' own order of operations, differentiated by autograd."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from hf_moe_accel.experts.base import (
    ExpertBackend,
    ExpertsSpec,
    ExpertWeights,
    LoraPair,
    NeededGrads,
    RowGrads,
    WeightGrads,
)
from hf_moe_accel.ops.permutation import Dispatched


class EagerBackend(ExpertBackend):
    """What every other backend is compared with. Runs anywhere; the backward pass computes the forward again."""

    @staticmethod
    def why_not(spec: ExpertsSpec, dtype: torch.dtype, device: torch.device) -> str | None:
        """It serves everything."""
        return None

    def forward(
        self, spec: ExpertsSpec, weights: ExpertWeights, rows: Dispatched
    ) -> tuple[Callable[[], Tensor], tuple[Tensor, ...]]:
        """Loop over the experts that have rows."""
        return lambda: _loop(spec, weights, rows), ()

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
        """Differentiate the loop with respect to the rows."""
        leaves = [rows.x_ND.detach().requires_grad_(), rows.weights_R.detach().requires_grad_()]
        with torch.enable_grad():
            out = _loop(spec, weights, rows._replace(x_ND=leaves[0], weights_R=leaves[1]))
        grad_x, grad_routing = torch.autograd.grad(out, leaves, grad_ND)
        return RowGrads(grad_x if need_x else None, grad_routing if need_routing else None, (grad_ND,))

    def backward_weights(
        self, spec: ExpertsSpec, weights: ExpertWeights, rows: Dispatched, grads: RowGrads, needs: NeededGrads
    ) -> WeightGrads:
        """Differentiate the loop with respect to the parameters."""
        leaves = [None if w is None else w.detach().requires_grad_() for w in weights.flat()]
        wanted = [leaf for leaf, need in zip(leaves, needs.flat(), strict=True) if need and leaf is not None]
        if not wanted:
            return WeightGrads.of([None] * len(leaves), len(weights.up_lora))
        with torch.enable_grad():
            out = _loop(spec, ExpertWeights.of(leaves, weights.scalings), rows)
            # Experts without rows are not part of the loop; this connects their parameters, and zeros come out.
            out = out + sum(0 * leaf.sum() for leaf in wanted)
        found = iter(torch.autograd.grad(out, wanted, grads.for_weights[0]))
        return WeightGrads.of([next(found) if need else None for need in needs.flat()], len(weights.up_lora))


def _loop(spec: ExpertsSpec, weights: ExpertWeights, rows: Dispatched) -> Tensor:
    def linear(x: Tensor, weight: Tensor, bias: Tensor | None, lora: tuple[LoraPair, ...], expert: int) -> Tensor:
        y = x @ (weight[expert] if spec.is_transposed else weight[expert].t())
        for pair in lora:
            y = y + pair.scaling * (x @ pair.a[expert].t()) @ pair.b[expert].t()
        return y if bias is None else y + bias[expert]

    # Connected to both inputs, so that a rank without rows has gradients (zeros) as well.
    out_ND = torch.zeros_like(rows.x_ND) + 0 * (rows.x_ND + rows.weights_R.sum()).to(rows.x_ND.dtype)
    end = 0
    for expert, count in enumerate(rows.counts_e.tolist()):
        start, end = end, end + count
        if count == 0:
            continue
        row = rows.row_of_R[start:end]
        hidden = spec.gate(linear(rows.x_ND[row], weights.up, weights.up_bias, weights.up_lora, expert))
        y = linear(hidden, weights.down, weights.down_bias, weights.down_lora, expert)
        if spec.post_norm is not None:
            assert weights.post_norm is not None
            y = spec.post_norm(y, weights.post_norm)
        y = y * rows.weights_R[start:end, None]
        out_ND = out_ND.index_add(0, row, y.to(out_ND.dtype))
    return out_ND
