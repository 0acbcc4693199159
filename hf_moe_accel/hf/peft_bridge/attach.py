"""Adapters onto a model: PEFT makes its wrappers, and those of experts become children of the experts.

PEFT's `target_parameters` wraps the experts module once for each parameter, builds W + BA in every forward, and stands
between transformers' expert parallelism and the experts. Here PEFT makes the wrappers, with its own matching of names,
ranks and initial values; then each becomes a `ParameterLora` below `experts.lora`, and the experts module is what it
was. PEFT still finds them as tuner layers, so that `set_adapter`, `disable_adapter` and `delete_adapter` work.
"""

from __future__ import annotations

import copy
import os
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from types import MethodType
from typing import Any

import peft
from peft.tuners.lora import LoraModel
from peft.tuners.lora.layer import LoraLayer, ParamWrapper
from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
from torch import nn
from torch.distributed.tensor import DTensor

from hf_moe_accel.hf.discover import FoundExperts, base_of, find_experts, refuse_quantized
from hf_moe_accel.hf.install import lead_here
from hf_moe_accel.hf.loading import average_gradients, is_sharded, reshard, shard_added, share
from hf_moe_accel.hf.peft_bridge.files import load_adapter, save_pretrained
from hf_moe_accel.hf.peft_bridge.layers import ExpertsLora, ParameterLora
from hf_moe_accel.hf.peft_bridge.older_files import Layout, current_files
from hf_moe_accel.hf.peft_bridge.targets import (
    check_hits,
    hits_experts,
    names_experts,
    refuse_options,
    translate_targets,
)
from hf_moe_accel.log import say, warn_once

# Where a configuration keeps its dropout while PEFT makes the wrappers, which refuse any on experts.
_DROPOUT = "moe_accel_dropout"
# What marks a parameter that `_keep_equal` has dealt with.
_KEPT_EQUAL = "moe_accel_kept_equal"


def get_peft_model(model: Any, peft_config: Any, adapter_name: str = "default", **kwargs: Any) -> Any:
    """`peft.get_peft_model`, with experts: the result can be prepared, sharded, saved and resumed.

    Experts are named in any spelling that users have: `target_parameters=["mlp.experts.gate_up_proj", ...]`, that of
    transformers v4, `target_modules=["gate_proj", "up_proj", "down_proj"]`, or "all-linear", which here leaves routers
    out. Where PEFT translates the names of v4 for a model type, the result is PEFT's (twice the rank for the stacked
    gate and up); elsewhere both get the given rank. `lora_dropout` acts on the other targets only.

    Call it before `prepare_moe_model` where you can: adapters are then sharded together with what they adapt. On a
    model that is prepared and sharded already, the factors of experts are sharded as the experts are, those of other
    layers are kept by every rank, and their gradients averaged. All ranks must call then.

    Args:
        model: a transformers model.
        peft_config: `LoraConfig`. It is not changed: the model holds a copy that names the experts' parameters.
        adapter_name: as in PEFT.
        kwargs: of `peft.get_peft_model`.

    Raises:
        ValueError: experts are named and none was hit; an option cannot be had on experts, or on a sharded model; the
            model is quantized. Names the value and the way out.
    """
    config = adapter_config(model, peft_config)
    wrapped = peft.get_peft_model(model, config, adapter_name, **kwargs)
    adopt_expert_adapters(wrapped)
    return wrapped


class PeftModel:
    """`peft.PeftModel` for models with experts: `PeftModel.from_pretrained(model, directory)`."""

    @classmethod
    def from_pretrained(
        cls,
        model: Any,
        model_id: str | os.PathLike[str],
        adapter_name: str = "default",
        is_trainable: bool = False,
        *,
        layout: Layout | None = None,
        **kwargs: Any,
    ) -> Any:
        """A model with a saved adapter, as `peft.PeftModel.from_pretrained`, before or after the model is prepared.

        Reads what PEFT saves, and older files: those with matrices for each expert (transformers v4, or
        `export_adapter`), and those of PEFT before 0.19.1, whose factors of experts are swapped. All ranks must call
        if the model is sharded.

        Args:
            model: a transformers model.
            model_id: a directory or hub id.
            adapter_name: as in PEFT.
            is_trainable: as in PEFT: False freezes the adapter.
            layout: "current" if the factors of experts are those of PEFT 0.19.1 or later (lora_A reads the inputs),
                "swapped" if they are the other way round. None: read off their shapes, or off the version that the
                file names where inputs and outputs are equally many.
            kwargs: of `peft.PeftModel.from_pretrained`; if the model is sharded, those that `peft.get_peft_model`
                knows as well.

        Raises:
            ValueError: as `get_peft_model`; or the layout cannot be told and must be given.
        """
        hub = {name: kwargs[name] for name in ("revision", "token", "cache_dir", "subfolder") if name in kwargs}
        with current_files(model, model_id, layout, **hub) as directory:
            config = kwargs.pop("config", None) or peft.PeftConfig.from_pretrained(directory)
            config = adapter_config(model, config)
            config.inference_mode = not is_trainable
            kwargs = {name: value for name, value in kwargs.items() if name not in hub}
            if is_sharded(model):
                wrapped = peft.get_peft_model(model, config, adapter_name, **kwargs)
                adopt_expert_adapters(wrapped)
                load_adapter(wrapped, directory, adapter_name)
                return wrapped if is_trainable else wrapped.eval()
            wrapped = peft.PeftModel.from_pretrained(
                model, directory, adapter_name, is_trainable, config=config, **kwargs
            )
        adopt_expert_adapters(wrapped)
        return wrapped


def adapter_config(model: Any, config: Any) -> Any:
    """A copy of a configuration, said as PEFT can follow it for this model; what is not LoRA comes back as it is.

    Raises:
        ValueError: as `get_peft_model`.
    """
    if not isinstance(config, peft.LoraConfig):
        return config
    base = base_of(model)
    found = find_experts(base)
    if found:
        refuse_quantized(base)
    config = copy.deepcopy(config)
    translate_targets(config, base, found, lambda *of: convert_peft_config_for_transformers(*of, conversions=None))
    check_hits(config, base, found)
    if is_sharded(base) and (why := why_not_after_sharding(config, found)):
        raise ValueError(
            f"{why} does not work on a model that is sharded already: give the adapter before prepare_moe_model, to "
            "the model as transformers loads it."
        )
    if names_experts(config, found):
        refuse_options(config, found)
        if config.lora_dropout:
            warn_once(
                f"hf_moe_accel: lora_dropout={config.lora_dropout} acts on the other targets; on experts it is 0"
            )
            setattr(config, _DROPOUT, config.lora_dropout)
            config.lora_dropout = 0.0
    return config


def why_not_after_sharding(config: Any, found: Sequence[FoundExperts]) -> str | None:
    """Which option of a configuration needs whole weights, or None.

    Args:
        config: any of PEFT's; LoRA's as `adapter_config` returns it.
        found: the experts of the model.
    """
    if not isinstance(config, peft.LoraConfig):
        return str(config.peft_type)
    for name in ("modules_to_save", "trainable_token_indices", "layer_replication"):
        if getattr(config, name, None):
            return f"{name}={getattr(config, name)}"
    if config.task_type in ("SEQ_CLS", "TOKEN_CLS"):
        return f"task_type={config.task_type!r}, for which PEFT copies the head,"
    if config.init_lora_weights not in (True, False, "gaussian"):
        return f"init_lora_weights={config.init_lora_weights!r}"
    for option in config.__dataclass_fields__.values():
        if option.metadata.get("is_lora_variant") and getattr(config, option.name):
            return str(option.name)
    for name in config.target_parameters or ():
        if not hits_experts(name, found):
            return f"target_parameters=[{name!r}]"
    return None


def adopt_expert_adapters(model: Any) -> None:
    """Turn PEFT's wrappers of experts into children of the experts, and lead what saves and adds adapters here.

    Does nothing to a model without LoRA, or without experts. All adapters and their values are kept. All ranks must
    call if the model is sharded: what was added to it since is sharded, or kept equal, here.
    """
    if not isinstance(model, peft.PeftModel) or not isinstance(model.base_model, LoraModel):
        return
    base = model.get_base_model()
    _set_dropout(model)
    sharded = is_sharded(base)
    if sharded:
        reshard(base)
        _mend_shapes(model)
    unwrapped = list(_unwrapped(base))
    found = find_experts(base)
    if not found:
        return
    if unwrapped:
        lead_here(base, found)
        model.merge_and_unload = MethodType(_merge_and_unload, model)
    if sharded:
        for experts in unwrapped:
            _shard_factors(base, experts.lora)
        _keep_equal(base)
    if "moe_accel_adapters" not in model.__dict__:
        model.moe_accel_adapters = True
        model.save_pretrained = MethodType(save_pretrained, model)
        model.add_adapter = MethodType(_add_adapter, model)
        model.load_adapter = MethodType(_load_adapter, model)
        _say_what_trains(model)


def _unwrapped(base: nn.Module) -> Iterator[Any]:
    """Put each experts module that PEFT has wrapped back in its place, with the wrappers' adapters below it."""
    modules = dict(base.named_modules())
    for name, module in modules.items():
        parent, _, key = name.rpartition(".")
        if not isinstance(module, ParamWrapper) or isinstance(modules[parent], ParamWrapper):
            continue
        experts: Any = module.get_base_layer()
        if "down_proj" not in experts._parameters or not hasattr(experts, "has_gate"):
            continue
        setattr(modules[parent], key, experts)
        if "lora" not in experts._modules:
            experts.lora = ExpertsLora()
        depth, wrapper = 0, module
        while isinstance(wrapper, ParamWrapper):
            if wrapper.parameter_name not in experts.lora:
                experts.lora[wrapper.parameter_name] = ParameterLora(wrapper.num_experts, depth)
            experts.lora[wrapper.parameter_name].take(wrapper)
            wrapper, depth = wrapper.base_layer, depth + 1
        yield experts


def _shard_factors(base: Any, lora: ExpertsLora) -> None:
    """Shard new factors of an experts module, those of each adapter together."""
    added: dict[str, list[nn.Module]] = defaultdict(list)
    for adapter, factor in lora.all_factors():
        if not isinstance(factor.weight, DTensor):
            added[adapter].append(factor)
    for factors in added.values():
        share(parameter for factor in factors for parameter in factor.parameters())
        shard_added(base, factors, with_experts=True)


def _mend_shapes(model: Any) -> None:
    """Make the adapters of linear layers anew that PEFT 0.21 has made for one rank's part of a weight.

    It knows that FSDP2 computes with whole weights only by the name of the mesh, and not where there are replicas.
    """
    for layer in model.modules():
        if not isinstance(layer, LoraLayer) or not isinstance(linear := layer.get_base_layer(), nn.Linear):
            continue
        if (layer.in_features, layer.out_features) != (linear.in_features, linear.out_features):
            layer.in_features, layer.out_features = linear.in_features, linear.out_features
            for adapter in list(layer.lora_A):
                dtype = layer.lora_A[adapter].weight.dtype
                rank, alpha, config = layer.r[adapter], layer.lora_alpha[adapter], model.peft_config[adapter]
                layer.update_layer(adapter, rank, lora_alpha=alpha, config=config)
                layer.lora_A[adapter].to(dtype)
                layer.lora_B[adapter].to(dtype)


def _keep_equal(base: nn.Module) -> None:
    """Let the adapters of other layers, added after sharding, train as one on all ranks.

    They are small, and a gather for each costs more than it saves: every rank has them whole. Beside an adapter that
    is sharded, since it was there first, they are sharded too, so that one can be copied into the other.
    """
    for layer in base.modules():
        if not isinstance(layer, LoraLayer) or isinstance(layer, ParameterLora):
            continue
        for factors in (getattr(layer, name) for name in layer.adapter_layer_names):
            new = [p for p in factors.parameters() if not isinstance(p, DTensor) and not hasattr(p, _KEPT_EQUAL)]
            share(new)
            if any(isinstance(p, DTensor) for p in factors.parameters()):
                for factor in factors.children():
                    if any(p is each for p in factor.parameters() for each in new):
                        shard_added(base, [factor], with_experts=False)
                continue
            for parameter in new:
                average_gradients(parameter)
                setattr(parameter, _KEPT_EQUAL, True)


def _set_dropout(model: Any) -> None:
    """Give configurations, and what they adapt beside experts, the dropout that `adapter_config` set aside."""
    for adapter, config in model.peft_config.items():
        if _DROPOUT not in config.__dict__:
            continue
        config.lora_dropout = config.__dict__.pop(_DROPOUT)
        for module in model.modules():
            if isinstance(module, LoraLayer) and not isinstance(module, ParamWrapper | ParameterLora):
                if adapter in module.lora_dropout:
                    module.lora_dropout[adapter] = nn.Dropout(config.lora_dropout)


def _add_adapter(model: Any, adapter_name: str, peft_config: Any, *args: Any, **kwargs: Any) -> None:
    """`add_adapter` of PEFT. All ranks must call if the model is sharded."""
    config = adapter_config(model, peft_config)
    type(model).add_adapter(model, adapter_name, config, *args, **kwargs)
    adopt_expert_adapters(model)


def _load_adapter(
    model: Any,
    model_id: str | os.PathLike[str],
    adapter_name: str,
    is_trainable: bool = False,
    *,
    layout: Layout | None = None,
    **hub: Any,
) -> None:
    """`load_adapter` of PEFT, which reads older files as well: see `PeftModel.from_pretrained`.

    All ranks must call if the model is sharded.

    Raises:
        ValueError: the file does not fit the model.
    """
    with current_files(base_of(model), model_id, layout, **hub) as directory:
        if adapter_name not in model.peft_config:
            config = peft.PeftConfig.from_pretrained(directory)
            config.inference_mode = not is_trainable
            model.add_adapter(adapter_name, config)
            model.set_requires_grad(adapter_name, requires_grad=is_trainable)
        load_adapter(model, directory, adapter_name)


def expert_parallel_rules(model: nn.Module) -> dict[str, str]:
    """The rules by which transformers shards the factors by expert, to be added to the model's own."""
    return {
        re.sub(r"\.\d+\.", ".*.", f"{name}.{parameter}"): "grouped_gemm"
        for name, module in model.named_modules()
        if isinstance(module, ParameterLora)
        for parameter, _ in module.named_parameters()
    }


def _merge_and_unload(model: Any, *args: Any, **kwargs: Any) -> Any:
    raise NotImplementedError(
        "merge_and_unload of a model with adapters on experts: hf_moe_accel.export_checkpoint(model, directory) "
        "writes the merged model, from which it can be loaded."
    )


def _say_what_trains(model: Any) -> None:
    parts = {"experts": 0, "other adapters": 0, "other weights": 0}
    layers = (module for module in model.modules() if isinstance(module, ParameterLora))
    ours = {id(parameter) for layer in layers for parameter in layer.parameters()}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            kind = "experts" if id(parameter) in ours else "other adapters" if "lora_" in name else "other weights"
            parts[kind] += parameter.numel()
    total = sum(parts.values())
    if not total:
        return
    shown = ", ".join(f"{number:,} {kind}" for kind, number in parts.items() if number)
    say(f"hf_moe_accel: LoRA trains {total:,} parameters: {shown}")
