"""TransformerEngine's grouped matrix product in the place of torch's, between the kernels of `fused`.

It learns on the host how many rows each expert has: the one point where the host waits for the device, in the forward
pass; the backward pass has kept the counts. LoRA's thin products stay torch's, which computes those of all experts in
one kernel: at 128 experts, 131,072 rows and rank 16 they took an H100 0.12 to 0.28 ms each, and 1.9 to 3.0 ms with
TransformerEngine, which launches 128 times.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from hf_moe_accel.experts.base import ExpertsSpec, ExpertWeights, NeededGrads, RowGrads, WeightGrads
from hf_moe_accel.experts.fused import FusedBackend, Groups
from hf_moe_accel.ops.permutation import Dispatched
from hf_moe_accel.ops.transformer_engine import (
    FP8_MULTIPLE,
    Scaling,
    grouped_linear,
    grouped_outer,
    why_not,
    why_not_fp8,
)


class TransformerEngineBackend(FusedBackend):
    """CUDA, in bf16 and fp16.

    Attributes:
        scaling: of FP8; None for products in the dtype of the rows.
    """

    reads_counts = True
    num_groups = 2  # the ends of experts, and on the host the rows of each
    scaling: ClassVar[Scaling | None] = None

    @staticmethod
    def why_not(spec: ExpertsSpec, dtype: torch.dtype, device: torch.device) -> str | None:
        """TransformerEngine and its device, then what `fused` needs."""
        return why_not(dtype, device) or FusedBackend.why_not(spec, dtype, device)

    def _arrange(self, rows: Dispatched) -> tuple[Dispatched, Groups]:
        rows, groups = super()._arrange(rows)
        return rows, (*groups, rows.counts_e.cpu())

    def _linear(self, x_RK: Tensor, weight_eKM: Tensor, groups: Groups, *, of_grads: bool = False) -> Tensor:
        return grouped_linear(x_RK, weight_eKM, groups[1].tolist(), scaling=self.scaling, of_grads=of_grads)

    def _outer(self, spec: ExpertsSpec, into_RK: Tensor, grad_RM: Tensor, groups: Groups) -> Tensor:
        counts = groups[1].tolist()
        if spec.is_transposed:
            return grouped_outer(into_RK, grad_RM, counts, scaling=self.scaling, roles=("input", "grad"))
        return grouped_outer(grad_RM, into_RK, counts, scaling=self.scaling, roles=("grad", "input"))


class _FP8Backend(TransformerEngineBackend):
    """The products with the base weights in FP8, forward and backward; parameters, gradients, LoRA as they are.

    FP8 products take rows of an expert in whole multiples. What fills up repeats the expert's last row, so that no
    scale changes, with a routing weight of 0, so that nothing comes of it.
    """

    def _arrange(self, rows: Dispatched) -> tuple[Dispatched, Groups]:
        counts_e = _round_up(rows.counts_e.cpu())
        padded, _ = _pad(rows, counts_e)
        ends_e = torch.cumsum(padded.counts_e, 0, dtype=torch.int32)
        return padded, (ends_e, counts_e)

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
        """As `fused` does, on the padded rows."""
        padded, slot_of_R = _pad(rows, saved[1])
        grads = super().backward_rows(
            spec, weights, padded, saved, grad_ND, needs, need_x=need_x, need_routing=need_routing
        )
        if grads.weights_R is None:
            return grads
        return grads._replace(weights_R=grads.weights_R.index_select(0, slot_of_R))

    def backward_weights(
        self, spec: ExpertsSpec, weights: ExpertWeights, rows: Dispatched, grads: RowGrads, needs: NeededGrads
    ) -> WeightGrads:
        """As `fused` does, on the padded rows."""
        padded, _ = _pad(rows, grads.for_weights[1])
        return super().backward_weights(spec, weights, padded, grads, needs)


class FP8CurrentScalingBackend(_FP8Backend):
    """One scale for each matrix: E4M3, gradients in E5M2. CUDA, compute capability 8.9 or more."""

    scaling = "current"

    @staticmethod
    def why_not(spec: ExpertsSpec, dtype: torch.dtype, device: torch.device) -> str | None:
        """TransformerEngine, its device and FP8, then what `fused` needs."""
        return why_not_fp8("current", _sizes(spec), dtype, device) or FusedBackend.why_not(spec, dtype, device)


class FP8BlockScalingBackend(_FP8Backend):
    """A scale for each block of 128 values: E4M3. CUDA, where TransformerEngine has it: compute capability 9.0."""

    scaling = "block"

    @staticmethod
    def why_not(spec: ExpertsSpec, dtype: torch.dtype, device: torch.device) -> str | None:
        """TransformerEngine, its device and FP8, then what `fused` needs."""
        return why_not_fp8("block", _sizes(spec), dtype, device) or FusedBackend.why_not(spec, dtype, device)


def _sizes(spec: ExpertsSpec) -> tuple[int, ...]:
    return spec.hidden_size, spec.pre_activation_size, spec.intermediate_size


def _round_up(counts_e: Tensor) -> Tensor:
    return (counts_e + FP8_MULTIPLE - 1) // FP8_MULTIPLE * FP8_MULTIPLE


def _pad(rows: Dispatched, padded_counts_e: Tensor) -> tuple[Dispatched, Tensor]:
    """Rows of each expert filled up to a multiple; and for each pair the slot it is in.

    Args:
        rows: as they were dispatched.
        padded_counts_e: [e] on the host, so that nothing is read back.
    """
    num_slots, device = int(padded_counts_e.sum()), rows.counts_e.device
    counts_e = rows.counts_e.long()
    slots_e = _round_up(counts_e)
    first_row_e, first_slot_e = counts_e.cumsum(0) - counts_e, slots_e.cumsum(0) - slots_e
    expert_S = torch.arange(counts_e.numel(), device=device).repeat_interleave(slots_e, output_size=num_slots)
    place_S = torch.arange(num_slots, device=device) - first_slot_e[expert_S]
    is_row_S = place_S < counts_e[expert_S]
    r_of_S = first_row_e[expert_S] + torch.minimum(place_S, counts_e[expert_S] - 1)
    num_rows = rows.row_of_R.numel()
    expert_R = torch.arange(counts_e.numel(), device=device).repeat_interleave(counts_e, output_size=num_rows)
    slot_of_R = torch.arange(num_rows, device=device) + (first_slot_e - first_row_e)[expert_R]
    padded = rows._replace(
        weights_R=torch.where(is_row_S, rows.weights_R[r_of_S], 0.0),
        row_of_R=rows.row_of_R[r_of_S],
        counts_e=slots_e.to(rows.counts_e.dtype),
        r_of_P=slot_of_R[rows.r_of_P],
    )
    return padded, slot_of_R
