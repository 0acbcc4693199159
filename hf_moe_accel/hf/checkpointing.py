"""Leads transformers' activation checkpointing to `moe/replay`, whoever switches it on and whenever."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from hf_moe_accel.log import warn_once
from hf_moe_accel.moe.replay import compare_routing, keep_exchanges


def keep_exchanges_when_checkpointing(model: Any) -> None:
    """From now on, each forward pass in training looks whether checkpointing is on, and has it keep the exchanges.

    Reentrant checkpointing knows no contexts: it routes and sends again, and raises where that chooses other experts.
    A `context_fn` of the user wins, with a warning: its recompute sends again as well, without that comparison, whose
    operations would not be those that selective checkpointing has noted.
    """
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    model.register_forward_pre_hook(functools.partial(_hook, layers))


def has_own_context(function: Any) -> bool:
    """Whether a layer's checkpointing function has a `context_fn` that is not ours."""
    return getattr(function, "keywords", {}).get("context_fn") not in (None, keep_exchanges)


def is_torchs(function: Any) -> bool:
    """Whether a layer's checkpointing function is that of torch, perhaps watched by us, and not one around it."""
    inner = function.args[0] if getattr(function, "func", None) is compare_routing else function
    return getattr(inner, "func", inner) is checkpoint


def _hook(layers: Sequence[Any], model: Any, args: Any) -> None:
    for layer in layers:
        if not (layer.training and layer.gradient_checkpointing):
            continue
        function = layer._gradient_checkpointing_func
        if not isinstance(function, functools.partial) or function.func is compare_routing:
            continue
        if function.keywords.get("use_reentrant", True):
            layer._gradient_checkpointing_func = functools.partial(compare_routing, function)
            continue
        if function.keywords.get("context_fn") is None:
            layer._gradient_checkpointing_func = functools.partial(function, context_fn=keep_exchanges)
        elif has_own_context(function):
            warn_once(
                "hf_moe_accel: activation checkpointing has a context_fn of its own, so every recompute sends the "
                "tokens of the MoE layers again. Without it the received tokens are kept instead."
            )
