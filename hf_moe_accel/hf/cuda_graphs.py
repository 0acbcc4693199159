"""CUDA graphs of a model's layers: what the host would launch kernel by kernel, forward and backward, in one launch.

At a few thousand tokens a step the kernels of a layer take less time than the host needs to launch them. With all
experts on one device nothing in a layer depends on counts that the host would have to read (`dispatch/local`), so a
pass of a layer is the same kernels each time. `torch.cuda.make_graphed_callables` captures them, under rules that
training as it is does not keep by itself. This module keeps them: other shapes, other adapters, passes without
gradients or a second forward pass before the backward one run without graphs, and gradients may add up over passes.
What a replayed layer hands out (hidden states that a model returns) stays as it is until the next pass.

[Note: when graphs are captured]
When two training passes were alike in all their layers, and a third one begins like them. By then everything has been
compiled, tuned and allocated. The layers are captured in the order in which they run, so that all graphs share one
pool of memory, which is that of a pass's activations.

[Note: activation checkpointing]
The graph of a checkpointed layer's forward pass keeps its inputs alone, and that of its backward pass computes the
layer again, in memory that all layers share. States of random numbers are left out, which the host would read: a layer
that draws any is not captured.

[Note: graphs that nobody asked for]
Trainers take them where nothing but the time of a pass can change. Layers are not compiled then. A pass has memory of
its own in graphs, so the device must have waited for the host, or they would gain nothing, and memory has to be left.
A capture takes seconds, so more passes have to be alike before it. Nothing of anybody else may look into a layer or at
what it returns (hooks), and a step in which the parts of layers are timed runs without graphs. Otherwise, and when
they have not served for a while, the layers get their own forward functions back for good.

[Note: the gradients of parameters]
A graph writes them to the same memory each time, and autograd takes that memory for `.grad` as it is. Before a pass
replays anything, gradients that are still there, since they add up over passes, get memory of their own.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten
from torch.utils.checkpoint import checkpoint

from hf_moe_accel.experts.base import ExpertBackend
from hf_moe_accel.hf.checkpointing import has_own_context, is_torchs
from hf_moe_accel.hf.compiling import CompiledLayer, compile_loss, layers_of
from hf_moe_accel.hf.hooks import are_foreign, hooks_of
from hf_moe_accel.log import say, warn_once
from hf_moe_accel.moe.replay import keep_exchanges
from hf_moe_accel.moe.stats import RoutingStats
from hf_moe_accel.moe.timing import PartTimer
from hf_moe_accel.topology import ExpertTopology

# Training passes without a capture after which it is said why, or without a replay that nobody asked for.
_PATIENCE = 20
# Of graphs that nobody asked for: how often in a row passes have to be alike before a capture, passes without one
# after which no other is awaited, and the share of the memory that has to be left.
_ALIKE, _GIVE_UP, _SPARE = 4, 100, 0.05
_RANDOM = (
    "draw random numbers, such as for dropout, which with activation checkpointing no graph draws twice alike: leave "
    "one of the two out"
)
_OTHERWISE = (
    "are checkpointed by more than torch's function, to the host's memory (offload=True) or with a context_fn, which "
    "no graph can hold: leave that out, or torch_compile_mode"
)
_SAVED = (
    "run under hooks on saved tensors, such as for offloading activations, which no graph calls: leave those out, or "
    "torch_compile_mode"
)
_BUSY = "keep the device busy, which need not wait for the host"
_HOOKED = "or parts of them have hooks, which no graph calls"
# What a layer may be given beside tensors: a graph is good for one value of each.
_CONSTANTS = (type(None), bool, int, float, str, torch.dtype, torch.device)


class Runtime(Protocol):
    """What is read here of the runtime that `prepare` makes."""

    topology: ExpertTopology
    backend: ExpertBackend
    stats: RoutingStats | None
    timer: PartTimer
    check_tokens: bool


def why_not(model: Any, runtime: Runtime) -> str | None:
    """Why no CUDA graph can hold the layers of a prepared model, and what to do about it; None if one can.

    Args:
        model: of transformers, without wrappers.
        runtime: of the model.
    """
    if runtime.topology.world_size > 1:
        return (
            f"with {runtime.topology.world_size} processes the host reads in each layer how many tokens go where. "
            "Train in one process, or leave torch_compile_mode out"
        )
    if runtime.backend.reads_counts:
        return (
            f"{type(runtime.backend).__name__} reads in each layer how many rows each expert has. Pass "
            "MoEAccelConfig(expert_backend='fused') or 'grouped_mm'"
        )
    if runtime.check_tokens:
        return "check_tokens=True reads values in each layer. Leave it out"
    if getattr(model.config.get_text_config(), "output_router_logits", False):
        return (
            "output_router_logits=True takes logits out of the middle of each layer, for the auxiliary loss. Set it "
            "to False in the model's config, or leave torch_compile_mode out"
        )
    return None


def replay_where_nothing_else_changes(model: Any, runtime: Runtime, device: torch.device) -> None:
    """Let layers be replayed as graphs, if they can be; see [Note: graphs that nobody asked for].

    Args:
        model: a prepared model of transformers, without wrappers.
        runtime: of the model.
        device: where it will be.
    """
    if device.type != "cuda" or why_not(model, runtime) is not None:
        return
    if not any("forward" in layer.__dict__ for layer in layers_of(model)):
        LayerGraphs(model, runtime, device, asked=False)


class LayerGraphs:
    """Compiles the layers of a model, and its loss, and replays the layers as graphs; see the module's docstring.

    Args:
        model: a prepared model of transformers, without wrappers, for which `why_not` returns None.
        runtime: of the model.
        device: of the model.
        asked: whether a user wants graphs. Otherwise see [Note: graphs that nobody asked for].
        kwargs: of `torch.compile`, if a user wants graphs.

    Attributes:
        asked: as given.
        replayed: how many training passes were replayed.
    """

    def __init__(
        self, model: nn.Module, runtime: Runtime, device: torch.device, *, asked: bool = True, **kwargs: Any
    ) -> None:
        """Take the place of the layers' forward functions; they compile at their first call."""
        self.asked = asked
        self.replayed = 0
        self.device = device
        self.stats = runtime.stats
        self._timer = runtime.timer
        self._pace: _Pace | None = None
        if not asked:
            kwargs = {"disable": True}
            if device.type == "cuda":
                self._pace = _Pace(functools.partial(torch.Event, device))
        self._layers = [_Layer(self, module, **kwargs) for module in layers_of(model)]
        for layer in self._layers:
            layer.module.forward = layer
        if asked:
            compile_loss(model, **kwargs)
        self.release()

    @staticmethod
    def of(model: nn.Module) -> LayerGraphs | None:
        """Those that a model has, if it has any."""
        calls = (layer.__dict__.get("forward") for layer in layers_of(model))
        return next((call.graphs for call in calls if isinstance(call, _Layer)), None)

    def release(self) -> None:
        """Give back the graphs and their memory. The next training passes capture again."""
        self._running: dict[_Layer, _Inputs] = {}  # the layers of this pass so far, in order
        self._last: dict[_Layer, _Inputs] = {}
        self._passes = self._alike = self._idle = 0
        self._captured = self._replays = False
        self._hooks: list[dict[int, Any]] = []  # where hooks may come that would end graphs nobody asked for
        self._state: Any = None
        self._parameters: list[nn.Parameter] = []
        self._adapted: list[Any] = []
        self._own: dict[nn.Parameter, weakref.ref[Tensor]] = {}
        self._backward: weakref.ref[_Backward] | None = None
        for layer in self._layers:
            layer.captured = None

    def remove(self) -> None:
        """Give the layers their own forward functions back, and the memory."""
        self.release()
        for layer in self._layers:
            if layer.module.__dict__.get("forward") is layer:
                del layer.module.forward
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def enter(self, layer: _Layer, inputs: _Inputs) -> bool:
        """Note a call of a layer in training. Returns whether it may be replayed."""
        if not self._running or layer in self._running:
            self._begin(layer, inputs)
        if self._pace is not None and not self._captured:
            self._pace.enter_layer()
        self._running[layer] = inputs._replace(tensors=[]) if self._captured else inputs.noted()
        return self._replays and layer.serves(inputs)

    def watched(self, layer: _Layer, args: Any, kwargs: Any) -> Any:
        """Run a layer, and note why none can hold it that is checkpointed, if none can."""
        if self._captured or not layer.module.gradient_checkpointing:
            return layer.run(args, kwargs)
        before = self._random_numbers()
        out = layer.run(args, kwargs)
        strange = None if torch.equal(before, self._random_numbers()) else _RANDOM
        function = layer.module._gradient_checkpointing_func
        if has_own_context(function) or not is_torchs(function):
            strange = _OTHERWISE
        if strange is not None:
            self._running[layer] = self._running[layer]._replace(strange=strange)
        return out

    def _random_numbers(self) -> Tensor:
        """The state that changes with each that is drawn. The host has it."""
        return torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else torch.get_rng_state()

    def awaits_backward(self, out: Any) -> None:
        """The memory of a pass is in use until its backward pass, or until nothing is left that could start one."""
        if self._backward is not None:
            return
        output = next((leaf for leaf in tree_flatten(out)[0] if isinstance(leaf, Tensor) and leaf.requires_grad), None)
        if output is not None:
            # This hook of the first layer runs when all others have had their turn, and is gone with the graph.
            backward = _Backward()
            output.register_hook(backward.end)
            self._backward = weakref.ref(backward)

    def _begin(self, first: _Layer, inputs: _Inputs) -> None:
        """A pass begins."""
        before, self._last, self._running = self._last, self._running, {}
        self._passes += 1
        if self._captured:
            if are_foreign(self._hooks):
                self._give_up(f"layers {_HOOKED}")
        else:
            if self._pace is not None:
                self._pace.begin_pass()
            signatures = _signatures(self._last)
            alike = signatures == _signatures(before) and signatures[:1] == [(first, inputs.signature)]
            self._alike = self._alike + 1 if alike else 0
            if self._alike >= (1 if self.asked else _ALIKE) and self._strange() is None:
                self._capture(self._last)
            elif self._passes == (_PATIENCE if self.asked else _GIVE_UP):
                self._explain(before)
        backward = None if self._backward is None else self._backward()
        in_use = backward is not None and not backward.has_run
        stands_back = not self.asked and self._timer.active and self._timer.in_layers
        self._replays = first.serves(inputs) and not in_use and not stands_back and self._state == self._state_now()
        if self._replays:
            self._backward = None
            self.replayed += 1
            self._idle = 0
            self._part_from_gradients()
        elif self._captured and not self.asked and not stands_back:
            self._idle += 1
            if self._idle == _PATIENCE:
                self._give_up(f"the last {_PATIENCE} passes were not like those that were captured")

    def _strange(self) -> str | None:
        """Why no graph can hold what the layers did in the last pass, if none can."""
        strange = next((inputs.strange for inputs in self._last.values() if inputs.strange), None)
        if strange is None and _saved_tensors_have_hooks():
            strange = _SAVED
        if strange is None and not self.asked and are_foreign(self._hooks_now()):
            strange = _HOOKED
        if strange is None and self._pace is not None and not self._pace.device_waits:
            strange = _BUSY
        return strange

    def _hooks_now(self) -> list[dict[int, Any]]:
        return hooks_of([part for layer in self._layers for part in layer.module.modules()])

    def _give_up(self, reason: str) -> None:
        self.remove()
        say(f"hf_moe_accel: layers run without CUDA graphs from here on: {reason}")

    def _capture(self, layers: dict[_Layer, _Inputs]) -> None:
        """Capture what the layers do with inputs like these, in this order."""
        say(f"hf_moe_accel: capturing CUDA graphs of {len(layers)} layers")
        # What is captured on a stream of its own trains on the usual one.
        torch.autograd.graph.set_warn_on_accumulate_grad_stream_mismatch(False)
        captured = tuple(_Captured(layer, inputs.signature) for layer, inputs in layers.items())
        samples = tuple(inputs.buffers(self.device) for inputs in layers.values())
        timed, self._timer.active = self._timer.active, False
        failed = ""
        try:
            with self._uncounted(), _without_autocast_cache(self.device.type):
                torch.cuda.make_graphed_callables(captured, samples, allow_unused_input=True)
        except Exception as error:
            kind = type(captured[0].module).__name__
            if not self.asked:
                failed = f"none can hold a {kind} ({str(error).partition(chr(10))[0]})"
            elif isinstance(error, RuntimeError):
                raise RuntimeError(
                    f"torch_compile_mode='reduce-overhead': no CUDA graph can hold a {kind} ({error}). Leave "
                    "torch_compile_mode out: layers are compiled without graphs then."
                ) from error
            else:
                raise
        finally:
            self._timer.active = timed
        if not self.asked and not failed and self._is_full():
            failed = f"less than {_SPARE:.0%} of the device's memory would be left"
        if failed:
            del captured, samples
            self._give_up(failed)
            return
        for layer, each in zip(layers, captured, strict=True):
            layer.captured = each
            if self.stats is not None:
                each.counted = {number: self.stats.newest(number) for number in _moe_layers(layer.module)}
        self._parameters = [parameter for each in captured for parameter in each.parameters()]
        self._adapted = [part for each in captured for part in each.modules() if hasattr(part, "merged_adapters")]
        if not self.asked:
            self._hooks = self._hooks_now()
        self._captured, self._last = True, {}
        self._state = self._state_now()

    def _is_full(self) -> bool:
        if self.device.type != "cuda":
            return False
        free, total = torch.cuda.mem_get_info(self.device)
        return free < _SPARE * total

    def _uncounted(self) -> AbstractContextManager[None]:
        return nullcontext() if self.stats is None else self.stats.uncounted()

    def _state_now(self) -> Any:
        """What the kernels of a pass depend on beside its inputs."""
        return (
            [(parameter.data_ptr(), parameter.requires_grad) for parameter in self._parameters],
            [
                (each.disable_adapters, tuple(each.active_adapters), len(each.merged_adapters))
                for each in self._adapted
            ],
            torch.is_autocast_enabled(self.device.type) and torch.get_autocast_dtype(self.device.type),
        )

    def _part_from_gradients(self) -> None:
        """See [Note: the gradients of parameters]."""
        for parameter in self._parameters:
            grad = parameter.grad
            own = self._own.get(parameter)
            if grad is not None and (own is None or own() is not grad):
                parameter.grad = grad.clone()
                self._own[parameter] = weakref.ref(parameter.grad)

    def _explain(self, before: dict[_Layer, _Inputs]) -> None:
        passes = [next(iter(each.values())) for each in (before, self._last) if each]
        strange = self._strange()
        if strange is not None:
            # What to leave out says, after the colon, who asked for graphs.
            reason = f"layers {strange if self.asked else strange.partition(':')[0]}"
        else:
            shapes = " and then ".join(str([tuple(t.shape) for t in inputs.tensors]) for inputs in passes)
            number = "three" if self.asked else "six"
            reason = (
                f"no {number} passes were alike: the last ones had inputs of {shapes}. Give all batches one shape: "
                "pack, pad to a fixed length, and drop the last one of an epoch (dataloader_drop_last=True)"
            )
        if not self.asked:
            self._give_up(reason)
            return
        warn_once(f"hf_moe_accel: {self._passes} passes, and no CUDA graph has been captured: {reason}.")


class _Layer(CompiledLayer):
    """Stands for the forward function of a layer.

    Attributes:
        graphs: of the model.
        captured: its graphs, if there are.
    """

    def __init__(self, graphs: LayerGraphs, module: Any, **kwargs: Any) -> None:
        super().__init__(module, **kwargs)
        self.graphs = graphs
        self.captured: _Captured | None = None
        self._in_graph = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Replay, or run."""
        if not (self.module.training and torch.is_grad_enabled()):
            return self.run(args, kwargs)
        inputs = _Inputs.of(args, kwargs)
        if not self.graphs.enter(self, inputs) or self.captured is None:
            return self.graphs.watched(self, args, kwargs)
        out = self.captured.forward(*inputs.tensors)
        self.graphs.awaits_backward(out)
        if self.graphs.stats is not None:
            for number, counted in self.captured.counted.items():
                self.graphs.stats.repeat(number, counted)
        return out

    def capture(self, args: Any, kwargs: Any) -> Any:
        """What a graph is to hold."""
        self._in_graph = True
        try:
            return self.run(args, kwargs)
        finally:
            self._in_graph = False

    def serves(self, inputs: _Inputs) -> bool:
        """Whether there is a graph for such inputs."""
        return self.captured is not None and self.captured.signature == inputs.signature

    def run(self, args: Any, kwargs: Any) -> Any:
        """Without a graph."""
        # As in the capture, which must not find that it has to compile once more.
        with _without_autocast_cache(self.graphs.device.type):
            return super().run(args, kwargs)

    def _checkpoint(self, function: Callable[..., Any], forward: functools.partial[Any], *args: Any) -> Any:
        """See [Note: activation checkpointing]."""
        if self._in_graph:
            if getattr(function, "keywords", {}).get("use_reentrant") is not False:
                # A graph's backward pass asks for gradients by name, which reentrant checkpointing does not serve.
                function = functools.partial(checkpoint, use_reentrant=False, context_fn=keep_exchanges)
            function = functools.partial(function, preserve_rng_state=False)
        return super()._checkpoint(function, forward, *args)


class _Signature(NamedTuple):
    """What a graph is good for.

    Attributes:
        spec: how tensors lie in the arguments, among the constants.
        constants: what is no tensor, with None for each tensor.
        about: the shape of each tensor, its dtype and whether it requires a gradient, with None for each constant.
    """

    spec: TreeSpec
    constants: tuple[Any, ...]
    about: list[Any]

    def call(self, tensors: tuple[Tensor, ...]) -> tuple[Any, Any]:
        """The arguments of a call with these tensors: (args, kwargs)."""
        rest = iter(tensors)
        pairs = zip(self.about, self.constants, strict=True)
        args, kwargs = tree_unflatten([value if each is None else next(rest) for each, value in pairs], self.spec)
        return args, kwargs


class _Inputs(NamedTuple):
    """What a layer is called with.

    Attributes:
        tensors: in order.
        signature: equal for calls that one graph can serve; None if none can.
        strange: why no graph can hold the call, if none can.
    """

    tensors: list[Tensor]
    signature: _Signature | None
    strange: str | None

    @classmethod
    def of(cls, args: Any, kwargs: dict[str, Any]) -> _Inputs:
        """Of a call."""
        leaves, spec = tree_flatten((args, kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        constants = tuple(None if isinstance(leaf, Tensor) else leaf for leaf in leaves)
        strange = next((type(each).__name__ for each in constants if not isinstance(each, _CONSTANTS)), None)
        if kwargs.get("past_key_values") is not None:
            strange = "past_key_values"
        if strange is not None:
            strange = f"are called with {strange}, which no graph can hold"
        about = [(leaf.shape, leaf.dtype, leaf.requires_grad) if isinstance(leaf, Tensor) else None for leaf in leaves]
        return cls(tensors, None if strange else _Signature(spec, constants, about), strange)

    def noted(self) -> _Inputs:
        """To be kept until the next pass: of a tensor that belongs to the graph of this one, only what it is like."""
        return self._replace(
            tensors=[
                torch.empty_like(each, device="meta", requires_grad=True) if each.requires_grad else each
                for each in self.tensors
            ]
        )

    def buffers(self, device: torch.device) -> tuple[Tensor, ...]:
        """Where a graph reads such inputs from."""
        return tuple(
            torch.zeros_like(each, device=device).requires_grad_() if each.is_meta else each.detach().clone()
            for each in self.tensors
        )


class _Captured(nn.Module):
    """A layer as `torch.cuda.make_graphed_callables` takes it: a module, called with tensors only.

    Attributes:
        module: the layer.
        signature: of the inputs that it was captured with.
        counted: what the host counts of a pass of each MoE layer in it.
    """

    def __init__(self, layer: _Layer, signature: Any) -> None:
        super().__init__()
        self.module = layer.module
        self.signature = signature
        self.counted: dict[int, tuple[int, int, int]] = {}
        self._layer = layer

    def forward(self, *tensors: Tensor) -> Any:
        """What is captured; the graph takes its place."""
        return self._layer.capture(*self.signature.call(tensors))


class _Pace:
    """Whether the host is ahead of the device in forward passes.

    Args:
        make_event: of the device.
    """

    def __init__(self, make_event: Callable[[], Any]) -> None:
        self._make_event = make_event
        self._entered = self._caught_up = self._in_a_row = 0
        self._before: Any = None

    def begin_pass(self) -> None:
        """Add up the last pass."""
        # A host that is ahead is so by more and more layers.
        waited = 0 < self._entered and 9 * self._entered <= 10 * self._caught_up
        self._in_a_row = self._in_a_row + 1 if waited else 0
        self._entered = self._caught_up = 0
        self._before = None

    def enter_layer(self) -> None:
        """Note whether the device has come to the layer before."""
        before, self._before = self._before, self._make_event()
        self._before.record()
        if before is not None:
            self._entered += 1
            self._caught_up += before.query()

    @property
    def device_waits(self) -> bool:
        """Whether it had at nearly all layers, in as many passes in a row as have to be alike."""
        return self._in_a_row >= _ALIKE


class _Backward:
    """Whether the backward pass of a replayed pass has run."""

    has_run = False

    def end(self, _: Tensor) -> None:
        """It has, but for the first layer, whose turn it is."""
        self.has_run = True


def _saved_tensors_have_hooks() -> bool:
    try:
        with torch.autograd.graph.disable_saved_tensors_hooks("there are some"):
            return False
    except RuntimeError:
        return True


def _moe_layers(module: nn.Module) -> list[int]:
    """The numbers of the MoE layers in a layer."""
    bindings = (part.__dict__.get("moe_binding") for part in module.modules())
    return [binding.layer for binding in bindings if binding is not None]


def _signatures(layers: dict[_Layer, _Inputs]) -> list[tuple[_Layer, Any]]:
    return [(layer, inputs.signature) for layer, inputs in layers.items()]


def _without_autocast_cache(device_type: str) -> AbstractContextManager[None]:
    """Autocast as it is, but for its cache of weights, which no graph can hold."""
    return torch.autocast(
        device_type,
        dtype=torch.get_autocast_dtype(device_type),
        enabled=torch.is_autocast_enabled(device_type),
        cache_enabled=False,
    )
