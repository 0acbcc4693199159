"""Runs functions on 1, 2 or 4 ranks, in worker processes that a pytest session starts once, and whole programs.

The workers are forked from one server that has imported torch and transformers already, so that a case costs
milliseconds, and so does a new worker. The life of a case on each of its ranks:

    pool                                    worker (one per rank)
    Case ------------------------------->   set environment, seeds and process group; call fn
                                       <--  Report: its value, or a traceback
    release, once all have reported   -->   destroy the process group, put global state back
    or one has failed                  <--  Report: clean, or a traceback

Waiting for the release keeps a fast rank from closing connections that a slow one still reads from. Releasing a
failed rank at once closes them, which ends the collectives that the others wait in. A rank that stays silent
nevertheless is asked for its Python stack. The workers of a failed case are killed.
"""

from __future__ import annotations

import atexit
import contextlib
import enum
import multiprocessing
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from multiprocessing import connection, forkserver
from pathlib import Path
from typing import Any

import psutil
import torch.distributed as dist

from tests.helpers.rank_worker import PRELOAD, STACK_SIGNAL, Case, Report, dumps, worker_main

WORLD_SIZES = (1, 2, 4)
START_TIMEOUT = 120.0  # seconds for the imports of a new pool, on a busy machine
FAILURE_GRACE = 5.0  # seconds that the other ranks have left once one has failed
CLEAN_UP_TIMEOUT = 30.0  # seconds to clean up after a case that passed
SHOWN_OUTPUT = 4000  # characters of a rank's output shown in an error

_RANK_VARIABLES = (
    "RANK",
    "LOCAL_RANK",
    "GROUP_RANK",
    "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
    "TORCHELASTIC_RUN_ID",
    "TORCHELASTIC_RESTART_COUNT",
    "TORCHELASTIC_USE_AGENT_STORE",
)
# The environment variable by which the processes of one launch are found.
_LAUNCH_MARK = "RANKS_LAUNCH_ID"
# What gloo says on a healthy rank when another one has gone.
_CONSEQUENCE = re.compile(r"closed by peer|reset by peer|broken pipe|connection refused|socket closed", re.IGNORECASE)


class RanksError(AssertionError):
    """A rank failed, died or was stuck; the message holds all tracebacks and stacks, and every rank's output."""


class LaunchTimeout(AssertionError):
    """A launched program ran out of time; the message holds its output and the stacks of its Python processes."""


class _Worker:
    """One process of the pool, the pipe to it, and the file that its stdout and stderr go to."""

    def __init__(self, index: int, store_port: int, directory: str) -> None:
        context = multiprocessing.get_context("forkserver")
        self.log = Path(directory, f"worker{index}.log")
        self.log.write_bytes(b"")
        self.conn, theirs = context.Pipe()
        self.process = context.Process(
            target=worker_main, args=(theirs, store_port, str(self.log)), name=f"rank worker {index}"
        )
        self.process.start()
        theirs.close()

    def wait_until_ready(self) -> None:
        try:
            if not self.conn.poll(START_TIMEOUT):
                raise RanksError(f"{self.process.name} did not start within {START_TIMEOUT:g} s\n{self.output()}")
            self.conn.recv_bytes()
        except EOFError:
            raise RanksError(f"{self.process.name} died while it started\n{self.output()}") from None

    def send(self, case: Case) -> None:
        os.truncate(self.log, 0)
        with contextlib.suppress(ConnectionError):  # `_drive` notes that it has died
            self.conn.send_bytes(pickle.dumps(case))

    def has_died(self) -> bool:
        """Says whether an idle worker has died: one that lives has nothing to say."""
        return self.conn.poll() or not self.process.is_alive()

    def output(self) -> str:
        return self.log.read_text(errors="replace")

    def kill(self) -> int:
        """Kills what still runs of the worker and of the processes that cases started in its session.

        Returns the worker's exit code; negative, the signal that it died of.
        """
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.join()
        self.conn.close()
        return self.process.exitcode


class _State(enum.Enum):
    RUNNING = enum.auto()
    REPORTED = enum.auto()  # fn has returned or raised; the worker waits for its release
    RELEASED = enum.auto()  # cleaning up
    CLEAN = enum.auto()  # ready for the next case
    DEAD = enum.auto()  # or killed, since it could not be made clean


class _Rank:
    """What is known of one rank of a running case."""

    def __init__(self, worker: _Worker) -> None:
        self.worker = worker
        self.state = _State.RUNNING
        self.value = b""  # pickled
        self.error = ""  # traceback, stack, or how the worker died
        self.error_line = ""  # the exception alone, where there is one
        self.failed_at = 0.0
        self.output_end: int | None = None  # where a stack follows the case's own output

    @property
    def finished(self) -> bool:
        return self.state in (_State.CLEAN, _State.DEAD)

    @property
    def is_consequence(self) -> bool:
        return bool(_CONSEQUENCE.search(self.error_line))

    @property
    def output(self) -> str:
        return self.worker.output()[: self.output_end]

    def fail(self, error: str, error_line: str = "", at: float | None = None) -> None:
        self.error_line = "" if self.error else error_line
        self.failed_at = self.failed_at or at or time.monotonic()
        self.error = f"{self.error}\n{error}".strip()

    def receive(self) -> None:
        """Takes the worker's next message, or notes that it has died."""
        try:
            # Processes that it has forked may hold the pipe of a dead worker open: then there is nothing to read.
            report: Report | None = pickle.loads(self.worker.conn.recv_bytes()) if self.worker.conn.poll() else None
        except (EOFError, ConnectionError):
            report = None
        if report is None:
            self.fail(f"the process {self.kill()}")
            return
        if report.error:
            self.fail(report.error, report.error_line, report.time)
        if self.state is _State.RUNNING:
            self.value, self.state = report.value, _State.REPORTED
        elif report.error or not report.reusable:
            self.kill()
        else:
            self.state = _State.CLEAN

    def release(self) -> None:
        if self.state is _State.REPORTED:
            self.state = _State.RELEASED
            with contextlib.suppress(ConnectionError):
                self.worker.conn.send_bytes(b"")

    def kill(self) -> str:
        """Makes sure that the worker is dead and says how it died."""
        self.state = _State.DEAD
        code = self.worker.kill()
        return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"exited with code {code}"


class RanksPool:
    """Four worker processes, started at first use; those of a failed case, or that cannot be cleaned, are replaced."""

    def __init__(self) -> None:
        self._workers: dict[int, _Worker] = {}
        self._directory = ""
        # As under torchrun, the launcher holds the store: it outlives a rank 0 that dies.
        self._store: dist.TCPStore | None = None
        self._num_cases = 0

    def run(
        self,
        fn: Callable[..., Any],
        world_size: int,
        *args: Any,
        timeout: float = 120.0,
        env: Mapping[str, str | None] | None = None,
        init: bool = True,
        capture: bool = False,
        **kwargs: Any,
    ) -> list[Any]:
        """Runs `fn(*args, **kwargs)` on `world_size` ranks and returns their values in the order of the ranks.

        Every rank starts with this process's environment, working directory and import path, seed 0, one torch thread
        and no GPU. With `world_size` > 1 it also has torchrun's variables and a fresh gloo process group; with 1 it is
        a plain process. Tensors come back as plain CPU tensors.

        Args:
            fn: A function at the top level of a module.
            world_size: 1, 2 or 4.
            args: Arguments of `fn`.
            timeout: Seconds after which the ranks are killed and their stacks shown.
            env: Environment variables to set, or with None to remove.
            init: False leaves `init_process_group` to `fn`, for instance to accelerate.
            capture: True returns pairs (value, what the rank wrote to stdout and stderr).
            kwargs: Keyword arguments of `fn`.

        Raises:
            RanksError: A rank raised, died, was stuck, or could not be cleaned up.
            ValueError: `world_size` is not 1, 2 or 4.
        """
        __tracebackhide__ = True
        if world_size not in WORLD_SIZES:
            raise ValueError(f"world_size is {world_size}, but the pool runs cases of {WORLD_SIZES} ranks")
        call = dumps((fn, args, kwargs))
        self._start_workers()
        ranks = [_Rank(self._workers[index]) for index in range(world_size)]
        self._num_cases += 1
        # Rendezvous through the environment does not tell the keys of two cases apart: it needs a store of its own.
        own_store = None if init else _new_store()
        port = (own_store or self._store).port
        started = time.monotonic()
        try:
            for index, rank in enumerate(ranks):
                rank.worker.send(
                    Case(
                        call=call,
                        number=self._num_cases,
                        rank=index,
                        world_size=world_size,
                        init=init,
                        group_timeout=timeout + 60,  # the later one of the two: `_drive` shows where each rank is
                        environ=_environ(
                            (_torchrun(index, world_size, port) if world_size > 1 else {}) | dict(env or {})
                        ),
                        cwd=os.getcwd(),
                        path=list(sys.path),
                    )
                )
            _drive(ranks, timeout)
        finally:
            failed = any(rank.error for rank in ranks)
            for index, rank in enumerate(ranks):
                # New workers cost less than looking for what else a failure may have left behind.
                if failed or rank.state is not _State.CLEAN:
                    rank.kill()
                    del self._workers[index]
        if failed:
            raise RanksError(_describe(fn, ranks, started))
        values = [pickle.loads(rank.value) for rank in ranks]
        return [(value, rank.output) for value, rank in zip(values, ranks, strict=True)] if capture else values

    def close(self) -> None:
        """Kills the workers; the next case starts new ones."""
        while self._workers:
            self._workers.popitem()[1].kill()
        if self._store:
            self._store = None
            shutil.rmtree(self._directory)

    def _start_workers(self) -> None:
        if not self._store:
            self._store = _new_store()
            self._directory = tempfile.mkdtemp(prefix="ranks-")
            atexit.register(self.close)
        for index, worker in list(self._workers.items()):
            if worker.has_died():
                worker.kill()
                del self._workers[index]
        new = [index for index in range(max(WORLD_SIZES)) if index not in self._workers]
        if new:
            with _changed_environ(OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES=""):
                forkserver.set_forkserver_preload(list(PRELOAD))
                forkserver.ensure_running()
        for index in new:
            self._workers[index] = _Worker(index, self._store.port, self._directory)
        for index in new:
            self._workers[index].wait_until_ready()


def _drive(ranks: list[_Rank], timeout: float) -> None:
    """Takes a case from its start to clean workers, or to errors."""
    limit, overdue = time.monotonic() + timeout, f"no answer within {timeout:g} s"
    released = False
    while waiting := [rank for rank in ranks if not rank.finished]:
        handles = {handle: rank for rank in waiting for handle in (rank.worker.conn, rank.worker.process.sentinel)}
        ready = connection.wait(list(handles), max(0.0, limit - time.monotonic()))
        if not ready:
            _show_stacks([rank for rank in waiting if rank.state is not _State.REPORTED], overdue)
            return
        for rank in {handles[handle] for handle in ready}:
            rank.receive()
        failed = any(rank.error for rank in ranks)
        if not released and (failed or all(rank.state is _State.REPORTED for rank in ranks)):
            released = True
            grace = FAILURE_GRACE if failed else CLEAN_UP_TIMEOUT
            limit = time.monotonic() + grace
            overdue = f"no answer within {grace:g} s of " + ("the first failure" if failed else "its return")
        if released:
            for rank in ranks:
                rank.release()


def _show_stacks(ranks: list[_Rank], overdue: str) -> None:
    """Adds to each rank's error the Python stacks of its worker; the caller kills it."""
    for rank in ranks:
        rank.output_end = len(rank.worker.output())
        with contextlib.suppress(ProcessLookupError):
            os.kill(rank.worker.process.pid, STACK_SIGNAL)
    time.sleep(0.5)  # faulthandler answers at once, whatever the process is waiting for, but the machine may be busy
    for rank in ranks:
        threads = re.split(r"\n(?=Thread|Current thread)", rank.worker.output()[rank.output_end :])
        stacks = "\n".join(thread for thread in threads if "_exit_with_session" not in thread)
        # Below `_run` are the frames of the worker itself.
        stacks = re.sub(r'  File ".*rank_worker.py", line \d+ in _run\n(  File .*\n)*', "", stacks)
        rank.fail(f"{overdue}, and killed; its stack:\n{stacks}")


def _describe(fn: Callable[..., Any], ranks: list[_Rank], started: float) -> str:
    failed = sorted((rank for rank in ranks if rank.error), key=lambda rank: (rank.is_consequence, rank.failed_at))
    parts = [f"{fn.__module__}.{fn.__qualname__}: rank {ranks.index(failed[0])} of {len(ranks)} failed"]
    ranks_of: dict[str, list[_Rank]] = {}
    for rank in failed:
        shortened = rank.is_consequence and not failed[0].is_consequence
        error = f"(consequence) {rank.error_line.strip()[:200]} [...]" if shortened else rank.error
        ranks_of.setdefault(error, []).append(rank)
    for error, group in ranks_of.items():
        names = ", ".join(f"rank {ranks.index(rank)} after {rank.failed_at - started:.1f} s" for rank in group)
        parts.append(f"--- {names} ---\n{error}")
    for index, rank in enumerate(ranks):
        if output := rank.output.strip():
            parts.append(f"--- output of rank {index} ---\n{_tail(output)}")
    return "\n".join(parts)


def _tail(text: str) -> str:
    # What faulthandler adds to a stack, and would leave no room for what crashed.
    text = re.sub(r"\nExtension modules: .*", "", text)
    return text if len(text) <= SHOWN_OUTPUT else "[...] " + text[-SHOWN_OUTPUT:]


@contextlib.contextmanager
def _changed_environ(**variables: str) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.update(variables)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _new_store() -> dist.TCPStore:
    return dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


def _torchrun(rank: int, world_size: int, port: int) -> dict[str, str]:
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "GROUP_RANK": "0",
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_RUN_ID": "ranks",
        "TORCHELASTIC_RESTART_COUNT": "0",
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }


def _environ(changes: Mapping[str, str | None]) -> dict[str, str]:
    """This process's environment without a rank and without a GPU, changed as asked for."""
    environ: dict[str, str | None] = dict(os.environ)
    environ |= dict.fromkeys(_RANK_VARIABLES)
    environ |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    environ |= changes
    # Without a GPU, Triton's kernels run in its interpreter.
    environ["TRITON_INTERPRET"] = "0" if environ["CUDA_VISIBLE_DEVICES"] else "1"
    return {name: value for name, value in environ.items() if value is not None}


_pool = RanksPool()
run_ranks = _pool.run


def launch(
    args: Sequence[str], world_size: int = 1, timeout: float = 120.0, env: Mapping[str, str | None] | None = None
) -> subprocess.CompletedProcess[str]:
    """Runs `python ARGS`, or with `world_size` > 1 `torchrun ARGS`, and returns its exit code and output.

    For what needs processes of its own: command lines, launchers, and programs that get killed. Nothing that it
    started is alive afterwards, not even ranks whose launcher was killed. There is no GPU, unless `env` shows one.

    Args:
        args: A script, or "-m" and a module, and its arguments.
        world_size: Number of ranks; 1 means a plain process, without a launcher.
        timeout: Seconds after which everything is killed.
        env: Environment variables to set, or with None to remove.

    Raises:
        LaunchTimeout: The program still ran after `timeout`.
    """
    __tracebackhide__ = True
    command = [sys.executable]
    if world_size > 1:
        command += ["-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1"]
        command += ["--nproc-per-node", str(world_size)]
    command += args
    mark = uuid.uuid4().hex
    environ = _environ({"PYTHONFAULTHANDLER": "1", _LAUNCH_MARK: mark} | dict(env or {}))
    timed_out = False
    with tempfile.TemporaryFile("w+", errors="replace") as out, tempfile.TemporaryFile("w+", errors="replace") as err:
        process = subprocess.Popen(
            command, env=environ, stdin=subprocess.DEVNULL, stdout=out, stderr=err, start_new_session=True
        )
        try:
            process.wait(timeout)
        except subprocess.TimeoutExpired:
            timed_out = True
            for running in _marked(mark):
                _send(running, signal.SIGABRT)  # makes Python write its stacks
            time.sleep(0.5)
        finally:
            while running := _marked(mark):  # again, since a dying process may just have started another one
                for one in running:
                    _send(one, signal.SIGKILL)
                time.sleep(0.01)
            process.wait()
        texts = []
        for file in (out, err):
            file.seek(0)
            texts.append(file.read())
    if timed_out:
        stdout, stderr = (_tail(text) for text in texts)
        raise LaunchTimeout(
            f"{' '.join(command)} still ran after {timeout:g} s\n--- stdout ---\n{stdout}\n--- stderr ---\n{stderr}"
        )
    return subprocess.CompletedProcess(command, process.returncode, *texts)


def _marked(mark: str) -> list[psutil.Process]:
    """Finds the live processes of a launch: torchrun puts each rank in a session of its own, so no group holds all."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            if process.environ().get(_LAUNCH_MARK) == mark and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def _send(process: psutil.Process, number: signal.Signals) -> None:
    with contextlib.suppress(psutil.NoSuchProcess):
        process.send_signal(number)
