"""Hooks on modules that are not ours: what they look at must be there, and as it is without us."""

from __future__ import annotations

import functools
from typing import Any

from torch import nn
from torch.nn.modules import module as of_all_modules

_KINDS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
# FSDP2's hooks, and this library's, look at nothing that it leaves out.
_KNOWN = ("torch.distributed.", "hf_moe_accel.")


def hooks_of(modules: list[nn.Module]) -> list[dict[int, Any]]:
    """Where the hooks of modules, and those of all modules, are, and new ones will be."""
    own = [getattr(module, kind) for module in modules for kind in _KINDS]
    return own + [getattr(of_all_modules, f"_global{kind}") for kind in _KINDS]


def are_foreign(hooks: list[dict[int, Any]]) -> bool:
    """Whether there are any of neither FSDP2 nor this library."""
    return not all(_module_of(hook).startswith(_KNOWN) for each in hooks for hook in each.values())


def _module_of(hook: Any) -> str:
    while isinstance(hook, functools.partial):
        hook = hook.func
    return str(getattr(hook, "__module__", ""))
