"""`fused` with quack-kernels' grouped products, which read rows through the index: most rows are never gathered."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_moe_accel.experts.base import ExpertsSpec
from hf_moe_accel.experts.fused import FusedBackend, Groups
from hf_moe_accel.ops.permutation import Dispatched
from hf_moe_accel.ops.quack import Through, grouped_linear, grouped_outer, why_not

_BY_NAME = "on other GPUs than Hopper it has not been tried yet; give expert_backend='quack' to do so"
_MULTIPLE = 8  # of all sizes, which are read 16 bytes at a time


class QuackBackend(FusedBackend):
    """CUDA of compute capability 9 and 10, in bf16 and fp16. LoRA's thin products are torch's, of gathered rows."""

    num_groups = 3  # the ends of experts, their starts with the number of rows at the end, the index in int32

    @staticmethod
    def why_not(spec: ExpertsSpec, dtype: torch.dtype, device: torch.device) -> str | None:
        """quack-kernels and its device, sizes, then what `fused` needs."""
        reason = why_not(dtype, device)
        for size in (spec.hidden_size, spec.intermediate_size):
            if reason is None and size % _MULTIPLE:
                reason = f"quack-kernels takes sizes that are multiples of {_MULTIPLE}, not {size}"
        return reason or FusedBackend.why_not(spec, dtype, device)

    @staticmethod
    def why_by_name(device: torch.device) -> str | None:
        """Not where it has never run."""
        return None if torch.cuda.get_device_capability(device)[0] == 9 else _BY_NAME

    def _arrange(self, rows: Dispatched) -> tuple[Dispatched, Groups]:
        rows, (ends_e,) = super()._arrange(rows)
        return rows, (ends_e, torch.cat([ends_e.new_zeros(1), ends_e]), rows.row_of_R.int())

    def _take(self, source_ND: Tensor, rows: Dispatched, groups: Groups, *, gathered: bool) -> Tensor | Through:
        return self._gather(source_ND, rows.row_of_R) if gathered else Through(source_ND.contiguous(), groups[2])

    def _linear(self, x_RK: Tensor | Through, weight_eKM: Tensor, groups: Groups, *, of_grads: bool = False) -> Tensor:
        return grouped_linear(x_RK, weight_eKM, groups[1])

    def _outer(
        self, spec: ExpertsSpec, into_RK: Tensor | Through, grad_RM: Tensor | Through, groups: Groups
    ) -> Tensor:
        return grouped_outer(into_RK, grad_RM, groups[1], transposed=not spec.is_transposed)
