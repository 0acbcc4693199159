"""DeepEP (https://github.com/deepseek-ai/DeepEP): rows over NVLink, sent by kernels of its own on a stream of its own.

The only importer. DeepEP has two generations of one idea, V1 (`deep_ep.Buffer`) and V2 (`deep_ep.ElasticBuffer`; its
package holds both), and a `Link` speaks either:

    handle  = link.route(ids, E)        who gets what; the host waits until the counts have come
    arrived = link.send(x, handle)      a row once to each rank that needs it; launched, not waited for
    back    = link.send_back(y, handle) its transpose: rows return and are summed, without weights

[Note: route before rows]
DeepEP learns the counts in the call that sends rows, and the host waits there. Here a first call sends rows of a few
bytes, only for its handle and the experts of each received row; everything after it is a call with that handle, which
never waits. So the waits of all chunks of a layer lie in one place, ahead of everything that is to overlap. The price
is that small call, and with V1, whose calls with a handle carry no weights, another small one: the fp32 weights travel
as rows of their own, whose bits V1 copies without looking at them.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

# Launched: call it once to make the current stream wait, and for the rows and the weights (or None).
Launched = Callable[[], tuple[Tensor, Tensor | None]]

_MOST_TOP_K = 32
# V2 compiles its kernels anew, for seconds, for each size of its buffer: sizes are powers of two from here on.
_LEAST_ROOM = 256


class Route(NamedTuple):
    """What a rank learns of a chunk before its rows come.

    Attributes:
        handle: DeepEP's handle, as nested tuples of tensors and plain numbers.
        ids_NK: [N, K] this rank's own number of the expert of each slot, -1 where another rank's expert is meant.
        num_pairs: how many slots are not -1.
    """

    handle: tuple[Any, ...]
    ids_NK: Tensor
    num_pairs: int


def why_not(
    *, hidden: int, num_experts: int, top_k: int | None, dtype: torch.dtype, ep_size: int, device: torch.device
) -> str | None:
    """Why DeepEP cannot carry such rows here, as one sentence; None if it can. Not a collective.

    Args:
        hidden: hidden size D in elements.
        num_experts: experts of the model, E.
        top_k: experts of a token, where known.
        dtype: of the rows.
        ep_size: ranks that share the experts, all on one node.
        device: of this rank.
    """
    reason = why_not_device(device)
    if reason is None:
        reason = why_not_installed()
    if reason is None and dtype != torch.bfloat16:
        reason = (
            f"DeepEP sums rows in bf16 only, and these are {str(dtype).removeprefix('torch.')} (bf16 weights, or fp32 "
            "ones under bf16 mixed precision, make bf16 rows)"
        )
    if reason is None and top_k is not None and top_k > _MOST_TOP_K:
        reason = f"DeepEP takes at most {_MOST_TOP_K} experts a token, and this model has {top_k}"
    if reason is None and torch.are_deterministic_algorithms_enabled():
        if torch.utils.deterministic.fill_uninitialized_memory:  # type: ignore[attr-defined]
            reason = (
                "DeepEP refuses torch.use_deterministic_algorithms with "
                "torch.utils.deterministic.fill_uninitialized_memory, which writes into buffers that rows arrive in"
            )
    if reason is not None:
        return reason
    reasons = [link.why_not(hidden, num_experts, ep_size) for link in _links()]
    return None if None in reasons else ", and ".join(map(str, reasons))


def why_not_device(device: torch.device) -> str | None:
    """Why DeepEP cannot run on this rank's device, whatever it is to carry."""
    if device.type != "cuda":
        return f"DeepEP needs CUDA devices, and this run is on {device.type}"
    capability = torch.cuda.get_device_capability(device)
    if capability < (9, 0):
        return f"DeepEP needs a GPU of compute capability 9.0, and this one has {'.'.join(map(str, capability))}"
    mine = torch.cuda.current_device()
    for peer in range(torch.cuda.device_count()):
        if peer != mine and not torch.cuda.can_device_access_peer(mine, peer):
            return f"DeepEP needs GPUs that reach each other's memory, and {mine} does not reach {peer}"
    return None


def why_not_installed() -> str | None:
    """Why there is no DeepEP to call, as one sentence; None if there is."""
    try:
        _package()
    except ModuleNotFoundError as error:
        if error.name == "deep_ep":
            return "DeepEP (the module deep_ep) is not installed; it is built from source"
        return f"DeepEP cannot be imported: {error}"
    except Exception as error:
        # V2 checks NCCL and CUDA as it is imported, by assertions.
        return f"DeepEP cannot be imported: {type(error).__name__}: {error}"
    return None if _links() else "the module deep_ep has neither ElasticBuffer nor Buffer"


def open_link(group: dist.ProcessGroup, hidden: int, num_experts: int) -> Link:
    """The newest generation that serves. Nothing is allocated before `make_room`.

    Args:
        group: the EP process group.
        hidden: hidden size D in elements.
        num_experts: experts of the model, E.
    """
    serving = [link for link in _links() if link.why_not(hidden, num_experts, group.size()) is None]
    return serving[0](group, hidden)


class Link(ABC):
    """One EP group's DeepEP buffer, and the calls on it. All ranks of the group must make each call, in one order.

    Args:
        group: the EP process group.
        hidden: hidden size D in elements.
    """

    # Elements of a bf16 row that is sent for its handle, or beside weights, alone.
    blank: ClassVar[int]
    # Whether the size of the buffer goes by the number of tokens.
    is_sized_by_tokens: ClassVar[bool]

    def __init__(self, group: dist.ProcessGroup, hidden: int) -> None:
        """Keep the sizes."""
        self.group = group
        self.hidden = hidden
        self.deep_ep = _package()
        self.buffer: Any = None

    @classmethod
    @abstractmethod
    def why_not(cls, hidden: int, num_experts: int, ep_size: int) -> str | None:
        """Why this generation cannot carry such rows."""

    def most_tokens(self, num_tokens: int, device: torch.device) -> int:
        """The most tokens that a rank of the group has, this one `num_tokens`. Asks all, which the host waits for."""
        most = torch.tensor(num_tokens, device=device)
        dist.all_reduce(most, op=dist.ReduceOp.MAX, group=self.group)
        return int(most)

    @abstractmethod
    def make_room(self, num_tokens: int, top_k: int) -> None:
        """Allocate what `num_tokens` tokens take, where that is not there yet.

        Args:
            num_tokens: the most of a rank in one chunk, the same on all ranks; 0 where no size goes by it.
            top_k: experts of a token.
        """

    @abstractmethod
    def route(self, ids_TK: Tensor, num_experts: int) -> Route:
        """Tell all ranks what they will get, and wait on the host for what this one will; see the module's note."""

    @abstractmethod
    def send(self, x_TD: Tensor, handle: tuple[Any, ...], weights_TK: Tensor | None = None) -> Launched:
        """Launch rows, with weights where given: [T, D] bf16, [T, K] fp32 -> [N, D], [N, K].

        Weights are defined only in slots whose expert this rank has.
        """

    @abstractmethod
    def send_back(self, y_ND: Tensor, handle: tuple[Any, ...], weights_NK: Tensor | None = None) -> Launched:
        """Launch rows back: [N, D] bf16, [N, K] fp32 (0 in slots of other ranks) -> sums [T, D], [T, K]."""

    def close(self) -> None:
        """Free the buffer, which is a barrier of the group."""
        if self.buffer is not None:
            self.buffer.destroy()
            self.buffer = None

    def _ids(self, ids_TK: Tensor) -> Tensor:
        return ids_TK.to(getattr(self.deep_ep, "topk_idx_t", torch.int64)).contiguous()

    def blank_rows(self, like: Tensor) -> Tensor:
        """[N, blank] zeros, for the N of `like`: what is sent where only the rest counts."""
        return torch.zeros(like.size(0), self.blank, dtype=torch.bfloat16, device=like.device)


class BufferLink(Link):
    """DeepEP V1: rings of a fixed size, through which any number of rows passes."""

    blank = 16  # its least
    is_sized_by_tokens = False

    @classmethod
    def why_not(cls, hidden: int, num_experts: int, ep_size: int) -> str | None:
        """See the base class."""
        if ep_size not in (2, 4, 8):
            return f"DeepEP V1 serves 2, 4 or 8 ranks of a node, and ep_size is {ep_size}"
        # The builds that name their dtype of ids are those that came after the repair of odd multiples of 16.
        step = 16 if hasattr(_package(), "topk_idx_t") else 128
        if hidden % step or hidden > 8176:
            return f"DeepEP V1 (this build) takes hidden sizes up to 8176 that are multiples of {step}, not {hidden}"
        if num_experts // ep_size > 128:
            return f"DeepEP V1 takes at most 128 experts a rank, and ep_size {ep_size} makes {num_experts // ep_size}"
        return None

    def make_room(self, num_tokens: int, top_k: int) -> None:
        """See the base class; the first call allocates."""
        if self.buffer is not None:
            return
        make, ranks = self.deep_ep.Buffer, self.group.size()
        self._out, self._back = make.get_dispatch_config(ranks), make.get_combine_config(ranks)
        row = 2 * max(self.hidden, 2 * _MOST_TOP_K)
        size = max(config.get_nvl_buffer_size_hint(row, ranks) for config in (self._out, self._back))
        self.buffer = make(self.group, size, 0, explicitly_destroy=True)

    def route(self, ids_TK: Tensor, num_experts: int) -> Route:
        """See the base class."""
        ids_TK = self._ids(ids_TK)
        rows_of_rank, _, pairs_of_expert, is_sent, _ = self.buffer.get_dispatch_layout(ids_TK, num_experts)
        _, ids_NK, _, counts, handle, _ = self.buffer.dispatch(
            self.blank_rows(ids_TK),
            topk_idx=ids_TK,
            topk_weights=torch.zeros(ids_TK.shape, dtype=torch.float32, device=ids_TK.device),
            num_tokens_per_rank=rows_of_rank,
            num_tokens_per_expert=pairs_of_expert,
            is_token_in_rank=is_sent,
            config=self._out,
        )
        return Route(handle, ids_NK, sum(counts))

    def send(self, x_TD: Tensor, handle: tuple[Any, ...], weights_TK: Tensor | None = None) -> Launched:
        """See the base class."""
        if weights_TK is None:
            return self._send(x_TD, handle)
        top_k = weights_TK.size(1)
        # A row of 16 elements of bf16 holds 8 weights.
        padded = torch.nn.functional.pad(weights_TK, (0, -top_k % 8))
        weights, rows = self._send(padded.view(torch.bfloat16), handle), self._send(x_TD, handle)

        def finish() -> tuple[Tensor, Tensor]:
            weights_NK, _ = weights()
            return rows()[0], weights_NK.view(torch.float32)[:, :top_k]

        return finish

    def _send(self, x_TD: Tensor, handle: tuple[Any, ...]) -> Launched:
        x_ND, _, _, _, _, event = self.buffer.dispatch(
            x_TD.contiguous(), handle=handle, config=self._out, **self._on_its_stream()
        )
        return _launched(event, x_ND, None)

    def send_back(self, y_ND: Tensor, handle: tuple[Any, ...], weights_NK: Tensor | None = None) -> Launched:
        """See the base class."""
        out_TD, weights_TK, event = self.buffer.combine(
            y_ND.contiguous(), handle, topk_weights=weights_NK, config=self._back, **self._on_its_stream()
        )
        return _launched(event, out_TD, weights_TK)

    def _on_its_stream(self) -> dict[str, Any]:
        return {"previous_event": self.buffer.capture(), "async_finish": True, "allocate_on_comm_stream": True}


class ElasticLink(Link):
    """DeepEP V2: room for all rows that could come, so that all ranks agree on the most tokens that any has."""

    blank = 256  # the least that it takes back
    is_sized_by_tokens = True
    _room = _top_k = 0

    @classmethod
    def why_not(cls, hidden: int, num_experts: int, ep_size: int) -> str | None:
        """See the base class."""
        if hidden % 256:
            return f"DeepEP V2 takes hidden sizes that are multiples of 256, not {hidden}"
        if num_experts > 2048 or num_experts // ep_size > 256:
            return (
                f"DeepEP V2 takes at most 2048 experts and 256 a rank, and ep_size {ep_size} makes "
                f"{num_experts // ep_size} of {num_experts}"
            )
        return None

    def make_room(self, num_tokens: int, top_k: int) -> None:
        """See the base class."""
        room = max(_LEAST_ROOM, 1 << (num_tokens - 1).bit_length())
        if self.buffer is not None and room <= self._room and top_k <= self._top_k:
            return
        if self.buffer is not None:
            # Handles are places, not addresses: those of passes that are not over yet hold in any larger buffer.
            room, top_k = max(room, self._room), max(top_k, self._top_k)
            self.close()
        self._room, self._top_k = room, top_k
        self.buffer = self.deep_ep.ElasticBuffer(
            self.group,
            num_max_tokens_per_rank=room,
            hidden=max(self.hidden, self.blank),
            num_topk=top_k,
            allow_hybrid_mode=False,  # its way between nodes
            explicitly_destroy=True,
        )

    def route(self, ids_TK: Tensor, num_experts: int) -> Route:
        """See the base class."""
        ids_TK = self._ids(ids_TK)
        _, ids_NK, _, handle, _ = self.buffer.dispatch(
            self.blank_rows(ids_TK), topk_idx=ids_TK, num_experts=num_experts
        )
        return Route(self._plain(handle), ids_NK, sum(handle.num_recv_tokens_per_expert_list))

    def send(self, x_TD: Tensor, handle: tuple[Any, ...], weights_TK: Tensor | None = None) -> Launched:
        """See the base class."""
        made = self._made(handle)
        x_ND, _, weights_NK, _, event = self.buffer.dispatch(
            x_TD.contiguous(),
            topk_weights=weights_TK,
            handle=made,
            num_sms=made.num_sms,
            **self._on_its_stream(),
        )
        return _launched(event, x_ND, weights_NK)

    def send_back(self, y_ND: Tensor, handle: tuple[Any, ...], weights_NK: Tensor | None = None) -> Launched:
        """See the base class."""
        out_TD, weights_TK, event = self.buffer.combine(
            y_ND.contiguous(), self._made(handle), topk_weights=weights_NK, **self._on_its_stream()
        )
        return _launched(event, out_TD, weights_TK)

    def _on_its_stream(self) -> dict[str, Any]:
        captured = self.buffer.capture()
        return {"previous_event": captured, "async_with_compute_stream": True, "allocate_on_comm_stream": True}

    def _fields(self) -> list[str]:
        return list(inspect.signature(self.deep_ep.EPHandle).parameters)

    def _plain(self, handle: Any) -> tuple[Any, ...]:
        values = (getattr(handle, name) for name in self._fields())
        return tuple(tuple(value) if isinstance(value, list) else value for value in values)

    def _made(self, values: tuple[Any, ...]) -> Any:
        fields = zip(self._fields(), values, strict=True)
        return self.deep_ep.EPHandle(**{n: list(v) if isinstance(v, tuple) else v for n, v in fields})


def _launched(event: Any, rows: Tensor, weights: Tensor | None) -> Launched:
    def finish() -> tuple[Tensor, Tensor | None]:
        event.current_stream_wait()
        return rows, weights

    return finish


def _links() -> list[type[Link]]:
    """The generations that are installed, the newest first."""
    generations: list[tuple[str, type[Link]]] = [("ElasticBuffer", ElasticLink), ("Buffer", BufferLink)]
    return [link for name, link in generations if hasattr(_package(), name)]


def _package() -> Any:
    import deep_ep  # type: ignore[import-not-found]

    return deep_ep
