"""Reads what wandb has written offline."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from wandb.proto import wandb_internal_pb2

_BLOCK, _HEADER, _FILE_HEADER = 32768, 7, 7
_FULL, _FIRST, _MIDDLE, _LAST = 1, 2, 3, 4


@dataclass
class OfflineRun:
    """What an offline run holds.

    config: as the run page shows it; history: one entry a logged step; artifacts: their names, and the paths in each;
    files: the folder of its images and tables.
    """

    files: Path
    config: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    artifacts: dict[str, list[str]] = field(default_factory=dict)

    def logged(self, key: str) -> list[Any]:
        """The values of a key, in the order of logging."""
        return [entry[key] for entry in self.history if key in entry]


def read_offline_run(folder: Path) -> OfflineRun:
    """The one run in a folder that wandb used as its directory."""
    (path,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    run = OfflineRun(path.parent / "files")
    for payload in _payloads(path.read_bytes()):
        record = wandb_internal_pb2.Record.FromString(payload)
        kind = record.WhichOneof("record_type")
        if kind == "history":
            run.history.append(_nested(record.history.item))
        elif kind in ("run", "config"):
            run.config |= _nested(record.run.config.update if kind == "run" else record.config.update)
        elif kind == "request" and record.request.HasField("log_artifact"):
            _add_artifact(run, record.request.log_artifact.artifact)
        elif kind == "artifact":
            _add_artifact(run, record.artifact)
    return run


def _add_artifact(run: OfflineRun, artifact: Any) -> None:
    run.artifacts.setdefault(artifact.name, []).extend(entry.path for entry in artifact.manifest.contents)


def _nested(items: Any) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for item in items:
        *path, name = item.nested_key or [item.key]
        place = values
        for key in path:
            place = place.setdefault(key, {})
        place[name] = json.loads(item.value_json)
    return values


def _payloads(content: bytes) -> Iterator[bytes]:
    """The records of a log in LevelDB's format: blocks of 32 KiB, each record whole or in parts."""
    assert content.startswith(b":W&B")
    place, parts = _FILE_HEADER, b""
    while place + _HEADER <= len(content):
        left = _BLOCK - place % _BLOCK
        if left < _HEADER:
            place += left
            continue
        _, length, kind = struct.unpack("<IHB", content[place : place + _HEADER])
        parts += content[place + _HEADER : place + _HEADER + length]
        place += _HEADER + length
        if kind in (_FULL, _LAST):
            yield parts
            parts = b""
