"""Where a run is in its data, and where that is on another number of ranks or with another batch size."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any


@dataclass(frozen=True)
class Position:
    """How far training has come, with the sizes that its steps are counted in.

    Attributes:
        global_step: optimizer steps.
        per_device_batch: samples of a rank in a micro-batch.
        accumulation: micro-batches of a step.
        num_ranks: ranks, each with its own samples.
        steps_per_epoch: optimizer steps of an epoch; None for data of unknown length.
        epoch: the running one, from 0.
        batches_in_epoch: micro-batches of this rank that the running epoch has trained on.
    """

    global_step: int
    per_device_batch: int
    accumulation: int
    num_ranks: int
    steps_per_epoch: int | None
    epoch: int = 0
    batches_in_epoch: int = 0

    @property
    def micro_batch(self) -> int:
        """Samples of all ranks in a micro-batch."""
        return self.per_device_batch * self.num_ranks

    @property
    def global_batch(self) -> int:
        """Samples of a step."""
        return self.micro_batch * self.accumulation

    def begin_epoch(self, epoch: int, batches: int) -> Position:
        """The place after `batches` micro-batches of an epoch."""
        return replace(self, epoch=epoch, batches_in_epoch=batches)

    def read(self, batches: int) -> Position:
        """The place after `batches` micro-batches more."""
        return replace(self, batches_in_epoch=self.batches_in_epoch + batches)

    def to_json(self) -> dict[str, Any]:
        """For a checkpoint."""
        return asdict(self) | {"global_batch": self.global_batch}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Position:
        """Out of a checkpoint."""
        return cls(**{field.name: values[field.name] for field in fields(cls)})

    def describe_batch(self) -> str:
        """For people: "16 (2 a rank x 4 accumulated x 2 ranks)"."""
        ranks = "1 rank" if self.num_ranks == 1 else f"{self.num_ranks} ranks"
        return f"{self.global_batch} ({self.per_device_batch} a rank x {self.accumulation} accumulated x {ranks})"

    def after(self, saved: Position) -> Position:
        """The place of a run of these sizes that has seen the samples of a saved one, down to a whole step.

        With the same global batch that is the same step. With another one it is the step that the run would be at, had
        it had these sizes from its start.
        """
        same = self.global_batch == saved.global_batch
        if self.steps_per_epoch is None or saved.steps_per_epoch is None:
            step = saved.global_step if same else saved.global_step * saved.global_batch // self.global_batch
            batches = saved.batches_in_epoch * saved.micro_batch // self.micro_batch
            return replace(self, global_step=step, epoch=saved.epoch, batches_in_epoch=batches)
        if same:
            epoch, steps = divmod(saved.global_step, self.steps_per_epoch)
        else:
            epoch, steps = divmod(saved.global_step, saved.steps_per_epoch)
            steps = steps * saved.global_batch // self.global_batch
        step = epoch * self.steps_per_epoch + steps
        return replace(self, global_step=step, epoch=epoch, batches_in_epoch=steps * self.accumulation)
