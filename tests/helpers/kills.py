"""Ends a rank by SIGKILL at a numbered event of training or saving."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

from transformers import TrainerCallback

from hf_moe_accel.weights.export import _TensorFile

_FILE_EVENTS = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.listdir", "os.scandir", "shutil.rmtree"}
_counting: Events | None = None
_hooked = False


class Events(TrainerCallback):
    """Counts what this rank does: each file that it touches below a directory, each tensor that it writes, each step.

    Args:
        directory: of the run.
        kill_at: the number of the event to die at; 0 is never.
        delay: seconds between that event and the end, to end between two events as well.
    """

    def __init__(self, directory: str, kill_at: int, delay: float) -> None:
        self._directory = directory
        self._kill_at = kill_at
        self._delay = delay
        self.names: list[str] = []

    def happened(self, name: str) -> None:
        self.names.append(name)
        if len(self.names) == self._kill_at:
            if self._delay:
                threading.Timer(self._delay, os.kill, (os.getpid(), signal.SIGKILL)).start()
            else:
                os.kill(os.getpid(), signal.SIGKILL)

    def audited(self, event: str, arguments: tuple[Any, ...]) -> None:
        path = arguments[0] if arguments else None
        if event in _FILE_EVENTS and isinstance(path, str | os.PathLike) and str(path).startswith(self._directory):
            self.happened(f"{event} {os.path.relpath(path, self._directory)}")

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.happened(f"step {state.global_step + 1} begins")

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.happened(f"optimizer of step {state.global_step + 1}")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.happened(f"step {state.global_step} ends")


@contextmanager
def counted(events: Events) -> Iterator[None]:
    """Let `events` know what happens in this process."""
    global _counting, _hooked
    if not _hooked:  # an audit hook stays for the life of the process
        sys.addaudithook(lambda event, arguments: _counting and _counting.audited(event, arguments))
        _hooked = True
    write = _TensorFile.write

    def counted_write(self: Any, tensor: Any, *arguments: Any) -> None:
        write(self, tensor, *arguments)
        events.happened(f"wrote {tensor.key}")

    _counting = events
    try:
        with mock.patch.object(_TensorFile, "write", counted_write):
            yield
    finally:
        _counting = None
