"""torch.compile around the experts, which no graph takes: their sizes depend on the data."""

from __future__ import annotations

from typing import Any

import torch
from accelerate.utils import DynamoBackend, TorchDynamoPlugin
from transformers.modeling_layers import GradientCheckpointingLayer


def dynamo_plugin(args: Any) -> TorchDynamoPlugin | None:
    """How `TrainingArguments` or the environment say to compile, as Trainer reads them; None where they do not."""
    plugin = TorchDynamoPlugin(backend=args.torch_compile_backend, mode=args.torch_compile_mode)
    return None if plugin.backend == DynamoBackend.NO else plugin


def layers_of(model: Any) -> list[Any]:
    """The layers of a model of transformers: what it checkpoints one by one."""
    found = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    inner = {part for layer in found for part in layer.modules() if part is not layer}
    return [layer for layer in found if layer not in inner]


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
    if any(layer._compiled_call_impl is not None for layer in layers):
        return
    for layer in layers:
        layer.compile(**kwargs)
    compile_loss(model, **kwargs)


def compile_loss(model: Any, **kwargs: Any) -> None:
    """Compile the loss of a model of transformers: of large logits it makes several in fp32 otherwise."""
    model.loss_function = torch.compile(model.loss_function, **kwargs)
