"""What the commands that write a directory share: OUT is there whole or not at all, and is told how to be loaded."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tqdm import tqdm

from hf_moe_accel.weights.files import flush_directory, read_json

_ADAPTER_CONFIG = "adapter_config.json"


def check_out(out: Path) -> None:
    """Check that a directory can be made.

    Raises:
        ValueError: it is a file, not empty or a mount point, or half of it lies beside.
    """
    target = out.resolve()
    if target.exists() and not target.is_dir():
        raise ValueError(f"OUT {out} is a file: name a directory, which is made")
    if target.is_dir() and any(target.iterdir()):
        raise ValueError(f"OUT {out} is not empty, and nothing in it is overwritten: name a new directory")
    if target.is_mount():
        raise ValueError(f"OUT {out} is a mount point, whose name a finished copy cannot take: name a directory in it")
    if _beside(target).exists():
        raise ValueError(
            f"{_beside(target)} exists: a command that died has left it, or one runs. Remove it, or name another "
            "directory"
        )


@contextmanager
def whole_directory(out: Path) -> Iterator[Path]:
    """A directory to write to, which gets its name once everything in it is on the disk; gone if the body fails."""
    target = out.resolve()
    copy = _beside(target)
    copy.parent.mkdir(parents=True, exist_ok=True)
    copy.mkdir()
    try:
        yield copy
        for folder, _, _ in os.walk(copy):
            flush_directory(folder)
        os.rename(copy, target)  # takes the place of an empty directory
        flush_directory(target.parent)
    except BaseException:
        shutil.rmtree(copy, ignore_errors=True)
        raise


def progress(task: str, total: int) -> Any:
    """A bar over bytes, once it takes longer than a moment."""
    return tqdm(desc=task, total=total, delay=2.0, unit="B", unit_scale=True, unit_divisor=1024, leave=False)


def how_to_load(out: Path) -> str:
    """The line of Python that loads a model or an adapter."""
    if not (out / _ADAPTER_CONFIG).exists():
        return f"AutoModelForCausalLM.from_pretrained({str(out)!r})"
    base = read_json(out / _ADAPTER_CONFIG).get("base_model_name_or_path")
    model = f"AutoModelForCausalLM.from_pretrained({base!r})" if base else "base"
    return f"PeftModel.from_pretrained({model}, {str(out)!r})"


def in_bytes(number: int) -> str:
    """For people: "1.69MB"."""
    return str(tqdm.format_sizeof(number, "B", 1024))


def count(number: int, noun: str) -> str:
    """For people: "2 files"."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _beside(target: Path) -> Path:
    """Where a directory grows until it is whole."""
    return target.with_name(target.name + ".partial")
