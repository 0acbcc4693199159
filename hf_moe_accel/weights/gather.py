"""How rows of the live tensors reach the rank that writes them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from hf_moe_accel.weights.ranks import Ranks
from hf_moe_accel.weights.shards import Rows, Shard


def gather_rows(shard: Shard, wanted: Rows, to: int, ranks: Ranks) -> Tensor | None:
    """Rows of a tensor, on one rank.

    All ranks must call; those that neither hold a wanted row nor receive it return at once.

    Args:
        shard: what this rank holds of the tensor.
        wanted: the rows to bring together.
        to: the rank that receives them.
        ranks: who holds and receives.

    Returns:
        [rows, ...] of the tensor's dtype on rank `to`, possibly its own shard's memory; None on the others.
    """
    rank = ranks.rank
    first, _ = shard.held[rank]
    pieces = list(_cover(wanted, shard.held, to))

    if rank != to:
        sends = [shard.rows(start - first, stop - first) for holder, start, stop in pieces if holder == rank]
        _transfer([_operation(dist.isend, part.contiguous().to(ranks.device), to, ranks) for part in sends])
        return None
    if all(holder == rank for holder, _, _ in pieces):
        return shard.rows(wanted[0] - first, wanted[1] - first)
    shape = (wanted[1] - wanted[0], *shard.local.shape[1:])
    rows = torch.empty(shape, dtype=shard.local.dtype, device=ranks.device)
    receives = []
    for holder, start, stop in pieces:
        part = rows[start - wanted[0] : stop - wanted[0]]
        if holder == rank:
            part.copy_(shard.rows(start - first, stop - first))
        else:
            receives.append(_operation(dist.irecv, part, holder, ranks))
    _transfer(receives)
    return rows


def _cover(wanted: Rows, held: Sequence[Rows], to: int) -> Iterator[tuple[int, int, int]]:
    """(holder, start, stop) of pieces that make up the wanted rows, each from its copy nearest to rank `to`."""
    start, stop = wanted
    while start < stop:
        holders = [rank for rank, (first, end) in enumerate(held) if first <= start < end]
        assert holders, f"no rank holds row {start}: {held}"
        nearest = min(holders, key=lambda rank: abs(rank - to))
        end = min(stop, held[nearest][1])
        yield nearest, start, end
        start = end


def _operation(kind: Callable[..., Any], tensor: Tensor, peer: int, ranks: Ranks) -> dist.P2POp:
    # A contiguous tensor's bytes: not every backend knows every dtype.
    return dist.P2POp(kind, tensor.view(math.prod(tensor.shape)).view(torch.uint8), peer, group=ranks.group)


def _transfer(operations: list[dist.P2POp]) -> None:
    for work in dist.batch_isend_irecv(operations) if operations else ():
        work.wait()
