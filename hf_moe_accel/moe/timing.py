"""How long the parts of a step take, on the steps that are measured."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch

_UNTIMED = nullcontext()


class PartTimer:
    """Times named parts by events on the current stream of a device; on the CPU by the host's clock.

    Off until `active` is set, and then an `if` a part. What a stream waits for inside a part (a transfer, a rank that
    is late) counts as that part; what runs on other streams behind it does not.

    Attributes:
        active: whether parts are timed.
        in_layers: whether those within layers are wanted, for which CUDA graphs that nobody asked for stand back.
        device: what computes them.
    """

    def __init__(self) -> None:
        """Nothing is measured yet."""
        self.active = self.in_layers = False
        self.device = torch.device("cpu")
        self._parts: list[tuple[str, Any, Any]] = []
        self._running: tuple[str, Any] | None = None

    def part(self, name: str) -> AbstractContextManager[None]:
        """Adds what happens inside to a part; several of one name add up."""
        return self._timed(name) if self.active else _UNTIMED

    def switch(self, name: str | None) -> None:
        """End the stretch that is under way, and begin another one; None: none. Parts may lie within a stretch."""
        if self._running is None and name is None:
            return
        now = self._now()
        if self._running is not None:
            self._parts.append((*self._running, now))
        self._running = None if name is None else (name, now)

    def clear(self) -> None:
        """Forget what was measured."""
        self._parts.clear()

    def take(self) -> dict[str, float]:
        """Seconds of each part since the last call. Waits for the device to come to the end of the last one."""
        seconds: defaultdict[str, float] = defaultdict(float)
        for name, since, until in self._parts:
            if isinstance(until, float):
                seconds[name] += until - since
            else:
                until.synchronize()
                seconds[name] += since.elapsed_time(until) / 1000
        self.clear()
        return dict(seconds)

    @contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        since = self._now()
        yield
        self._parts.append((name, since, self._now()))

    def _now(self) -> Any:
        if self.device.type == "cpu":
            return time.perf_counter()
        event = torch.Event(self.device, enable_timing=True)
        event.record()
        return event
