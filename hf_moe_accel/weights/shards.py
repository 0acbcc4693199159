"""What each rank holds of the live tensors, as plain data: local rows, and which rows they are.

The tensors lie as FSDP2 and expert parallelism leave them: cut along dim 0 (rows) over some mesh axes, copied over the
others. A stacked expert parameter [8, ...] on 4 ranks, ep 2 x efsdp 2, and a dense one [6, ...] on the same ranks:

    rank                    0      1      2      3
    experts' rows          0, 1   4, 5   2, 3   6, 7      one expert lies on one rank: it is written there, unmoved
    dense rows             0, 1   2, 3   4, 5    -        a whole tensor lies nowhere: its writer receives the others'
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import _compute_local_shape_and_global_offset

Rows = tuple[int, int]  # first, and one after the last


class LowRank(NamedTuple):
    """An adapter that is to be folded into a tensor: scaling * b @ a, by rows of the tensor.

    Attributes:
        a: [e, r, in] of this rank's experts, or [r, in] whole.
        b: [e, out, r], or [rows of this rank, r].
        scaling: a factor.
        is_transposed: the tensor is stored [e, in, out].
    """

    a: Tensor
    b: Tensor
    scaling: float
    is_transposed: bool = False

    def rows(self, start: int, stop: int) -> Tensor:
        """What to add to rows of this rank, in fp32."""
        a = self.a[start:stop] if self.a.ndim == 3 else self.a
        delta = self.scaling * (self.b[start:stop].float() @ a.float())
        return delta.transpose(1, 2) if self.is_transposed else delta


@dataclass(frozen=True)
class Shard:
    """One tensor of which every rank holds some rows.

    Attributes:
        shape: of the whole tensor.
        local: [rows of this rank, ...], the live memory or a copy of it; a tensor without dims is one row.
        held: the rows that each rank holds, the same on every rank.
        added: adapters to fold into the rows when they are read.
    """

    shape: tuple[int, ...]
    local: Tensor
    held: tuple[Rows, ...]
    added: tuple[LowRank, ...] = ()

    @property
    def num_rows(self) -> int:
        """Rows of the whole tensor."""
        return self.shape[0] if self.shape else 1

    @property
    def row_bytes(self) -> int:
        """The size of a row in bytes."""
        row = 1
        for size in self.shape[1:]:
            row *= size
        return row * self.local.element_size()

    def rows(self, start: int, stop: int) -> Tensor:
        """Rows of this rank, counted from its first one; adapters are added in fp32 and the sum rounded once."""
        rows = self.local[start:stop]
        if not self.added:
            return rows
        return (rows.float() + sum(each.rows(start, stop) for each in self.added)).to(rows.dtype)

    def copy(self) -> Shard:
        """The same with a copy in host memory, which training does not change."""
        added = tuple(each._replace(a=_on_host(each.a), b=_on_host(each.b)) for each in self.added)
        return replace(self, local=_on_host(self.local), added=added)


def _on_host(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor, device="cpu").copy_(tensor)


def shards_of(tensors: Mapping[str, Tensor], world_size: int) -> dict[str, Shard]:
    """What this rank holds of live tensors, plain ones and DTensors. Without communication, and alike on every rank.

    A plain tensor counts as rank 0's: where buffers differ between ranks, rank 0's are the ones to save.

    Raises:
        ValueError: a tensor is cut along another dim than 0, or lies on a part of the ranks only.
    """
    seen: dict[Any, tuple[Rows, ...]] = {}  # most tensors share their layout with others
    shards = {}
    for name, tensor in tensors.items():
        num_rows = tensor.shape[0] if tensor.ndim else 1
        if isinstance(tensor, DTensor):
            key = (num_rows, tensor.device_mesh, tensor.placements)
            if key not in seen:
                seen[key] = _rows_by_rank(name, tensor, world_size)
            local, held = tensor.to_local(), seen[key]
        else:
            local, held = tensor, ((0, num_rows), *((0, 0),) * (world_size - 1))
        local = local.detach()
        shards[name] = Shard(tuple(tensor.shape), local if local.ndim else local.reshape(1), held)
    return shards


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
    local = tensor.to_local()
    first, end = rows[dist.get_rank()]
    assert end - first == (local.shape[0] if local.ndim else 1), (name, rows)
    return tuple(rows)
