"""Ranks that stop together: with data of unknown length, all have a batch or none goes on."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist


def agreed_count(count: int, device: torch.device) -> int:
    """The smallest count of any rank. All ranks must call.

    Args:
        count: batches that this rank has.
        device: of the process group's collectives.
    """
    smallest = torch.tensor(count, device=device)
    dist.all_reduce(smallest, op=dist.ReduceOp.MIN)
    return int(smallest)


class AgreeingLoader:
    """A data loader that ends on all ranks when it ends on one. All ranks must iterate.

    Args:
        loader: any data loader; everything but iteration is its own.
        device: of the process group's collectives.
    """

    def __init__(self, loader: Any, device: torch.device) -> None:
        """Wrap; read nothing."""
        self._loader = loader
        self._device = device

    def __iter__(self) -> Iterator[Any]:
        """Batches, as long as every rank has one."""
        batches = iter(self._loader)
        while True:
            batch = next(batches, None)
            if not agreed_count(int(batch is not None), self._device):
                return
            yield batch

    def __len__(self) -> int:
        """Of the loader, where it has one."""
        return len(self._loader)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)
