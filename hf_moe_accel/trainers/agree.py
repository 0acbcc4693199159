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
        loader: any data loader; everything but iteration and length is its own.
        device: of the process group's collectives.
        length: in batches, where the ranks have agreed on one; None means the loader's own.
    """

    def __init__(self, loader: Any, device: torch.device, length: int | None = None) -> None:
        """Wrap; read nothing."""
        self._loader = loader
        self._device = device
        self._length = length

    def __iter__(self) -> Iterator[Any]:
        """Batches, as long as every rank has one."""
        batches = iter(self._loader)
        while True:
            batch = next(batches, None)
            if not agreed_count(int(batch is not None), self._device):
                return
            yield batch

    def __len__(self) -> int:
        """In batches, where there is a length."""
        return len(self._loader) if self._length is None else self._length

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)
