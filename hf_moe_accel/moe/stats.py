"""Where the tokens of training went, counted on the device."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from hf_moe_accel.ops.permutation import Dispatched


class Routed(NamedTuple):
    """What was counted on this rank over some passes.

    Attributes:
        choices_LE: [L, E] int64, on the device: (token, expert) choices of this rank's tokens.
        rows_L: [L] int64, on the device: (row, expert) pairs that this rank's experts computed.
        tokens_L: of this rank, by layer.
        received_L: rows that reached this rank, by layer; a token counts once, however many experts it has here.
        top_k: experts of a token; 0 where nothing was counted.
    """

    choices_LE: Tensor
    rows_L: Tensor
    tokens_L: list[int]
    received_L: list[int]
    top_k: int


class RoutingStats:
    """Counts by layer what this rank's tokens choose and its experts compute; reads nothing back.

    Args:
        num_layers: MoE layers of the model, L.
        num_experts: experts of a layer, E.
    """

    def __init__(self, num_layers: int, num_experts: int) -> None:
        """The device is that of the tokens, so nothing is allocated yet."""
        self._shape = (num_layers, num_experts)
        self._choices_LE: Tensor | None = None
        self._clear()

    def add(self, layer: int, ids_TK: Tensor) -> None:
        """Count the choices of one forward pass of a layer."""
        if self._choices_LE is None:
            self._choices_LE = torch.zeros(self._shape, dtype=torch.int64, device=ids_TK.device)
            self._rows_LE = torch.zeros_like(self._choices_LE)
            self._one = self._choices_LE.new_ones(())
        ids = ids_TK.reshape(-1).long()
        self._choices_LE[layer].scatter_add_(0, ids, self._one.expand(ids.numel()))
        self._tokens_L[layer] += ids_TK.size(0)
        self._top_k = ids_TK.size(1)

    def add_rows(self, layer: int, chunks: Iterable[Dispatched]) -> None:
        """Count what this rank's experts were given in that pass; comes after `add`."""
        for rows in chunks:
            self._rows_LE[layer, : rows.counts_e.numel()] += rows.counts_e
            self._received_L[layer] += rows.x_ND.size(0)

    def take(self) -> Routed:
        """What was counted since the last call; no device sync."""
        choices_LE = self._choices_LE
        if choices_LE is None:
            choices_LE = torch.zeros(self._shape, dtype=torch.int64)
            rows_L = choices_LE.sum(1)
        else:
            rows_L = self._rows_LE.sum(1)
        routed = Routed(choices_LE, rows_L, self._tokens_L, self._received_L, self._top_k)
        self._choices_LE = None
        self._clear()
        return routed

    def _clear(self) -> None:
        num_layers, _ = self._shape
        self._tokens_L = [0] * num_layers
        self._received_L = [0] * num_layers
        self._top_k = 0
