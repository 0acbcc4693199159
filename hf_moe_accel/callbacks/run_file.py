"""What a run leaves in its `output_dir` for `hf-moe-accel report`: a JSON object a line, the first about the run."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

NAME = "moe_metrics.jsonl"
# Every number that is logged, and what it means. Loggers of transformers put "train/" in front.
METRICS = {
    "moe/tokens_per_second": "tokens, with padding, that all ranks trained on in a second",
    "moe/tokens_per_second_per_device": "the same, divided by the ranks",
    "moe/tflops_per_device": "10^12 model FLOPs a second and rank, by the formula in callbacks/flops.py",
    "moe/mfu": "model FLOPs utilisation: that, divided by the device's dense bf16 peak",
    "moe/step_time": "seconds of a step: the mean since the last log, without evaluation and saving",
    "moe/time/data": "seconds that rank 0 waited for a step's batches: the mean since the last log",
    "moe/time/forward": "seconds of the forward passes of this step on rank 0",
    "moe/time/backward": "seconds from there to the optimizer on rank 0: losses, backward passes, clipping",
    "moe/time/dispatch": "of these two, sending tokens to their experts, as far as nothing computes meanwhile",
    "moe/time/experts": "of these two, the experts",
    "moe/time/combine": "of these two, sending results back, as far as nothing computes meanwhile",
    "moe/time/optimizer": "seconds of the optimizer's step on rank 0",
    "moe/peak_memory_gib": "the most memory that a rank has had in use so far: of its GPU, without one of its process",
    "moe/load_max_over_mean": "tokens of the busiest expert, divided by an equal share: the worst layer",
    "moe/load_cv": "standard deviation of the tokens of an expert, divided by their mean: the mean over layers",
    "moe/idle_experts": "share of the experts that got no token since the last log: the mean over layers",
    "moe/router_entropy": "entropy of the softmax of router logits, 1 where experts are equal: the mean over layers",
    "moe/rank_max_over_mean": "rows that the busiest rank's experts compute, divided by their mean: the worst layer",
    "moe/rank_tokens_max": "tokens sent to the rank that was sent most since the last log, over all layers",
    "moe/rank_tokens_min": "tokens sent to the rank that was sent fewest",
    "moe/dropped": "choices of experts minus rows that experts computed, over all ranks; 0: nothing was dropped",
    "moe/aux_loss": "the auxiliary loss that the model returned in this step: the mean over ranks",
}


class RunFile:
    """Appends records. A line is written whole or, if the program is killed, is the last one and is not read.

    Args:
        folder: the run's `output_dir`.
        about: the first line of a new file: what is trained, and how it was prepared.
        step: where the run begins; more than 0 goes on from the records up to there.
    """

    def __init__(self, folder: str | os.PathLike[str], about: dict[str, Any], step: int) -> None:
        """Write nothing before the first record."""
        self._path = Path(folder, NAME)
        self._about = about
        self._step = step
        self._begun = False

    def append(self, record: dict[str, Any]) -> None:
        """Write one record; it has its "step".

        Raises:
            OSError: it cannot be written.
        """
        if not self._begun:
            self._begin()
        with self._path.open("ab") as file:
            file.write(_line(record))

    def _begin(self) -> None:
        lines = [_line(self._about)]
        if self._step and self._path.exists():
            # A run that was killed has gone further than the checkpoint that this one goes on from.
            lines += [_line(record) for record in list(_records(self._path))[1:] if record["step"] <= self._step]
        self._path.parent.mkdir(parents=True, exist_ok=True)
        written = self._path.with_suffix(".partial")
        written.write_bytes(b"".join(lines))
        os.replace(written, self._path)
        self._begun = True


@dataclass(frozen=True)
class Run:
    """What was read.

    Attributes:
        about: of the run.
        records: one for each time that the trainer logged; "step" and "logs", and "experts" where tokens were counted.
    """

    about: dict[str, Any]
    records: list[dict[str, Any]]

    def series(self, name: str) -> list[tuple[int, float]]:
        """(step, value) of a logged number, where it was logged."""
        return [(record["step"], record["logs"][name]) for record in self.records if name in record["logs"]]

    def counted(self) -> list[tuple[int, dict[str, Any]]]:
        """(step, what was counted since the last one)."""
        return [(record["step"], record["experts"]) for record in self.records if "experts" in record]


def read_run(folder: str | os.PathLike[str]) -> Run:
    """Read what a run has written so far.

    Raises:
        ValueError: there is no such file in the folder, or nothing in it.
    """
    path = Path(folder, NAME)
    lines = list(_records(path)) if path.is_file() else []
    if not lines:
        raise ValueError(
            f"{folder} holds no {NAME}: name the output_dir of a run of our trainers, or of one with `add_metrics`, "
            "that has logged at least once (with expert_metrics=True)"
        )
    about, *records = lines
    return Run(about, records)


def _records(path: Path) -> Iterator[dict[str, Any]]:
    for line in path.read_bytes().splitlines(keepends=True):
        if line.endswith(b"\n"):
            yield json.loads(line)


def _line(record: dict[str, Any]) -> bytes:
    return json.dumps(record, separators=(",", ":"), default=str).encode() + b"\n"
