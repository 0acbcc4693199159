"""`hf-moe-accel checkpoint`: says whether checkpoints are as they were saved, and takes the standard model out of one.

Nothing here needs a GPU, the ranks that saved, or the model's class: a checkpoint holds the standard files already.
"""

from __future__ import annotations

import hashlib
import os
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hf_moe_accel.commands.output import check_out, count, how_to_load, in_bytes, progress, whole_directory
from hf_moe_accel.weights.checkpoint import PARTIAL, REPLACED, STATE_FOLDER, STATE_NAME, SavedRun
from hf_moe_accel.weights.files import read_json
from hf_moe_accel.weights.manifest import (
    ALTERED,
    MANIFEST_NAME,
    check_manifest,
    foreign_files,
    missing_or_resized,
    read_manifest,
)

# Of Trainer, and of no use to who loads the model.
_TRAINERS_OWN = ("trainer_state.json", "training_args.bin")
_CHECKPOINT_NAME = re.compile(r"checkpoint-(\d+)")


def check_verify(directory: Path) -> None:
    """Check the argument of `verify`.

    Raises:
        ValueError: there is no checkpoint to verify.
    """
    _check_directory(directory)
    if not _is_checkpoint(directory) and not _complete(directory) and not _half_written(directory):
        raise ValueError(
            f"{directory} holds no checkpoint: give a checkpoint (run/checkpoint-20) or a run's output_dir (run)"
        )


def verify(directory: Path) -> int:
    """Say whether a checkpoint, or each one of a run, is as it was saved, and return the exit code."""
    if _is_checkpoint(directory):
        num_problems = _verify_one(directory)
        if num_problems:
            print(f"DAMAGED: {count(num_problems, 'problem')} in {directory}.")
            return 1
        print(f"INTACT: every file of {directory} is as it was saved.")
        return 0

    checkpoints = _complete(directory)
    intact = [each for each in checkpoints if not _verify_one(each)]
    for each in _half_written(directory):
        print(each)
        print("  note: half-written: the run died while it was saved, or is saving it now; nothing resumes from it")
    newest = _newest(intact)
    offer = f"The newest intact one is {newest}." if newest else "None is intact."
    if not checkpoints:
        print(f"DAMAGED: {directory} holds no complete checkpoint.")
    elif len(intact) < len(checkpoints):
        print(f"DAMAGED: {len(checkpoints) - len(intact)} of {count(len(checkpoints), 'checkpoint')}. {offer}")
    else:
        print(f"INTACT: {count(len(checkpoints), 'checkpoint')}. {offer}")
        return 0
    return 1


def check_export(directory: Path, out: Path) -> None:
    """Check the arguments of `export`.

    Raises:
        ValueError: the first is no checkpoint, or the second no place for a new directory.
    """
    _check_directory(directory)
    if not _is_checkpoint(directory):
        which = _complete(directory)
        hint = f", for example {which[-1]}" if which else " (run/checkpoint-20)"
        raise ValueError(f"{directory} is no checkpoint: give one{hint}")
    check_out(out)
    if out.resolve().is_relative_to(directory.resolve()):
        raise ValueError(f"OUT {out} lies in the checkpoint, which is not changed: name a directory elsewhere")


def export(directory: Path, out: Path) -> int:
    """Copy the standard model, or the adapter, out of a checkpoint, verified, and return the exit code.

    `out` is there whole or not at all.
    """
    try:
        saved = read_manifest(directory)
        wanted = {name: entry for name, entry in saved.items() if not _is_training_state(name)}
        # Before the first byte is copied: reading all of a large checkpoint takes long.
        if problems := missing_or_resized(directory, wanted):
            raise ValueError("; ".join(f"{name} {problem}" for name, problem in problems.items()))
        _copy_whole(directory, out, wanted)
    except (OSError, ValueError) as error:
        print(f"FAILED: nothing was exported from {directory}: {error}", file=sys.stderr)
        return 1
    _print_foreign(foreign_files(directory, saved))
    print(f"{out}: {_size_of(wanted)}, verified while they were copied. Load it with")
    print(f"  {how_to_load(out)}")
    return 0


def _check_directory(directory: Path) -> None:
    if not directory.is_dir():
        problem = "is a file" if directory.exists() else "does not exist"
        raise ValueError(f"{directory} {problem}: give the directory of a checkpoint, for example run/checkpoint-20")


def _is_checkpoint(directory: Path) -> bool:
    """Also of one that has lost its manifest, or was given another name."""
    by_name = _CHECKPOINT_NAME.fullmatch(directory.resolve().name) is not None
    return by_name or (directory / MANIFEST_NAME).exists() or (directory / STATE_FOLDER).is_dir()


def _complete(run: Path) -> list[Path]:
    """A run's checkpoints by their steps, with those that get their name back when the run is resumed."""
    found = [path for path in (*run.glob("checkpoint-*"), *(run / REPLACED).glob("checkpoint-*")) if _is_named(path)]
    return sorted(
        (path for path in found if path.parent == run or not (run / path.name).exists()),
        key=lambda path: int(path.name.rpartition("-")[2]),
    )


def _half_written(run: Path) -> list[Path]:
    return sorted(path for path in (run / PARTIAL).glob("checkpoint-*") if _is_named(path))


def _is_named(path: Path) -> bool:
    return path.is_dir() and _CHECKPOINT_NAME.fullmatch(path.name) is not None


def _newest(intact: list[Path]) -> Path | None:
    """The one that a resumed run would take; of those that hold a model only, the one with the highest step."""
    states = [SavedRun(path, read_json(path / STATE_FOLDER / STATE_NAME)) for path in intact if _is_resumable(path)]
    if states:
        return max(states, key=lambda each: each.progress or 0).directory
    return intact[-1] if intact else None


def _is_resumable(directory: Path) -> bool:
    return (directory / STATE_FOLDER / STATE_NAME).exists()


def _verify_one(directory: Path) -> int:
    """Print what there is to say about a checkpoint and return the number of problems."""
    print(directory, flush=True)
    verdict = check_manifest(directory)
    if verdict.num_files:
        print(f"  {count(verdict.num_files, 'file')}, {in_bytes(verdict.num_bytes)}")
    for problem in verdict.problems:
        print(f"  {problem}")
    _print_foreign(verdict.foreign)
    if not verdict.problems and not _is_resumable(directory):
        print("  note: holds a model and no training state (save_only_model=True): it cannot be resumed from")
    return len(verdict.problems)


def _print_foreign(names: tuple[str, ...] | list[str]) -> None:
    for name in names:
        print(f"  note: {name} was not saved with the checkpoint and is ignored")


def _is_training_state(name: str) -> bool:
    return name.startswith(STATE_FOLDER + "/") or name in _TRAINERS_OWN


def _copy_whole(directory: Path, out: Path, wanted: Mapping[str, Mapping[str, Any]]) -> None:
    total = sum(entry["size"] for entry in wanted.values())
    with whole_directory(out) as copy, progress("Exporting", total) as bar:
        for name, entry in wanted.items():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            _copy_verified(directory / name, copy / name, name, entry, bar)


def _copy_verified(source: Path, target: Path, name: str, entry: Mapping[str, Any], bar: Any) -> None:
    digest = hashlib.sha256()
    try:
        with open(source, "rb") as reader, open(target, "wb") as writer:
            while block := reader.read(2**22):
                digest.update(block)
                writer.write(block)
                bar.update(len(block))
            writer.flush()
            os.fsync(writer.fileno())
    except OSError as error:
        # What fails once a file is open does not name it.
        raise OSError(f"{name} could not be copied: {error.strerror}") from error
    if digest.hexdigest() != entry["sha256"]:
        raise ValueError(f"{name} {ALTERED}")


def _size_of(files: Mapping[str, Mapping[str, Any]]) -> str:
    return f"{count(len(files), 'file')}, {in_bytes(sum(entry['size'] for entry in files.values()))}"
