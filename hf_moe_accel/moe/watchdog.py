"""A job whose ranks wait for each other forever ends, and says who was where.

Each rank writes its place to the process group's store from a thread, about once a second, without a collective and
without touching the device. A rank that waits in an exchange longer than the timeout raises a flag in the store; every
rank that sees the flag prints the places of all ranks and exits.
"""

from __future__ import annotations

import faulthandler
import json
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

EXIT_CODE = 75


class Watchdog:
    """Watches the waits of one model's token path on this rank.

    Args:
        store: the store of the process group; the thread uses a connection of its own.
        rank: this rank.
        world_size: all ranks.
        timeout: seconds that one wait may take.
        name: keeps several models of a run apart; the same on all ranks.
    """

    def __init__(self, store: Any, rank: int, world_size: int, timeout: float, name: str) -> None:
        """Start the thread."""
        self._store = store.clone()
        self._rank = rank
        self._world_size = world_size
        self._timeout = timeout
        self._prefix = f"hf_moe_accel/{name}"
        self._interval = min(1.0, timeout / 4)
        self._place = "not in the MoE layers yet"
        self._waits_since: float | None = None
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="hf-moe-accel-watchdog", daemon=True)
        self._thread.start()

    @contextmanager
    def waiting(self, step: int, layer: int, direction: str) -> Iterator[None]:
        """Marks an exchange: `direction` is for example "forward, dispatch"."""
        self._place = f"step {step}, layer {layer}, {direction}"
        self._waits_since = time.monotonic()
        try:
            yield
        finally:
            self._waits_since = None

    def close(self) -> None:
        """Stop watching. Call before the process group goes."""
        self._place = f"done (last: {self._place})"
        self._closed.set()
        self._thread.join(timeout=5)

    def _watch(self) -> None:
        try:
            while not self._closed.wait(self._interval):
                self._publish()
                since = self._waits_since
                if since is not None and time.monotonic() - since > self._timeout:
                    self._store.set(f"{self._prefix}/stuck", str(self._rank))
                if self._store.check([f"{self._prefix}/stuck"]):
                    self._end()
            self._publish()
        except Exception:  # The store is gone, and with it the run: nothing is left to watch.
            return

    def _publish(self) -> None:
        since = self._waits_since
        waited = None if since is None else round(time.monotonic() - since, 1)
        value = json.dumps({"place": self._place, "waited": waited})
        self._store.set(f"{self._prefix}/rank/{self._rank}", value)

    def _end(self) -> None:
        self._publish()
        # Every rank sees the flag within two rounds and has then said where it is.
        time.sleep(2 * self._interval)
        stuck = self._store.get(f"{self._prefix}/stuck").decode()
        lines = [
            f"hf_moe_accel: rank {self._rank}: rank {stuck} waited more than collective_timeout={self._timeout:g} s "
            "for the other ranks in an exchange of tokens. Every rank must run the same forward and backward passes "
            "(a batch, an evaluation or a generation on some ranks only is the usual cause). Where each rank was:",
            *(f"  {line}" for line in self._table()),
        ]
        print("\n".join(lines), file=sys.stderr, flush=True)
        faulthandler.dump_traceback(file=sys.stderr, all_threads=True)
        sys.stderr.flush()
        # Rank 0 may hold the store that the others still read.
        time.sleep(self._interval * (4 if self._rank == 0 else 1))
        os._exit(EXIT_CODE)

    def _table(self) -> list[str]:
        """One line for each place, with all ranks that are there."""
        ranks_at: dict[str, list[int]] = {}
        for rank in range(self._world_size):
            key = f"{self._prefix}/rank/{rank}"
            text = "has not started its MoE layers"
            if self._store.check([key]):
                entry = json.loads(self._store.get(key))
                waited = entry["waited"]
                text = entry["place"] + (", computing or elsewhere" if waited is None else f", waiting for {waited} s")
            ranks_at.setdefault(text, []).append(rank)
        return [f"rank{'s' * (len(r) > 1)} {', '.join(map(str, r))}: {text}" for text, r in ranks_at.items()]
