"""The contract of an expert backend. Shape letters: the legend of `ops/permutation`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from hf_moe_accel.ops.permutation import Dispatched

Gate = Callable[[Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class ExpertsSpec:
    """What an experts module computes, as plain flags; its parameters come with each call.

    For a pair (row x, expert i) with routing weight w, with `up` the first and `down` the second projection:

        w * post_norm(gate(x @ up[i] + up_bias[i]) @ down[i] + down_bias[i])

    Attributes:
        num_experts: experts of the model, E.
        hidden_size: D.
        pre_activation_size: width of the first projection: 2I with a gate, else I.
        intermediate_size: I.
        is_transposed: parameters are stored [e, in, out]; otherwise [e, out, in].
        has_bias: both projections have a bias.
        gate: [R, pre_activation_size] -> [R, I], elementwise in R; any torch function, without parameters.
        post_norm: (y_RD, weight) -> y_RD applied to each expert's output before the routing weight, or None.
    """

    num_experts: int
    hidden_size: int
    pre_activation_size: int
    intermediate_size: int
    is_transposed: bool
    has_bias: bool
    gate: Gate
    post_norm: Callable[[Tensor, Tensor], Tensor] | None = None

    @property
    def weights_before_down(self) -> bool:
        """Whether weighting the activation equals weighting the output: no down bias and no post-norm between."""
        return not self.has_bias and self.post_norm is None


class ExpertWeights(NamedTuple):
    """The parameters of this rank's experts, as stored (see `ExpertsSpec.is_transposed`).

    up: [e, 2I or I, D]; down: [e, D, I]; up_bias: [e, 2I or I]; down_bias: [e, D]; post_norm: [D].
    """

    up: Tensor
    down: Tensor
    up_bias: Tensor | None = None
    down_bias: Tensor | None = None
    post_norm: Tensor | None = None

    @classmethod
    def of(cls, values: Iterable[Tensor | None]) -> ExpertWeights:
        """From all five, in order."""
        up, down, *others = values
        assert up is not None and down is not None
        return cls(up, down, *others)


class WeightGrads(NamedTuple):
    """Gradients of `ExpertWeights`, each of its parameter's shape; None where not needed."""

    up: Tensor | None
    down: Tensor | None
    up_bias: Tensor | None
    down_bias: Tensor | None
    post_norm: Tensor | None


class NeededGrads(NamedTuple):
    """Which of `ExpertWeights` train."""

    up: bool
    down: bool
    up_bias: bool
    down_bias: bool
    post_norm: bool


class RowGrads(NamedTuple):
    """Gradients by rows, and what the weights' gradients are made of.

    Attributes:
        x_ND: [N, D] or None where not needed.
        weights_R: [R] fp32 or None where not needed.
        for_weights: what `backward_weights` needs, in the backend's own order.
    """

    x_ND: Tensor | None
    weights_R: Tensor | None
    for_weights: tuple[Tensor, ...]


class ExpertBackend(ABC):
    """Forward and backward of the experts, as two explicit functions without state.

    The backward is cut in two so that the rows' gradients can travel while the weights' gradients are computed.
    """

    @staticmethod
    @abstractmethod
    def why_not(spec: ExpertsSpec, dtype: torch.dtype, device: torch.device) -> str | None:
        """Why this backend cannot serve these experts here, as one sentence; None if it can."""

    @abstractmethod
    def forward(
        self, spec: ExpertsSpec, weights: ExpertWeights, rows: Dispatched
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Compute.

        Args:
            spec: what to compute.
            weights: in the dtype to compute in.
            rows: in the same dtype.

        Returns:
            ([N, D] the weighted sum over each row's experts, tensors to keep for the backward pass).
        """

    @abstractmethod
    def backward_rows(
        self,
        spec: ExpertsSpec,
        weights: ExpertWeights,
        rows: Dispatched,
        saved: tuple[Tensor, ...],
        grad_ND: Tensor,
        *,
        need_x: bool,
        need_routing: bool,
    ) -> RowGrads:
        """Gradients of the rows and of the routing weights.

        Args:
            spec: as in forward.
            weights: as in forward.
            rows: as in forward.
            saved: the second result of forward.
            grad_ND: [N, D] gradient of the first result.
            need_x: whether the gradient of `rows.x_ND` is wanted.
            need_routing: whether the gradient of `rows.weights_R` is wanted.
        """

    @abstractmethod
    def backward_weights(
        self, spec: ExpertsSpec, weights: ExpertWeights, rows: Dispatched, grads: RowGrads, needs: NeededGrads
    ) -> WeightGrads:
        """Gradients of the parameters that train.

        Experts without rows get zeros.
        """
