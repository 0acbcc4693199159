"""torch's batched matrix product over blocks of a few experts, each with its rows padded to one number: for CPU.

Against torch's grouped_mm, which on CPU is a loop over experts: a block's thin LoRA products are one call each, what
else is done to rows is one call for a group of blocks, mostly in cache, and the numbers of rows recur. The last is for
oneDNN: it compiles each bf16 product for its shape (0.4 to 2 ms) and remembers the last 1,024, so that with the
routing's own numbers of rows it compiles most products of every step again.

Kept for backward: what `grouped_mm` keeps, with the padding. A padding row repeats a real one under the routing weight
0, so it is finite and adds zeros to every sum.

Shape letters beside those of `ops/permutation`: b experts of a block, c rows of each with padding, S padded rows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from hf_moe_accel.experts.base import (
    ExpertBackend,
    ExpertsSpec,
    ExpertWeights,
    Factors,
    LoraPair,
    NeededGrads,
    RowGrads,
    WeightGrads,
)
from hf_moe_accel.experts.common import Formulas, as_in_out, detached, dot, weighted
from hf_moe_accel.ops.gates import GateFormula
from hf_moe_accel.ops.permutation import Dispatched, sum_segments
from hf_moe_accel.ops.reuse import ReusedMemory

_BLOCK_SIZES = (8, 4, 2, 1)
# Of a block and of a group, unless a single expert has more: beyond, a call costs little against what it does, and
# what lies between two of them leaves the cache.
_MAX_ROWS = 4096
# So many rows of padding an expert cost about as much as calls of its own would.
_ROWS_PER_CALL = 96
_SILU = GateFormula("swish", gated=True)


class PaddedBMMBackend(ExpertBackend):
    """Needs no vendor beside torch; CPU only, as it reads how many rows each expert has."""

    device_types = ("cpu",)

    def __init__(self) -> None:
        self._formulas = Formulas()
        self._scratch = torch.empty(0)
        self._memory = ReusedMemory()

    @staticmethod
    def why_not(spec: ExpertsSpec, dtype: torch.dtype, device: torch.device) -> str | None:
        """Device."""
        if device.type != "cpu":
            return f"it is for CPU: it reads the experts' numbers of rows, for which a {device.type} device would stop"
        return None

    def forward(
        self, spec: ExpertsSpec, weights: ExpertWeights, rows: Dispatched
    ) -> tuple[Callable[[], Tensor], tuple[Tensor, ...]]:
        """Group by group: gather, up, gate and weight, down. Then the sum."""
        padded = _pad(rows)
        up, down = _projections(spec, weights)
        h_SM = rows.x_ND.new_empty(padded.row_of_S.numel(), spec.pre_activation_size)
        up_thin, down_thin = up.thin(h_SM), down.thin(h_SM)
        weighted_y_SD = self._summands(rows.x_ND, h_SM.size(0))
        y_SD = weighted_y_SD if spec.weights_before_down else torch.empty_like(weighted_y_SD)
        for group in padded.groups:
            row_S, weights_S = padded.row_of_S[group.slots], padded.weights_S[group.slots]
            h, y = h_SM[group.slots], y_SD[group.slots]
            _pre_activate(up, weights.up_bias, group, rows.x_ND.index_select(0, row_S), group.of(up_thin), h)
            a = spec.gate(h)
            if spec.weights_before_down:
                down.apply(group, weighted(a, weights_S), group.of(down_thin), y)
            else:
                down.apply(group, a, group.of(down_thin), y)
                if weights.down_bias is not None:
                    _add_bias(group, weights.down_bias, y)
                if spec.post_norm is not None:
                    y = spec.post_norm(y, detached(weights.post_norm))
                weighted(y, weights_S, out=weighted_y_SD[group.slots])
        kept = (*up_thin, *down_thin, h_SM) if spec.weights_before_down else (*up_thin, *down_thin, h_SM, y_SD)
        out_ND = padded.sum(weighted_y_SD)  # of memory that the next call writes to
        return lambda: out_ND, kept

    def keep(self, spec: ExpertsSpec, weights: ExpertWeights, rows: Dispatched) -> tuple[Tensor, ...]:
        """Without the second projection, where nothing of it is kept."""
        if weights.down_lora or not spec.weights_before_down:
            return super().keep(spec, weights, rows)
        padded = _pad(rows)
        up, _ = _projections(spec, weights)
        h_SM = rows.x_ND.new_empty(padded.row_of_S.numel(), spec.pre_activation_size)
        up_thin = up.thin(h_SM)
        for group in padded.groups:
            x = rows.x_ND.index_select(0, padded.row_of_S[group.slots])
            _pre_activate(up, weights.up_bias, group, x, group.of(up_thin), h_SM[group.slots])
        return (*up_thin, h_SM)

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
        """Group by group: down, gate (on the recomputed activation), up. Then the sum.

        The parameters' gradients too, while what they are made of is in cache: to keep it for `backward_weights` and
        to gather again there took longer than what travels meanwhile on a CPU.
        """
        padded = _pad(rows)
        up, down = (projection.transposed() for projection in _projections(spec, weights))
        num_up_thin, num_thin = len(up.lora), len(up.lora) + len(down.lora)
        up_thin, down_thin, (h_SM, *y_SD) = saved[:num_up_thin], saved[num_up_thin:num_thin], saved[num_thin:]
        of = self._gradients(weights, needs)
        norm = None if spec.post_norm is None else detached(weights.post_norm)
        grad_norm = None if norm is None else torch.zeros_like(norm, dtype=torch.float32)
        grad_routing_S = torch.empty_like(padded.weights_S) if need_routing else None
        grad_x_SD = self._summands(grad_ND, h_SM.size(0)) if need_x else None
        needs_x = of.up is not None or any(factors.a is not None for factors in of.up_lora)
        needs_grad_h = need_x or of.up is not None or of.up_bias is not None or bool(up.lora)
        for group in padded.groups:
            row_S, weights_S = padded.row_of_S[group.slots], padded.weights_S[group.slots]
            grad_y = grad_ND.index_select(0, row_S)
            if y_SD:
                normed = y_SD[0][group.slots]
                if norm is not None and spec.post_norm is not None:
                    leaves = normed.detach().requires_grad_(), norm.detach().requires_grad_()
                    with torch.enable_grad():
                        normed = spec.post_norm(*leaves)
                if grad_routing_S is not None:
                    grad_routing_S[group.slots] = dot(grad_y, normed.detach())
                grad_y = weighted(grad_y, weights_S)
                if grad_norm is not None:
                    grad_y, of_norm = torch.autograd.grad(normed, leaves, grad_y)
                    grad_norm += of_norm
            a, to_grad_h = self._activate(spec, h_SM[group.slots])
            grad_a, grad_thin = torch.empty_like(a), down.thin(a)
            down.apply(group, grad_y, grad_thin, grad_a)
            if not y_SD:
                if grad_routing_S is not None:
                    grad_routing_S[group.slots] = dot(grad_a, a)
                grad_a = weighted(grad_a, weights_S)
                # On the narrower side of the outer products.
                grad_thin = tuple(weighted(grad_Sr, weights_S) for grad_Sr in grad_thin)
            _grads_of_factors(group, of.down_lora, a, grad_y, group.of(down_thin), grad_thin)
            if of.down is not None:
                into_down = a if y_SD else weighted(a, weights_S)
                _grad_of_weight(group, spec.is_transposed, into_down, grad_y, of.down)
            if of.down_bias is not None:
                _grad_of_bias(group, grad_y, of.down_bias)
            if not needs_grad_h:
                continue
            grad_h, grad_thin = to_grad_h(grad_a), up.thin(grad_a)
            if grad_x_SD is not None or up.lora:
                grad_x = torch.empty_like(grad_y) if grad_x_SD is None else grad_x_SD[group.slots]
                up.apply(group, grad_h, grad_thin, grad_x)
            if of.up_bias is not None:
                _grad_of_bias(group, grad_h, of.up_bias)
            x = rows.x_ND.index_select(0, row_S) if needs_x else None
            _grads_of_factors(group, of.up_lora, x, grad_h, group.of(up_thin), grad_thin)
            if of.up is not None and x is not None:
                _grad_of_weight(group, spec.is_transposed, x, grad_h, of.up)
        if grad_norm is not None and needs.post_norm:
            of = of._replace(post_norm=grad_norm.to(grad_ND.dtype))
        return RowGrads(
            None if grad_x_SD is None else padded.sum(grad_x_SD),
            None if grad_routing_S is None else grad_routing_S[padded.slot_of_R],
            tuple(grad for grad in of.flat() if grad is not None),
        )

    def backward_weights(
        self, spec: ExpertsSpec, weights: ExpertWeights, rows: Dispatched, grads: RowGrads, needs: NeededGrads
    ) -> WeightGrads:
        """What `backward_rows` has made."""
        made = iter(grads.for_weights)
        return WeightGrads.of([next(made) if need else None for need in needs.flat()], len(needs.up_lora))

    def _summands(self, like_ND: Tensor, num_slots: int) -> Tensor:
        """[S, D] uninitialized, until the next call: fresh memory for so much costs more than the sum."""
        num = num_slots * like_ND.size(1)
        if self._scratch.dtype != like_ND.dtype or self._scratch.numel() < num:
            with torch.inference_mode(False):  # what is made in it could not be written to outside
                self._scratch = like_ND.new_empty(num)
        return self._scratch[:num].view(num_slots, like_ND.size(1))

    def _gradients(self, weights: ExpertWeights, needs: NeededGrads) -> WeightGrads:
        """Room for those of the parameters that train."""
        flat = (
            self._memory.empty_like(weight) if weight is not None and need else None
            for weight, need in zip(weights.flat(), needs.flat(), strict=True)
        )
        return WeightGrads.of(list(flat), len(weights.up_lora))

    def _activate(self, spec: ExpertsSpec, h_SM: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """The activation of a group, and what takes its gradient to that of the pre-activation."""
        if self._formulas[spec] != _SILU:
            h_leaf = h_SM.detach().requires_grad_()
            with torch.enable_grad():
                a_leaf = spec.gate(h_leaf)
            return a_leaf.detach(), lambda grad_a: torch.autograd.grad(a_leaf, h_leaf, grad_a)[0]
        g, u = h_SM.chunk(2, dim=-1)
        silu_g = torch.nn.functional.silu(g)

        def to_grad_h(grad_a: Tensor) -> Tensor:
            # What autograd does, written to where it belongs.
            grad_h = torch.empty_like(h_SM)
            grad_g, grad_u = grad_h.chunk(2, dim=-1)
            torch.mul(grad_a, silu_g, out=grad_u)
            torch.ops.aten.silu_backward.grad_input(grad_a * u, g, grad_input=grad_g)
            return grad_h

        return silu_g * u, to_grad_h


class Block(NamedTuple):
    """Neighbouring experts, all with the same number of padded rows: one batched product.

    Attributes:
        experts: of this rank.
        slots: its rows within its group.
        rows_each: rows of each expert.
    """

    experts: slice
    slots: slice
    rows_each: int

    def by_expert(self, rows_S: Tensor) -> Tensor:
        """[b, c, *] the block's of the group's rows."""
        return rows_S[self.slots].view(self.experts.stop - self.experts.start, self.rows_each, rows_S.size(1))


class Group(NamedTuple):
    """Neighbouring blocks: what else is done with their rows is done in one call.

    Attributes:
        blocks: in order.
        slots: its rows of all.
    """

    blocks: list[Block]
    slots: slice

    def of(self, thin: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """The group's rows of thin tensors."""
        return tuple(thin_Sr[self.slots] for thin_Sr in thin)


class Padded(NamedTuple):
    """The pairs of `Dispatched`, padded.

    Attributes:
        groups: all experts, in order.
        row_of_S: [S] int64 row to read.
        weights_S: [S] fp32 routing weight, 0 in padding.
        slot_of_R: [R] int64.
        rows: those of `Dispatched`.
    """

    groups: list[Group]
    row_of_S: Tensor
    weights_S: Tensor
    slot_of_R: Tensor
    rows: Dispatched

    def sum(self, rows_SD: Tensor) -> Tensor:
        """[N, D] for each row the sum over its experts, in fp32 and rounded once; padding is left out."""
        return sum_segments(rows_SD, self.slot_of_R[self.rows.r_of_P], self.rows.start_of_N)


def _pad(rows: Dispatched) -> Padded:
    groups = _groups(rows.counts_e.tolist())
    blocks = [block for group in groups for block in group.blocks]
    num_e = torch.tensor([block.rows_each for block in blocks for _ in range(block.experts.start, block.experts.stop)])
    ends_e, slot_ends_e = torch.cumsum(rows.counts_e, 0), torch.cumsum(num_e, 0)
    # How far an expert's rows move back to make room for the padding before them.
    shift_e = (slot_ends_e - num_e) - (ends_e - rows.counts_e)
    slot_of_R = torch.arange(rows.row_of_R.numel()) + shift_e.repeat_interleave(rows.counts_e)
    r_of_S = torch.arange(groups[-1].slots.stop) - shift_e.repeat_interleave(num_e)
    # The last row of the expert is repeated; for an expert without rows, the one before it, or the first of all.
    r_of_S = torch.minimum(r_of_S, (ends_e - 1).clamp(min=0).repeat_interleave(num_e))
    weights_S = rows.weights_R.new_zeros(r_of_S.numel()).index_copy(0, slot_of_R, rows.weights_R)
    return Padded(groups, rows.row_of_R[r_of_S], weights_S, slot_of_R, rows)


def _groups(counts: list[int]) -> list[Group]:
    """Blocks of experts with these numbers of rows, as many together as may be."""
    groups: list[Group] = []
    blocks: list[Block] = []
    first = start = stop = 0
    while first < len(counts):
        size = next(size for size in _BLOCK_SIZES if size == 1 or _is_worth_it(counts[first : first + size], size))
        rows_each = _round_up(max(counts[first : first + size]))
        end = stop + size * rows_each
        if blocks and end - start > _MAX_ROWS:
            groups.append(Group(blocks, slice(start, stop)))
            blocks, start = [], stop
        blocks.append(Block(slice(first, first + size), slice(stop - start, end - start), rows_each))
        first, stop = first + size, end
    return [*groups, Group(blocks, slice(start, stop))]


def _is_worth_it(counts: list[int], size: int) -> bool:
    padded = size * _round_up(max(counts))
    return len(counts) == size and padded <= min(_MAX_ROWS, sum(counts) + size * _ROWS_PER_CALL)


def _round_up(count: int) -> int:
    """To one of 8 numbers between powers of two, in whole tiles of 16 rows."""
    step = max(16, 1 << max(0, count.bit_length() - 4))
    return -(-count // step) * step


class Projection(NamedTuple):
    """A projection without its bias, as [e, in, out], with its LoRA pairs."""

    weight_eKM: Tensor
    lora: tuple[LoraPair, ...]

    def transposed(self) -> Projection:
        """What takes a gradient of the output to that of the input."""
        lora = (LoraPair(b.transpose(1, 2), a.transpose(1, 2), scaling) for a, b, scaling in self.lora)
        return Projection(self.weight_eKM.transpose(1, 2), tuple(lora))

    def thin(self, like_S: Tensor) -> tuple[Tensor, ...]:
        """[S, r] for each pair, where `apply` puts `scaling * x @ a.T`."""
        return tuple(like_S.new_empty(like_S.size(0), pair.a.size(1)) for pair in self.lora)

    def apply(self, group: Group, x_SK: Tensor, thin: tuple[Tensor, ...], out_SM: Tensor) -> None:
        """The group's rows, from `x_SK` to `out_SM`."""
        for block in group.blocks:
            x_bcK, out_bcM = block.by_expert(x_SK), block.by_expert(out_SM)
            beta = 0
            # Thin products first, while the rows are in cache; the wide one adds up in registers, so it comes last.
            for (a_erK, b_eMr, scaling), thin_Sr in zip(self.lora, thin, strict=True):
                thin_bcr = block.by_expert(thin_Sr)
                a_bKr, b_brM = a_erK[block.experts].transpose(1, 2), b_eMr[block.experts].transpose(1, 2)
                # Here scaling is of few numbers, and all that is made of thin tensors has it.
                torch.baddbmm(thin_bcr, x_bcK, a_bKr, beta=0, alpha=scaling, out=thin_bcr)
                torch.baddbmm(out_bcM, thin_bcr, b_brM, beta=beta, out=out_bcM)
                beta = 1
            torch.baddbmm(out_bcM, x_bcK, self.weight_eKM[block.experts], beta=beta, out=out_bcM)


def _pre_activate(
    up: Projection, bias_eM: Tensor | None, group: Group, x_SD: Tensor, thin: tuple[Tensor, ...], h_SM: Tensor
) -> None:
    """A group's pre-activation, from its rows, into `h_SM`."""
    up.apply(group, x_SD, thin, h_SM)
    if bias_eM is not None:
        _add_bias(group, bias_eM, h_SM)


def _add_bias(group: Group, bias_eM: Tensor, rows_SM: Tensor) -> None:
    for block in group.blocks:
        block.by_expert(rows_SM).add_(bias_eM[block.experts, None])


def _projections(spec: ExpertsSpec, weights: ExpertWeights) -> tuple[Projection, Projection]:
    up_eDM, down_eID = as_in_out(spec, weights)
    return Projection(up_eDM, weights.up_lora), Projection(down_eID, weights.down_lora)


def _grads_of_factors(
    group: Group,
    of_lora: tuple[Factors[Tensor | None], ...],
    x_SK: Tensor | None,
    grad_SM: Tensor,
    thin: tuple[Tensor, ...],
    grad_thin: tuple[Tensor, ...],
) -> None:
    """The group's part of `of_lora`, from a projection's input (for the first factors) and its output's gradient."""
    for (of_a, of_b), thin_Sr, grad_thin_Sr in zip(of_lora, thin, grad_thin, strict=True):
        if of_a is not None and x_SK is not None:
            _outer(group, grad_thin_Sr, x_SK, of_a)
        if of_b is not None:
            _outer(group, grad_SM, thin_Sr, of_b)


def _outer(group: Group, left_SM: Tensor, right_SK: Tensor, out_eMK: Tensor) -> None:
    """The group's experts' `left.T @ right`."""
    for block in group.blocks:
        left_bMc, right_bcK = block.by_expert(left_SM).transpose(1, 2), block.by_expert(right_SK)
        torch.bmm(left_bMc, right_bcK, out=out_eMK[block.experts])


def _grad_of_weight(group: Group, is_transposed: bool, x_SK: Tensor, grad_SM: Tensor, out_e: Tensor) -> None:
    left, right = (x_SK, grad_SM) if is_transposed else (grad_SM, x_SK)
    _outer(group, left, right, out_e)


def _grad_of_bias(group: Group, grad_SM: Tensor, out_eM: Tensor) -> None:
    for block in group.blocks:
        torch.sum(block.by_expert(grad_SM), 1, out=out_eM[block.experts])
