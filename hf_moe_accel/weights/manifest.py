"""The manifest of a checkpoint: the size and the checksum of each of its files."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from tqdm import tqdm

from hf_moe_accel.weights.files import flush_directory, flush_file, write_json
from hf_moe_accel.weights.ranks import Ranks

MANIFEST_NAME = "manifest.json"
ALTERED = "is altered: its checksum is another"
_THREADS = 4  # hashing runs outside Python's lock; more than a few do not read faster


@dataclass(frozen=True)
class Verdict:
    """What a check of a checkpoint's files has found.

    Attributes:
        problems: what is wrong, a line each that names the file; empty if all is as it was saved.
        foreign: files that were not saved with the checkpoint. Nothing reads them.
        num_files: files of the manifest.
        num_bytes: their sizes together.
    """

    problems: tuple[str, ...]
    foreign: tuple[str, ...]
    num_files: int = 0
    num_bytes: int = 0


def write_manifest(directory: Path, ranks: Ranks) -> None:
    """Seal a checkpoint: flush all its files and write the manifest, last of all. All ranks must call."""
    with ranks.same_outcome(f"Sealing {directory}"):
        # On a network file system a rank may see its own new files only, by listing; by name it finds all.
        names = sorted(set().union(*ranks.gather(_files(directory))))
        sums = _checksums(directory, _my_share(directory, names, ranks), "Sealing", ranks, flush=True)
        entries: dict[str, Any] = {}
        for part in ranks.gather(sums):
            entries |= part
        if ranks.rank == 0:
            for folder in {directory, *((directory / name).parent for name in names)}:
                flush_directory(folder)
            write_json(directory / MANIFEST_NAME, {"format": 1, "files": dict(sorted(entries.items()))})
            flush_directory(directory)


def check_manifest(directory: Path, ranks: Ranks | None = None) -> Verdict:
    """Compare a checkpoint's files with its manifest, each rank a part of them. All ranks must call, if given.

    Args:
        directory: of the checkpoint.
        ranks: who reads; None is this process alone.
    """
    ranks = ranks or Ranks(alone=True)
    saved: Mapping[str, Mapping[str, Any]] = {}
    unreadable = None
    try:
        saved = read_manifest(directory)
    except ValueError as error:
        unreadable = str(error)
    # Before any rank returns: one that does not see the directory must not leave the others waiting for it.
    by_rank = ranks.gather(unreadable)
    for rank, reason in enumerate(by_rank):
        if reason is not None:
            seen_by_others = None in by_rank
            return Verdict((f"{reason} (on rank {rank}, not on all)" if seen_by_others else reason,), ())
    problems = missing_or_resized(directory, saved)
    intact = [name for name in saved if name not in problems]
    try:
        sums = _checksums(directory, _my_share(directory, intact, ranks), "Verifying", ranks, flush=False)
        altered = {name: ALTERED for name, entry in sums.items() if entry != saved[name]}
    except OSError as error:
        altered = {os.path.relpath(error.filename, directory): f"cannot be read: {error.strerror}"}
    for part in ranks.gather(altered):
        problems |= part
    return Verdict(
        tuple(f"{name} {problem}" for name, problem in sorted(problems.items())),
        tuple(foreign_files(directory, saved)),
        len(saved),
        sum(entry["size"] for entry in saved.values()),
    )


def read_manifest(directory: Path) -> dict[str, dict[str, Any]]:
    """The size and the sha256 that each file of a checkpoint was saved with, by its name. Not a collective.

    Raises:
        ValueError: there is no manifest, or it is damaged.
    """
    if not directory.is_dir():
        raise ValueError(f"{directory} is no directory")
    try:
        # Bytes, since a damaged file need not be text.
        files: dict[str, dict[str, Any]] = json.loads((directory / MANIFEST_NAME).read_bytes())["files"]
        for name, entry in files.items():
            path = PurePosixPath(name)
            if path.is_absolute() or ".." in path.parts or not _is_entry(entry):
                raise ValueError(f"it says of {name!r}: {entry!r}")
    except FileNotFoundError:
        reason = "it was not saved by this library's trainers, or its saving never ended"
        raise ValueError(f"{MANIFEST_NAME} is missing: {reason}") from None
    except OSError as error:
        raise ValueError(f"{MANIFEST_NAME} cannot be read: {error.strerror}") from error
    except KeyError as error:
        raise ValueError(f"{MANIFEST_NAME} is damaged: it lacks {error}") from error
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{MANIFEST_NAME} is damaged: {error}") from error
    return files


def _is_entry(entry: Any) -> bool:
    return isinstance(entry, dict) and isinstance(entry.get("size"), int) and isinstance(entry.get("sha256"), str)


def missing_or_resized(directory: Path, saved: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """What is wrong with which files, as far as it shows without reading them."""
    problems = {}
    for name, entry in saved.items():
        path = directory / name
        if not path.is_file():
            problems[name] = "is missing"
        elif (size := path.stat().st_size) != entry["size"]:
            what = "is truncated" if size < entry["size"] else "has grown"
            problems[name] = f"{what}: {size} bytes instead of {entry['size']}"
    return problems


def foreign_files(directory: Path, saved: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """The names of the files that were not saved with the checkpoint."""
    return [name for name in _files(directory) if name not in saved and name != MANIFEST_NAME]


def _files(directory: Path) -> list[str]:
    return sorted(
        str(Path(folder, name).relative_to(directory)) for folder, _, names in os.walk(directory) for name in names
    )


def _my_share(directory: Path, names: Sequence[str], ranks: Ranks) -> list[str]:
    """This rank's files, by size: the same distribution on all ranks."""
    load = [0] * ranks.world_size
    mine = []
    for size, name in sorted(((directory / name).stat().st_size, name) for name in names)[::-1]:
        rank = load.index(min(load))
        load[rank] += size
        if rank == ranks.rank:
            mine.append(name)
    return mine


def _checksums(directory: Path, names: Sequence[str], task: str, ranks: Ranks, *, flush: bool) -> dict[str, Any]:
    total = sum((directory / name).stat().st_size for name in names)
    options = {"unit": "B", "unit_scale": True, "unit_divisor": 1024, "leave": False}
    with tqdm(desc=task, total=total, delay=2.0, disable=ranks.rank != 0, **options) as bar:

        def entry(name: str) -> tuple[str, dict[str, Any]]:
            digest, size = hashlib.sha256(), 0
            try:
                for block in _blocks(directory / name):
                    digest.update(block)
                    size += len(block)
                    bar.update(len(block))
                if flush:
                    flush_file(directory / name)
            except OSError as error:
                # What fails once a file is open does not name it.
                raise OSError(error.errno, error.strerror, str(directory / name)) from error
            return name, {"size": size, "sha256": digest.hexdigest()}

        with ThreadPoolExecutor(_THREADS) as pool:
            return dict(pool.map(entry, names))


def _blocks(path: Path) -> Iterator[bytes]:
    with open(path, "rb") as file:
        while block := file.read(2**22):
            yield block
