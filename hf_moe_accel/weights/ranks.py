"""The processes that save or load together, and how they end alike."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch.distributed.tensor import DTensor


class AllRanksError(RuntimeError):
    """An error that every rank raises, whichever of them it happened on."""


@dataclass(frozen=True)
class Ranks:
    """The processes that work on one checkpoint: all of the run, in one process group.

    Attributes:
        group: None is the default group. Work in a background thread needs one of its own: two threads that use one
            group at a time would take each other's messages.
        device: where the group moves tensors.
        alone: this process works by itself, whatever group it is in.
    """

    group: Any = None
    device: str = "cpu"
    alone: bool = False

    @property
    def rank(self) -> int:
        """This process; 0 without a process group."""
        return dist.get_rank() if dist.is_initialized() and not self.alone else 0

    @property
    def world_size(self) -> int:
        """All processes; 1 without a process group."""
        return dist.get_world_size() if dist.is_initialized() and not self.alone else 1

    @classmethod
    def of(cls, tensors: Any) -> Ranks:
        """The default group, and the device that these live tensors (DTensors among them) lie on."""
        meshes = (tensor.device_mesh for tensor in tensors if isinstance(tensor, DTensor))
        return cls(device=next((mesh.device_type for mesh in meshes), "cpu"))

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, in the order of the ranks. All ranks must call."""
        if self.world_size == 1:
            return [value]
        values = [None] * self.world_size
        dist.all_gather_object(values, value, group=self.group)
        return values

    def share(self, value: Any) -> Any:
        """Rank 0's value, on all ranks. All ranks must call."""
        if self.world_size == 1:
            return value
        # Not a broadcast: where a rank has failed, this must pair with what `same_outcome` calls there.
        return self.gather(value if self.rank == 0 else None)[0]

    @contextmanager
    def same_outcome(self, task: str) -> Iterator[None]:
        """Raise on every rank what the body raises on one, so that no rank goes on to wait for it.

        All ranks must call. A rank that fails meets the others at their next `same_outcome`, be it this one or one
        inside or after it: the body may contain collectives as long as the first one that the others come to is that.

        Raises:
            AllRanksError: names the task, the first rank that failed and its error, or says that a rank has died. One
                process raises the error itself.
        """
        error: Exception | None = None
        try:
            yield
        except AllRanksError:
            raise
        except Exception as raised:
            error = raised
        if self.world_size == 1:
            if error is not None:
                raise error
            return
        try:
            reports = self.gather(None if error is None else f"{type(error).__name__}: {error}")
        except RuntimeError as lost:
            reason = f"{type(error).__name__}: {error}" if error is not None else str(lost).splitlines()[0]
            raise AllRanksError(
                f"{task} failed on rank {self.rank}, which can no longer reach the others (has a rank died?): {reason}"
            ) from (error or lost)
        for rank, report in enumerate(reports):
            if report is not None:
                raise AllRanksError(f"{task} failed on rank {rank}: {report}") from error
