"""torch.compile around the experts, which no graph takes: their sizes depend on the data."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from accelerate.utils import DynamoBackend, TorchDynamoPlugin
from transformers.modeling_layers import GradientCheckpointingLayer

from hf_moe_accel.hf.checkpointing import has_own_context


def dynamo_plugin(args: Any) -> TorchDynamoPlugin | None:
    """How `TrainingArguments` or the environment say to compile, as Trainer reads them; None where they do not."""
    plugin = TorchDynamoPlugin(backend=args.torch_compile_backend, mode=args.torch_compile_mode)
    return None if plugin.backend == DynamoBackend.NO else plugin


def layers_of(model: Any) -> list[Any]:
    """The layers of a model of transformers: what it checkpoints one by one."""
    found = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    inner = {part for layer in found for part in layer.modules() if part is not layer}
    return [layer for layer in found if layer not in inner]


class CompiledLayer:
    """Stands for the forward function of a layer, and compiles it at its first call.

    Where activations are checkpointed, what is compiled lies within: torch's compiler gives a whole frame up at a
    checkpoint with contexts, and compiles nothing in the backward pass, where the layer is computed again.

    Args:
        module: the layer.
        kwargs: of `torch.compile`.
    """

    def __init__(self, module: Any, **kwargs: Any) -> None:
        functools.update_wrapper(self, module.forward)
        self.module = module
        self._compile = functools.partial(torch.compile, **kwargs)
        self._plain = self._compile(module.forward)
        self._checkpointed: Callable[..., Any] | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the layer computes."""
        return self.run(args, kwargs)

    def run(self, args: Any, kwargs: Any) -> Any:
        """What the layer computes, compiled."""
        layer = self.module
        if not (layer.training and layer.gradient_checkpointing):
            return self._plain(*args, **kwargs)
        function = layer._gradient_checkpointing_func
        layer._gradient_checkpointing_func = functools.partial(self._checkpoint, function)
        try:
            return type(layer).forward(layer, *args, **kwargs)
        finally:
            layer._gradient_checkpointing_func = function

    def _checkpoint(self, function: Callable[..., Any], forward: functools.partial[Any], *args: Any) -> Any:
        """`function(forward, *args)`, as transformers calls it, of what is compiled."""
        if has_own_context(function):
            # It chooses among operations, which a compiled layer no longer has.
            return function(forward, *args)
        if self._checkpointed is None:
            self._checkpointed = self._compile(forward.func)
        return function(functools.partial(self._checkpointed, *forward.args, **forward.keywords), *args)

    def __reduce__(self) -> Any:
        """A layer that is copied, or pickled, has the forward function that it had at first."""
        return getattr, (self.module, "forward")  # that of its class, as the copy has nothing of its own yet


def compile_layers(model: Any, **kwargs: Any) -> None:
    """Compile each layer in place, and the loss; does nothing to a model that was compiled so before.

    In place of the whole model: all layers share their graphs, so that a deep model compiles as fast as a shallow one;
    names of parameters and hooks (FSDP2's) stay as they are; and attention masks are made outside, where transformers
    sees that a causal one need not be made at all. In a graph it cannot see that (before torch 2.14), and attention
    with the mask written out took 3.2 times as long on an H100.

    Args:
        model: a model of transformers, without wrappers.
        kwargs: of `torch.compile`.
    """
    layers = layers_of(model)
    if any(isinstance(layer.__dict__.get("forward"), CompiledLayer) for layer in layers):
        return
    for layer in layers:
        layer.forward = CompiledLayer(layer, **kwargs)
    compile_loss(model, **kwargs)


def compile_loss(model: Any, **kwargs: Any) -> None:
    """Compile the loss of a model of transformers: of large logits it makes several in fp32 otherwise."""
    model.loss_function = torch.compile(model.loss_function, **kwargs)
