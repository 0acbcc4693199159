"""What a run leaves in its `output_dir` for `hf-moe-accel report`: one JSON object a line, the first about the run."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

NAME = "moe_metrics.jsonl"


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
    if not path.is_file():
        raise ValueError(
            f"{folder} holds no {NAME}: name the output_dir of a run of AcceleratedMoETrainer or MoEAccelCallback "
            "that has logged at least once (with expert_metrics=True)"
        )
    about, *records = _records(path)
    return Run(about, records)


def _records(path: Path) -> Iterator[dict[str, Any]]:
    for line in path.read_bytes().splitlines(keepends=True):
        if line.endswith(b"\n"):
            yield json.loads(line)


def _line(record: dict[str, Any]) -> bytes:
    return json.dumps(record, separators=(",", ":"), default=str).encode() + b"\n"
