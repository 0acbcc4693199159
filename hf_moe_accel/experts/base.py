"""The contract of an expert backend. Shape letters: the legend of `ops/permutation`, and r the rank of a LoRA pair."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, NamedTuple, Self, TypeVar

import torch
from torch import Tensor

from hf_moe_accel.ops.permutation import Dispatched

Gate = Callable[[Tensor], Tensor]
Scalings = tuple[tuple[float, ...], tuple[float, ...]]
T = TypeVar("T")


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


class LoraPair(NamedTuple):
    """One adapter of a projection: `scaling * x @ a[i].T @ b[i].T` is added to its product, before the bias.

    a: [e, r, in]; b: [e, out, r], both contiguous, however the projection is stored.
    """

    a: Tensor
    b: Tensor
    scaling: float


class ExpertWeights(NamedTuple):
    """The parameters of this rank's experts, as stored (see `ExpertsSpec.is_transposed`).

    up: [e, 2I or I, D]; down: [e, D, I]; up_bias: [e, 2I or I]; down_bias: [e, D]; post_norm: [D]. Several LoRA pairs
    of a projection are several active adapters: they add up.
    """

    up: Tensor
    down: Tensor
    up_bias: Tensor | None = None
    down_bias: Tensor | None = None
    post_norm: Tensor | None = None
    up_lora: tuple[LoraPair, ...] = ()
    down_lora: tuple[LoraPair, ...] = ()

    @classmethod
    def of(cls, flat: Iterable[Tensor | None], scalings: Scalings = ((), ())) -> ExpertWeights:
        """The inverse of `flat` and `scalings`: from the first five, and a and b for each scaling."""
        up, down, up_bias, down_bias, post_norm, *factors = flat
        assert up is not None and down is not None
        up_lora, down_lora = _pairs(factors, len(scalings[0]))

        def scaled(pairs: tuple[Factors[Tensor | None], ...], by: tuple[float, ...]) -> tuple[LoraPair, ...]:
            found = []
            for (a, b), scaling in zip(pairs, by, strict=True):
                assert a is not None and b is not None
                found.append(LoraPair(a, b, scaling))
            return tuple(found)

        lora = scaled(up_lora, scalings[0]), scaled(down_lora, scalings[1])
        return cls(up, down, up_bias, down_bias, post_norm, *lora)

    def flat(self) -> tuple[Tensor | None, ...]:
        """All parameters: the first five, then a and b of each pair, those of `up` first."""
        factors = (factor for pair in (*self.up_lora, *self.down_lora) for factor in (pair.a, pair.b))
        return (self.up, self.down, self.up_bias, self.down_bias, self.post_norm, *factors)

    @property
    def scalings(self) -> Scalings:
        """Those of the pairs of both projections."""
        return tuple(pair.scaling for pair in self.up_lora), tuple(pair.scaling for pair in self.down_lora)


class Factors(NamedTuple, Generic[T]):
    """Something for each factor of a `LoraPair`."""

    a: T
    b: T


class ByParameter(NamedTuple, Generic[T]):
    """Something for each parameter of `ExpertWeights`."""

    up: T
    down: T
    up_bias: T
    down_bias: T
    post_norm: T
    up_lora: tuple[Factors[T], ...] = ()
    down_lora: tuple[Factors[T], ...] = ()

    @classmethod
    def of(cls, flat: Sequence[T], num_up_pairs: int) -> Self:
        """From the order of `ExpertWeights.flat`."""
        up, down, up_bias, down_bias, post_norm, *factors = flat
        return cls(up, down, up_bias, down_bias, post_norm, *_pairs(factors, num_up_pairs))

    def flat(self) -> tuple[T, ...]:
        """In the order of `ExpertWeights.flat`."""
        factors = (factor for pair in (*self.up_lora, *self.down_lora) for factor in pair)
        return (self.up, self.down, self.up_bias, self.down_bias, self.post_norm, *factors)


def _pairs(factors: Sequence[T], num_up: int) -> tuple[tuple[Factors[T], ...], tuple[Factors[T], ...]]:
    pairs = tuple(Factors(a, b) for a, b in zip(factors[::2], factors[1::2], strict=True))
    return pairs[:num_up], pairs[num_up:]


class WeightGrads(ByParameter[Tensor | None]):
    """Gradients of `ExpertWeights`, each of its parameter's shape; None where not needed."""


class NeededGrads(ByParameter[bool]):
    """Which of `ExpertWeights` train."""


class RowGrads(NamedTuple):
    """Gradients by rows, and what the weights' gradients are made of.

    Attributes:
        x_ND: [N, D] or None where not needed.
        weights_R: [R] fp32 or None where not needed.
        for_weights: what `backward_weights`, which comes next, needs, in the backend's own order.
    """

    x_ND: Tensor | None
    weights_R: Tensor | None
    for_weights: tuple[Any, ...]


class ExpertBackend(ABC):
    """Forward and backward of the experts, as two explicit functions of their arguments alone.

    The backward is cut in two so that the rows' gradients can travel while the weights' gradients are computed; a
    backend for devices where that gains less than it costs makes both in the first.

    Attributes:
        device_types: where it can run at all, such as ("cuda",); None: anywhere. "auto" does not speak of the others.
        reads_counts: whether the host reads how many rows each expert has, so that no CUDA graph can hold a pass.
    """

    device_types: ClassVar[tuple[str, ...] | None] = None
    reads_counts: ClassVar[bool] = True

    @staticmethod
    @abstractmethod
    def why_not(spec: ExpertsSpec, dtype: torch.dtype, device: torch.device) -> str | None:
        """Why this backend cannot serve these experts here, as one sentence; None if it can."""

    @staticmethod
    def why_by_name(device: torch.device) -> str | None:
        """Why "auto" does not take this backend on a device where it can serve, as one sentence; None if it does."""
        return None

    @abstractmethod
    def forward(
        self, spec: ExpertsSpec, weights: ExpertWeights, rows: Dispatched
    ) -> tuple[Callable[[], Tensor], tuple[Tensor, ...]]:
        """Compute.

        Args:
            spec: what to compute.
            weights: in the dtype to compute in.
            rows: in the same dtype.

        Returns:
            (computes [N, D] the weighted sum over each row's experts, tensors to keep for the backward pass). What
            only the sum needs is left to the first, which is called once, or never: in `keep`, and in a recompute.
        """

    def keep(self, spec: ExpertsSpec, weights: ExpertWeights, rows: Dispatched) -> tuple[Tensor, ...]:
        """The second result of `forward` once more, for a backward pass that did not keep it."""
        return self.forward(spec, weights, rows)[1]

    @abstractmethod
    def backward_rows(
        self,
        spec: ExpertsSpec,
        weights: ExpertWeights,
        rows: Dispatched,
        saved: tuple[Tensor, ...],
        grad_ND: Tensor,
        needs: NeededGrads,
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
            needs: which parameters train, as in `backward_weights`; what nothing is made of need not be kept for it.
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
