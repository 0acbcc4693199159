"""The contract of a token dispatcher. Shape letters: the legend of `ops/permutation`.

[Note: launch is never wait]
Every method that moves rows returns a `Pending`: the transfer is under way, and `wait()` is called just before the
first use of its result. What may run between the two is the caller's choice, so the schedule lives in one place
(`moe/overlap`) and no dispatcher knows it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, Self, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from hf_moe_accel.ops.permutation import Dispatched

T = TypeVar("T")


class Pending(Generic[T]):
    """A result that is on its way; see [Note: launch is never wait]."""

    def __init__(self, finish: Callable[[], T]) -> None:
        """`finish` waits for the transfer and returns the result; it is called once."""
        self._finish: Callable[[], T] | None = finish

    @classmethod
    def done(cls, value: T) -> Pending[T]:
        """A result that needs no waiting."""
        return cls(lambda: value)

    def wait(self) -> T:
        """The result. To be called exactly once."""
        assert self._finish is not None, "a pending result was waited for twice"
        finish, self._finish = self._finish, None
        return finish()


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """What a model will have its dispatcher carry.

    Attributes:
        hidden: hidden size D in elements.
        num_experts: experts of the model, E; the most that any layer has.
        top_k: experts of a token, where known.
        dtype: of the rows.
        ep_size: ranks that share the experts.
        ranks_per_node: ranks of a node.
        device: of this rank.
    """

    hidden: int
    num_experts: int
    top_k: int | None
    dtype: torch.dtype
    ep_size: int
    ranks_per_node: int
    device: torch.device

    @property
    def within_node(self) -> bool:
        """Whether the ranks of an EP group are on one node."""
        return self.ranks_per_node % self.ep_size == 0


class TokenDispatcher(ABC):
    """Brings each token to the ranks that own its experts, and the results back.

    A plan is made per forward and handed to every later call, so nothing about a batch stays on the dispatcher. It is
    a frozen dataclass of tensors and plain numbers: `moe/forward` saves its tensors for the backward pass.

    All ranks of the EP group must call each method, in the same order, also with no tokens.

    Attributes:
        moves_rows: whether rows travel between ranks, so that keeping them may be cheaper than sending them again.
        device_types: where it can run at all, such as ("cuda",); None: anywhere. "auto" does not speak of the others.
    """

    moves_rows = True
    device_types: ClassVar[tuple[str, ...] | None] = None

    @classmethod
    def why_not(cls, traffic: Traffic) -> str | None:
        """Why this dispatcher cannot serve on this rank, as one sentence; None if it can. Not a collective."""
        return None

    @classmethod
    @abstractmethod
    def create(cls, group: dist.ProcessGroup | None, traffic: Traffic) -> Self:
        """One for a model.

        Args:
            group: the EP process group; None where `ep_size` is 1.
            traffic: what it will have to carry.
        """

    def close(self) -> None:  # noqa: B027
        """Give back what is held beyond the process group, which must still be there; the next plan takes it anew."""

    @abstractmethod
    def plan(self, ids_TK: Tensor, num_experts: int, chunks: int = 1) -> Any:
        """Agree on who sends what; the one host sync of a layer, where there is any.

        Args:
            ids_TK: [T, K] integer expert of each top-k slot, in [0, num_experts).
            num_experts: the experts of the model, E.
            chunks: parts that the tokens are sent in; chunk i is the i-th of `Tensor.tensor_split`. The same number
                on all ranks of the EP group.
        """

    def most_tokens(self, plan: Any) -> int | None:
        """The most tokens that a rank of the EP group holds; None where the ranks do not tell each other.

        All ranks of the EP group must call, or none. `overlap_chunks="auto"` cuts by it, and not at all without it.
        """
        return None

    @abstractmethod
    def dispatch(self, x_TD: Tensor, weights_TK: Tensor, plan: Any, chunk: int) -> Pending[Dispatched]:
        """Send the rows of a chunk to their experts.

        Args:
            x_TD: [T, D] all tokens of this rank.
            weights_TK: [T, K] routing weights; they travel in fp32.
            plan: from `plan`.
            chunk: which part.
        """

    @abstractmethod
    def combine(self, y_ND: Tensor, plan: Any, chunk: int) -> Pending[Tensor]:
        """Send the results of a chunk back and sum them by token.

        Args:
            y_ND: [N, D], for each received row the weighted sum over this rank's experts.
            plan: from `plan`.
            chunk: which part.

        Returns:
            [T_chunk, D].
        """

    def plan_to_combine(self, plan: Any) -> Any:
        """What `combine_backward` needs of a plan."""
        return plan

    @abstractmethod
    def combine_backward(self, grad_TD: Tensor, plan: Any, chunk: int) -> Pending[Tensor]:
        """The transpose of `combine`: [T, D] gradient of all tokens' outputs -> [N, D] of the chunk's rows."""

    @abstractmethod
    def dispatch_backward(
        self, grad_x_ND: Tensor | None, grad_weights_R: Tensor | None, plan: Any, chunk: int, rows: Dispatched
    ) -> Pending[tuple[Tensor | None, Tensor | None]]:
        """The transpose of `dispatch`.

        Args:
            grad_x_ND: [N, D], or None where no rank needs it.
            grad_weights_R: [R] fp32 in expert order, or None where no rank needs it.
            plan: from `plan`.
            chunk: which part.
            rows: what `dispatch` returned for this chunk (its index tensors).

        Returns:
            ([T_chunk, D], [T_chunk, K] fp32), None where None was given.
        """

    @abstractmethod
    def sum_over_ep(self, tensor: Tensor) -> Tensor:
        """The sum over the EP group: for gradients of weights that all experts share."""
