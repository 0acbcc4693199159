"""The token path: dispatch, compute, combine; `moe/overlap` orders them in chunks.

    ids_TK ---plan--->  who sends what (the one host sync)
    x_TD, weights_TK ---dispatch--->  x_ND, weights_R by expert ---experts--->  y_ND ---combine--->  out_TD
    backward:  grad_TD ---combine_backward---> grad_ND ---experts---> rows' gradients ---dispatch_backward--->
                                                              (weights' gradients while they travel)

[Note: two nodes]
A layer is two autograd functions, so that other work can run between the launch of a transfer and the wait for it:
`_TokenPath` launches the combine, `_Arrival` waits for it; in the backward pass `_Arrival` launches its transpose and
`_TokenPath` waits for that. Autograd runs the node that was made last first. So whatever the model computes between
the two, here the shared experts (`hf/shared`), has its backward pass between them as well.

Shape letters: the legend of `ops/permutation`.

[Note: what is kept between forward and backward]
Only tensors handed to `save_for_backward`: the parameters themselves (FSDP2 frees and gathers them under our hands, so
no copy, view list or pointer), the received rows, the index tensors, and what the backend returns. Saved-tensor hooks
(checkpointing, offloading) therefore see all of it. `expert_checkpointing` "up" leaves out what the backend returns,
"full" the received rows as well, for which the layer's own input is kept, as the router before it does anyhow.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import fields, is_dataclass, replace
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from hf_moe_accel.dispatch.base import Pending, TokenDispatcher
from hf_moe_accel.experts.base import ExpertBackend, ExpertsSpec, ExpertWeights, NeededGrads, Scalings
from hf_moe_accel.moe.check import check_tokens
from hf_moe_accel.moe.deferred import Deferred
from hf_moe_accel.moe.overlap import (
    ChunkChoice,
    LayerPass,
    Place,
    Saved,
    compute_again,
    send_again,
    send_and_compute,
    send_and_compute_backward,
    without_rows,
)
from hf_moe_accel.moe.replay import current_region
from hf_moe_accel.moe.stats import RoutingStats
from hf_moe_accel.moe.timing import PartTimer


class Runtime(Protocol):
    """What the path uses of the runtime that `prepare` makes."""

    dispatcher: TokenDispatcher
    backend: ExpertBackend
    stats: RoutingStats | None
    timer: PartTimer
    chunks: ChunkChoice
    expert_checkpointing: str
    check_tokens: bool

    def step_of(self, layer: int, *, again: bool) -> int:
        """The number of the running forward pass; called once a layer, and `again` in a recompute."""

    def waiting(self, step: int, layer: int, direction: str) -> AbstractContextManager[None]:
        """Marks a wait for other ranks."""


def forward(
    spec: ExpertsSpec,
    x_TD: Tensor,
    ids_TK: Tensor,
    weights_TK: Tensor,
    weights: ExpertWeights,
    runtime: Runtime,
    layer: int,
    meanwhile: Callable[[], None] | None = None,
) -> Tensor:
    """The output of the experts for this rank's tokens.

    All ranks of the EP group must call, also with no tokens.

    Args:
        spec: what the experts compute.
        x_TD: [T, D] floating point.
        ids_TK: [T, K] integer, experts of the whole model.
        weights_TK: [T, K] floating point routing weights.
        weights: this rank's parameters, plain tensors.
        runtime: dispatcher, backend and what watches them.
        layer: the number of the layer among the model's MoE layers.
        meanwhile: given, the result is `Deferred`: before it is waited for, this is called.

    Returns:
        [T, D] in the dtype of `x_TD`.
    """
    dtype = _compute_dtype(weights.up)
    under_way = _UnderWay()
    with torch.autocast(x_TD.device.type, enabled=False):
        ticket: Tensor = _TokenPath.apply(  # type: ignore[no-untyped-call]
            under_way,
            spec,
            runtime,
            layer,
            dtype,
            torch.is_grad_enabled(),
            weights.scalings,
            x_TD,
            ids_TK,
            weights_TK,
            *weights.flat(),
        )

    def arrive() -> Tensor:
        if meanwhile is not None:
            meanwhile()
        with torch.autocast(x_TD.device.type, enabled=False):
            out: Tensor = _Arrival.apply(under_way, ticket)  # type: ignore[no-untyped-call]
        return out

    return arrive() if meanwhile is None else Deferred(arrive, x_TD, requires_grad=ticket.requires_grad)


def _compute_dtype(weight: Tensor) -> torch.dtype:
    """The dtype of the experts' products: the parameters', but under autocast fp32 masters compute in its dtype."""
    device = weight.device.type
    if weight.dtype == torch.float32 and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return weight.dtype


class _UnderWay:
    """What one of a layer's two nodes launches and the other waits for.

    Attributes:
        result: in the forward pass: waits, and returns the result [T, D] in the dtype of the model.
        plan: of the exchange.
        dispatcher: that makes it.
        timer: of the parts of a step.
        dtype: in which gradients travel.
        gradient: in the backward pass: the gradient of the result, in `dtype`, and its first chunk under way.
    """

    result: Callable[[], Tensor] | None
    plan: Any
    dispatcher: TokenDispatcher
    timer: PartTimer
    dtype: torch.dtype
    gradient: tuple[Tensor, Pending[Tensor]] | None


class _Arrival(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, under_way: _UnderWay, ticket: Tensor) -> Tensor:
        assert under_way.result is not None
        result, under_way.result = under_way.result, None
        tensors, skeleton = _take_tensors(under_way.dispatcher.plan_to_combine(under_way.plan))
        under_way.plan = None
        ctx.save_for_backward(*tensors)
        ctx.call = (under_way, skeleton)
        return result()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[None, Tensor]:
        under_way, skeleton = ctx.call
        plan = _put_tensors(skeleton, iter(ctx.saved_tensors))
        with torch.autocast(grad_TD.device.type, enabled=False):
            grad = grad_TD.to(under_way.dtype).contiguous()
            with under_way.timer.part("combine"):
                under_way.gradient = (grad, under_way.dispatcher.combine_backward(grad, plan, 0))
        return None, grad_TD.new_empty(0)


class _TokenPath(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        under_way: _UnderWay,
        spec: ExpertsSpec,
        runtime: Runtime,
        layer: int,
        dtype: torch.dtype,
        counts: bool,
        scalings: Scalings,
        x_TD: Tensor,
        ids_TK: Tensor,
        weights_TK: Tensor,
        *parameters: Tensor | None,
    ) -> Tensor:
        dispatcher = runtime.dispatcher
        region = current_region()
        again = region is not None and region.recomputes
        # Reentrant checkpointing runs its first pass without gradients.
        counts = (counts or region is not None) and not again
        level = runtime.expert_checkpointing
        # Of a checkpointed region nothing is kept anyhow, and its recompute, which must keep the same, comes right
        # before the backward pass.
        keeps_all = region is not None or level == "activation"
        if not dispatcher.moves_rows:
            region = None
        kept = None if region is None else region.replay(ids_TK)
        step = runtime.step_of(layer, again=again)
        if runtime.check_tokens:
            check_tokens(x_TD, ids_TK, spec.num_experts, f"step {step}, layer {layer}")
        call = LayerPass(Place(runtime, layer, step), spec, _cast(parameters, dtype, scalings))
        saved: Saved | None
        if kept is not None:
            plan, rows = kept.plan, kept.rows
            if level == "full":
                rows = send_again(call, x_TD.to(dtype), plan, rows, "recompute")
            saved = compute_again(call, rows)
            result = kept.out_TD.clone
        else:
            chunks = runtime.chunks.of(layer, dispatcher)
            with runtime.timer.part("dispatch"), runtime.waiting(step, layer, "forward, plan"):
                plan = dispatcher.plan(ids_TK, spec.num_experts, chunks)
                runtime.chunks.learn(dispatcher, plan)
            finish, rows, saved = send_and_compute(call, x_TD.to(dtype), weights_TK, plan, chunks)
            if counts and runtime.stats is not None:
                # Where nothing moves, this rank's experts were given what its tokens chose.
                known = not dispatcher.moves_rows and len(rows) == 1
                runtime.stats.add(layer, ids_TK, rows[0].counts_e if known else None)
                runtime.stats.add_rows(layer, rows)
            keep = None
            if region is not None:
                keep = partial(region.keep, ids_TK, plan, without_rows(rows) if level == "full" else rows)
            result = partial(_result, finish, x_TD.dtype, keep)
        under_way.result, under_way.plan = result, plan
        under_way.dispatcher, under_way.timer, under_way.dtype = dispatcher, runtime.timer, dtype

        sent_TD = None
        if not keeps_all:
            saved = None
            if level == "full":
                rows, sent_TD = without_rows(rows), x_TD
        tensors, skeleton = _take_tensors((plan, rows, saved, sent_TD))
        ctx.save_for_backward(*tensors, *parameters)
        ctx.call = (under_way, spec, runtime, layer, step, dtype, scalings, skeleton, len(tensors))
        ctx.dtypes = (x_TD.dtype, weights_TK.dtype)
        return x_TD.new_empty(0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor | None, ...]:
        under_way, spec, runtime, layer, step, dtype, scalings, skeleton, num_tensors = ctx.call
        (grad_TD, first), under_way.gradient = under_way.gradient, None
        kept = ctx.saved_tensors
        parameters = kept[num_tensors:]
        plan, rows, saved, sent_TD = _put_tensors(skeleton, iter(kept[:num_tensors]))
        place = Place(runtime, layer, step)
        call = LayerPass(place, spec, _cast(parameters, dtype, scalings))
        need_x, _, need_routing, *train = ctx.needs_input_grad[7:]
        with torch.autocast(grad_TD.device.type, enabled=False):
            if sent_TD is not None:
                rows = send_again(call, sent_TD.to(dtype), plan, rows, "backward")
            if saved is None:
                saved = compute_again(call, rows)
            grad_x_TD, grad_weights_TK, of_weights = send_and_compute_backward(
                call,
                grad_TD,
                first,
                plan,
                rows,
                saved,
                NeededGrads.of(train, len(call.weights.up_lora)),
                tuple(None if p is None else p.dtype for p in parameters),
                need_x=need_x,
                need_routing=need_routing,
            )
            if of_weights.post_norm is not None:
                # The experts share this weight, so its gradient has a part on every rank of the EP group.
                with runtime.waiting(step, layer, "backward, post-norm"):
                    of_weights = of_weights._replace(post_norm=runtime.dispatcher.sum_over_ep(of_weights.post_norm))
        x_dtype, routing_dtype = ctx.dtypes
        return (
            *(None,) * 7,
            None if grad_x_TD is None else grad_x_TD.to(x_dtype),
            None,
            None if grad_weights_TK is None else grad_weights_TK.to(routing_dtype),
            *(None if g is None else g.to(p.dtype) for g, p in zip(of_weights.flat(), parameters, strict=True)),
        )


def _result(finish: Callable[[], Tensor], dtype: torch.dtype, keep: Callable[[Tensor], None] | None) -> Tensor:
    out_TD = finish().to(dtype)
    if keep is not None:
        keep(out_TD)
    return out_TD


def _cast(parameters: tuple[Tensor | None, ...], dtype: torch.dtype, scalings: Scalings) -> ExpertWeights:
    return ExpertWeights.of((None if p is None else p.to(dtype) for p in parameters), scalings)


class _Slot:
    """Stands in a skeleton where a tensor was taken out."""


def _take_tensors(tree: Any) -> tuple[list[Tensor], Any]:
    """The tensors of nested tuples and dataclasses, in order, and the tree with a slot for each."""
    if isinstance(tree, Tensor):
        return [tree], _Slot
    if isinstance(tree, tuple):
        parts = [_take_tensors(item) for item in tree]
        tensors = [tensor for found, _ in parts for tensor in found]
        items = [skeleton for _, skeleton in parts]
        return tensors, type(tree)(*items) if hasattr(tree, "_fields") else tuple(items)
    if is_dataclass(tree) and not isinstance(tree, type):
        values = {f.name: _take_tensors(getattr(tree, f.name)) for f in fields(tree)}
        tensors = [tensor for found, _ in values.values() for tensor in found]
        return tensors, replace(tree, **{name: skeleton for name, (_, skeleton) in values.items()})
    return [], tree


def _put_tensors(skeleton: Any, tensors: Any) -> Any:
    """The inverse of `_take_tensors`."""
    if skeleton is _Slot:
        return next(tensors)
    if isinstance(skeleton, tuple):
        items = [_put_tensors(item, tensors) for item in skeleton]
        return type(skeleton)(*items) if hasattr(skeleton, "_fields") else tuple(items)
    if is_dataclass(skeleton) and not isinstance(skeleton, type):
        return replace(
            skeleton, **{f.name: _put_tensors(getattr(skeleton, f.name), tensors) for f in fields(skeleton)}
        )
    return skeleton
