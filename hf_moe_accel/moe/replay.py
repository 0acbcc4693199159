"""Under activation checkpointing a recompute neither routes nor sends again: it replays what the forward exchanged.

A checkpointed region keeps, of each MoE layer in it, the plan, the received rows and the layer's output; the backward
pass computes the rest again from them. That costs the memory of the received rows, and saves every transfer of the
recompute; with `expert_checkpointing="full"` the rows are left out, and sent once more. Handed to
`torch.utils.checkpoint` as its `context_fn` (non-reentrant checkpointing only).

Reentrant checkpointing has no contexts: its recompute routes and sends again, and the region keeps the routing alone,
to raise if the recompute chooses other experts.
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar, Token
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hf_moe_accel.ops.permutation import Dispatched


class Exchange(NamedTuple):
    """One layer's exchange. rows: of each chunk, perhaps `without_rows`; out_TD: [T, D] what the layer returned."""

    plan: Any
    rows: tuple[Dispatched, ...]
    out_TD: Tensor


class Region:
    """What is kept of the layers of one checkpointed region, in order.

    Args:
        keeps_rows: whether whole exchanges are kept, so that a recompute sends nothing; else the routing alone.
    """

    def __init__(self, *, keeps_rows: bool = True) -> None:
        """Keep nothing yet."""
        self._keeps_rows = keeps_rows
        self._ids: list[Tensor] = []
        self._exchanges: list[Exchange] = []
        self._next: int | None = None

    @property
    def recomputes(self) -> bool:
        """Whether this pass over the region is a recompute."""
        return self._next is not None

    def keep(self, ids_TK: Tensor, plan: Any, rows: tuple[Dispatched, ...], out_TD: Tensor) -> None:
        """Record a layer, in the forward pass; nothing in a recompute. See `Exchange`."""
        if self.recomputes:
            return
        self._ids.append(ids_TK)
        if self._keeps_rows:
            # A copy: the model may write into what it gets.
            self._exchanges.append(Exchange(plan, rows, out_TD.clone()))

    def replay(self, ids_TK: Tensor) -> Exchange | None:
        """The exchange of the next layer, in a recompute; None in the forward pass, or where none is kept.

        Raises:
            RuntimeError: the recompute routed differently than the forward pass.
        """
        if self._next is None:
            return None
        index = self._next
        self._next += 1
        before_TK = self._ids[index]
        if not torch.equal(before_TK, ids_TK):
            changed = int((before_TK != ids_TK).any(dim=1).sum())
            raise RuntimeError(
                f"activation checkpointing: {changed} of {ids_TK.size(0)} tokens chose other experts in the recompute "
                "than in the forward pass, so their gradients would be wrong. The layers before the router must "
                "compute the same twice: check for randomness outside PyTorch's generators, or turn checkpointing off."
            )
        return self._exchanges[index] if self._keeps_rows else None

    def start(self, next_exchange: int | None) -> None:
        """Begin a pass over the region: None records, 0 replays."""
        self._next = next_exchange


_region: ContextVar[Region | None] = ContextVar("hf_moe_accel_region", default=None)


def current_region() -> Region | None:
    """The checkpointed region that this code runs in, if it keeps its exchanges."""
    return _region.get()


class _Inside:
    """Makes a region the current one. Can be entered again: a graph that is kept is recomputed once a backward."""

    def __init__(self, region: Region, next_exchange: int | None) -> None:
        self._region = region
        self._next_exchange = next_exchange
        self._token: Token[Region | None] | None = None

    def __enter__(self) -> None:
        self._region.start(self._next_exchange)
        self._token = _region.set(self._region)

    def __exit__(self, *_: object) -> None:
        assert self._token is not None
        _region.reset(self._token)


def keep_exchanges() -> tuple[_Inside, _Inside]:
    """A `context_fn` for `torch.utils.checkpoint.checkpoint`: contexts for the forward pass and for the recompute."""
    region = Region()
    return _Inside(region, None), _Inside(region, 0)


def compare_routing(checkpoint: Callable[..., Any], function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """`checkpoint(function, *args, **kwargs)`, which raises if a recompute routes differently than the forward pass.

    For reentrant checkpointing, which has no contexts. The ids live with the function that is checkpointed, as long as
    the graph does.
    """
    region = Region(keeps_rows=False)
    passes = 0

    def watched(*inputs: Any, **options: Any) -> Any:
        nonlocal passes
        passes += 1
        with _Inside(region, None if passes == 1 else 0):
            return function(*inputs, **options)

    return checkpoint(watched, *args, **kwargs)
