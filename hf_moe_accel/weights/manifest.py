"""The manifest of a checkpoint: the size and the checksum of each of its files."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from hf_moe_accel.weights.files import flush_directory, flush_file, read_json, write_json
from hf_moe_accel.weights.ranks import Ranks

MANIFEST_NAME = "manifest.json"
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
        names = ranks.share(_files(directory))
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
    if not directory.is_dir():
        return Verdict((f"{directory} is no directory",), ())
    try:
        saved: Mapping[str, Any] = read_json(directory / MANIFEST_NAME)["files"]
    except FileNotFoundError:
        reason = "it was not saved by this library's trainers, or its saving never ended"
        return Verdict((f"{MANIFEST_NAME} is missing: {reason}",), ())
    except (ValueError, KeyError, TypeError) as error:
        return Verdict((f"{MANIFEST_NAME} is damaged: {error}",), ())
    present = set(_files(directory))
    problems: dict[str, str] = {}
    intact = []
    for name, entry in saved.items():
        if name not in present:
            problems[name] = "is missing"
        elif (size := (directory / name).stat().st_size) != entry["size"]:
            what = "is truncated" if size < entry["size"] else "has grown"
            problems[name] = f"{what}: {size} bytes instead of {entry['size']}"
        else:
            intact.append(name)
    sums = _checksums(directory, _my_share(directory, intact, ranks), "Verifying", ranks, flush=False)
    altered = {name: "is altered: its checksum is another" for name, entry in sums.items() if entry != saved[name]}
    for part in ranks.gather(altered):
        problems |= part
    return Verdict(
        tuple(f"{name} {problem}" for name, problem in sorted(problems.items())),
        tuple(sorted(present - set(saved) - {MANIFEST_NAME})),
        len(saved),
        sum(entry["size"] for entry in saved.values()),
    )


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
            for block in _blocks(directory / name):
                digest.update(block)
                size += len(block)
                bar.update(len(block))
            if flush:
                flush_file(directory / name)
            return name, {"size": size, "sha256": digest.hexdigest()}

        with ThreadPoolExecutor(_THREADS) as pool:
            return dict(pool.map(entry, names))


def _blocks(path: Path) -> Iterator[bytes]:
    with open(path, "rb") as file:
        while block := file.read(2**22):
            yield block
