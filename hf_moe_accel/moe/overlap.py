"""The chunk schedule: while a chunk of the tokens computes, the next one arrives and the one before returns.

    time ->    dispatch 0   compute 0    compute 1    compute 2    ...
                            dispatch 1   dispatch 2   ...
                                         combine 0    combine 1    ...

The backward pass is the same with combine's transpose first and dispatch's last; there, computing a chunk means the
gradients of its rows, which leave at once, and then its weights' gradients, while they travel. With one chunk either
is a straight line. No chunk is waited for before the next one was launched, and the wait for what returns comes after
the launch of what follows it: on a link that serves transfers in order no launch is held up by a wait.

Interleaving chunks of a layer's tokens follows FasterMoE (https://doi.org/10.1145/3503221.3508418) and Tutel
(https://arxiv.org/abs/2206.03382); weights' gradients behind the backward dispatch, Megatron-LM's delayed wgrad.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from hf_moe_accel.dispatch.base import Pending, TokenDispatcher
from hf_moe_accel.experts.base import (
    ExpertBackend,
    ExpertsSpec,
    ExpertWeights,
    NeededGrads,
    WeightGrads,
)
from hf_moe_accel.moe.timing import PartTimer
from hf_moe_accel.ops.permutation import Dispatched

# What "auto" cuts: a chunk keeps so many tokens of the rank that has most, so that the experts' products stay large.
TOKENS_OF_A_CHUNK = 2048
MOST_CHUNKS = 4

Saved = tuple[tuple[Tensor, ...], ...]


class ChunkChoice:
    """The number of chunks of each exchange; equal on all ranks of an EP group, without asking them.

    A number that the user wrote is equal by itself. "auto" goes by the most tokens that any of the ranks holds, which
    an exchange of counts tells all of them on its way: a pass sends its first layer in one chunk, and cuts the others
    by what the exchange before told. So the choice follows from the pass alone, whatever came before it.

    Args:
        wanted: "auto" or a number.
        within_node: whether the ranks of an EP group are on one node, where "auto" cuts nothing: two H200s over NVLink
            took 1.13 times as long in two parts and 1.24 times in four (full fine-tuning, 16,384 tokens a rank).
    """

    def __init__(self, wanted: int | str, *, within_node: bool = False) -> None:
        """Nothing is known yet."""
        self.wanted = wanted
        self.within_node = within_node
        self._most_tokens: int | None = None

    def of(self, layer: int, dispatcher: TokenDispatcher) -> int:
        """The number of chunks for the next exchange, that of the given layer."""
        if not dispatcher.moves_rows:
            return 1
        if isinstance(self.wanted, int):
            return self.wanted
        if self.within_node or layer == 0 or self._most_tokens is None:
            return 1
        return max(1, min(MOST_CHUNKS, self._most_tokens // TOKENS_OF_A_CHUNK))

    def learn(self, dispatcher: TokenDispatcher, plan: Any) -> None:
        """Note what an exchange of counts told. All ranks of the EP group must call."""
        if self.wanted == "auto" and not self.within_node:
            self._most_tokens = dispatcher.most_tokens(plan)


class Watched(Protocol):
    """What the schedule uses of the runtime."""

    dispatcher: TokenDispatcher
    backend: ExpertBackend
    timer: PartTimer

    def waiting(self, step: int, layer: int, direction: str) -> AbstractContextManager[None]:
        """Marks a wait for other ranks."""


class Place(NamedTuple):
    """One layer in one step."""

    runtime: Watched
    layer: int
    step: int

    def wait(self, pending: Pending[Any], direction: str, chunk: int, chunks: int) -> Any:
        """Wait for one chunk's transfer, known to the watchdog."""
        where = direction if chunks == 1 else f"{direction}, chunk {chunk + 1} of {chunks}"
        with self.runtime.waiting(self.step, self.layer, where):
            return pending.wait()


class LayerPass(NamedTuple):
    """A pass over a layer, in either direction. weights: in the dtype to compute in."""

    place: Place
    spec: ExpertsSpec
    weights: ExpertWeights


def send_and_compute(
    call: LayerPass, x_TD: Tensor, weights_TK: Tensor, plan: Any, chunks: int
) -> tuple[Callable[[], Tensor], tuple[Dispatched, ...], Saved]:
    """The forward pass of a layer, up to the wait for the last of its result. All ranks of the EP group must call.

    Args:
        call: which layer.
        x_TD: [T, D] in the dtype to compute in.
        weights_TK: [T, K] routing weights.
        plan: of the exchange, in `chunks` chunks.
        chunks: how many.

    Returns:
        (waits for the last chunk and returns the result [T, D], to be called once; the rows of each chunk; what the
        backend keeps of each chunk).
    """
    place = call.place
    dispatcher, backend, timed = place.runtime.dispatcher, place.runtime.backend, place.runtime.timer.part
    with timed("dispatch"):
        arriving = [dispatcher.dispatch(x_TD, weights_TK, plan, 0)]
    returning: list[Pending[Tensor]] = []
    rows: list[Dispatched] = []
    saved: list[tuple[Tensor, ...]] = []
    out: list[Tensor] = []

    def send_back(result: Callable[[], Tensor], i: int) -> None:
        with timed("experts"):
            y_ND = result()
        with timed("combine"):
            returning.append(dispatcher.combine(y_ND, plan, i))

    for i in range(chunks):
        with timed("dispatch"):
            if i + 1 < chunks:
                arriving.append(dispatcher.dispatch(x_TD, weights_TK, plan, i + 1))
            rows.append(place.wait(arriving[i], "forward, dispatch", i, chunks))
        with timed("experts"):
            result, kept = backend.forward(call.spec, call.weights, rows[i])
        saved.append(kept)
        if dispatcher.moves_rows or i + 1 < chunks:
            send_back(result, i)
        if i > 0:
            with timed("combine"):
                out.append(place.wait(returning[i - 1], "forward, combine", i - 1, chunks))

    def finish() -> Tensor:
        if not dispatcher.moves_rows:
            # Not before: a recompute ends here, where nobody reads the result.
            send_back(result, chunks - 1)
        with timed("combine"):
            out.append(place.wait(returning[-1], "forward, combine", chunks - 1, chunks))
            joined: Tensor = _joined(out)
        return joined

    return finish, tuple(rows), tuple(saved)


def compute_again(call: LayerPass, rows: tuple[Dispatched, ...]) -> Saved:
    """What the backend keeps of each chunk, from the rows that arrived before. Sends nothing."""
    runtime = call.place.runtime
    with runtime.timer.part("experts"):
        return tuple(runtime.backend.keep(call.spec, call.weights, of_chunk) for of_chunk in rows)


def without_rows(rows: tuple[Dispatched, ...]) -> tuple[Dispatched, ...]:
    """What `send_again` needs to bring the rows back: where they go, and their weights."""
    return tuple(of_chunk._replace(x_ND=of_chunk.x_ND.new_empty(0)) for of_chunk in rows)


def send_again(
    call: LayerPass, x_TD: Tensor, plan: Any, rows: tuple[Dispatched, ...], direction: str
) -> tuple[Dispatched, ...]:
    """What `without_rows` took out, in the exchange that it came by. All ranks of the EP group must call.

    Args:
        call: which layer.
        x_TD: [T, D] what was sent before.
        plan: of that exchange.
        rows: of each chunk.
        direction: of the pass, for the watchdog.
    """
    dispatcher = call.place.runtime.dispatcher
    with call.place.runtime.timer.part("dispatch"):
        # The transpose of combine: each rank that has an expert of a token gets the token's row.
        arriving = [dispatcher.combine_backward(x_TD, plan, i) for i in range(len(rows))]
        return tuple(
            of_chunk._replace(x_ND=call.place.wait(arriving[i], f"{direction}, dispatch again", i, len(rows)))
            for i, of_chunk in enumerate(rows)
        )


def send_and_compute_backward(
    call: LayerPass,
    grad_TD: Tensor,
    first: Pending[Tensor],
    plan: Any,
    rows: tuple[Dispatched, ...],
    saved: Saved,
    needs: NeededGrads,
    dtypes: tuple[torch.dtype | None, ...],
    *,
    need_x: bool,
    need_routing: bool,
) -> tuple[Tensor | None, Tensor | None, WeightGrads]:
    """The backward pass of a layer. All ranks of the EP group must call.

    Args:
        call: which layer.
        grad_TD: [T, D] gradient of the result, in the dtype to compute in.
        first: of the first chunk, `combine_backward`, under way.
        plan: of the forward pass.
        rows: of each chunk, from the forward pass.
        saved: of each chunk, from the forward pass.
        needs: which parameters train.
        dtypes: of the parameters, in the order of `ExpertWeights.flat`: what their gradients are added up in.
        need_x: whether the gradient of x_TD is wanted.
        need_routing: whether the gradient of the routing weights is wanted.

    Returns:
        ([T, D] or None, [T, K] fp32 or None, the sum over the chunks, in their order, of the parameters' gradients).
    """
    place = call.place
    dispatcher, backend, timed = place.runtime.dispatcher, place.runtime.backend, place.runtime.timer.part
    chunks = len(rows)
    arriving = [first]
    returning: list[Pending[tuple[Tensor | None, Tensor | None]]] = []
    back: list[tuple[Tensor | None, Tensor | None]] = []
    total: list[Tensor | None] = []
    for i in range(chunks):
        with timed("combine"):
            if i + 1 < chunks:
                arriving.append(dispatcher.combine_backward(grad_TD, plan, i + 1))
            grad_ND = place.wait(arriving[i], "backward, combine", i, chunks)
        with timed("experts"):
            grads = backend.backward_rows(
                call.spec, call.weights, rows[i], saved[i], grad_ND, needs, need_x=need_x, need_routing=need_routing
            )
        with timed("dispatch"):
            returning.append(dispatcher.dispatch_backward(grads.x_ND, grads.weights_R, plan, i, rows[i]))
        with timed("experts"):
            of_chunk = backend.backward_weights(call.spec, call.weights, rows[i], grads, needs).flat()
            total = [_sum(*parts) for parts in zip(total, of_chunk, dtypes, strict=True)] if total else list(of_chunk)
        if i > 0:
            with timed("dispatch"):
                back.append(place.wait(returning[i - 1], "backward, dispatch", i - 1, chunks))
    with timed("dispatch"):
        back.append(place.wait(returning[-1], "backward, dispatch", chunks - 1, chunks))
    grads_x, grads_weights = zip(*back, strict=True)
    of_weights = WeightGrads.of(total, len(call.weights.up_lora))
    return _joined(grads_x) if need_x else None, _joined(grads_weights) if need_routing else None, of_weights


def _joined(parts: Any) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _sum(total: Tensor | None, part: Tensor | None, dtype: torch.dtype | None) -> Tensor | None:
    if total is None or part is None:
        return None
    # Not in place: a backend may hand out views and expanded tensors.
    return total.to(dtype) + part
