"""Where the tokens of training went, counted on the device."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
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

    It counts in the same memory all the time, where a CUDA graph of a pass counts as well when it is replayed.

    Args:
        num_layers: MoE layers of the model, L.
        num_experts: experts of a layer, E.
    """

    def __init__(self, num_layers: int, num_experts: int) -> None:
        """The device is that of the tokens, so nothing is allocated yet."""
        self._shape = (num_layers, num_experts)
        self._choices_LE: Tensor | None = None
        self._tokens_L: list[int]
        self._received_L: list[int]
        self._newest = [(0, 0, 0)] * num_layers  # of a layer's newest pass: tokens, received rows, experts of a token
        self._clear()

    def add(self, layer: int, ids_TK: Tensor, choices_E: Tensor | None = None) -> None:
        """Count the choices of one forward pass of a layer.

        Args:
            layer: its number.
            ids_TK: [T, K] the choices.
            choices_E: [E] how many there are of each expert, where that is known already.
        """
        if self._choices_LE is None:
            self._choices_LE = torch.zeros(self._shape, dtype=torch.int64, device=ids_TK.device)
            self._rows_LE = torch.zeros_like(self._choices_LE)
            self._one = self._choices_LE.new_ones(())
        if choices_E is None:
            ids = ids_TK.reshape(-1).long()
            self._choices_LE[layer].scatter_add_(0, ids, self._one.expand(ids.numel()))
        else:
            self._choices_LE[layer, : choices_E.numel()] += choices_E
        self._tokens_L[layer] += ids_TK.size(0)
        self._top_k = ids_TK.size(1)
        self._newest[layer] = (ids_TK.size(0), 0, self._top_k)

    def add_rows(self, layer: int, chunks: Iterable[Dispatched]) -> None:
        """Count what this rank's experts were given in that pass; comes after `add`."""
        for rows in chunks:
            self._rows_LE[layer, : rows.counts_e.numel()] += rows.counts_e
            tokens, received, top_k = self._newest[layer]
            self._newest[layer] = (tokens, received + rows.x_ND.size(0), top_k)
            self._received_L[layer] += rows.x_ND.size(0)

    def newest(self, layer: int) -> tuple[int, int, int]:
        """What the host has counted of a layer's newest pass, for `repeat`."""
        return self._newest[layer]

    def repeat(self, layer: int, counted: tuple[int, int, int]) -> None:
        """Count on the host what the device has counted by itself: it has repeated a pass.

        Args:
            layer: whose pass.
            counted: in that pass, by `newest`.
        """
        tokens, received, self._top_k = counted
        self._tokens_L[layer] += tokens
        self._received_L[layer] += received

    @contextmanager
    def uncounted(self) -> Iterator[None]:
        """What passes inside is counted as always, and then the counts are put back. Something was counted before."""
        assert self._choices_LE is not None, "nothing has been counted yet"
        on_device = (self._choices_LE, self._rows_LE)
        before = [counts_LE.clone() for counts_LE in on_device]
        tokens_L, received_L = list(self._tokens_L), list(self._received_L)
        try:
            yield
        finally:
            for counts_LE, values_LE in zip(on_device, before, strict=True):
                counts_LE.copy_(values_LE)
            self._tokens_L, self._received_L = tokens_L, received_L

    def take(self) -> Routed:
        """What was counted since the last call; no device sync."""
        if self._choices_LE is None:
            choices_LE = torch.zeros(self._shape, dtype=torch.int64)
            rows_L = choices_LE.sum(1)
        else:
            choices_LE, rows_L = self._choices_LE.clone(), self._rows_LE.sum(1)
            self._choices_LE.zero_()
            self._rows_LE.zero_()
        routed = Routed(choices_LE, rows_L, self._tokens_L, self._received_L, self._top_k)
        self._clear()
        return routed

    def _clear(self) -> None:
        num_layers, _ = self._shape
        self._tokens_L = [0] * num_layers
        self._received_L = [0] * num_layers
        self._top_k = 0
