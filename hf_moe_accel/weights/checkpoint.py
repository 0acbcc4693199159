"""The checkpoints of a run, each of which is there whole or not at all.

    run/checkpoint-20/               complete: its manifest was written last, and then it got this name
    run/_partial/checkpoint-30/      being written, or what a run that died has left; removed by the next save
    run/_replaced/checkpoint-30/     the one before of the same name, until the new one has taken its place

Names with an underscore are what Trainer's uploads to the Hub leave out.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from hf_moe_accel.log import say
from hf_moe_accel.weights.files import flush_directory, read_json
from hf_moe_accel.weights.manifest import MANIFEST_NAME, check_manifest, read_manifest, write_manifest
from hf_moe_accel.weights.ranks import Ranks

PARTIAL = "_partial"
REPLACED = "_replaced"
STATE_FOLDER = "training_state"
STATE_NAME = "state.json"
_NAME = re.compile(r"checkpoint-(\d+)")


class Part(Protocol):
    """What can be written to a checkpoint now, or later from a copy."""

    def copy(self) -> Part:
        """The same, from memory that training does not change."""

    def write(self, ranks: Ranks) -> None:
        """Write it. All ranks must call."""


class CheckpointSave:
    """One checkpoint on its way to the disk. All ranks must call every method.

    Args:
        final: where it will lie: `run/checkpoint-<step>`.
        ranks: who writes.
        background: of the same processes, a group for the thread that writes while training goes on; None writes
            everything at once.
    """

    def __init__(self, final: Path, ranks: Ranks, background: Ranks | None = None) -> None:
        """Touch nothing yet."""
        self.final = final
        self.directory = final.parent / PARTIAL / final.name
        self._ranks = ranks
        self._background = background
        self._parts: list[Part] = []
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def begin(self) -> None:
        """Make an empty directory to write to, in the place of whatever a run that died has left.

        Raises:
            AllRanksError: it cannot be made, or not all ranks see it.
        """
        _make_partial(self.directory / STATE_FOLDER, self.final.parent, f"Saving {self.final}", self._ranks)

    def add(self, part: Part) -> None:
        """Write a part, or keep a copy to write in the background."""
        if self._background is None:
            part.write(self._ranks)
        else:
            self._parts.append(part.copy())

    def complete(self, then: Callable[[], None]) -> None:
        """Write what is left, seal the checkpoint and give it its name; in the background if there is one.

        Args:
            then: what rank 0 does once the checkpoint is complete, for example delete older ones.
        """
        if self._background is None:
            self._finish(self._ranks, then)
            return
        self._thread = threading.Thread(
            target=self._finish_in_background, args=(self._background, then), name="hf-moe-accel-save", daemon=True
        )
        self._thread.start()

    def wait(self, timeout: float | None = None) -> None:
        """Wait for the background, for so many seconds at most, and raise what went wrong there."""
        if self._thread is not None:
            self._thread.join(timeout)
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def discard(self) -> None:
        """Remove what was written. Not a collective."""
        self._parts.clear()
        if self._ranks.rank == 0:
            shutil.rmtree(self.directory.parent, ignore_errors=True)

    def _finish(self, ranks: Ranks, then: Callable[[], None]) -> None:
        while self._parts:
            # Taken off the list, so that its copy is freed once it is written.
            self._parts.pop(0).write(ranks)
        write_manifest(self.directory, ranks)
        with ranks.same_outcome(f"Saving {self.final}"):
            if ranks.rank == 0:
                _give_name(self.directory, self.final)
                then()

    def _finish_in_background(self, ranks: Ranks, then: Callable[[], None]) -> None:
        try:
            self._finish(ranks, then)
        except BaseException as error:
            self._error = error
            # It is raised at the next save or at the end of training, where all ranks can end together.
            say(f"hf_moe_accel: {self.final} could not be saved: {error}", level=logging.ERROR)
            self.discard()


def check_run_directory(run: Path, ranks: Ranks) -> None:
    """Find out before training whether checkpoints can be written. All ranks must call.

    Raises:
        AllRanksError: the directory cannot be made or written to, or not all ranks see it.
    """
    task = f"Preparing {run} for checkpoints"
    _make_partial(run / PARTIAL, run, task, ranks)
    with ranks.same_outcome(task):
        if ranks.rank == 0:
            (run / PARTIAL).rmdir()


def _make_partial(directory: Path, run: Path, task: str, ranks: Ranks) -> None:
    """Make a directory to write to, where nothing is left of a save that died."""
    with ranks.same_outcome(task):
        if ranks.rank == 0:
            recover(run)
            _remove(run / PARTIAL)
            directory.mkdir(parents=True)
    with ranks.same_outcome(task):
        if not directory.is_dir():
            raise FileNotFoundError(
                f"rank 0 has made {directory}, which is not there for this rank: output_dir must lie on a file system "
                "that all ranks share"
            )


def recover(run: Path) -> None:
    """Undo the replacement of a checkpoint that was cut short: the old one gets its name back."""
    for old in (run / REPLACED).glob("checkpoint-*"):
        if not (run / old.name).exists():
            os.rename(old, run / old.name)
    _remove(run / REPLACED)


def _give_name(directory: Path, final: Path) -> None:
    replaced = final.parent / REPLACED / final.name
    if final.exists():
        replaced.parent.mkdir(exist_ok=True)
        os.rename(final, replaced)
    os.rename(directory, final)
    flush_directory(final.parent)
    _remove(replaced.parent)
    directory.parent.rmdir()


def _remove(directory: Path) -> None:
    if directory.exists():
        shutil.rmtree(directory)


@dataclass(frozen=True)
class SavedRun:
    """A checkpoint that training state was saved with; not verified.

    Attributes:
        directory: `run/checkpoint-<step>`.
        state: where training was, see `trainers/position`; None where that file is missing or damaged.
    """

    directory: Path
    state: dict[str, Any] | None

    @property
    def step(self) -> int:
        """Of its name."""
        return int(self.directory.name.rpartition("-")[2])

    @property
    def progress(self) -> int | None:
        """Samples that training had seen: of two checkpoints, the newer one has more."""
        return None if self.state is None else int(self.state["global_step"] * self.state["global_batch"])


def saved_runs(run: Path) -> list[SavedRun]:
    """The checkpoints of a run with training state, the newest first, damaged ones among them.

    A damaged one may not say how far it was: by its step it takes its place among the others. That one is damaged must
    not make a run go on from an older one without a word. Half-written ones do not count.
    """
    found = [
        SavedRun(directory, _state_of(directory))
        for directory in run.glob("checkpoint-*")
        if _NAME.fullmatch(directory.name) and _has_state(directory)
    ]
    ordered = sorted((each for each in found if each.progress is not None), key=lambda each: each.progress or 0)
    for each in sorted((each for each in found if each.progress is None), key=lambda each: each.step):
        older = [place for place, other in enumerate(ordered) if other.step < each.step]
        ordered.insert(older[-1] + 1 if older else 0, each)
    return ordered[::-1]


def _has_state(directory: Path) -> bool:
    try:
        return any(name.startswith(f"{STATE_FOLDER}/") for name in read_manifest(directory))
    except ValueError:
        return (directory / STATE_FOLDER).is_dir()


def _state_of(directory: Path) -> dict[str, Any] | None:
    try:
        state = read_json(directory / STATE_FOLDER / STATE_NAME)
        _ = int(state["global_step"] * state["global_batch"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return dict(state)


def newest_intact(run: Path, but: Path) -> Path | None:
    """The newest checkpoint of a run, another than `but`, whose files are all as they were saved."""
    for each in saved_runs(run):
        if each.directory.resolve() != but.resolve() and not check_manifest(each.directory).problems:
            return each.directory
    return None


def unusable(run: Path) -> list[str]:
    """A line for each checkpoint of a run that training cannot be resumed from, with the reason."""
    usable = {each.directory for each in saved_runs(run)}
    lines = [
        f"{directory} is half-written: the run died while it was saved"
        for directory in sorted((run / PARTIAL).glob("checkpoint-*"))
    ]
    for directory in sorted(run.glob("checkpoint-*")):
        if directory.is_dir() and directory not in usable:
            whole = (directory / MANIFEST_NAME).exists()
            reason = (
                "holds a model and no training state (save_only_model=True)" if whole else f"has no {MANIFEST_NAME}"
            )
            lines.append(f"{directory} {reason}")
    return lines
