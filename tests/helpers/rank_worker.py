"""The worker's side of `ranks.RanksPool`: one process that runs its rank of one case after another."""

from __future__ import annotations

import faulthandler
import gc
import io
import multiprocessing
import os
import pickle
import random
import signal
import sys
import threading
import time
import traceback
import warnings
from dataclasses import dataclass, field
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

STACK_SIGNAL = signal.SIGUSR1  # a worker answers it with the Python stacks of its threads, on stderr

# Imported once, in the server that workers are forked from.
PRELOAD = (
    "torch.distributed.fsdp",
    "torch.distributed.tensor",
    "accelerate",
    "pytest",
    "transformers",
    "transformers.trainer",
)

_SHOWN_LOCAL = 200  # characters of a local variable shown with a failed assertion


@dataclass(frozen=True)
class Case:
    """What one rank has to do."""

    call: bytes  # pickled (fn, args, kwargs)
    number: int  # of this case, for its keys in the store
    rank: int
    world_size: int
    init: bool  # initialize the process group, where there is more than one rank
    group_timeout: float  # seconds
    environ: dict[str, str]
    cwd: str
    path: list[str]  # sys.path


@dataclass(frozen=True)
class Report:
    """What came of running a case, and then of cleaning up after it."""

    value: bytes = b""  # pickled
    error: str = ""  # traceback; empty on success
    error_line: str = ""  # the exception alone
    reusable: bool = True  # nothing of the case is left in the worker
    time: float = field(default_factory=time.monotonic)  # one clock for all processes of a machine


class _Pickler(pickle.Pickler):
    """Pickles tensors as plain CPU tensors: no shared memory, no autograd history, no storage beyond the values."""

    def reducer_override(self, obj: Any) -> Any:
        if not isinstance(obj, torch.Tensor):
            return NotImplemented
        if isinstance(obj, DTensor):
            raise TypeError("a DTensor cannot leave its rank: return its .full_tensor() or .to_local()")
        return obj.detach().cpu().clone().__reduce_ex__(pickle.HIGHEST_PROTOCOL)


def dumps(value: Any) -> bytes:
    """Pickles a value whose tensors arrive as plain CPU tensors."""
    buffer = io.BytesIO()
    _Pickler(buffer, protocol=pickle.HIGHEST_PROTOCOL).dump(value)
    return buffer.getvalue()


def worker_main(conn: Connection, store_port: int, log: str) -> None:
    """Runs cases from `conn` until it closes, with stdout and stderr appended to the file `log`."""
    os.setsid()  # whatever a case starts can be killed together with its worker
    _session_watcher.start()
    fd = os.open(log, os.O_WRONLY | os.O_APPEND)
    os.dup2(fd, 1)
    os.dup2(fd, 2)
    os.close(fd)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(line_buffering=True, errors="backslashreplace")
    faulthandler.enable(file=2)
    faulthandler.register(STACK_SIGNAL, file=2)
    torch.set_num_threads(1)
    # One connection for all cases, since the server asks the machine's resolver for the name of each new one.
    store = dist.TCPStore("127.0.0.1", store_port, is_master=False)
    frozen = _freeze_imports(0)
    conn.send_bytes(b"")
    while True:
        try:
            case: Case = pickle.loads(conn.recv_bytes())
        except EOFError:
            return
        with warnings.catch_warnings():
            conn.send_bytes(pickle.dumps(_run(case, store)))
            conn.recv_bytes()
            conn.send_bytes(pickle.dumps(_clean_up()))
        frozen = _freeze_imports(frozen)


def _freeze_imports(known: int) -> int:
    """Where more modules than the known ones are there, spares the next collections of garbage a look at them."""
    if len(sys.modules) > known:
        gc.collect()
        gc.freeze()
    return len(sys.modules)


def _exit_with_session() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)


_session_watcher = threading.Thread(target=_exit_with_session, daemon=True)


def _run(case: Case, store: dist.Store) -> Report:
    try:
        os.environ.clear()
        os.environ.update(case.environ)
        os.chdir(case.cwd)
        sys.path[:] = case.path
        random.seed(0)
        np.random.seed(0)
        torch.manual_seed(0)
        fn, args, kwargs = pickle.loads(case.call)
        if case.init and case.world_size > 1:
            dist.init_process_group(
                "gloo",
                store=dist.PrefixStore(f"case{case.number}", store),
                rank=case.rank,
                world_size=case.world_size,
                timeout=timedelta(seconds=case.group_timeout),
            )
        return Report(value=dumps(fn(*args, **kwargs)))
    except BaseException as exc:  # SystemExit and pytest's outcomes too: they are a failure of the case
        return _failure(exc)


def _clean_up() -> Report:
    try:
        gc.collect()  # models and meshes go before the groups that they use
        if dist.is_initialized():
            dist.destroy_process_group()
        _reset_torch()
        _reset_hugging_face()
        gc.collect()
        # A group that failed to initialize is still counted, and would name the next ones differently on this rank.
        return Report(reusable=dist.distributed_c10d._world.group_count == 0 and not _left_threads())
    except BaseException as exc:
        return _failure(exc)


def _left_threads() -> list[threading.Thread]:
    ours = (threading.main_thread(), _session_watcher)
    # tqdm keeps one to refresh progress bars.
    return [one for one in threading.enumerate() if one not in ours and not type(one).__module__.startswith("tqdm")]


def _reset_torch() -> None:
    from torch.distributed.device_mesh import _mesh_resources
    from torch.distributed.tensor import _redistribute
    from torch.distributed.tensor.debug import _clear_sharding_prop_cache

    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float32)
    torch.set_default_device(None)
    torch.set_grad_enabled(True)
    torch.use_deterministic_algorithms(False)
    # The meshes of two cases compare equal although their process groups differ: no cached one may survive.
    _mesh_resources.mesh_stack.clear()
    _clear_sharding_prop_cache()
    _redistribute._gen_transform_infos.cache_clear()
    if "torch._dynamo" in sys.modules:
        sys.modules["torch._dynamo"].reset()


def _reset_hugging_face() -> None:
    from accelerate.state import AcceleratorState, GradientState
    from transformers.utils import logging

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    logging.set_verbosity_warning()
    logging.warning_once.cache_clear()  # else only the first case of a session would see the warning


def _failure(exc: BaseException) -> Report:
    summary = traceback.TracebackException.from_exception(exc, capture_locals=isinstance(exc, AssertionError))
    del summary.stack[0]  # ours
    # pytest explains a failed assertion only in its own process: here the variables in sight have to do.
    for frame in summary.stack[:-1]:
        frame.locals = None
    for frame in summary.stack[-1:]:
        frame.locals = frame.locals and {name: text[:_SHOWN_LOCAL] for name, text in frame.locals.items()}
    return Report(error="".join(summary.format()), error_line=list(summary.format_exception_only())[-1])
