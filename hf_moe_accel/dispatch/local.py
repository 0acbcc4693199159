"""No transfer: this rank owns all experts (ep_size 1)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Self

import torch
import torch.distributed as dist
from torch import Tensor

from hf_moe_accel.dispatch.base import Pending, TokenDispatcher, Traffic
from hf_moe_accel.ops.permutation import Dispatched, order_by_expert


@dataclass(frozen=True, kw_only=True)
class LocalPlan:
    """`ids_of_chunk[i]`: [T_chunk, K]; `chunk_rows[i]`: (first token, one past the last)."""

    ids_of_chunk: tuple[Tensor, ...]
    chunk_rows: tuple[tuple[int, int], ...]
    num_experts: int


class LocalDispatcher(TokenDispatcher):
    """Every rank holds all experts, so rows stay where they are: a row is a token, and no count is read back."""

    moves_rows = False

    @classmethod
    def create(cls, group: dist.ProcessGroup | None, traffic: Traffic) -> Self:
        """It needs neither."""
        return cls()

    def plan(self, ids_TK: Tensor, num_experts: int, chunks: int = 1) -> LocalPlan:
        """Only cut the tokens into chunks."""
        parts = ids_TK.tensor_split(chunks)
        ends = [0]
        for part in parts:
            ends.append(ends[-1] + part.size(0))
        return LocalPlan(
            ids_of_chunk=tuple(parts), chunk_rows=tuple(zip(ends, ends[1:], strict=False)), num_experts=num_experts
        )

    def dispatch(self, x_TD: Tensor, weights_TK: Tensor, plan: LocalPlan, chunk: int) -> Pending[Dispatched]:
        """Order the (token, slot) pairs by expert."""
        ids = plan.ids_of_chunk[chunk]
        top_k = ids.size(1)
        first, last = plan.chunk_rows[chunk]
        pairs = torch.arange(ids.numel(), device=ids.device)
        weights_P = weights_TK[first:last].reshape(-1).float()
        return Pending.done(
            order_by_expert(
                x_TD[first:last], ids.reshape(-1), pairs // top_k, weights_P, pairs[::top_k], plan.num_experts
            )
        )

    def combine(self, y_ND: Tensor, plan: LocalPlan, chunk: int) -> Pending[Tensor]:
        """A row is a token: nothing to do."""
        return Pending.done(y_ND)

    def plan_to_combine(self, plan: LocalPlan) -> LocalPlan:
        """No tensor: what the experts keep is the last that a recompute has to bring back."""
        return replace(plan, ids_of_chunk=())

    def combine_backward(self, grad_TD: Tensor, plan: LocalPlan, chunk: int) -> Pending[Tensor]:
        """A row is a token: nothing to do."""
        first, last = plan.chunk_rows[chunk]
        return Pending.done(grad_TD[first:last])

    def dispatch_backward(
        self, grad_x_ND: Tensor | None, grad_weights_R: Tensor | None, plan: LocalPlan, chunk: int, rows: Dispatched
    ) -> Pending[tuple[Tensor | None, Tensor | None]]:
        """Bring the weights' gradient back into slot order."""
        grad_weights = None
        if grad_weights_R is not None:
            grad_weights = grad_weights_R.index_select(0, rows.r_of_P).view(plan.ids_of_chunk[chunk].shape)
        return Pending.done((grad_x_ND, grad_weights))

    def sum_over_ep(self, tensor: Tensor) -> Tensor:
        """One rank owns all experts: the sum is complete."""
        return tensor
