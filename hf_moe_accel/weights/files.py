"""Files that are on the disk when they are said to be."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


def flush_file(path: str | os.PathLike[str]) -> None:
    """Return when a file's content is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# A directory is flushed in the same way; it holds the names of its files.
flush_directory = flush_file


def write_json(path: Path, value: Any, **options: Any) -> None:
    """Write a JSON file and flush it."""
    with open(path, "w") as file:
        file.write(json.dumps(value, indent=2, **options) + "\n")
        file.flush()
        os.fsync(file.fileno())


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        ValueError: the file holds no JSON; names it.
    """
    try:
        return json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error
