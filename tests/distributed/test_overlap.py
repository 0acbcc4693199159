"""Chunks overlap: by the order of launches and waits, and by time over a simulated link."""

from __future__ import annotations

import os
import time
from contextlib import closing
from functools import cache
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from hf_moe_accel import MoEAccelConfig, prepare_moe_model
from hf_moe_accel.dispatch.all_to_all import AllToAllDispatcher
from hf_moe_accel.dispatch.base import TokenDispatcher
from hf_moe_accel.dispatch.local import LocalDispatcher
from hf_moe_accel.experts.base import ExpertBackend
from hf_moe_accel.experts.eager import EagerBackend
from hf_moe_accel.moe.forward import forward
from hf_moe_accel.moe.overlap import MOST_CHUNKS, TOKENS_OF_A_CHUNK, ChunkChoice
from hf_moe_accel.runtime import MoERuntime, runtime_of
from hf_moe_accel.topology import ExpertTopology
from tests.helpers.grids import HIDDEN, KINDS, make_batch, make_spec, make_weights, slow
from tests.helpers.links import RecordingBackend, RecordingDispatcher, SimulatedLink
from tests.helpers.models import tiny_model
from tests.helpers.ranks import run_ranks

NUM_EXPERTS = 8
Trace = list[tuple[str, str, int]]


def make_runtime(dispatcher: TokenDispatcher, backend: ExpertBackend, chunks: int | str) -> MoERuntime:
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    return MoERuntime(ExpertTopology(ranks, NUM_EXPERTS, ranks), dispatcher, backend, [NUM_EXPERTS], 60.0, chunks)


def step(runtime: MoERuntime, layer: int = 0, num_tokens: int | None = None) -> None:
    """One forward and backward pass of a layer."""
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    spec = make_spec(NUM_EXPERTS, **KINDS["gated"])
    local = NUM_EXPERTS // ranks
    weights = make_weights(spec)
    mine = weights._replace(
        up=weights.up[rank * local : (rank + 1) * local].clone().requires_grad_(),
        down=weights.down[rank * local : (rank + 1) * local].clone().requires_grad_(),
    )
    x, ids, routing = make_batch("uneven", ranks, NUM_EXPERTS, 2, HIDDEN)[rank]
    if num_tokens is not None:
        x, ids, routing = (torch.cat([tensor] * num_tokens)[:num_tokens] for tensor in (x, ids, routing))
    out = forward(spec, x.requires_grad_(), ids, routing.requires_grad_(), mine, runtime, layer)
    out.backward(torch.ones_like(out))


# ---------------------------------------------------------------------------------------------------------------------
# The order


def trace_on_ranks(chunks: int) -> Trace:
    trace: Trace = []
    dispatcher = RecordingDispatcher(AllToAllDispatcher(dist.group.WORLD), trace)
    with closing(make_runtime(dispatcher, RecordingBackend(EagerBackend(), trace), chunks)) as runtime:
        step(runtime)
    return trace


@pytest.mark.parametrize("chunks", [1, 2, 4])
def test_what_is_launched_before_what_is_waited_for(chunks: int) -> None:
    traces = run_ranks(trace_on_ranks, 2, chunks)
    assert all(trace == traces[0] for trace in traces), "the ranks order their transfers differently"
    at = {event: place for place, event in enumerate(traces[0])}
    assert len(at) == len(traces[0]) == chunks * (4 * 2 + 3), "each transfer and each computation once a chunk"
    for i in range(chunks):
        for arrives, computes, leaves in (
            ("dispatch", "forward", "combine"),
            ("combine_backward", "backward_rows", "dispatch_backward"),
        ):
            assert at["wait", arrives, i] < at["compute", computes, i] < at["launch", leaves, i]
            assert at["launch", leaves, i] < at["wait", leaves, i]
            if i + 1 < chunks:
                assert at["launch", arrives, i + 1] < at["wait", arrives, i], "the next was sent before"
                # While the next one computes, this one returns.
                assert at["launch", leaves, i] < at["compute", computes, i + 1] < at["wait", leaves, i]
        weights = at["compute", "backward_weights", i]
        assert at["launch", "dispatch_backward", i] < weights < at["wait", "dispatch_backward", i]


def test_one_chunk_is_a_straight_line() -> None:
    (trace, _) = run_ranks(trace_on_ranks, 2, 1)
    assert [f"{kind} {name}" for kind, name, _ in trace] == [
        "launch dispatch",
        "wait dispatch",
        "compute forward",
        "launch combine",
        "wait combine",
        "launch combine_backward",
        "wait combine_backward",
        "compute backward_rows",
        "launch dispatch_backward",
        "compute backward_weights",
        "wait dispatch_backward",
    ]


def places_on_ranks(chunks: int) -> list[str]:
    """What the watchdog is told of."""
    places: list[str] = []
    with closing(make_runtime(AllToAllDispatcher(dist.group.WORLD), EagerBackend(), chunks)) as runtime:
        waiting = runtime.waiting
        runtime.waiting = lambda *place: places.append(place) or waiting(*place)  # type: ignore[method-assign]
        step(runtime)
    return [direction for _, _, direction in places]


def test_the_watchdog_is_told_the_chunk() -> None:
    assert run_ranks(places_on_ranks, 2, 1)[0] == [
        "forward, plan",
        "forward, dispatch",
        "forward, combine",
        "backward, combine",
        "backward, dispatch",
    ]
    assert run_ranks(places_on_ranks, 2, 2)[0] == [
        "forward, plan",
        "forward, dispatch, chunk 1 of 2",
        "forward, dispatch, chunk 2 of 2",
        "forward, combine, chunk 1 of 2",
        "forward, combine, chunk 2 of 2",
        "backward, combine, chunk 1 of 2",
        "backward, combine, chunk 2 of 2",
        "backward, dispatch, chunk 1 of 2",
        "backward, dispatch, chunk 2 of 2",
    ]


# ---------------------------------------------------------------------------------------------------------------------
# The number of chunks


class Told(LocalDispatcher):
    """Moves rows, and its plans tell what they are told."""

    moves_rows = True

    def __init__(self, most_tokens: int | None) -> None:
        self._most = most_tokens

    def most_tokens(self, plan: Any) -> int | None:
        return self._most


@pytest.mark.parametrize(
    ("most_tokens", "chunks"),
    [
        (None, 1),
        (0, 1),
        (2 * TOKENS_OF_A_CHUNK - 1, 1),
        (2 * TOKENS_OF_A_CHUNK, 2),
        (3 * TOKENS_OF_A_CHUNK + 5, 3),
        (100 * TOKENS_OF_A_CHUNK, MOST_CHUNKS),
    ],
)
def test_auto_cuts_by_the_tokens_of_the_fullest_rank(most_tokens: int | None, chunks: int) -> None:
    choice = ChunkChoice("auto")
    assert choice.of(0, Told(None)) == choice.of(1, Told(None)) == 1
    choice.learn(Told(most_tokens), None)
    assert choice.of(1, Told(None)) == chunks
    assert choice.of(0, Told(None)) == 1, "a pass does not depend on the one before"


def test_a_number_is_a_number_and_nothing_is_cut_that_does_not_travel() -> None:
    assert ChunkChoice(3).of(0, Told(None)) == 3
    assert ChunkChoice(3).of(0, LocalDispatcher()) == 1
    choice = ChunkChoice("auto")
    choice.learn(Told(10**6), None)
    assert choice.of(1, LocalDispatcher()) == 1


def test_auto_cuts_nothing_within_a_node() -> None:
    choice = ChunkChoice("auto", within_node=True)
    choice.learn(Told(100 * TOKENS_OF_A_CHUNK), None)
    assert choice.of(1, Told(None)) == 1
    assert ChunkChoice(3, within_node=True).of(1, Told(None)) == 3


def prepared_choices() -> list[bool]:
    """Whether the ranks of an EP group are on one node, where both ranks of the run are and where each has its own."""
    found = []
    for ranks_per_node in ("2", "1"):
        with mock.patch.dict(os.environ, LOCAL_WORLD_SIZE=ranks_per_node):
            model = prepare_moe_model(tiny_model("qwen3_moe"), MoEAccelConfig(ep_size=2))
        found.append(runtime_of(model).chunks.within_node)
    return found


def test_a_group_over_nodes_is_told_apart() -> None:
    assert run_ranks(prepared_choices, 2) == [[True, False]] * 2


def auto_on_ranks() -> list[int]:
    """The chunks that this rank cuts its layers in: passes of different size, of which ranks hold different parts."""
    asked: list[int] = []

    class Asked(AllToAllDispatcher):
        def plan(self, ids_TK: Any, num_experts: int, chunks: int = 1) -> Any:
            asked.append(chunks)
            return super().plan(ids_TK, num_experts, chunks)

    mine = dist.get_rank() == 0
    with closing(make_runtime(Asked(dist.group.WORLD), EagerBackend(), "auto")) as runtime:
        for tokens in (2 * TOKENS_OF_A_CHUNK if mine else 3, 5):
            for layer in (0, 0):  # one runtime of one layer: the second call stands for the second layer
                runtime.chunks.of = lambda layer, dispatcher, of=ChunkChoice.of: of(runtime.chunks, 1, dispatcher)
                step(runtime, layer, tokens)
    return asked


def test_ranks_agree_though_their_tokens_differ() -> None:
    assert run_ranks(auto_on_ranks, 2) == [[1, 2, 2, 1]] * 2


# ---------------------------------------------------------------------------------------------------------------------
# The time


class Sleeper(EagerBackend):
    """Computes for a time that follows from the rows, as an accelerator does: it keeps no core busy."""

    def __init__(self, seconds_per_row: float) -> None:
        self._seconds_per_row = seconds_per_row

    def _sleep(self, rows: Any) -> None:
        time.sleep(self._seconds_per_row * rows.x_ND.size(0))

    def forward(self, spec: Any, weights: Any, rows: Any) -> Any:
        self._sleep(rows)
        return super().forward(spec, weights, rows)

    def backward_rows(self, spec: Any, weights: Any, rows: Any, *others: Any, **needs: bool) -> Any:
        self._sleep(rows)
        return super().backward_rows(spec, weights, rows, *others, **needs)

    def backward_weights(self, spec: Any, weights: Any, rows: Any, grads: Any, needs: Any) -> Any:
        self._sleep(rows)
        return super().backward_weights(spec, weights, rows, grads, needs)


TOKENS = 120
SECONDS_OF_COMPUTE = 0.4  # of a step: a third in the forward pass, a third for rows and one for weights going back
NO_LINK = 0.0


@cache
def time_of_step(chunks: int, seconds_of_link: float) -> float:
    """Seconds of the fastest step whose four transfers take as long as given: of four, on a busy machine of more."""
    size = 4 * TOKENS * HIDDEN * 4  # of fp32 rows
    found: list[float] = []
    # What disturbs a step makes it slower, each time by another time: one that came twice was not disturbed.
    while len(found) < 4 or (len(found) < 12 and sorted(found)[1] - min(found) > 0.003):
        dispatcher: Any = LocalDispatcher()
        if seconds_of_link != NO_LINK:
            dispatcher = SimulatedLink(dispatcher, latency=0.0, bytes_per_second=size / seconds_of_link)
        runtime = make_runtime(dispatcher, Sleeper(SECONDS_OF_COMPUTE / 3 / TOKENS), chunks)
        runtime.chunks.of = lambda *_: chunks  # type: ignore[method-assign]
        started = time.perf_counter()
        step(runtime, num_tokens=TOKENS)
        found.append(time.perf_counter() - started)
        if seconds_of_link != NO_LINK:
            assert dispatcher.busy == pytest.approx(seconds_of_link)
    return min(found)


@pytest.mark.parametrize("share", [1.0, *slow(0.5)])
def test_time_approaches_the_longer_of_computing_and_sending(share: float) -> None:
    link = share * SECONDS_OF_COMPUTE
    exposed = {chunks: time_of_step(chunks, link) - time_of_step(chunks, NO_LINK) for chunks in (1, 2, 4)}
    # One chunk: the weights' gradients hide the last of four transfers, and nothing hides the others.
    assert 0.6 < exposed[1] / link < 0.9
    # By arithmetic 0.38 with two chunks, and with four 0.27 where sending takes as long as computing, 0.19 at half.
    assert exposed[2] / link < 0.5
    assert exposed[4] / link < 0.37
    assert exposed[4] < exposed[2]
