"""Shared experts, which every token goes to, compute while the others' tokens travel.

A block calls them before the routed experts (Qwen2-MoE, HunYuan, MiniMax-M3) or after (DeepSeek, GLM-4, Nemotron-H):

    called       shared, routed, +                        routed, shared, +
    what runs    routed: dispatch, compute, combine's launch | shared | combine's wait | +        in both
    backward     combine's transpose: launch | shared | wait | routed: compute, dispatch's transpose

Neither needs a stream of its own: both results are `Deferred`. The shared experts run when the routed experts' result
is first used, or their own if that is earlier, and the wait for the routed experts comes after them.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers.modeling_layers import GradientCheckpointingLayer

from hf_moe_accel.moe.deferred import Deferred, may_defer

if TYPE_CHECKING:
    from hf_moe_accel.hf.discover import FoundExperts


class SharedExperts:
    """Takes the place of the `forward` of a module: the result is made when it is needed.

    Args:
        module: with one tensor in and one out.
    """

    def __init__(self, module: nn.Module) -> None:
        """Take the place."""
        self._compute: Callable[[Tensor], Tensor] = module.forward
        self._called: Deferred | None = None
        module.forward = self

    def __call__(self, x: Tensor) -> Tensor:
        """Note the call."""
        if not may_defer():
            return self._compute(x)
        version = None if x.is_inference() else x._version

        def make() -> Tensor:
            self._called = None
            assert version is None or x._version == version, "the input of shared experts was written into"
            return self._compute(x)

        self._called = Deferred(make, None, requires_grad=torch.is_grad_enabled())
        return self._called

    def compute(self) -> None:
        """Make the result of the last call, if nothing has used it yet."""
        if self._called is not None:
            self._called.made()


def find_shared(model: nn.Module, experts: FoundExperts) -> list[nn.Module]:
    """The shared experts beside an experts module: modules that take the same input and give as much."""
    block = model.get_submodule(experts.name.rpartition(".")[0])
    if isinstance(block, GradientCheckpointingLayer):
        # No block of their own, but a whole decoder layer (Gemma 4): what lies there takes other inputs.
        return []
    return [child for child in block.children() if _is_shared(child, experts.spec.hidden_size)]


def why_not_shared(model: nn.Module, found: Sequence[FoundExperts]) -> str | None:
    """Why shared experts, or some of them, compute before or after tokens travel; None if they don't."""
    beside = {id(module) for experts in found for module in find_shared(model, experts)}
    blocks = tuple(experts.name.rpartition(".")[0] + "." for experts in found if find_shared(model, experts))
    for name, module in model.named_modules():
        # The name is for the report alone.
        if "shared" in name.rpartition(".")[2] and id(module) not in beside and not name.startswith(blocks):
            return f"{name} does not lie beside the experts with the same input, so it computes before or after them"
    return None


def overlap_shared(model: nn.Module, found: Sequence[FoundExperts]) -> None:
    """From now on, shared experts compute while tokens travel. The experts are bound."""
    for experts in found:
        shared = [SharedExperts(module) for module in find_shared(model, experts)]
        if shared:
            experts.module.moe_binding.meanwhile = lambda shared=shared: [each.compute() for each in shared]


def _is_shared(module: Any, hidden: int) -> bool:
    linears = [each for each in module.modules() if isinstance(each, nn.Linear)]
    return (
        len(inspect.signature(type(module).forward).parameters) == 2  # self and the input
        and len(linears) > 1
        and linears[0].in_features == linears[-1].out_features == hidden
        # FSDP2 would give the weights back when the call is noted, and not when it is computed.
        and not isinstance(module, FSDPModule)
    )
