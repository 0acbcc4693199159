"""TransformerEngine's grouped matrix product in the place of torch's, between the kernels of `fused`.

It learns on the host how many rows each expert has: the one point where the host waits for the device, in the forward
pass; the backward pass has kept the counts. The thin products of LoRA stay torch's: one kernel for all experts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hf_moe_accel.experts.base import ExpertsSpec
from hf_moe_accel.experts.fused import FusedBackend, Groups
from hf_moe_accel.ops import transformer_engine
from hf_moe_accel.ops.permutation import Dispatched


class TransformerEngineBackend(FusedBackend):
    """CUDA, in bf16 and fp16. Stays behind `fused` in "auto", which was faster where we measured both."""

    num_groups = 2

    @staticmethod
    def why_not(spec: ExpertsSpec, dtype: torch.dtype, device: torch.device) -> str | None:
        """TransformerEngine and its device, then what `fused` needs."""
        return transformer_engine.why_not(dtype, device) or FusedBackend.why_not(spec, dtype, device)

    def _groups(self, rows: Dispatched) -> Groups:
        return (*super()._groups(rows), rows.counts_e.cpu())

    def _linear(self, x_RK: Tensor, weight_eKM: Tensor, groups: Groups) -> Tensor:
        return transformer_engine.grouped_linear(x_RK, weight_eKM, groups[1].tolist())

    def _outer(self, a_RM: Tensor, b_RK: Tensor, groups: Groups) -> Tensor:
        return transformer_engine.grouped_outer(a_RM, b_RK, groups[1].tolist())
