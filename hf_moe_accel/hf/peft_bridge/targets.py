"""What a LoRA configuration names: from the spellings that users have to the one by which PEFT adapts experts.

In transformers v4 each expert was a module of linear layers, and configurations name those (`gate_proj`, Mixtral's
`w1`, "all-linear"); in v5 the experts of a layer are two stacked parameters. PEFT translates the names for some model
types. The rest are translated here: the names of v4 are still those of the hub's tensors.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter

from hf_moe_accel.hf.discover import FoundExperts

_INSTEAD = "Set it back, or leave the experts out of target_modules and target_parameters."
# Options that experts cannot have: the option -> (the values that are fine, why not the others).
_NOT_ON_EXPERTS: dict[str, tuple[tuple[Any, ...], str]] = {
    "init_lora_weights": (
        (True, False, "gaussian"),
        "it starts from the weight of a linear layer, and the experts of a layer are one stacked parameter; True and "
        "'gaussian' work",
    ),
    "use_dora": ((False,), "DoRA needs the norms of W + BA, which is never built for experts"),
    "lora_bias": ((False,), "there is no bias beside the factors of experts"),
    "fan_in_fan_out": ((False,), "how the parameters of experts are stored is read off the model"),
}


def translate_targets(
    config: Any, model: nn.Module, found: Sequence[FoundExperts], translate_some: Callable[[Any, nn.Module], None]
) -> None:
    """Turn the names of experts in `target_modules` into entries of `target_parameters`, in place.

    Args:
        config: PEFT's `LoraConfig`.
        model: not adapted yet.
        found: its experts.
        translate_some: PEFT's own translation, in place.

    Raises:
        ValueError: a name for one half of a stacked parameter, without the other.
    """
    all_linear = config.target_modules == "all-linear"
    named = set(config.target_parameters or ())
    translate_some(config, model)
    if not found:
        return
    parameters = set(config.target_parameters or ())
    if all_linear:
        # PEFT takes routers for linear layers like others.
        experts = {name for name in parameters - named if hits_experts(name, found)} or set(_parameters_of(found))
        parameters = named if _are_excluded(config, found) else named | experts
        _leave_out(config, _routers(model, found) | _read_by_kernels(model))
    else:
        parameters |= _named_the_old_way(config, model, found)
    config.target_parameters = sorted(parameters) or None


def refuse_options(config: Any, found: Sequence[FoundExperts]) -> None:
    """Refuse options of a translated configuration that experts cannot have.

    Args:
        config: names experts.
        found: the model's.

    Raises:
        ValueError: names the option, the reason and what to do instead.
    """
    if config.layers_to_transform is not None or _are_excluded(config, found):
        raise ValueError(
            f"layers_to_transform={config.layers_to_transform} and exclude_modules={config.exclude_modules} do not "
            "act on the stacked parameters of experts, which PEFT adapts in all layers. Name those that you mean: "
            f"target_parameters=[{found[0].name + '.down_proj'!r}, ...]."
        )
    for name, (fine, reason) in _NOT_ON_EXPERTS.items():
        value = getattr(config, name, fine[0])
        if value not in fine:
            raise ValueError(f"{name}={value!r} does not work on experts: {reason}. {_INSTEAD}")
    for option in config.__dataclass_fields__.values():
        if option.metadata.get("is_lora_variant") and getattr(config, option.name):
            raise ValueError(
                f"{option.name} does not work on experts: it changes what an adapter computes, and those of experts "
                f"add the product of two factors only. {_INSTEAD}"
            )


def check_hits(config: Any, model: nn.Module, found: Sequence[FoundExperts]) -> None:
    """Check that whatever speaks of experts in a translated configuration hits some.

    Raises:
        ValueError: names the targets that hit nothing.
    """
    modules = [] if isinstance(config.target_modules, str) else config.target_modules or ()
    missed = [
        name for name in config.target_parameters or () if _speaks_of_experts(name) and not hits_experts(name, found)
    ]
    missed += [
        name
        for name in modules
        if _speaks_of_experts(name) and not any(_ends(each, name) for each, _ in model.named_modules())
    ]
    if missed:
        known = f"target_parameters={_parameters_of(found)} adapts all of them" if found else "it has none"
        raise ValueError(f"{sorted(missed)} hit no experts of {type(model).__name__}: {known}.")


def names_experts(config: Any, found: Sequence[FoundExperts]) -> bool:
    """Whether a translated configuration adapts experts."""
    return any(hits_experts(name, found) for name in config.target_parameters or ())


def _parameters_of(found: Sequence[FoundExperts]) -> list[str]:
    """The stacked parameters, by the end of their names that is the same in all layers."""
    return sorted({f"{_short(each.name)}.{parameter}" for each in found for parameter in each.parameters[:2]})


def _speaks_of_experts(name: str) -> bool:
    return "experts" in name.split(".")


def hits_experts(name: str, found: Sequence[FoundExperts]) -> bool:
    """Whether an entry of `target_parameters` means a stacked parameter of experts."""
    return any(_ends(f"{experts.name}.{parameter}", name) for experts in found for parameter in experts.parameters[:2])


def _ends(full: str, name: str) -> bool:
    return full == name or full.endswith(f".{name}")


def _short(name: str) -> str:
    return ".".join(name.split(".")[-2:])


def _named_the_old_way(config: Any, model: nn.Module, found: Sequence[FoundExperts]) -> set[str]:
    """The parameters that `target_modules` names the way of v4; takes names out of it that stand for nothing else."""
    targets = config.target_modules or []
    modules = [name for name, _ in model.named_modules()]
    if isinstance(targets, str):
        places = [f"{experts.name}{number}." for experts in found for number in ("", ".0")]

        def is_named(name: str) -> bool:
            return any(re.fullmatch(targets, place + name) for place in places)

        left: Any = targets if any(re.fullmatch(targets, name) for name in modules) else []
    else:
        leaves = {target.rpartition(".")[2] for target in targets if "." not in target or _speaks_of_experts(target)}

        def is_named(name: str) -> bool:
            return name in leaves

        left = sorted(target for target in targets if any(_ends(name, target) for name in modules))
    parameters = set()
    for parameter, spellings in _spellings(model, found).items():
        named = [{name for name in spelling if is_named(name)} for spelling in spellings]
        if any(part == spelling for part, spelling in zip(named, spellings, strict=True)):
            parameters.add(parameter)
        elif half := next(filter(None, named), None):
            whole = next(spelling for spelling in spellings if half <= spelling)
            raise ValueError(
                f"target_modules names {sorted(half)} of the experts without {sorted(whole - half)}: transformers v5 "
                f"keeps them as one parameter, {parameter!r}. Name all, or give the others' full names where you do "
                "not mean the experts."
            )
    if parameters:
        config.target_modules = left
    return parameters


def _spellings(model: nn.Module, found: Sequence[FoundExperts]) -> dict[str, list[set[str]]]:
    """For each stacked parameter, sets of names that together stand for it: usual ones, and those of the hub."""
    spellings: dict[str, list[set[str]]] = {}
    for experts in found:
        up, down = (f"{_short(experts.name)}.{parameter}" for parameter in experts.parameters[:2])
        spellings[up] = [{"gate_proj", "up_proj"} if experts.module.has_gate else {"up_proj"}]
        spellings[down] = [{"down_proj"}]
    for parameter, found_spellings in spellings.items():
        found_spellings.append({parameter.rpartition(".")[2]})
        end = ".".join(["experts", parameter.rpartition(".")[2]])
        for converter in get_model_conversion_mapping(model, add_legacy=False):
            if isinstance(converter, WeightConverter) and any(_ends(to, end) for to in converter.target_patterns):
                found_spellings.append({pattern.split(".")[-2] for pattern in converter.source_patterns})
    return spellings


def _routers(model: nn.Module, found: Sequence[FoundExperts]) -> set[str]:
    """Linear layers beside experts that score them."""
    routers = set()
    for experts in found:
        block = model.get_submodule(experts.name.rpartition(".")[0])
        for name, module in block.named_modules(prefix=experts.name.rpartition(".")[0]):
            if isinstance(module, nn.Linear) and module.out_features == experts.spec.num_experts:
                routers.add(_short(name))
    return routers


def _read_by_kernels(model: nn.Module) -> set[str]:
    """Layers whose weights Mamba's kernels read past their modules; PEFT raises where these are to be adapted."""
    return {
        _short(f"{name}.{child}")
        for name, module in model.named_modules()
        for child in ("conv1d", "out_proj")
        if "conv1d" in module._modules and child in module._modules
    }


def _are_excluded(config: Any, found: Sequence[FoundExperts]) -> bool:
    """Whether `exclude_modules` speaks of the experts modules."""
    excluded = config.exclude_modules or ()
    if isinstance(excluded, str):
        return any(re.fullmatch(excluded, experts.name) for experts in found)
    return any(_ends(experts.name, name) for experts in found for name in excluded)


def _leave_out(config: Any, modules: set[str]) -> None:
    if not modules:
        return
    if isinstance(config.exclude_modules, str):
        ends = "|".join(rf"(?:.*\.)?{re.escape(name)}" for name in sorted(modules))
        config.exclude_modules = f"(?:{config.exclude_modules})|{ends}"
    else:
        config.exclude_modules = sorted({*(config.exclude_modules or ()), *modules})
