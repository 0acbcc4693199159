"""Finds the experts of a model by the attributes that transformers' decorator leaves on them, not by model name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hf_moe_accel.experts.base import ExpertsSpec

# What `transformers.integrations.moe.use_experts_implementation` sets on a module.
_FLAGS = ("has_gate", "has_bias", "is_transposed", "is_concatenated", "has_post_expert_norm", "num_experts")

# What cannot be read off: routed experts that do not follow the decorator's contract (x, ids, weights) -> out over
# stacked [E, ...] parameters. Class name -> why.
_NOT_STANDARD = {
    "DbrxExperts": "its experts lie in one flat weight for each projection",
    "DogeCDMoE": "its experts are rows of embeddings",
    "JetMoeParallelExperts": "its experts take rows that are sorted already",
    "Llama4TextExperts": "its experts take every token for every expert, without routing arguments",
    "LongcatFlashExperts": "it has experts without weights among the others",
    "NllbMoeExperts": "its experts are separate modules",
    "Step3p7Experts": "the bounds of its activation differ from layer to layer",
    "SwitchTransformersExperts": "its experts are separate modules",
    "VitPoseNaiveMoe": "its experts are separate modules",
}
WHAT_WORKS = (
    "Models whose experts carry transformers' `use_experts_implementation` work: Qwen3-MoE, Mixtral, DeepSeek, "
    "GPT-OSS, OLMoE, GLM-4-MoE, Granite-MoE, Nemotron-H and about 80 more."
)
NO_QUANTIZED = (
    "quantized models (quantization_config) are not supported, also not as a frozen base of adapters (QLoRA: "
    "bitsandbytes leaves the experts in 16 bits anyway, since they are no linear layers). Load the model without "
    "quantization_config and train LoRA on it. If the checkpoint itself is quantized, have transformers dequantize it "
    "once, save that, and load it instead (for GPT-OSS: quantization_config=Mxfp4Config(dequantize=True))."
)


@dataclass(frozen=True)
class FoundExperts:
    """One experts module of a model.

    Attributes:
        name: its name in the model.
        module: the module.
        spec: what it computes.
        parameters: names, from the module, in the order of `ExpertWeights`; None where it has none.
    """

    name: str
    module: Any
    spec: ExpertsSpec
    parameters: tuple[str | None, ...]

    def weight(self, place: int) -> Tensor:
        """The parameter at a place of `ExpertWeights`."""
        name = self.parameters[place]
        assert name is not None
        weight: Tensor = self.module.get_parameter(name)
        return weight


def class_name(module: nn.Module) -> str:
    """The name of the module's class before `fully_shard` renamed it to FSDP<Name>."""
    return type(module).__name__.removeprefix("FSDP")


def base_of(model: Any) -> Any:
    """The transformers model inside a PEFT model; any other model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def find_experts(model: nn.Module) -> list[FoundExperts]:
    """The experts modules of a model, in order; empty for a dense model.

    Raises:
        ValueError: an adapter other than LoRA wraps experts, or an activation has parameters of its own.
    """
    found = []
    for name, module in model.named_modules():
        if "down_proj" not in module._parameters or not all(hasattr(module, flag) for flag in _FLAGS):
            continue
        if name.endswith(".base_layer"):
            raise ValueError(
                f"the experts {name.replace('.base_layer', '')!r} are wrapped by an adapter other than PEFT's LoRA, "
                "which expert parallelism would feed wrongly. Use LoraConfig(target_parameters="
                "['mlp.experts.gate_up_proj', 'mlp.experts.down_proj']), or leave the experts out of its targets."
            )
        found.append(_describe(name, module))
    return found


def find_routers(model: nn.Module) -> list[tuple[nn.Module, int]]:
    """The routers of a transformers model, in order, each with the place of its logits among its outputs.

    They are what the model says that `output_router_logits` records; empty where it says nothing.
    """
    recorder: Any = (getattr(model, "_can_record_outputs", None) or {}).get("router_logits")
    if not hasattr(recorder, "target_class"):
        return []
    return [
        (module, recorder.index)
        for name, module in model.named_modules()
        if isinstance(module, recorder.target_class) and name.endswith(recorder.layer_name or "")
    ]


def refuse_quantized(model: Any) -> None:
    """Refuse a model whose weights are quantized, or will be when they are read.

    Raises:
        ValueError: it is.
    """
    if getattr(model, "is_quantized", False) or getattr(model.config, "quantization_config", None) is not None:
        raise ValueError(NO_QUANTIZED)


def why_not_standard(model: nn.Module) -> str | None:
    """For a mixture-of-experts model whose experts we cannot serve: which and why, as one sentence."""
    for name, module in model.named_modules():
        reason = _NOT_STANDARD.get(class_name(module))
        if reason is not None:
            return f"{name!r} is of the kind {type(module).__name__}: {reason}. {WHAT_WORKS}"
    return None


def _describe(name: str, module: Any) -> FoundExperts:
    up_name = "gate_up_proj" if module.has_gate else "up_proj"
    up, down = module.get_parameter(up_name), module.get_parameter("down_proj")
    out_of, into = (2, 1) if module.is_transposed else (1, 2)
    gate: Callable[[Tensor], Tensor] = module._apply_gate if module.has_gate else module.act_fn
    act_fn = getattr(module, "act_fn", None)
    if isinstance(act_fn, nn.Module) and next(act_fn.parameters(), None) is not None:
        raise ValueError(
            f"the activation {type(act_fn).__name__} of the experts {name!r} has trainable parameters of its own, "
            "which is not supported: use an activation without parameters (for example hidden_act='silu')."
        )
    post_norm, post_norm_name = None, None
    if module.has_post_expert_norm:
        post_norm_name = "post_expert_norm.weight"
        post_norm = _functional(module.post_expert_norm)
    spec = ExpertsSpec(
        num_experts=up.shape[0],
        hidden_size=down.shape[out_of],
        pre_activation_size=up.shape[out_of],
        intermediate_size=down.shape[into],
        is_transposed=module.is_transposed,
        has_bias=module.has_bias,
        gate=gate,
        post_norm=post_norm,
    )
    biases = (f"{up_name}_bias", "down_proj_bias") if module.has_bias else (None, None)
    return FoundExperts(name, module, spec, (up_name, "down_proj", *biases, post_norm_name))


def _functional(norm: nn.Module) -> Callable[[Tensor, Tensor], Tensor]:
    def post_norm(y_RD: Tensor, weight_D: Tensor) -> Tensor:
        out: Tensor = torch.func.functional_call(norm, {"weight": weight_D}, (y_RD,))
        return out

    return post_norm
