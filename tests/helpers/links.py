"""Dispatchers around another one: one notes what is launched and waited for, one stands for a slow link."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Self

from torch import Tensor

from hf_moe_accel.dispatch.base import Pending, TokenDispatcher
from hf_moe_accel.experts.base import ExpertBackend
from hf_moe_accel.ops.permutation import Dispatched


class _Around(TokenDispatcher):
    """Hands each call on, and its transfers to `_sent`."""

    def __init__(self, inner: TokenDispatcher) -> None:
        """`inner` does the work."""
        self._inner = inner

    @classmethod
    def create(cls, group: Any, traffic: Any) -> Self:
        raise NotImplementedError("made around another dispatcher")

    def close(self) -> None:
        self._inner.close()

    def plan(self, ids_TK: Tensor, num_experts: int, chunks: int = 1) -> Any:
        return self._inner.plan(ids_TK, num_experts, chunks)

    def most_tokens(self, plan: Any) -> int | None:
        return self._inner.most_tokens(plan)

    def dispatch(self, x_TD: Tensor, weights_TK: Tensor, plan: Any, chunk: int) -> Pending[Dispatched]:
        size = x_TD.nbytes / x_TD.size(0) * self._tokens_of(x_TD, plan, chunk) if x_TD.size(0) else 0
        return self._sent("dispatch", chunk, size, lambda: self._inner.dispatch(x_TD, weights_TK, plan, chunk))

    def combine(self, y_ND: Tensor, plan: Any, chunk: int) -> Pending[Tensor]:
        return self._sent("combine", chunk, y_ND.nbytes, lambda: self._inner.combine(y_ND, plan, chunk))

    def combine_backward(self, grad_TD: Tensor, plan: Any, chunk: int) -> Pending[Tensor]:
        size = grad_TD.nbytes / grad_TD.size(0) * self._tokens_of(grad_TD, plan, chunk) if grad_TD.size(0) else 0
        return self._sent("combine_backward", chunk, size, lambda: self._inner.combine_backward(grad_TD, plan, chunk))

    def dispatch_backward(
        self, grad_x_ND: Tensor | None, grad_weights_R: Tensor | None, plan: Any, chunk: int, rows: Dispatched
    ) -> Pending[tuple[Tensor | None, Tensor | None]]:
        size = 0 if grad_x_ND is None else grad_x_ND.nbytes
        return self._sent(
            "dispatch_backward",
            chunk,
            size,
            lambda: self._inner.dispatch_backward(grad_x_ND, grad_weights_R, plan, chunk, rows),
        )

    def sum_over_ep(self, tensor: Tensor) -> Tensor:
        return self._inner.sum_over_ep(tensor)

    @staticmethod
    def _tokens_of(tokens_TD: Tensor, plan: Any, chunk: int) -> int:
        chunks = len(plan.chunks if hasattr(plan, "chunks") else plan.ids_of_chunk)
        return tokens_TD[:, 0].tensor_split(chunks)[chunk].size(0)

    def _sent(self, name: str, chunk: int, size: float, launch: Callable[[], Pending[Any]]) -> Pending[Any]:
        raise NotImplementedError


class RecordingDispatcher(_Around):
    """Notes each launch and each wait in `trace`, as ("launch" or "wait", the call, the chunk)."""

    def __init__(self, inner: TokenDispatcher, trace: list[tuple[str, str, int]]) -> None:
        """`trace` may be shared with a `RecordingBackend`."""
        super().__init__(inner)
        self._trace = trace

    def _sent(self, name: str, chunk: int, size: float, launch: Callable[[], Pending[Any]]) -> Pending[Any]:
        self._trace.append(("launch", name, chunk))
        pending = launch()

        def finish() -> Any:
            self._trace.append(("wait", name, chunk))
            return pending.wait()

        return Pending(finish)


class RecordingBackend(ExpertBackend):
    """Notes each call in `trace`, as ("compute", the call, how many of them there were before)."""

    def __init__(self, inner: ExpertBackend, trace: list[tuple[str, str, int]]) -> None:
        """`inner` does the work."""
        self._inner, self._trace = inner, trace
        self._calls = {"forward": 0, "backward_rows": 0, "backward_weights": 0}

    @staticmethod
    def why_not(*_: Any) -> str | None:
        return None

    def forward(self, *args: Any) -> Any:
        return self._note("forward", *args)

    def backward_rows(self, *args: Any, **needs: bool) -> Any:
        return self._note("backward_rows", *args, **needs)

    def backward_weights(self, *args: Any) -> Any:
        return self._note("backward_weights", *args)

    def _note(self, name: str, *args: Any, **needs: bool) -> Any:
        self._trace.append(("compute", name, self._calls[name]))
        self._calls[name] += 1
        return getattr(self._inner, name)(*args, **needs)


class SimulatedLink(_Around):
    """A link that serves transfers in the order of their launch, and keeps no core busy.

    What is sent arrives `latency` after its last byte has left; a transfer starts when the one before has left.

    Attributes:
        busy: seconds that all transfers so far took, had nothing else gone on.
    """

    # Also around `local`: only the link makes the tokens of one process travel.
    moves_rows = True

    def __init__(self, inner: TokenDispatcher, latency: float, bytes_per_second: float) -> None:
        """`inner` does the real work at launch and wait."""
        super().__init__(inner)
        self._latency, self._bytes_per_second = latency, bytes_per_second
        self._free_at = 0.0
        self.busy = 0.0

    def _sent(self, name: str, chunk: int, size: float, launch: Callable[[], Pending[Any]]) -> Pending[Any]:
        pending = launch()
        seconds = size / self._bytes_per_second
        self._free_at = max(time.perf_counter(), self._free_at) + seconds
        self.busy += seconds + self._latency
        arrives = self._free_at + self._latency

        def finish() -> Any:
            time.sleep(max(0.0, arrives - time.perf_counter()))
            return pending.wait()

        return Pending(finish)
