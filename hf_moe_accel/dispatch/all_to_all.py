"""Uneven all-to-all collectives (NCCL, gloo): the distributed reference.

A token travels once to each rank that owns at least one of its experts, whatever the number of experts there; with it
go its (expert, weight) pairs, 8 bytes each. The expert side weights and sums, so one row comes back.

2 ranks, experts 0 1 | 2 3, top-2; rank 0 holds tokens a (experts 0 3) and b (0 1), rank 1 holds c (2 3):

    rows sent      0 -> 0: a b     0 -> 1: a      1 -> 0: none      1 -> 1: c
    pairs sent     (a,0) (b,0) (b,1)   (a,1)                        (c,0) (c,1)     local expert numbers
    rank 1 has     rows a c;  pairs by expert: 0: c;  1: a c
    rows back      0 -> 0: a b     1 -> 0: a      ...                 token a = the sum of two rows

Exchanging counts ahead of rows, in one collective and one host sync a layer, follows transformers' `AllToAllEP`; a row
once per rank, with its pairs, follows DeepEP (https://github.com/deepseek-ai/DeepEP).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch
import torch.distributed as dist
from torch import Tensor

from hf_moe_accel.dispatch.base import Pending, TokenDispatcher, Traffic
from hf_moe_accel.ops.permutation import Dispatched, compact, order_by_expert, sum_segments


@dataclass(frozen=True, kw_only=True)
class ChunkPlan:
    """One chunk's part of the exchange. S rows and Q pairs leave this rank, N rows and P pairs arrive.

    Attributes:
        token_of_S: [S] int64, the token (within all T) of each row sent, rows in the order of (rank, token).
        s_of_V: [S] int64, the rows sent in the order of (token, rank): where each stands in the sending order.
        start_of_T: [T_chunk] int64, the first entry of `s_of_V` of each token.
        slot_of_Q: [Q] int64, the (token, k) slot, within the chunk, of each pair sent.
        code_of_Q: [Q] int32, row (within its rank's block) x local experts + local expert.
        row_start_r: [ep] int64, the first row that arrives from each rank.
        pairs_in_r: [ep] int64, how many pairs arrive from each rank.
        first_token, num_tokens: which tokens of this rank the chunk holds.
        rows_out, rows_in, pairs_out, pairs_in: [ep] numbers on the host.
    """

    token_of_S: Tensor
    s_of_V: Tensor
    start_of_T: Tensor
    slot_of_Q: Tensor
    code_of_Q: Tensor
    row_start_r: Tensor
    pairs_in_r: Tensor
    first_token: int
    num_tokens: int
    top_k: int
    rows_out: tuple[int, ...]
    rows_in: tuple[int, ...]
    pairs_out: tuple[int, ...]
    pairs_in: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class AllToAllPlan:
    """The plan of a forward: one entry a chunk. most_tokens: that a rank of the group holds."""

    chunks: tuple[ChunkPlan, ...]
    num_local_experts: int
    most_tokens: int


class AllToAllDispatcher(TokenDispatcher):
    """See the module's docstring.

    Args:
        group: the EP process group.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        """Keep the group; nothing is allocated."""
        self.group = group
        self.ep_size = group.size()

    @classmethod
    def create(cls, group: dist.ProcessGroup | None, traffic: Traffic) -> Self:
        """It carries whatever comes."""
        assert group is not None, "all_to_all needs an EP group"
        return cls(group)

    def plan(self, ids_TK: Tensor, num_experts: int, chunks: int = 1) -> AllToAllPlan:
        """Exchange the counts of all chunks in one collective and read them back: the layer's one host sync."""
        local = num_experts // self.ep_size
        parts = ids_TK.tensor_split(chunks)
        masks = [self._wanted(part, local) for part in parts]
        # [ep, chunks + 1, 2]: rows and pairs for each rank; last, how many tokens this rank has.
        counts = [torch.stack([rows.sum(0), pairs.sum(0)], dim=1) for rows, pairs in masks]
        send = torch.stack([*counts, torch.full_like(counts[0], ids_TK.size(0))], dim=1)
        receive = torch.empty_like(send)
        dist.all_to_all_single(receive, send, group=self.group)
        out, back = torch.stack([send, receive]).tolist()
        plans = []
        first = 0
        for i, (part, (wanted, _)) in enumerate(zip(parts, masks, strict=True)):
            numbers = [tuple(side[r][i][j] for r in range(self.ep_size)) for side in (out, back) for j in (0, 1)]
            plans.append(self._plan_chunk(part, wanted, receive[:, i], first, local, *numbers))
            first += part.size(0)
        most_tokens = max(of_rank[-1][0] for of_rank in back)
        return AllToAllPlan(chunks=tuple(plans), num_local_experts=local, most_tokens=most_tokens)

    def most_tokens(self, plan: AllToAllPlan) -> int:
        """Each rank's number comes with its counts."""
        return plan.most_tokens

    def _wanted(self, ids_TK: Tensor, local: int) -> tuple[Tensor, Tensor]:
        """[T, ep] bool: does the rank need the token; [T, ep] int64: how many of its experts does the token want."""
        pairs = torch.zeros(ids_TK.size(0), self.ep_size, dtype=torch.int64, device=ids_TK.device)
        pairs.scatter_add_(1, (ids_TK // local).long(), torch.ones_like(ids_TK, dtype=torch.int64))
        return pairs > 0, pairs

    def _plan_chunk(
        self,
        ids_TK: Tensor,
        wanted: Tensor,
        receive_r2: Tensor,
        first_token: int,
        local: int,
        rows_out: tuple[int, ...],
        pairs_out: tuple[int, ...],
        rows_in: tuple[int, ...],
        pairs_in: tuple[int, ...],
    ) -> ChunkPlan:
        num_tokens, top_k = ids_TK.shape
        total = sum(rows_out)
        by_rank = wanted.t().reshape(-1)
        # s_rT[r, t]: where token t's row for rank r stands in the sending order (nonsense where it isn't wanted).
        s_rT = (torch.cumsum(by_rank, 0) - 1).view(self.ep_size, num_tokens)
        token_of_S = compact(by_rank, total) % max(num_tokens, 1)
        s_of_V = s_rT.t().reshape(-1).index_select(0, compact(wanted.reshape(-1), total))
        rows_of_T = wanted.sum(1)
        start_of_T = torch.cumsum(rows_of_T, 0) - rows_of_T

        ids_Q = ids_TK.reshape(-1)
        owner_Q = ids_Q // local
        slot_of_Q = torch.argsort(owner_Q, stable=True)
        owner_Q = owner_Q.index_select(0, slot_of_Q).long()
        rows_out_r = wanted.sum(0)
        block_start_r = torch.cumsum(rows_out_r, 0) - rows_out_r
        row_Q = s_rT[owner_Q, slot_of_Q // top_k] - block_start_r.index_select(0, owner_Q)
        code_of_Q = row_Q * local + ids_Q.index_select(0, slot_of_Q) % local
        return ChunkPlan(
            token_of_S=token_of_S + first_token,
            s_of_V=s_of_V,
            start_of_T=start_of_T,
            slot_of_Q=slot_of_Q,
            code_of_Q=code_of_Q.int(),
            row_start_r=torch.cumsum(receive_r2[:, 0], 0) - receive_r2[:, 0],
            pairs_in_r=receive_r2[:, 1].contiguous(),
            first_token=first_token,
            num_tokens=num_tokens,
            top_k=top_k,
            rows_out=rows_out,
            rows_in=rows_in,
            pairs_out=pairs_out,
            pairs_in=pairs_in,
        )

    def dispatch(self, x_TD: Tensor, weights_TK: Tensor, plan: AllToAllPlan, chunk: int) -> Pending[Dispatched]:
        """Launch the rows and their (expert, weight) pairs."""
        part = plan.chunks[chunk]
        rows = self._exchange(x_TD.index_select(0, part.token_of_S), part.rows_out, part.rows_in)
        weights_of_chunk = weights_TK[part.first_token : part.first_token + part.num_tokens]
        weights_Q = weights_of_chunk.reshape(-1).index_select(0, part.slot_of_Q).float()
        # Weight bits travel beside the codes: one collective for both.
        packed_Q2 = torch.stack([part.code_of_Q, weights_Q.view(torch.int32)], dim=1)
        pairs = self._exchange(packed_Q2, part.pairs_out, part.pairs_in)
        local = plan.num_local_experts

        def finish() -> Dispatched:
            packed_P2 = pairs.wait()
            code_of_P = packed_P2[:, 0]
            num_pairs = code_of_P.size(0)
            # Pairs leave their rank in the order of its tokens, so rows never decrease along P.
            row_of_P = code_of_P // local + part.row_start_r.repeat_interleave(part.pairs_in_r, output_size=num_pairs)
            pairs_of_N = row_of_P.new_zeros(sum(part.rows_in))
            pairs_of_N.scatter_add_(0, row_of_P, torch.ones_like(row_of_P))
            weights_P = packed_P2[:, 1].contiguous().view(torch.float32)
            start_of_N = torch.cumsum(pairs_of_N, 0) - pairs_of_N
            return order_by_expert(rows.wait(), code_of_P % local, row_of_P, weights_P, start_of_N, local)

        return Pending(finish)

    def combine(self, y_ND: Tensor, plan: AllToAllPlan, chunk: int) -> Pending[Tensor]:
        """Launch the rows back; on arrival sum, for each token, what its ranks made of it."""
        return self._return_rows(y_ND, plan.chunks[chunk])

    def combine_backward(self, grad_TD: Tensor, plan: AllToAllPlan, chunk: int) -> Pending[Tensor]:
        """Each rank that made a part of a token's output gets the token's gradient."""
        part = plan.chunks[chunk]
        return self._exchange(grad_TD.index_select(0, part.token_of_S), part.rows_out, part.rows_in)

    def dispatch_backward(
        self, grad_x_ND: Tensor | None, grad_weights_R: Tensor | None, plan: AllToAllPlan, chunk: int, rows: Dispatched
    ) -> Pending[tuple[Tensor | None, Tensor | None]]:
        """Launch both gradients back."""
        part = plan.chunks[chunk]
        weights: Pending[Tensor] | None = None
        if grad_weights_R is not None:
            weights = self._exchange(grad_weights_R.index_select(0, rows.r_of_P), part.pairs_in, part.pairs_out)
        grad_x = None if grad_x_ND is None else self._return_rows(grad_x_ND, part)

        def finish() -> tuple[Tensor | None, Tensor | None]:
            grad_weights = None
            if weights is not None:
                grad_weights_Q = weights.wait()
                grad_weights = torch.empty_like(grad_weights_Q)
                grad_weights[part.slot_of_Q] = grad_weights_Q
                grad_weights = grad_weights.view(-1, part.top_k)
            return None if grad_x is None else grad_x.wait(), grad_weights

        return Pending(finish)

    def sum_over_ep(self, tensor: Tensor) -> Tensor:
        """All-reduce over the EP group."""
        # Autograd hands out expanded gradients: fewer elements in memory than the collective would write.
        tensor = tensor.contiguous()
        dist.all_reduce(tensor, group=self.group)
        return tensor

    def _return_rows(self, y_ND: Tensor, part: ChunkPlan) -> Pending[Tensor]:
        rows = self._exchange(y_ND, part.rows_in, part.rows_out)
        return Pending(lambda: sum_segments(rows.wait(), part.s_of_V, part.start_of_T))

    def _exchange(self, rows: Tensor, sizes_out: tuple[int, ...], sizes_in: tuple[int, ...]) -> Pending[Tensor]:
        """Launch one uneven all-to-all along dim 0."""
        rows = rows.contiguous()
        received = rows.new_empty(sum(sizes_in), *rows.shape[1:])
        work = dist.all_to_all_single(received, rows, list(sizes_in), list(sizes_out), group=self.group, async_op=True)

        def finish(sent: Tensor = rows) -> Tensor:
            # Bound as a default, the buffer being sent lives until the transfer is over.
            work.wait()
            return received

        return Pending(finish)
