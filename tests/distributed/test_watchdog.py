"""Ranks that wait for each other forever end the job, and each says who was where."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch.distributed as dist

from hf_moe_accel import MoEAccelConfig, prepare_moe_model
from hf_moe_accel.moe import watchdog
from hf_moe_accel.moe.watchdog import EXIT_CODE, Watchdog
from hf_moe_accel.runtime import MoERuntime, runtime_of
from tests.distributed.watchdog_job import TIMEOUT, run
from tests.helpers.grids import named
from tests.helpers.models import ragged_batch_dataset, tiny_model
from tests.helpers.ranks import RanksError, launch

Ranks = Callable[..., list[Any]]
JOB = "tests.distributed.watchdog_job"
THREAD = "hf-moe-accel-watchdog"


class Ended(BaseException):
    """Stands for the end of the process."""


class FakeStore:
    """A store in this process, which may go away."""

    def __init__(self) -> None:
        self.values: dict[str, bytes] = {}
        self.gone = False

    def clone(self) -> FakeStore:
        return self

    def set(self, key: str, value: str) -> None:
        self._use()[key] = value.encode()

    def get(self, key: str) -> bytes:
        return self._use()[key]

    def check(self, keys: list[str]) -> bool:
        return all(key in self._use() for key in keys)

    def _use(self) -> dict[str, bytes]:
        if self.gone:
            raise RuntimeError("connection reset by peer")
        return self.values


class Watched:
    """A watchdog of rank 1 of 3 whose end is noted instead of carried out."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.ended = threading.Event()
        self.code = 0
        monkeypatch.setattr(watchdog.os, "_exit", self._exit)
        monkeypatch.setattr(watchdog.faulthandler, "dump_traceback", lambda **_: None)
        monkeypatch.setattr(threading, "excepthook", lambda _: None)
        self.store = FakeStore()
        self.dog = Watchdog(self.store, rank=1, world_size=3, timeout=0.2, name="model")

    def _exit(self, code: int) -> None:
        self.code = code
        self.ended.set()
        raise Ended

    def lives(self) -> bool:
        return not self.ended.wait(0.6)


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> Iterator[Watched]:
    watched = Watched(monkeypatch)
    yield watched
    watched.store.gone = False
    watched.dog.close()


def test_rank_that_waits_too_long_ends(watched: Watched, capfd: pytest.CaptureFixture[str]) -> None:
    watched.store.set("hf_moe_accel/model/rank/0", '"in step 7, layer 0, forward, plan, for 0.1 s"')
    with watched.dog.waiting(7, 1, "backward, combine"):
        assert watched.ended.wait(5)
    assert watched.code == EXIT_CODE != 0
    text = capfd.readouterr().err
    assert "rank 1: a rank came no further" in text
    assert "collective_timeout=0.2 s" in text
    assert "rank 0: in step 7, layer 0, forward, plan" in text
    assert "rank 1: in step 7, layer 1, backward, combine, for" in text
    assert "rank 2: not in the model yet" in text


def test_rank_that_is_stuck_on_the_way_ends(watched: Watched, capfd: pytest.CaptureFixture[str]) -> None:
    watched.dog.enter("the beginning of step 1, forward")
    assert watched.ended.wait(5)
    assert "rank 1: after the beginning of step 1, forward, for" in capfd.readouterr().err


def test_rank_that_computes_elsewhere_lives(watched: Watched) -> None:
    assert watched.lives()
    watched.dog.enter("the beginning of step 1, forward")
    with watched.dog.waiting(1, 0, "forward, plan"):
        pass
    watched.dog.leave()
    assert watched.lives()
    # An exchange of a part of the model that was called by itself.
    with watched.dog.waiting(2, 0, "forward, plan"):
        pass
    assert watched.lives()


def test_rank_that_comes_further_lives(watched: Watched) -> None:
    watched.dog.enter("the beginning of step 1, forward")
    for layer in range(8):
        with watched.dog.waiting(1, layer, "forward, plan"):
            assert not watched.ended.wait(0.1)
    watched.dog.leave()


def test_rank_that_does_not_wait_ends_with_the_others(watched: Watched, capfd: pytest.CaptureFixture[str]) -> None:
    watched.store.set("hf_moe_accel/model/stuck", "0")
    assert watched.ended.wait(5)
    assert "rank 1: outside the model for" in capfd.readouterr().err


def test_store_that_is_gone(watched: Watched, capfd: pytest.CaptureFixture[str]) -> None:
    watched.store.gone = True
    assert watched.lives()
    with watched.dog.waiting(1, 0, "forward, plan"):
        assert watched.ended.wait(5)
    text = capfd.readouterr().err
    assert "rank 1: in step 1, layer 0, forward, plan, for" in text
    assert "ranks 0, 2: unknown, since the store" in text


def test_error_of_a_collective_says_who_was_where(watched: Watched) -> None:
    with pytest.raises(RuntimeError, match="reset by peer") as raised:
        try:
            with watched.dog.waiting(1, 0, "forward, plan"):
                raise RuntimeError("reset by peer")
        finally:
            watched.dog.close()
    (note,) = raised.value.__notes__
    assert "where each rank was:" in note
    assert "rank 1: outside the model for 0.0 s, last after step 1, layer 0, forward, plan" in note


def test_other_errors_and_no_error_are_left_alone(watched: Watched) -> None:
    with pytest.raises(ValueError, match="of the user") as raised:
        try:
            raise ValueError("of the user")
        finally:
            watched.dog.close()
    assert not hasattr(raised.value, "__notes__")
    assert not watched.dog._thread.is_alive()


STUCK = {
    "a forward too many": ("outside the model", "after the beginning of step 3, forward"),
    "asleep before a backward": ("after the beginning of step 3, backward", "outside the model"),
    "asleep between exchanges": ("in step 3, layer 1, forward, plan", "after step 3, layer 0, forward, combine"),
}


@pytest.mark.parametrize("case", named(STUCK, ["asleep before a backward", "asleep between exchanges"]))
def test_job_that_is_stuck_ends(case: str, ranks: Ranks) -> None:
    ranks(dist.get_rank, 2)  # Starts the workers.
    started = time.monotonic()
    with pytest.raises(RanksError) as raised:
        ranks(run, 2, case, timeout=60)
    seconds = time.monotonic() - started
    text = str(raised.value)
    assert f"exited with code {EXIT_CODE}" in text
    for rank in range(2):
        output = text.partition(f"--- output of rank {rank} ---")[2].partition("--- output of")[0]
        assert f"rank {rank}: a rank came no further" in output, text
        for other, place in enumerate(STUCK[case]):
            assert f"  rank {other}: {place}" in output, text
    assert seconds < 2 * TIMEOUT + 10, seconds


@pytest.mark.slow
def test_torchrun_job_that_is_stuck_ends() -> None:
    result = launch(["-m", JOB, "asleep before a forward"], 2, timeout=90)
    assert result.returncode != 0
    for rank in range(2):
        assert f"rank {rank}: a rank came no further" in result.stderr
    assert result.stderr.count("  rank 0: after the beginning of step 3, forward, for") == 2
    assert result.stderr.count("  rank 1: outside the model for") == 2
    assert f"exitcode  : {EXIT_CODE}" in result.stderr
    assert "is done" not in result.stdout


def launch_two_ranks(case: str) -> list[Any]:
    """The program on two ranks without torchrun, which would end the other rank by itself; the store is here."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)

    def launch_rank(rank: int) -> Any:
        env = {
            "RANK": str(rank),
            "WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(store.port),
            "TORCHELASTIC_USE_AGENT_STORE": "True",
        }
        return launch(["-m", JOB, case], 1, timeout=90, env=env)

    with ThreadPoolExecutor() as executor:
        return list(executor.map(launch_rank, range(2)))


def test_rank_that_survives_another_one_says_who_was_where() -> None:
    survivor, killed = launch_two_ranks("killed")
    assert killed.returncode < 0
    assert survivor.returncode > 0
    assert "hf_moe_accel: where each rank was:" in survivor.stderr
    assert "  rank 1: outside the model" in survivor.stderr
    assert "last after step 2, layer 0, backward, dispatch" in survivor.stderr


@pytest.mark.slow
def test_job_without_trouble_ends_without_a_word() -> None:
    """Also where nobody closes the runtime."""
    for rank, result in enumerate(launch_two_ranks("without trouble")):
        assert result.returncode == 0, result.stderr
        assert f"rank {rank} is done" in result.stdout
        assert "where each rank was" not in result.stderr
        assert "Traceback" not in result.stderr


def prepared(**choices: Any) -> tuple[Any, MoERuntime]:
    model = prepare_moe_model(tiny_model("qwen3_moe"), MoEAccelConfig(**choices))
    runtime = runtime_of(model)
    assert runtime is not None
    return model, runtime


def step(model: Any) -> None:
    batch = {key: value[None] for key, value in ragged_batch_dataset(1, 16, seed=dist.get_rank())[0].items()}
    model(**batch).loss.backward()


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name == THREAD]


def open_and_close() -> dict[str, Any]:
    if dist.get_rank() == 0:
        # Models that are not spread over the ranks do not count.
        prepare_moe_model(tiny_model("llama"))
    model, runtime = prepared(ep_size=2)
    other, other_runtime = prepared(ep_size=2)
    counts = [len(threads())]
    for _ in range(2):
        step(model)
        counts.append(len(threads()))
        step(other)
        counts.append(len(threads()))
        runtime.close()
        counts.append(len(threads()))
        other_runtime.close()
        counts.append(len(threads()))
    names = [runtime._name, other_runtime._name]
    step(model)
    dist.destroy_process_group()
    time.sleep(1.5)
    runtime.close()
    counts.append(len(threads()))
    return {"counts": counts, "names": names}


@pytest.mark.slow
def test_runtimes_open_and_close(ranks: Ranks) -> None:
    for result, output in ranks(open_and_close, 2, capture=True):
        assert result["counts"] == [0, *[1, 2, 1, 0] * 2, 0]
        assert result["names"] == ["model1", "model2"]
        assert "where each rank was" not in output


def no_expert_parallelism() -> int:
    model, runtime = prepared(ep_size=1)
    step(model)
    count = len(threads())
    runtime.close()
    return count


def test_ranks_without_expert_parallelism_are_not_watched(ranks: Ranks) -> None:
    assert ranks(no_expert_parallelism, 2) == [0, 0]


def interrupted() -> str:
    model, runtime = prepared(ep_size=2)
    experts = model.model.layers[1].mlp.experts
    handle = experts.register_forward_pre_hook(lambda *_: 1 / 0)
    try:
        step(model)
    except ZeroDivisionError:
        pass
    handle.remove()
    watching = runtime._watchdog
    assert watching is not None
    place = watching._described()
    runtime.close()
    return place


def test_a_pass_that_raises_is_left(ranks: Ranks) -> None:
    for place in ranks(interrupted, 2):
        assert place.startswith("outside the model"), place
