"""DeepEP's documented contract without its kernels: a module `deep_ep` over any process group, on any device.

Written from the docstrings and host checks of DeepEP (V1: `Buffer` as of 567632d, V2: `ElasticBuffer` as of 2.1.0). It
checks arguments as the vendor does: what its Python asserts raises AssertionError here, what its C++ asserts (on the
host, on the device, or by having no kernel for a number of ranks) raises RuntimeError. Nothing else is forgiven but
the device: CPU tensors stand for CUDA ones.

What a caller must not rely on is made to show: until an event is waited for, its results hold garbage; so do slots
that the vendor leaves undefined; and buffers that were not destroyed before the process group are reported by
`installed`.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor

from hf_moe_accel.dispatch.deepep import DeepEPDispatcher
from hf_moe_accel.ops import deep_ep as library

VERSIONS = ("v1", "v2")
GARBAGE = {torch.bfloat16: float("nan"), torch.float32: float("nan"), torch.int32: -77, torch.int64: -77}


class Record:
    """What a program did with DeepEP on this rank."""

    def __init__(self) -> None:
        self.alive: list[Any] = []  # buffers that are not destroyed
        self.made: list[Any] = []
        self.calls: list[str] = []
        self.open_events = 0  # launches that nothing has waited for


@contextmanager
def installed(version: str) -> Iterator[Record]:
    """`import deep_ep` gives the double, and the library takes this device for one that DeepEP runs on.

    Raises:
        AssertionError: a buffer was left, or a launch was not waited for.
    """
    record = Record()
    with (
        mock.patch.dict(sys.modules, {"deep_ep": module(version, record)}),
        mock.patch.object(library, "why_not_device", lambda device: None),
        mock.patch.object(DeepEPDispatcher, "device_types", None),
    ):
        yield record
    assert record.alive == [], "a DeepEP buffer was not destroyed before the process group"
    assert record.open_events == 0, "a DeepEP launch was never waited for"


def module(version: str, record: Record) -> types.ModuleType:
    made = types.ModuleType("deep_ep")
    made.topk_idx_t = torch.int64
    made.Config = Config
    made.EventHandle, made.EventOverlap = EventHandle, EventOverlap
    made.Buffer = type("Buffer", (Buffer,), {"record": record})
    if version == "v2":
        made.ElasticBuffer = type("ElasticBuffer", (ElasticBuffer,), {"record": record})
        made.EPHandle = EPHandle
    return made


def check(condition: bool, what: str) -> None:
    """A check of the vendor's C++."""
    if not condition:
        raise RuntimeError(f"DeepEP assertion failed: {what}")


# ---------------------------------------------------------------------------------------------------------------------
# Events


class EventHandle:
    """A point on a stream."""

    def __init__(self, finish: Callable[[], None] | None = None) -> None:
        self.finish = finish

    def current_stream_wait(self) -> None:
        if self.finish is not None:
            self.finish()
            self.finish = None


class EventOverlap:
    def __init__(self, event: EventHandle | None = None) -> None:
        self.event = event

    def current_stream_wait(self) -> None:
        assert self.event is not None
        self.event.current_stream_wait()


def launched(
    record: Record, device: torch.device, asynchronous: bool, *results: Tensor | None
) -> tuple[list[Tensor | None], EventHandle | None]:
    """Results as a launch hands them out: garbage until its event is waited for."""
    results = tuple(None if result is None else result.to(device) for result in results)
    if not asynchronous:
        return list(results), None
    handed_out = [None if r is None else torch.full_like(r, GARBAGE[r.dtype]) for r in results]
    record.open_events += 1

    def finish() -> None:
        record.open_events -= 1
        for out, result in zip(handed_out, results, strict=True):
            if out is not None:
                out.copy_(result)

    return handed_out, EventHandle(finish)


def gather(group: Any, value: Any) -> list[Any]:
    """The value of each rank."""
    gathered: list[Any] = [None] * group.size()
    dist.all_gather_object(gathered, value, group=group)
    return gathered


def exchange(group: Any, for_rank: list[Any], of_all: Any = None) -> tuple[list[Any], list[Any]]:
    """What each rank has for this one, and what each has for all."""
    gathered = gather(group, (for_rank, of_all))
    return [of_rank[group.rank()] for of_rank, _ in gathered], [of_all for _, of_all in gathered]


def check_torch_deterministic() -> None:
    assert not (torch.are_deterministic_algorithms_enabled() and torch.utils.deterministic.fill_uninitialized_memory)


def check_rows(x: Tensor) -> None:
    check(x.dim() == 2 and x.is_contiguous(), "x is 2-D and contiguous")
    check(x.size(1) * x.element_size() % 16 == 0, "rows are multiples of 16 bytes")


def check_bias(bias: Any, num_tokens: int, x: Tensor) -> list[Tensor]:
    biases = [bias] if isinstance(bias, Tensor) else list(bias or ())
    assert len(biases) in ((0, 1) if isinstance(bias, Tensor) else (0, 2))
    for one in biases:
        check(one.is_contiguous() and one.dtype == x.dtype, "bias is contiguous and of the dtype of x")
        check(one.shape == (num_tokens, x.size(1)), "bias has the shape of the output")
    return biases


def local_slots(ids: Tensor, rank: int, local: int) -> Tensor:
    """Local expert ids, -1 elsewhere."""
    return torch.where((ids >= 0) & (ids // local == rank), ids % local, -1)


def summed(num_tokens: int, like: Tensor, parts: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Rows added up by token, in fp32, and rounded once."""
    out = torch.zeros(num_tokens, *like.shape[1:])
    for tokens, rows in parts:
        out.index_add_(0, tokens, rows.float())
    return out.to(like.dtype)


# ---------------------------------------------------------------------------------------------------------------------
# V1


class Config:
    def __init__(self, num_sms: int, send: int, recv: int, rdma_send: int = 6, rdma_recv: int = 128) -> None:
        check(num_sms >= 0 and 0 < send < recv, "the sizes of a config are in order")
        self.num_sms, self.recv = num_sms, recv

    def get_nvl_buffer_size_hint(self, hidden_bytes: int, num_ranks: int) -> int:
        check(num_ranks <= 8, "ranks of one node")
        slots = self.num_sms // 2 * num_ranks
        size = slots * 5 * 4 + slots * self.recv * (hidden_bytes + 8 + 128 * 8 + 128 * 4 + 128 * 4)
        return (size + 127) // 128 * 128


class Buffer:
    """V1."""

    num_sms = 20
    record: Record

    def __init__(
        self,
        group: Any,
        num_nvl_bytes: int = 0,
        num_rdma_bytes: int = 0,
        low_latency_mode: bool = False,
        num_qps_per_rank: int = 24,
        allow_nvlink_for_low_latency_mode: bool = True,
        allow_mnnvl: bool = False,
        explicitly_destroy: bool = False,
        enable_shrink: bool = False,
    ) -> None:
        check(num_nvl_bytes % 128 == 0 and num_rdma_bytes == 0, "the buffer is aligned, and within a node")
        self.group, self.num_nvl_bytes, self.explicitly_destroy = group, num_nvl_bytes, explicitly_destroy
        self.group_size, self.rank = group.size(), group.rank()
        check(self.group_size < 8 or self.group_size % 8 == 0, "the number of ranks")
        check(len(set(gather(group, num_nvl_bytes))) == 1, "all ranks have buffers of one size")
        self.runtime: Any = object()
        self.record.alive.append(self)
        self.record.made.append(self)

    def destroy(self) -> None:
        assert self.explicitly_destroy, "`explicitly_destroy` flag must be set"
        check(self.runtime is not None, "not destroyed")
        dist.barrier(group=self.group)
        self.runtime = None
        self.record.alive.remove(self)

    @staticmethod
    def is_sm90_compiled() -> bool:
        return True

    @classmethod
    def set_num_sms(cls, new_num_sms: int) -> None:
        assert new_num_sms % 2 == 0, "The SM count must be even"
        Buffer.num_sms = new_num_sms

    @staticmethod
    def capture() -> EventOverlap:
        return EventOverlap(EventHandle())

    @staticmethod
    def get_dispatch_config(num_ranks: int) -> Config:
        sends = {2: 24, 4: 6, 8: 6}
        assert num_ranks in sends, f"Unsupported number of EP ranks: {num_ranks}"
        return Config(Buffer.num_sms, sends[num_ranks], 256, 6, 128)

    @staticmethod
    def get_combine_config(num_ranks: int) -> Config:
        sends = {2: 10, 4: 9, 8: 4}
        assert num_ranks in sends, f"Unsupported number of EP ranks: {num_ranks}"
        return Config(Buffer.num_sms, sends[num_ranks], 256, 6, 128)

    def _start(self, config: Config, previous_event: Any, asynchronous: bool, allocate_on_comm_stream: bool) -> None:
        check_torch_deterministic()
        check(self.runtime is not None, "the buffer is there")
        check(config.num_sms % 2 == 0, "the number of SMs is even")
        check(self.group_size in (2, 4, 8), "kernels are there for 2, 4 and 8 ranks")
        if allocate_on_comm_stream:
            # An EventHandle in place of an EventOverlap counts as none.
            check(getattr(previous_event, "event", None) is not None and asynchronous, "previous event, asynchronous")

    def _check_size(self, config: Config, x: Tensor, num_topk: int) -> None:
        ranks, slots = self.group_size, config.num_sms // 2 * self.group_size
        size = (
            ranks * ranks * 4 + slots * 16 + slots * config.recv * (x.size(1) * x.element_size() + 4 + num_topk * 12)
        )
        check(size <= self.num_nvl_bytes, "the buffer is large enough")

    def get_dispatch_layout(
        self,
        topk_idx: Tensor,
        num_experts: int,
        previous_event: Any = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> tuple[Any, ...]:
        self._start(Config(self.num_sms, 6, 256), previous_event, async_finish, allocate_on_comm_stream)
        check(topk_idx.dim() == 2 and topk_idx.is_contiguous() and num_experts > 0, "top-k is 2-D and contiguous")
        check(topk_idx.dtype == torch.int64, "top-k is of topk_idx_t")
        local = num_experts // self.group_size
        slots = [local_slots(topk_idx, rank, local) >= 0 for rank in range(self.group_size)]
        in_rank = torch.stack([slot.any(1) for slot in slots], dim=1)
        per_expert = torch.bincount(topk_idx[topk_idx >= 0].cpu(), minlength=num_experts).int()
        results, event = launched(
            self.record, topk_idx.device, async_finish, in_rank.sum(0).int(), per_expert, in_rank.contiguous()
        )
        return results[0], None, results[1], results[2], EventOverlap(event)

    def dispatch(
        self,
        x: Tensor,
        handle: tuple[Any, ...] | None = None,
        num_tokens_per_rank: Tensor | None = None,
        num_tokens_per_rdma_rank: Tensor | None = None,
        is_token_in_rank: Tensor | None = None,
        num_tokens_per_expert: Tensor | None = None,
        topk_idx: Tensor | None = None,
        topk_weights: Tensor | None = None,
        expert_alignment: int = 1,
        num_worst_tokens: int = 0,
        config: Config | None = None,
        previous_event: Any = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> tuple[Any, ...]:
        config = self.get_dispatch_config(self.group_size) if config is None else config
        ranks, channels = self.group_size, config.num_sms // 2
        if handle is not None:
            assert topk_idx is None and topk_weights is None
            rank_prefix, channel_prefix, _, src_idx, is_token_in_rank, _ = handle
        else:
            assert num_tokens_per_rank is not None
            assert is_token_in_rank is not None and num_tokens_per_expert is not None
        self._start(config, previous_event, async_finish, allocate_on_comm_stream)
        check(is_token_in_rank.dtype == torch.bool, "is_token_in_rank is bool")
        check_rows(x)
        check(is_token_in_rank.shape == (x.size(0), ranks), "is_token_in_rank is [tokens, ranks]")
        check(is_token_in_rank.is_contiguous(), "is_token_in_rank is contiguous")
        row_bytes = x.size(1) * x.element_size()
        check(row_bytes % 32 == 0 and row_bytes // 2 + 8 <= 8192, "rows are multiples of 32 bytes, below 16 KiB")
        if handle is not None:
            check(rank_prefix.dtype == channel_prefix.dtype == torch.int32, "prefixes are int32")
            check(rank_prefix.is_contiguous() and rank_prefix.shape == (ranks, ranks), "the rank prefix")
            check(channel_prefix.is_contiguous() and channel_prefix.shape == (ranks, channels), "the channel prefix")
        else:
            check(num_tokens_per_rank.dtype == num_tokens_per_expert.dtype == torch.int32, "counts are int32")
            check(num_tokens_per_rank.shape == (ranks,), "a count for each rank")
            num_experts = num_tokens_per_expert.numel()
            check(num_experts % ranks == 0 and num_experts // ranks <= 128, "at most 128 experts a rank")
        check((topk_idx is None) == (topk_weights is None), "ids come with weights")
        num_topk = 0
        if topk_idx is not None:
            num_topk = topk_idx.size(1)
            check(topk_idx.is_contiguous() and topk_weights.is_contiguous(), "top-k is contiguous")
            check(topk_idx.shape == topk_weights.shape and topk_idx.size(0) == x.size(0), "top-k is [tokens, k]")
            check(topk_idx.dtype == torch.int64, "top-k is of topk_idx_t")
            check(topk_weights.dtype == torch.float32, "weights are fp32")
            check(num_topk <= 32, "at most 32 experts a token")
        self._check_size(config, x, num_topk)

        sent = []
        for rank in range(ranks):
            tokens = is_token_in_rank[:, rank].nonzero()[:, 0]
            rows: tuple[Any, ...] = (tokens.int().cpu(), x[tokens].cpu())
            if topk_idx is not None:
                ids = local_slots(topk_idx[tokens], rank, num_experts // ranks)
                rows += (ids.cpu(), torch.where(ids >= 0, topk_weights[tokens], 0.0).cpu())
            sent.append(rows)
        counted = None
        if handle is None:
            counted = (num_tokens_per_rank.cpu(), num_tokens_per_expert.cpu())
        received, counted_by_all = exchange(self.group, sent, counted)
        parts = [torch.cat(part) for part in zip(*received, strict=True)]
        if handle is not None:
            self.record.calls.append("cached dispatch")
            check(parts[0].cpu().equal(src_idx[: parts[0].numel()].cpu()), "the handle is of this exchange")
            (recv_x,), event = launched(self.record, x.device, async_finish, _padded(parts[1], num_worst_tokens))
            return recv_x, None, None, None, None, EventOverlap(event)
        self.record.calls.append("dispatch")
        made_handle = (
            torch.stack([rows for rows, _ in counted_by_all]).cumsum(0).int().to(x.device),
            torch.zeros(ranks, channels, dtype=torch.int32, device=x.device),
            torch.zeros(ranks, channels, dtype=torch.int32, device=x.device),
            _padded(parts[0], num_worst_tokens).to(x.device),
            is_token_in_rank,
            torch.where(is_token_in_rank, is_token_in_rank.cumsum(0) - 1, -1).int(),
        )
        counts: list[int] = []
        ids, weights = (parts[2], parts[3]) if topk_idx is not None else (None, None)
        if num_worst_tokens > 0:
            check(topk_idx is not None, "worst-case buffers come with top-k")
            check(num_worst_tokens >= parts[1].size(0), "the worst case is not exceeded")
            ids, weights = _padded(ids, num_worst_tokens, -1), _padded(weights, num_worst_tokens)
        else:
            local = num_experts // ranks
            mine = slice(self.rank * local, (self.rank + 1) * local)
            of_experts = sum(pairs for _, pairs in counted_by_all)[mine]
            counts = [_aligned(int(count), expert_alignment) for count in of_experts]
        results, event = launched(
            self.record, x.device, async_finish, _padded(parts[1], num_worst_tokens), ids, weights
        )
        return *results, counts, made_handle, EventOverlap(event)

    def combine(
        self,
        x: Tensor,
        handle: tuple[Any, ...],
        topk_weights: Tensor | None = None,
        bias: Any = None,
        config: Config | None = None,
        previous_event: Any = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> tuple[Any, ...]:
        config = self.get_combine_config(self.group_size) if config is None else config
        rank_prefix, _, channel_prefix, src_idx, _, send_head = handle
        ranks, channels = self.group_size, config.num_sms // 2
        self._start(config, previous_event, async_finish, allocate_on_comm_stream)
        check_rows(x)
        check(x.dtype == torch.bfloat16, "combine kernels are there for bf16")
        for tensor in (src_idx, send_head, rank_prefix, channel_prefix):
            check(tensor.dtype == torch.int32 and tensor.is_contiguous(), "the handle is int32 and contiguous")
        check(src_idx.shape == (x.size(0),), "x has the rows that came")
        check(send_head.size(1) == ranks and rank_prefix.shape == (ranks, ranks), "the handle is of as many ranks")
        check(channel_prefix.shape == (ranks, channels), "the handle is of as many SMs")
        num_tokens, num_topk = send_head.size(0), 0
        if topk_weights is not None:
            num_topk = topk_weights.size(1)
            check(topk_weights.dim() == 2 and topk_weights.is_contiguous(), "weights are 2-D and contiguous")
            check(topk_weights.size(0) == x.size(0) and topk_weights.dtype == torch.float32, "fp32, one a row")
            check(num_topk <= 32, "at most 32 experts a token")
        self._check_size(config, x, num_topk)
        biases = check_bias(bias, num_tokens, x)

        self.record.calls.append("combine")
        ends = rank_prefix[:, self.rank].tolist()
        sent = []
        for start, end in zip([0, *ends], ends, strict=False):
            rows = slice(start, end)
            weights = None if topk_weights is None else topk_weights[rows].cpu()
            sent.append((src_idx[rows].long().cpu(), x[rows].cpu(), weights))
        back, _ = exchange(self.group, sent)
        parts = [(tokens, rows) for tokens, rows, _ in back]
        parts += [(torch.arange(num_tokens), one.cpu()) for one in biases]
        out, out_weights = summed(num_tokens, x, parts), None
        if topk_weights is not None:
            out_weights = summed(num_tokens, topk_weights, [(tokens, weights) for tokens, _, weights in back])
        results, event = launched(self.record, x.device, async_finish, out, out_weights)
        return *results, EventOverlap(event)


def _padded(rows: Tensor, num_worst_tokens: int, fill: float | None = None) -> Tensor:
    if num_worst_tokens == 0:
        return rows
    padding = rows.new_full(
        (num_worst_tokens - rows.size(0), *rows.shape[1:]), GARBAGE[rows.dtype] if fill is None else fill
    )
    return torch.cat([rows, padding])


def _aligned(count: int, alignment: int) -> int:
    return -(-count // alignment) * alignment


# ---------------------------------------------------------------------------------------------------------------------
# V2


class EPHandle:
    """V2's handle: only attributes."""

    def __init__(
        self,
        do_expand: bool,
        num_experts: int,
        expert_alignment: int,
        num_max_tokens_per_rank: int,
        num_sms: int,
        topk_idx: Tensor,
        num_recv_tokens: int,
        num_expanded_tokens: int,
        num_recv_tokens_per_expert_list: list[int],
        psum_num_recv_tokens_per_scaleup_rank: Tensor,
        psum_num_recv_tokens_per_expert: Tensor,
        num_unaligned_recv_tokens_per_expert: Tensor | None,
        recv_src_metadata: Tensor,
        dst_buffer_slot_idx: Tensor,
        token_metadata_at_forward: Tensor | None,
        channel_linked_list: Tensor | None,
    ) -> None:
        assert topk_idx is not None
        vars(self).update({name: value for name, value in locals().items() if name != "self"})
        self.cached_recv_src_metadata_before_sort = None


class ElasticBuffer:
    """V2, without the expanding layout and without hybrid mode, which the library does not use."""

    record: Record

    def __init__(
        self,
        group: Any,
        num_bytes: int | None = None,
        num_cpu_bytes: int = 0,
        num_max_tokens_per_rank: int = 0,
        hidden: int = 0,
        num_topk: int = 0,
        use_fp8_dispatch: bool = False,
        deterministic: bool = False,
        allow_hybrid_mode: bool = True,
        allow_multiple_reduction: bool = True,
        prefer_overlap_with_compute: bool = True,
        sl_idx: int = 3,
        num_allocated_qps: int = 0,
        num_cpu_timeout_secs: int = 300,
        num_gpu_timeout_secs: int = 100,
        explicitly_destroy: bool = False,
    ) -> None:
        if num_bytes is None:
            check(num_max_tokens_per_rank > 0 and hidden > 0, "sizes are given")
            num_bytes = self._size(group.size(), num_max_tokens_per_rank, hidden, num_topk or 32)
        self.group, self.num_bytes, self.explicitly_destroy = group, num_bytes, explicitly_destroy
        self.num_max_tokens_per_rank = num_max_tokens_per_rank
        check(len(set(gather(group, (num_bytes, num_max_tokens_per_rank)))) == 1, "all ranks have buffers of one size")
        self.runtime: Any = object()
        self.record.alive.append(self)
        self.record.made.append(self)

    @staticmethod
    def _size(ranks: int, num_max_tokens: int, hidden: int, num_topk: int) -> int:
        size = ranks * num_max_tokens * (2 * hidden + 12 * num_topk + 8)
        return _aligned(size, 2 << 20)

    def destroy(self) -> None:
        assert self.explicitly_destroy
        if self.runtime is not None:
            dist.barrier(group=self.group)
            self.runtime = None
            self.record.alive.remove(self)

    @staticmethod
    def capture() -> EventHandle:
        return EventHandle()

    def get_theoretical_num_sms(self, num_experts: int, num_topk: int) -> int:
        assert num_experts % self.group.size() == 0
        return 20

    def _start(self, num_sms: int, previous_event: Any, allocate_on_comm_stream: bool) -> None:
        check_torch_deterministic()
        check(self.runtime is not None, "the buffer is there")
        check(num_sms > 0, "there are SMs")
        check(previous_event is None or isinstance(previous_event, EventHandle), "the previous event is a handle")
        check(previous_event is None or allocate_on_comm_stream, "a previous event needs the communication stream")

    def dispatch(
        self,
        x: Tensor,
        topk_idx: Tensor | None = None,
        topk_weights: Tensor | None = None,
        cumulative_local_expert_recv_stats: Tensor | None = None,
        num_experts: int | None = None,
        num_max_tokens_per_rank: int | None = None,
        expert_alignment: int | None = None,
        num_sms: int = 0,
        num_qps: int = 0,
        previous_event: Any = None,
        previous_event_before_epilogue: Any = None,
        async_with_compute_stream: bool = False,
        allocate_on_comm_stream: bool = False,
        handle: EPHandle | None = None,
        do_handle_copy: bool = True,
        do_cpu_sync: bool | None = None,
        do_expand: bool = False,
        do_zero_padding: bool = False,
        use_tma_aligned_col_major_sf: bool = False,
    ) -> tuple[Any, ...]:
        num_topk = (handle.topk_idx if topk_idx is None else topk_idx).shape[1]
        num_sms = self.get_theoretical_num_sms(num_experts, num_topk) if num_sms == 0 else num_sms
        cached = handle is not None
        if handle is not None:
            assert topk_idx is None
            assert not do_cpu_sync, "Cannot do CPU sync with cached handle"
            topk_idx = handle.topk_idx
            most = handle.num_max_tokens_per_rank if num_max_tokens_per_rank is None else num_max_tokens_per_rank
            num_experts = handle.num_experts if num_experts is None else num_experts
            alignment = handle.expert_alignment if expert_alignment is None else expert_alignment
            do_cpu_sync = False
            assert (num_experts, alignment, most) == (
                handle.num_experts,
                handle.expert_alignment,
                handle.num_max_tokens_per_rank,
            )
        else:
            most = self.num_max_tokens_per_rank if num_max_tokens_per_rank is None else num_max_tokens_per_rank
            alignment = 1 if expert_alignment is None else expert_alignment
            do_cpu_sync = True if do_cpu_sync is None else do_cpu_sync
        assert not do_expand, "the double has no expanding layout"
        self._start(num_sms, previous_event, allocate_on_comm_stream)
        check(not do_zero_padding, "zero padding needs the expanding layout")
        ranks = self.group.size()
        check_rows(x)
        check(x.size(0) <= most, "no more tokens than the most")
        check(topk_idx.dim() == 2 and topk_idx.size(0) == x.size(0), "top-k is [tokens, k]")
        check(topk_idx.dtype == torch.int64 and topk_idx.is_contiguous(), "top-k is of topk_idx_t, contiguous")
        check(num_topk <= 32, "at most 32 experts a token")
        if topk_weights is not None:
            check(topk_weights.shape == topk_idx.shape and topk_weights.is_contiguous(), "weights are as top-k")
            check(topk_weights.dtype == torch.float32, "weights are fp32")
        check(num_experts % ranks == 0, "experts are spread evenly")
        check(num_experts <= 2048 and num_experts // ranks <= 256, "at most 2048 experts and 256 a rank")
        check(self._size(ranks, most, x.size(1), num_topk) <= self.num_bytes, "the buffer is large enough")

        local = num_experts // ranks
        sent = []
        for to in range(ranks):
            slots = local_slots(topk_idx, to, local)
            tokens = (slots >= 0).any(1).nonzero()[:, 0]
            weights = None
            if topk_weights is not None:
                weights = torch.where(slots[tokens] >= 0, topk_weights[tokens], GARBAGE[torch.float32]).cpu()
            sent.append((tokens.int().cpu(), x[tokens].cpu(), slots[tokens].cpu(), weights))
        received, agreed = exchange(self.group, sent, (most, x.size(1), num_topk, cached))
        check(len(set(agreed)) == 1, "all ranks pass one most, one hidden size and one k")
        src, rows, ids = (torch.cat([part[i] for part in received]) for i in range(3))
        weights = None if topk_weights is None else torch.cat([part[3] for part in received])
        num_recv = rows.size(0)
        if handle is None:
            self.record.calls.append("dispatch")
            counts = torch.bincount(ids[ids >= 0], minlength=local)
            of_rank = torch.tensor([part[0].numel() for part in received])
            metadata = torch.full((num_recv, num_topk + 2), GARBAGE[torch.int32], dtype=torch.int32)
            metadata[:, 0] = src + most * torch.arange(ranks).repeat_interleave(of_rank).int()
            aligned = [_aligned(int(count), alignment) for count in counts]
            padded = num_recv
            if not do_cpu_sync:
                padded = most * ranks
                metadata, rows, ids = (_padded(part, padded) for part in (metadata, rows, ids))
                weights = None if weights is None else _padded(weights, padded)
            handle = EPHandle(
                do_expand,
                num_experts,
                alignment,
                most,
                num_sms,
                topk_idx.clone() if do_handle_copy else topk_idx,
                padded,
                sum(aligned),
                aligned if do_cpu_sync else [],
                of_rank.cumsum(0).int().to(x.device),
                torch.tensor(aligned).cumsum(0).int().to(x.device),
                None,
                metadata.to(x.device),
                torch.zeros(x.size(0), num_topk, dtype=torch.int32, device=x.device),
                None,
                None,
            )
        else:
            self.record.calls.append("cached dispatch")
            check(int(handle.psum_num_recv_tokens_per_scaleup_rank[-1]) == num_recv, "the handle is of this exchange")
            check(handle.dst_buffer_slot_idx.shape == (x.size(0), num_topk), "the handle is of these tokens")
            rows, ids = (_padded(part, handle.num_recv_tokens) for part in (rows, ids))
            weights = None if weights is None else _padded(weights, handle.num_recv_tokens)
        results, event = launched(self.record, x.device, async_with_compute_stream, rows, ids, weights)
        return *results, handle, EventOverlap(event)

    def combine(
        self,
        x: Tensor,
        handle: EPHandle,
        topk_weights: Tensor | None = None,
        bias: Any = None,
        num_sms: int = 0,
        num_qps: int = 0,
        previous_event: Any = None,
        previous_event_before_epilogue: Any = None,
        async_with_compute_stream: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> tuple[Any, ...]:
        self._start(handle.num_sms if num_sms == 0 else num_sms, previous_event, allocate_on_comm_stream)
        ranks = self.group.size()
        check_rows(x)
        check(x.dtype == torch.bfloat16, "x is bf16")
        check(x.size(1) % 256 == 0, "the hidden size is a multiple of 256")
        num_tokens, num_topk = handle.topk_idx.shape
        check(num_tokens <= handle.num_max_tokens_per_rank, "no more tokens than the most")
        check(handle.recv_src_metadata.shape == (x.size(0), num_topk + 2), "x has the rows that came")
        if topk_weights is not None:
            check(
                topk_weights.shape == (x.size(0), num_topk) and topk_weights.is_contiguous(), "weights are [rows, k]"
            )
            check(topk_weights.dtype == torch.float32, "weights are fp32")
        size = self._size(ranks, handle.num_max_tokens_per_rank, x.size(1), num_topk)
        check(size <= self.num_bytes, "the buffer is large enough")
        biases = check_bias(bias, num_tokens, x)

        self.record.calls.append("combine")
        ends = handle.psum_num_recv_tokens_per_scaleup_rank.tolist()
        sent = []
        for start, end in zip([0, *ends], ends, strict=False):
            rows = slice(start, end)
            weights = None if topk_weights is None else topk_weights[rows].cpu()
            source = handle.recv_src_metadata[rows, 0].long() % handle.num_max_tokens_per_rank
            sent.append((source.cpu(), x[rows].cpu(), weights))
        back, _ = exchange(self.group, sent)
        parts = [(tokens, rows) for tokens, rows, _ in back]
        parts += [(torch.arange(num_tokens), one.cpu()) for one in biases]
        out, out_weights = summed(num_tokens, x, parts), None
        if topk_weights is not None:
            # Of each slot, what the rank of its expert gives; nothing is summed.
            out_weights = torch.zeros(num_tokens, num_topk)
            owner = handle.topk_idx.cpu() // (handle.num_experts // ranks)
            for of_rank, (tokens, _, weights) in enumerate(back):
                theirs = owner[tokens] == of_rank
                out_weights[tokens] = torch.where(theirs, weights, out_weights[tokens])
        results, event = launched(self.record, x.device, async_with_compute_stream, out, out_weights)
        return *results, EventOverlap(event)
