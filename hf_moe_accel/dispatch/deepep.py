"""DeepEP's kernels within a node: rows go over NVLink while the experts compute.

`ops/deep_ep` speaks to its two generations; this is the contract on top:

    plan                route each chunk: its handle, and which slots of the rows to come are pairs of this rank
    dispatch            send rows and weights            dispatch_backward   send their gradients back, summed
    combine             send results back, summed        combine_backward    send gradients, as rows were sent

The host waits once a chunk, and with V2 once more ahead of all (see [Note: route before rows]); all of it in `plan`.
V2's wait is for the most tokens of a rank, by which its buffer is sized. V1 asks for that only where `overlap_chunks`
is "auto", which cuts by it.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from typing import Any, Self

import torch
import torch.distributed as dist
from torch import Tensor

from hf_moe_accel.dispatch.base import Pending, TokenDispatcher, Traffic
from hf_moe_accel.ops.deep_ep import Link, open_link, why_not
from hf_moe_accel.ops.permutation import Dispatched, compact, order_by_expert


@dataclass(frozen=True, kw_only=True)
class ChunkPlan:
    """One chunk's part of the exchange. N rows and P pairs arrive.

    Attributes:
        handle: DeepEP's, as nested tuples of tensors and plain numbers.
        slot_of_P: [P] int64, which of the N x K slots that arrive hold the pairs.
        expert_of_P: [P] integer, the local expert of each pair.
        start_of_N: [N] int64, the first pair of each row.
        first_token, num_tokens: which tokens of this rank the chunk holds.
    """

    handle: tuple[Any, ...]
    slot_of_P: Tensor
    expert_of_P: Tensor
    start_of_N: Tensor
    first_token: int
    num_tokens: int
    top_k: int


@dataclass(frozen=True, kw_only=True)
class DeepEPPlan:
    """The plan of a forward: one entry a chunk. most_tokens: that a rank of the group holds, where all know."""

    chunks: tuple[ChunkPlan, ...]
    num_local_experts: int
    most_tokens: int | None


class DeepEPDispatcher(TokenDispatcher):
    """See the module's docstring.

    Args:
        group: the EP process group.
        hidden: hidden size D in elements.
        num_experts: experts of the model, E; the most that any layer has.
    """

    device_types = ("cuda",)

    def __init__(self, group: dist.ProcessGroup, hidden: int, num_experts: int) -> None:
        """Allocate nothing: the first plan does."""
        self.group = group
        self.link: Link = open_link(group, hidden, num_experts)

    @classmethod
    def why_not(cls, traffic: Traffic) -> str | None:
        """See the base class."""
        if not traffic.within_node:
            return (
                f"DeepEP is used within a node only, and ep_size {traffic.ep_size} does not divide the "
                f"{traffic.ranks_per_node} ranks of one"
            )
        return why_not(
            hidden=traffic.hidden,
            num_experts=traffic.num_experts,
            top_k=traffic.top_k,
            dtype=traffic.dtype,
            ep_size=traffic.ep_size,
            device=traffic.device,
        )

    @classmethod
    def create(cls, group: dist.ProcessGroup | None, traffic: Traffic) -> Self:
        """See the base class."""
        assert group is not None, "DeepEP needs an EP group"
        return cls(group, traffic.hidden, traffic.num_experts)

    def close(self) -> None:
        """Free the buffer, which is a barrier; not where an error is on its way up, as other ranks may never come."""
        if sys.exception() is None:
            self.link.close()

    def plan(self, ids_TK: Tensor, num_experts: int, chunks: int = 1) -> DeepEPPlan:
        """Allocate the buffer, where it is not there yet, and route each chunk."""
        local = num_experts // self.group.size()
        parts = ids_TK.tensor_split(chunks)
        most_tokens = None
        if self.link.is_sized_by_tokens:
            most_tokens = self.link.most_tokens(ids_TK.size(0), ids_TK.device)
        self.link.make_room(math.ceil((most_tokens or 0) / chunks), ids_TK.size(1))
        plans, first = [], 0
        for part in parts:
            plans.append(self._plan_chunk(part, num_experts, first))
            first += part.size(0)
        return DeepEPPlan(chunks=tuple(plans), num_local_experts=local, most_tokens=most_tokens)

    def most_tokens(self, plan: DeepEPPlan) -> int:
        """What making the plan told, or now all ranks tell each other."""
        if plan.most_tokens is not None:
            return plan.most_tokens
        mine = sum(part.num_tokens for part in plan.chunks)
        return self.link.most_tokens(mine, plan.chunks[0].slot_of_P.device)

    def _plan_chunk(self, ids_TK: Tensor, num_experts: int, first_token: int) -> ChunkPlan:
        handle, ids_NK, num_pairs = self.link.route(ids_TK, num_experts)
        is_pair = ids_NK >= 0
        slot_of_P = compact(is_pair.reshape(-1), num_pairs)
        pairs_of_N = is_pair.sum(1)
        return ChunkPlan(
            handle=handle,
            slot_of_P=slot_of_P,
            expert_of_P=ids_NK.reshape(-1).index_select(0, slot_of_P),
            start_of_N=torch.cumsum(pairs_of_N, 0) - pairs_of_N,
            first_token=first_token,
            num_tokens=ids_TK.size(0),
            top_k=ids_TK.size(1),
        )

    def dispatch(self, x_TD: Tensor, weights_TK: Tensor, plan: DeepEPPlan, chunk: int) -> Pending[Dispatched]:
        """Launch rows and weights.

        Raises:
            ValueError: the rows are not bf16.
        """
        if x_TD.dtype != torch.bfloat16:
            raise ValueError(
                f"token_dispatcher='deepep' carries bf16 rows, and these are {x_TD.dtype}: load the model in bf16, or "
                "train fp32 weights under bf16 mixed precision, or use token_dispatcher='all_to_all'."
            )
        part = plan.chunks[chunk]
        arriving = self.link.send(_of_chunk(x_TD, part), part.handle, _of_chunk(weights_TK, part).float().contiguous())

        def finish() -> Dispatched:
            x_ND, weights_NK = arriving()
            assert weights_NK is not None
            weights_P = weights_NK.reshape(-1).index_select(0, part.slot_of_P)
            row_of_P = part.slot_of_P // part.top_k
            return order_by_expert(
                x_ND, part.expert_of_P, row_of_P, weights_P, part.start_of_N, plan.num_local_experts
            )

        return Pending(finish)

    def combine(self, y_ND: Tensor, plan: DeepEPPlan, chunk: int) -> Pending[Tensor]:
        """Launch the rows back; DeepEP sums, for each token, what its ranks made of it."""
        returning = self.link.send_back(y_ND, plan.chunks[chunk].handle)
        return Pending(lambda: returning()[0])

    def combine_backward(self, grad_TD: Tensor, plan: DeepEPPlan, chunk: int) -> Pending[Tensor]:
        """Each rank that made a part of a token's output gets the token's gradient."""
        part = plan.chunks[chunk]
        arriving = self.link.send(_of_chunk(grad_TD, part), part.handle)
        return Pending(lambda: arriving()[0])

    def dispatch_backward(
        self, grad_x_ND: Tensor | None, grad_weights_R: Tensor | None, plan: DeepEPPlan, chunk: int, rows: Dispatched
    ) -> Pending[tuple[Tensor | None, Tensor | None]]:
        """Launch both gradients back, in one call."""
        if grad_x_ND is None and grad_weights_R is None:
            return Pending.done((None, None))
        part = plan.chunks[chunk]
        weights_NK = None
        if grad_weights_R is not None:
            weights_NK = grad_weights_R.new_zeros(part.start_of_N.numel(), part.top_k)
            weights_NK.view(-1)[part.slot_of_P] = grad_weights_R.index_select(0, rows.r_of_P)
        sent = grad_x_ND if grad_x_ND is not None else self.link.blank_rows(part.start_of_N)
        returning = self.link.send_back(sent, part.handle, weights_NK)

        def finish() -> tuple[Tensor | None, Tensor | None]:
            x_TD, weights_TK = returning()
            return None if grad_x_ND is None else x_TD, weights_TK

        return Pending(finish)

    def sum_over_ep(self, tensor: Tensor) -> Tensor:
        """All-reduce over the EP group."""
        # Autograd hands out expanded gradients: fewer elements in memory than the collective would write.
        tensor = tensor.contiguous()
        dist.all_reduce(tensor, group=self.group)
        return tensor


def _of_chunk(tensor_T: Tensor, part: ChunkPlan) -> Tensor:
    return tensor_T[part.first_token : part.first_token + part.num_tokens]
