"""How many tokens each expert got, counted on the device."""

from __future__ import annotations

import torch
from torch import Tensor


class RoutingStats:
    """Counts this rank's (token, expert) choices by layer; nothing is read back until `drain`.

    Args:
        num_layers: MoE layers of the model, L.
        num_experts: experts of a layer, E.
    """

    def __init__(self, num_layers: int, num_experts: int) -> None:
        """Allocate on first use, on the device of the tokens."""
        self._shape = (num_layers, num_experts)
        self._counts_LE: Tensor | None = None

    def add(self, layer: int, ids_TK: Tensor) -> None:
        """Count the choices of one forward pass of a layer."""
        if self._counts_LE is None:
            self._counts_LE = torch.zeros(self._shape, dtype=torch.int64, device=ids_TK.device)
        ids = ids_TK.reshape(-1).long()
        self._counts_LE[layer].scatter_add_(0, ids, torch.ones_like(ids))

    def drain(self) -> Tensor:
        """[L, E] int64 on the CPU: choices of this rank's tokens since the last call. One device sync."""
        if self._counts_LE is None:
            return torch.zeros(self._shape, dtype=torch.int64)
        counts = self._counts_LE.cpu().clone()
        self._counts_LE.zero_()
        return counts
