"""A job whose ranks wait for each other forever ends, and says who was where.

Each rank writes its place to the process group's store from a thread, about once a second, without a collective and
without touching the device. Within a forward or backward pass a rank goes from one exchange of tokens to the next. One
that comes no further for longer than the timeout, waiting in the exchange or in a collective of FSDP2 on the way
there, raises a flag in the store; every rank that sees the flag prints the places of all ranks and exits.
"""

from __future__ import annotations

import atexit
import faulthandler
import json
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

EXIT_CODE = 75


class _Place(NamedTuple):
    """Where this rank is; replaced as a whole, so that the thread never reads half of one.

    Attributes:
        name: for example "step 3, layer 1, forward, dispatch".
        state: "in" an exchange, "after" one and on the way to the next, or "outside" the passes of the model.
        since: `time.monotonic()` of the arrival.
    """

    name: str
    state: str
    since: float


class Watchdog:
    """Watches the forward and backward passes of one model on this rank.

    Args:
        store: the store of the process group; the thread uses a connection of its own.
        rank: this rank.
        world_size: all ranks.
        timeout: seconds that a rank may come no further within a pass.
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
        self._in_pass = False
        self._go("the start", "outside")
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="hf-moe-accel-watchdog", daemon=True)
        self._thread.start()
        # A daemon thread that is inside the store when the interpreter goes would abort the process.
        atexit.register(self._at_exit)

    def enter(self, place: str) -> None:
        """A pass of the model begins: `place` is for example "the beginning of step 3, forward"."""
        self._in_pass = True
        self._go(place, "after")

    def leave(self) -> None:
        """The pass has ended."""
        self._in_pass = False
        self._go(self._place.name, "outside")

    @contextmanager
    def waiting(self, step: int, layer: int, direction: str) -> Iterator[None]:
        """Marks an exchange: `direction` is for example "forward, dispatch"."""
        place = f"step {step}, layer {layer}, {direction}"
        self._go(place, "in")
        try:
            yield
        finally:
            self._go(place, "after" if self._in_pass else "outside")

    def close(self) -> None:
        """Stop watching. Call before the process group goes.

        While an error of a collective is being handled, its traceback is told where each rank was.
        """
        atexit.unregister(self._at_exit)
        self._closed.set()
        self._thread.join(timeout=5)
        error = sys.exception()
        if isinstance(error, RuntimeError):
            error.add_note(self._who_is_where())

    def _at_exit(self) -> None:
        # Set where an exception has ended the program.
        if isinstance(getattr(sys, "last_value", None), RuntimeError):
            print(self._who_is_where(), file=sys.stderr, flush=True)
        self.close()

    def _go(self, name: str, state: str) -> None:
        self._place = _Place(name, state, time.monotonic())

    def _watch(self) -> None:
        while True:
            place = self._place
            late = place.state != "outside" and time.monotonic() - place.since > self._timeout
            try:
                self._publish()
                if late:
                    self._store.set(f"{self._prefix}/stuck", str(self._rank))
                ends = self._store.check([f"{self._prefix}/stuck"])
            except Exception:  # The store went with the rank that held it: this rank still watches itself.
                ends = late
            if ends:
                self._end()
            if self._closed.wait(self._interval):
                return

    def _publish(self) -> None:
        self._store.set(f"{self._prefix}/rank/{self._rank}", json.dumps(self._described()))

    def _described(self) -> str:
        place = self._place
        seconds = time.monotonic() - place.since
        if place.state == "outside":
            return f"outside the model for {seconds:.1f} s, last after {place.name}"
        return f"{place.state} {place.name}, for {seconds:.1f} s"

    def _end(self) -> None:
        atexit.unregister(self._at_exit)
        # Every rank sees the flag within two rounds and has then said where it is.
        time.sleep(2 * self._interval)
        faulthandler.dump_traceback(file=sys.stderr, all_threads=True)
        message = (
            f"hf_moe_accel: rank {self._rank}: a rank came no further in a forward or backward pass for more than "
            f"collective_timeout={self._timeout:g} s, so that this job ends. Every rank must run the same passes: a "
            f"batch, an evaluation or a generation on some ranks only is the usual cause.\n{self._who_is_where()}"
        )
        print(message, file=sys.stderr, flush=True)
        # A rank that ends takes the others' connections with it, and rank 0 perhaps the store: all print first.
        time.sleep(self._interval * (4 if self._rank == 0 else 2))
        os._exit(EXIT_CODE)

    def _who_is_where(self) -> str:
        """One line for each place, with all ranks that are there."""
        ranks_at: dict[str, list[int]] = {}
        for rank in range(self._world_size):
            ranks_at.setdefault(self._described() if rank == self._rank else self._read(rank), []).append(rank)
        lines = [f"  rank{'s' * (len(r) > 1)} {', '.join(map(str, r))}: {text}" for text, r in ranks_at.items()]
        return "\n".join(["hf_moe_accel: where each rank was:", *lines])

    def _read(self, rank: int) -> str:
        key = f"{self._prefix}/rank/{rank}"
        try:
            return str(json.loads(self._store.get(key))) if self._store.check([key]) else "not in the model yet"
        except Exception:
            return "unknown, since the store of the process group is gone"
