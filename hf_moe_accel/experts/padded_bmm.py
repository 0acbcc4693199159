"""torch's batched matrix product over blocks of a few experts, each with its rows padded to one number: for CPU.

Against torch's grouped_mm, which on CPU is a loop over experts: a block's thin LoRA products are one call each, what
lies between gather and sum is a block and no [R, *] tensor, and the numbers of rows recur. The last is for oneDNN: it
compiles each bf16 product for its shape (0.4 to 2 ms) and remembers the last 1,024, so that with the routing's own
numbers of rows it compiles most products of every step again.

Kept for backward: what `grouped_mm` keeps, with the padding. A padding row repeats a real one under the routing weight
0, so it is finite and adds zeros to every sum.

Shape letters beside those of `ops/permutation`: b experts of a block, c rows of each with padding, S all padded rows.
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
from hf_moe_accel.experts.common import as_in_out, detached, dot, weighted
from hf_moe_accel.ops.permutation import Dispatched

_BLOCK_SIZES = (8, 4, 2, 1)
_MAX_ROWS = 4096
# So many rows of padding an expert cost about as much as calls of its own would.
_ROWS_PER_CALL = 96


class PaddedBMMBackend(ExpertBackend):
    """Needs no vendor beside torch; CPU only, as it reads how many rows each expert has."""

    device_types = ("cpu",)

    @staticmethod
    def why_not(spec: ExpertsSpec, dtype: torch.dtype, device: torch.device) -> str | None:
        """Device."""
        if device.type != "cpu":
            return f"it is for CPU: it reads the experts' numbers of rows, for which a {device.type} device would stop"
        return None

    def forward(
        self, spec: ExpertsSpec, weights: ExpertWeights, rows: Dispatched
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Block by block: gather, up, gate and weight, down, sum."""
        padded = _pad(rows)
        up, down = _projections(spec, weights)
        h_SM = rows.x_ND.new_empty(padded.row_of_S.numel(), spec.pre_activation_size)
        up_thin, down_thin = up.thin(h_SM), down.thin(h_SM)
        y_SD = None if spec.weights_before_down else h_SM.new_empty(h_SM.size(0), spec.hidden_size)
        out_ND = _zeros_for_sum(rows.x_ND)
        for block in padded.blocks:
            row_S, weights_S = padded.row_of_S[block.slots], padded.weights_S[block.slots]
            h = h_SM[block.slots]
            _pre_activate(up, weights.up_bias, block, rows.x_ND.index_select(0, row_S), block.of(up_thin), h)
            a = spec.gate(h)
            if y_SD is None:
                y = h.new_empty(h.size(0), spec.hidden_size)
                down.apply(block, weighted(a, weights_S), block.of(down_thin), y)
            else:
                y = y_SD[block.slots]
                down.apply(block, a, block.of(down_thin), y)
                if weights.down_bias is not None:
                    block.by_expert(y).add_(weights.down_bias[block.experts, None])
                if spec.post_norm is not None:
                    y = spec.post_norm(y, detached(weights.post_norm))
                y = weighted(y, weights_S)
            out_ND.index_add_(0, row_S, y.to(out_ND.dtype))
        kept = (*up_thin, *down_thin, h_SM) if y_SD is None else (*up_thin, *down_thin, h_SM, y_SD)
        return out_ND.to(rows.x_ND.dtype), kept

    def keep(self, spec: ExpertsSpec, weights: ExpertWeights, rows: Dispatched) -> tuple[Tensor, ...]:
        """Without the second projection, where nothing of it is kept."""
        if weights.down_lora or not spec.weights_before_down:
            return super().keep(spec, weights, rows)
        padded = _pad(rows)
        up, _ = _projections(spec, weights)
        h_SM = rows.x_ND.new_empty(padded.row_of_S.numel(), spec.pre_activation_size)
        up_thin = up.thin(h_SM)
        for block in padded.blocks:
            x = rows.x_ND.index_select(0, padded.row_of_S[block.slots])
            _pre_activate(up, weights.up_bias, block, x, block.of(up_thin), h_SM[block.slots])
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
        """Block by block: down, gate (through autograd, on the recomputed activation), up, sum.

        The factors' gradients too, while what they are made of is in cache.
        """
        padded = _pad(rows)
        up, down = (projection.transposed() for projection in _projections(spec, weights))
        num_up_thin, num_thin = len(up.lora), len(up.lora) + len(down.lora)
        up_thin, down_thin, (h_SM, *y_SD) = saved[:num_up_thin], saved[num_up_thin:num_thin], saved[num_thin:]
        of_up_lora, of_down_lora = _empty(weights.up_lora, needs.up_lora), _empty(weights.down_lora, needs.down_lora)
        # Of these the gradients of weights and biases are made.
        grad_h_SM = torch.empty_like(h_SM) if needs.up or needs.up_bias else None
        into_down_SI = grad_y_SD = None
        if needs.down or needs.down_bias:
            into_down_SI = h_SM.new_empty(h_SM.size(0), spec.intermediate_size)
            grad_y_SD = torch.empty_like(y_SD[0]) if y_SD else None
        norm = None if spec.post_norm is None else detached(weights.post_norm)
        grad_norm = None if norm is None else _zeros_for_sum(norm)
        grad_routing_S = torch.empty_like(padded.weights_S) if need_routing else None
        grad_x_ND = _zeros_for_sum(grad_ND) if need_x else None
        for block in padded.blocks:
            row_S, weights_S = padded.row_of_S[block.slots], padded.weights_S[block.slots]
            grad_y = grad_ND.index_select(0, row_S)
            if y_SD:
                normed = y_SD[0][block.slots]
                if norm is not None and spec.post_norm is not None:
                    leaves = normed.detach().requires_grad_(), norm.detach().requires_grad_()
                    with torch.enable_grad():
                        normed = spec.post_norm(*leaves)
                if grad_routing_S is not None:
                    grad_routing_S[block.slots] = dot(grad_y, normed.detach())
                grad_y = weighted(grad_y, weights_S)
                if grad_norm is not None:
                    grad_y, of_norm = torch.autograd.grad(normed, leaves, grad_y)
                    grad_norm += of_norm
                if grad_y_SD is not None:
                    grad_y_SD[block.slots] = grad_y
            h_leaf = h_SM[block.slots].detach().requires_grad_()
            with torch.enable_grad():
                a_leaf = spec.gate(h_leaf)
            a = a_leaf.detach()
            grad_a, grad_thin = torch.empty_like(a), down.thin(a)
            down.apply(block, grad_y, grad_thin, grad_a)
            if not y_SD:
                if grad_routing_S is not None:
                    grad_routing_S[block.slots] = dot(grad_a, a)
                grad_a = weighted(grad_a, weights_S)
                # On the narrower side of the outer products.
                grad_thin = tuple(weighted(grad_Sr, weights_S) for grad_Sr in grad_thin)
            if into_down_SI is not None:
                into_down_SI[block.slots] = a if y_SD else weighted(a, weights_S)
            _grads_of_factors(block, of_down_lora, a, grad_y, block.of(down_thin), grad_thin)
            (grad_h,) = torch.autograd.grad(a_leaf, h_leaf, grad_a)
            if grad_h_SM is not None:
                grad_h_SM[block.slots] = grad_h
            if grad_x_ND is not None or up.lora:
                grad_x, grad_thin = grad_y.new_empty(grad_y.shape), up.thin(grad_h)
                up.apply(block, grad_h, grad_thin, grad_x)
                if any(factor is not None for factors in of_up_lora for factor in factors):
                    x = rows.x_ND.index_select(0, row_S)
                    _grads_of_factors(block, of_up_lora, x, grad_h, block.of(up_thin), grad_thin)
                if grad_x_ND is not None:
                    grad_x_ND.index_add_(0, row_S, grad_x.to(grad_x_ND.dtype))
        of_factors = (factor for factors in (*of_up_lora, *of_down_lora) for factor in factors)
        norm_sum = None if grad_norm is None or not needs.post_norm else grad_norm.to(grad_ND.dtype)
        of_down = () if into_down_SI is None else (into_down_SI, grad_ND if grad_y_SD is None else grad_y_SD)
        return RowGrads(
            None if grad_x_ND is None else grad_x_ND.to(grad_ND.dtype),
            None if grad_routing_S is None else grad_routing_S[padded.slot_of_R],
            tuple(part for part in (*of_factors, norm_sum, grad_h_SM, *of_down) if part is not None),
        )

    def backward_weights(
        self, spec: ExpertsSpec, weights: ExpertWeights, rows: Dispatched, grads: RowGrads, needs: NeededGrads
    ) -> WeightGrads:
        """Outer products by block; nothing at all for frozen weights, and the factors' gradients are there already."""
        found = iter(grads.for_weights)
        up_lora, down_lora = (
            tuple(Factors(*(next(found) if need else None for need in pair)) for pair in pairs)
            for pairs in (needs.up_lora, needs.down_lora)
        )
        norm = next(found) if needs.post_norm else None
        up = down = up_bias = down_bias = None
        train_up, train_down = needs.up or needs.up_bias, needs.down or needs.down_bias
        if train_up or train_down:
            padded = _pad(rows)
        if train_up:
            grad_h_SM = next(found)
            up, up_bias = _grads_of_projection(
                padded.blocks,
                spec.is_transposed,
                weights.up,
                lambda block: rows.x_ND.index_select(0, padded.row_of_S[block.slots]),
                lambda block: grad_h_SM[block.slots],
                needs.up,
                needs.up_bias,
            )
        if train_down:
            into_down_SI, grad_y = next(found), next(found)

            def of_down(block: Block) -> Tensor:
                if spec.weights_before_down:
                    return grad_y.index_select(0, padded.row_of_S[block.slots])
                return grad_y[block.slots]

            down, down_bias = _grads_of_projection(
                padded.blocks,
                spec.is_transposed,
                weights.down,
                lambda block: into_down_SI[block.slots],
                of_down,
                needs.down,
                needs.down_bias,
            )
        return WeightGrads(up, down, up_bias, down_bias, norm, up_lora, down_lora)


class Block(NamedTuple):
    """Neighbouring experts, all with the same number of padded rows."""

    experts: slice
    slots: slice
    rows_each: int

    def by_expert(self, rows_S: Tensor) -> Tensor:
        """[b, c, *] of [b * c, *]."""
        return rows_S.view(self.experts.stop - self.experts.start, self.rows_each, rows_S.size(1))

    def of(self, thin: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """The block's rows of thin tensors."""
        return tuple(thin_Sr[self.slots] for thin_Sr in thin)


class Padded(NamedTuple):
    """The pairs of `Dispatched`, padded.

    Attributes:
        blocks: all experts, in order.
        row_of_S: [S] int64 row to read.
        weights_S: [S] fp32 routing weight, 0 in padding.
        slot_of_R: [R] int64.
    """

    blocks: list[Block]
    row_of_S: Tensor
    weights_S: Tensor
    slot_of_R: Tensor


def _pad(rows: Dispatched) -> Padded:
    blocks = _blocks(rows.counts_e.tolist())
    num_e = torch.tensor([block.rows_each for block in blocks for _ in range(block.experts.start, block.experts.stop)])
    ends_e, slot_ends_e = torch.cumsum(rows.counts_e, 0), torch.cumsum(num_e, 0)
    # How far an expert's rows move back to make room for the padding before them.
    shift_e = (slot_ends_e - num_e) - (ends_e - rows.counts_e)
    slot_of_R = torch.arange(rows.row_of_R.numel()) + shift_e.repeat_interleave(rows.counts_e)
    r_of_S = torch.arange(blocks[-1].slots.stop) - shift_e.repeat_interleave(num_e)
    # The last row of the expert is repeated; for an expert without rows, the one before it, or the first of all.
    r_of_S = torch.minimum(r_of_S, (ends_e - 1).clamp(min=0).repeat_interleave(num_e))
    weights_S = rows.weights_R.new_zeros(r_of_S.numel()).index_copy(0, slot_of_R, rows.weights_R)
    return Padded(blocks, rows.row_of_R[r_of_S], weights_S, slot_of_R)


def _blocks(counts: list[int]) -> list[Block]:
    blocks: list[Block] = []
    first, slot = 0, 0
    while first < len(counts):
        size = next(size for size in _BLOCK_SIZES if size == 1 or _is_worth_it(counts[first : first + size], size))
        rows_each = _round_up(max(counts[first : first + size]))
        blocks.append(Block(slice(first, first + size), slice(slot, slot + size * rows_each), rows_each))
        first, slot = first + size, slot + size * rows_each
    return blocks


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

    def apply(self, block: Block, x_SK: Tensor, thin: tuple[Tensor, ...], out_SM: Tensor) -> None:
        """The block's rows, from `x_SK` [b * c, K] to `out_SM` [b * c, M]."""
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
    up: Projection, bias_eM: Tensor | None, block: Block, x_SD: Tensor, thin: tuple[Tensor, ...], h_SM: Tensor
) -> None:
    """A block's pre-activation, from its rows, into `h_SM`."""
    up.apply(block, x_SD, thin, h_SM)
    if bias_eM is not None:
        block.by_expert(h_SM).add_(bias_eM[block.experts, None])


def _projections(spec: ExpertsSpec, weights: ExpertWeights) -> tuple[Projection, Projection]:
    up_eDM, down_eID = as_in_out(spec, weights)
    return Projection(up_eDM, weights.up_lora), Projection(down_eID, weights.down_lora)


def _empty(lora: tuple[LoraPair, ...], needs: tuple[Factors[bool], ...]) -> tuple[Factors[Tensor | None], ...]:
    """Room for the gradients of the factors that train."""
    return tuple(
        Factors(torch.empty_like(a) if need.a else None, torch.empty_like(b) if need.b else None)
        for (a, b, _), need in zip(lora, needs, strict=True)
    )


def _grads_of_factors(
    block: Block,
    of_lora: tuple[Factors[Tensor | None], ...],
    x_SK: Tensor,
    grad_SM: Tensor,
    thin: tuple[Tensor, ...],
    grad_thin: tuple[Tensor, ...],
) -> None:
    """The block's part of `of_lora`, from a projection's input and its output's gradient."""
    x_bcK, grad_bcM = block.by_expert(x_SK), block.by_expert(grad_SM)
    for (of_a, of_b), thin_Sr, grad_thin_Sr in zip(of_lora, thin, grad_thin, strict=True):
        if of_a is not None:
            torch.bmm(block.by_expert(grad_thin_Sr).transpose(1, 2), x_bcK, out=of_a[block.experts])
        if of_b is not None:
            torch.bmm(grad_bcM.transpose(1, 2), block.by_expert(thin_Sr), out=of_b[block.experts])


def _grads_of_projection(
    blocks: list[Block],
    is_transposed: bool,
    weight: Tensor,
    input_of: Callable[[Block], Tensor],
    grad_of: Callable[[Block], Tensor],
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of the weight and the bias of a projection, those that are needed."""
    of_weight = torch.empty_like(weight) if need_weight else None
    of_bias = weight.new_empty(weight.size(0), weight.size(2 if is_transposed else 1)) if need_bias else None
    for block in blocks:
        x_bcK, grad_bcM = block.by_expert(input_of(block)), block.by_expert(grad_of(block))
        if of_weight is not None:
            left, right = (x_bcK, grad_bcM) if is_transposed else (grad_bcM, x_bcK)
            torch.bmm(left.transpose(1, 2), right, out=of_weight[block.experts])
        if of_bias is not None:
            torch.sum(grad_bcM, 1, out=of_bias[block.experts])
    return of_weight, of_bias


def _zeros_for_sum(like: Tensor) -> Tensor:
    """Of a dtype in which sums of many are exact enough."""
    return torch.zeros_like(like, dtype=torch.promote_types(like.dtype, torch.float32))
