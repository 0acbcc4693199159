"""Which rank holds which rows of the live tensors, and how rows reach the rank that writes them.

The tensors lie as FSDP2 and expert parallelism leave them: cut along dim 0 (rows) over some mesh axes, copied over the
others. A stacked expert parameter [8, ...] on 4 ranks, ep 2 x efsdp 2, and a dense one [6, ...] on the same ranks:

    rank                    0      1      2      3
    experts' rows          0, 1   4, 5   2, 3   6, 7      one expert lies on one rank: it is written there, unmoved
    dense rows             0, 1   2, 3   4, 5    -        a whole tensor lies nowhere: its writer receives the others'
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import _compute_local_shape_and_global_offset

Rows = tuple[int, int]  # first, and one after the last


def rank_and_world_size() -> tuple[int, int]:
    """This process's rank and the number of ranks; (0, 1) without a process group."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


@contextmanager
def same_outcome(task: str) -> Iterator[None]:
    """Raise on every rank what the body raises on one, so that no rank goes on to wait for it.

    All ranks must call. The body must not end between two collectives on one rank only.

    Raises:
        RuntimeError: names the task, the first rank that failed and its error. One process raises the error itself.
    """
    error: Exception | None = None
    try:
        yield
    except Exception as raised:
        error = raised
    _, world_size = rank_and_world_size()
    if world_size == 1:
        if error is not None:
            raise error
        return
    reports: list[str | None] = [None] * world_size
    dist.all_gather_object(reports, None if error is None else f"{type(error).__name__}: {error}")
    for rank, report in enumerate(reports):
        if report is not None:
            raise RuntimeError(f"{task} failed on rank {rank}: {report}") from error


def num_rows(tensor: Tensor) -> int:
    """The size of dim 0; a tensor without dims is one row."""
    return tensor.shape[0] if tensor.ndim else 1


def held_rows(tensors: Mapping[str, Tensor], world_size: int) -> dict[str, tuple[Rows, ...]]:
    """The rows of each tensor that each rank holds, computed alike on every rank without communication.

    A plain tensor counts as rank 0's: where buffers differ between ranks, rank 0's are the ones to save.

    Raises:
        ValueError: a tensor is cut along another dim than 0, or lies on a part of the ranks only.
    """
    seen: dict[Any, tuple[Rows, ...]] = {}  # most tensors share their layout with others
    held = {}
    for name, tensor in tensors.items():
        if isinstance(tensor, DTensor):
            key = (num_rows(tensor), tensor.device_mesh, tensor.placements)
            if key not in seen:
                seen[key] = _rows_by_rank(name, tensor, world_size)
            held[name] = seen[key]
        else:
            held[name] = ((0, num_rows(tensor)), *((0, 0),) * (world_size - 1))
    return held


def _rows_by_rank(name: str, tensor: DTensor, world_size: int) -> tuple[Rows, ...]:
    mesh, placements = tensor.device_mesh, tensor.placements
    if mesh.size() != world_size or not all(p.is_replicate() or getattr(p, "dim", None) == 0 for p in placements):
        raise ValueError(
            f"{name} lies as {placements} on {mesh}, in a run of {world_size} ranks. Only tensors that are sharded "
            "along dim 0 over all ranks, as FSDP2 and expert parallelism do it, can be exported shard by shard. "
            "PreTrainedModel.save_pretrained(model, directory) gathers the whole model and saves it."
        )
    rows: list[Rows] = [(0, 0)] * world_size
    for coordinate in itertools.product(*map(range, mesh.shape)):
        shape, offset = _compute_local_shape_and_global_offset(tensor.shape, mesh.shape, list(coordinate), placements)
        rows[int(mesh.mesh[coordinate])] = (offset[0], offset[0] + shape[0]) if shape[0] else (0, 0)
    assert rows[dist.get_rank()][1] - rows[dist.get_rank()][0] == num_rows(tensor.to_local()), (name, rows)
    return tuple(rows)


def gather_rows(
    tensor: Tensor, wanted: Rows, held: Sequence[Rows], to: int, device: torch.device | str
) -> Tensor | None:
    """Rows of a live tensor, on one rank.

    All ranks must call; those that neither hold a wanted row nor receive it return at once.

    Args:
        tensor: a live tensor, its shard on this rank.
        wanted: the rows to bring together.
        held: the rows that each rank holds, see `held_rows`.
        to: the rank that receives them.
        device: where the process group moves tensors.

    Returns:
        [rows, ...] of the tensor's dtype on rank `to`, possibly its own shard's memory; None on the others.
    """
    rank, _ = rank_and_world_size()
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    local = local.detach().reshape(num_rows(local), *local.shape[1:])
    first, _ = held[rank]
    pieces = list(_cover(wanted, held, to))

    if rank != to:
        sends = [local[start - first : stop - first] for holder, start, stop in pieces if holder == rank]
        _transfer([dist.P2POp(dist.isend, _bytes(part.contiguous().to(device)), to) for part in sends])
        return None
    if all(holder == rank for holder, _, _ in pieces):
        return local[wanted[0] - first : wanted[1] - first]
    rows = torch.empty((wanted[1] - wanted[0], *local.shape[1:]), dtype=local.dtype, device=device)
    receives = []
    for holder, start, stop in pieces:
        part = rows[start - wanted[0] : stop - wanted[0]]
        if holder == rank:
            part.copy_(local[start - first : stop - first])
        else:
            receives.append(dist.P2POp(dist.irecv, _bytes(part), holder))
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


def _transfer(operations: list[dist.P2POp]) -> None:
    for work in dist.batch_isend_irecv(operations) if operations else ():
        work.wait()


def _bytes(tensor: Tensor) -> Tensor:
    """A contiguous tensor's memory: not every backend knows every dtype."""
    return tensor.view(math.prod(tensor.shape)).view(torch.uint8)
