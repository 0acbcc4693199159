"""The modules that hold LoRA on the experts, below `experts.lora`."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from hf_moe_accel.experts.base import LoraPair
from hf_moe_accel.lora import peft_layout


class Factor(nn.Module):
    """One factor of one adapter; the name of its parameter is what PEFT looks for: `lora_A.<adapter>.weight`."""

    def __init__(self, weight: Tensor, requires_grad: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=requires_grad)

    def forward(self, hidden: Tensor) -> Tensor:
        """What FSDP2 gathers the factor at, where it was sharded apart from the experts."""
        return hidden


class ParameterLora(nn.Module, LoraLayer):
    """All adapters of one parameter of the experts: A [E, r, in] and B [E, out, r], each sharded as the experts are.

    Its forward is never called: `hf/install` hands `active_pairs` to the token path. It is a `LoraLayer` for PEFT to
    find, without the base layer of one: the experts are above it.
    """

    adapter_layer_names = ("lora_A", "lora_B")
    other_param_names = ("r", "lora_alpha", "scaling")

    def __init__(self, num_experts: int, depth: int) -> None:
        """No adapter yet.

        Args:
            num_experts: E.
            depth: how many other wrappers PEFT puts around this parameter's, of which its keys speak.
        """
        nn.Module.__init__(self)
        self.num_experts = num_experts
        self.keys_prefix = "base_layer." * depth
        self.r: dict[str, int] = {}
        self.lora_alpha: dict[str, float] = {}
        self.scaling: dict[str, float] = {}
        self.lora_A = nn.ModuleDict()
        self.lora_B = nn.ModuleDict()
        self.lora_variant: dict[str, Any] = {}
        self.merged_adapters: list[str] = []

    def take(self, wrapper: Any) -> None:
        """Take the adapters of PEFT's `ParamWrapper` over, values and state."""
        for name in wrapper.lora_A:
            a, b = wrapper.lora_A[name].weight, wrapper.lora_B[name].weight
            self.lora_A[name] = Factor(_own(peft_layout.a_from_peft(a, self.num_experts)), a.requires_grad)
            self.lora_B[name] = Factor(_own(peft_layout.b_from_peft(b, self.num_experts)), b.requires_grad)
        for kept in self.other_param_names:
            getattr(self, kept).update(getattr(wrapper, kept))
        self._active_adapter = wrapper._active_adapter
        self._disable_adapters = wrapper._disable_adapters

    def active_pairs(self) -> tuple[LoraPair, ...]:
        """What the token path adds: this rank's factors of each active adapter, inside autograd."""
        return tuple(
            LoraPair(_local(_weight(self.lora_A, name)), _local(_weight(self.lora_B, name)), self.scaling[name])
            for name in self._active()
        )

    def active_factors(self) -> Iterator[nn.Module]:
        """The modules that hold them."""
        for name in self._active():
            yield self.lora_A[name]
            yield self.lora_B[name]

    def _active(self) -> list[str]:
        active: Any = [] if self._disable_adapters else self.active_adapters
        return [name for name in active if name in self.lora_A]

    def factors(self, adapter: str) -> Iterator[tuple[str, nn.Parameter, Any, Any]]:
        """("lora_A" or "lora_B", the live factor, its way into PEFT's layout, its way out of it)."""
        for kind, factors, into, out in (
            ("lora_A", self.lora_A, peft_layout.a_to_peft, peft_layout.a_from_peft),
            ("lora_B", self.lora_B, peft_layout.b_to_peft, peft_layout.b_from_peft),
        ):
            if adapter in factors:
                yield kind, _weight(factors, adapter), into, partial(out, num_experts=self.num_experts)


class ExpertsLora(nn.ModuleDict):
    """The child of an experts module: parameter name -> its adapters."""

    def forward(self, hidden: Tensor) -> Tensor:
        """Pass the experts' input on, through the factors that this pass will read."""
        for lora in self.children():
            assert isinstance(lora, ParameterLora)
            for factor in lora.active_factors():
                hidden = factor(hidden)
        return hidden

    def all_factors(self) -> Iterator[tuple[str, Factor]]:
        """(adapter, factor), of all adapters."""
        for name, module in self.named_modules():
            if isinstance(module, Factor):
                yield name.rpartition(".")[2], module


def _weight(factors: nn.ModuleDict, adapter: str) -> nn.Parameter:
    weight = factors[adapter].weight
    assert isinstance(weight, nn.Parameter)
    return weight


def _own(tensor: Tensor) -> Tensor:
    return tensor.detach().clone(memory_format=torch.contiguous_format)


def _local(parameter: Tensor) -> Tensor:
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter
