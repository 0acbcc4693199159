"""Adapters that were not saved the way PEFT saves them today, turned into what it would have saved.

Two older forms are in use. Matrices for each expert, under the hub's names (transformers v4; vLLM and SGLang read the
same, and `export_adapter` writes it). And stacked factors with inputs and outputs swapped: PEFT took the dims of a
stacked parameter for [E, in, out] whatever the model, until 0.19.1. Both hold the same numbers in another order.
"""

from __future__ import annotations

import copy
import os
import re
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple

import peft
import torch
from huggingface_hub import snapshot_download
from packaging.version import InvalidVersion, Version
from peft.utils.other import get_pattern_key
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from hf_moe_accel.hf.discover import FoundExperts, base_of, find_experts
from hf_moe_accel.hf.keys import compile_key_plan
from hf_moe_accel.hf.peft_bridge.files import FILE_NAME
from hf_moe_accel.hf.peft_bridge.hub_names import HubMatrix, hub_matrices
from hf_moe_accel.lora import peft_layout
from hf_moe_accel.weights.files import read_json

Layout = Literal["current", "swapped"]

_PREFIX = "base_model.model."
_OF_ONE_EXPERT = re.compile(r"\.experts\.\d+\.")
# PEFT took the dims the right way round for both ways of storing experts from 0.19.1 on; 0.19.0 turned the wrong one.
_RIGHT_SINCE = Version("0.19.1")
_TRANSPOSED_WRONG_IN = Version("0.19.0")


@contextmanager
def current_files(model: Any, source: str | os.PathLike[str], layout: Layout | None, **hub: Any) -> Iterator[Path]:
    """The directory of an adapter in the form of today's PEFT: the adapter's own, or a temporary one.

    Args:
        model: a transformers model, possibly on the meta device, sharded or with adapters.
        source: a directory, or a hub id.
        layout: see `PeftModel.from_pretrained`.
        hub: where on the hub, for example `revision`.

    Raises:
        ValueError: the layout cannot be told, or a matrix for one expert has no place in the model.
    """
    if layout not in (None, "current", "swapped"):
        raise ValueError(f"layout={layout!r} must be 'current' (PEFT 0.19.1 and later), 'swapped', or None (look).")
    subfolder = hub.pop("subfolder", None) or ""
    local = source if os.path.isdir(source) else snapshot_download(str(source), **hub)
    directory = Path(local, subfolder)
    path = directory / FILE_NAME
    config = peft.PeftConfig.from_pretrained(directory)
    if not path.exists() or not isinstance(config, peft.LoraConfig):
        yield directory
        return
    with safe_open(path, framework="pt") as file:
        shapes = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}
    found = find_experts(base_of(model))
    if any(_OF_ONE_EXPERT.search(key) for key in shapes):
        config, tensors = _stacked(model, found, config, load_file(path))
    elif swapped := _swapped(shapes, found, config, layout, directory):
        tensors = load_file(path)
        for a, b, num_experts in swapped:
            tensors[a], tensors[b] = peft_layout.swap(tensors[a], tensors[b], num_experts)
    else:
        yield directory
        return
    with tempfile.TemporaryDirectory() as temporary:
        save_file({key: each.contiguous() for key, each in tensors.items()}, Path(temporary, FILE_NAME))
        config.save_pretrained(temporary)
        yield Path(temporary)


def _swapped(
    shapes: Mapping[str, Sequence[int]],
    found: Sequence[FoundExperts],
    config: Any,
    layout: Layout | None,
    directory: Path,
) -> list[tuple[str, str, int]]:
    """The stacked pairs that are swapped, as (key of A, key of B, number of experts)."""
    pairs, looks = [], []
    for experts in found:
        names = [name for name in experts.parameters[:2] if _is_targeted(f"{experts.name}.{name}", config)]
        # PEFT's wrappers nest, the first parameter innermost.
        for depth, name in enumerate(reversed(names)):
            a, b = (f"{_PREFIX}{experts.name}.{'base_layer.' * depth}lora_{x}.weight" for x in "AB")
            if a not in shapes or b not in shapes:
                continue
            spec = experts.spec
            into, out = (
                (spec.hidden_size, spec.pre_activation_size)
                if name == experts.parameters[0]
                else (spec.intermediate_size, spec.hidden_size)
            )
            width = shapes[a][1]
            if width in (into, out):
                pairs.append((a, b, spec.num_experts))
                looks.append(None if into == out else width == out)
    seen = {look for look in looks if look is not None}
    if layout is not None:
        seen = {layout == "swapped"}
    elif pairs and not seen:
        # PEFT reads a configuration without a version as one of its own.
        saved_by = read_json(directory / "adapter_config.json").get("peft_version")
        seen = {_is_swapped_by_version(saved_by, found[0].spec.is_transposed)}
    if len(seen) > 1:
        raise ValueError("some of the adapter's factors of experts are swapped and some are not: it fits no version.")
    return pairs if seen == {True} else []


def _is_targeted(parameter: str, config: Any) -> bool:
    return any(parameter == name or parameter.endswith(f".{name}") for name in config.target_parameters or ())


def _is_swapped_by_version(saved_by: str | None, is_transposed: bool) -> bool:
    try:
        version = Version((saved_by or "").partition("@")[0])
    except InvalidVersion:
        version = None
    if version is None or version.is_devrelease:
        raise ValueError(
            "the inputs and outputs of the adapted experts are equally many, so that the shapes of the adapter's "
            f"factors do not tell their layout, and it names no release of PEFT (peft_version={saved_by!r}). Give "
            "layout='current' if it was saved by PEFT 0.19.1 or later, layout='swapped' if by an earlier one."
        )
    return version == _TRANSPOSED_WRONG_IN if is_transposed else version < _RIGHT_SINCE


class _Part(NamedTuple):
    """One matrix's adapter. a: [r, in]; b: [n, r], for n of its expert's outputs."""

    outputs: Tensor
    a: Tensor
    b: Tensor
    scaling: float


def _stacked(
    model: Any, found: Sequence[FoundExperts], config: Any, tensors: dict[str, Tensor]
) -> tuple[Any, dict[str, Tensor]]:
    """Stack the factors of single experts. Gate and up with different A get the sum of both ranks, as in PEFT."""
    base = base_of(model)
    state = base.state_dict(keep_vars=True)
    specs = {f"{each.name}.{name}": each for each in found for name in each.parameters[:2]}
    is_transposed = {name: each.spec.is_transposed for name, each in specs.items()}
    parts: dict[str, dict[int, list[_Part]]] = defaultdict(lambda: defaultdict(list))
    left = dict(tensors)
    modules = set()
    for matrix in hub_matrices(compile_key_plan(base), state, is_transposed):
        a, b = (left.pop(f"{_PREFIX}{matrix.name}.lora_{x}.weight", None) for x in "AB")
        if a is None or b is None:
            continue
        if matrix.expert is None:
            modules.add(matrix.parameter.removesuffix(".weight"))
            for x, factor in (("A", a), ("B", b)):
                left[f"{_PREFIX}{matrix.parameter.removesuffix('.weight')}.lora_{x}.weight"] = factor
        else:
            parts[matrix.parameter][matrix.expert].append(_part(matrix, a, b, config))
    if lost := [key for key in left if _OF_ONE_EXPERT.search(key)]:
        raise ValueError(f"{lost[0]!r} has no place in {type(base).__name__}.")
    config = copy.deepcopy(config)
    config.target_modules = sorted(modules)
    ranks: dict[str, int] = {}
    scalings: dict[str, float] = {}
    whole = {}
    for name, by_expert in parts.items():
        spec, leaf = specs[name].spec, name.rpartition(".")[2]
        out = spec.pre_activation_size if leaf == specs[name].parameters[0] else spec.hidden_size
        scaling = scalings.setdefault(leaf, next(part.scaling for each in by_expert.values() for part in each))
        whole[name] = [_joined(by_expert.get(expert, []), out, scaling) for expert in range(spec.num_experts)]
        ranks[leaf] = max(ranks.get(leaf, 0), *(a.size(0) for a, _ in whole[name] if a is not None))
    for leaf, rank in ranks.items():
        pattern = rf".*\.experts\.{re.escape(leaf)}"
        config.rank_pattern[pattern] = rank
        config.alpha_pattern[pattern] = scalings[leaf] * (rank**0.5 if config.use_rslora else rank)
    config.target_parameters = sorted({".".join(name.split(".")[-2:]) for name in parts})
    for name, factors in whole.items():
        experts, _, leaf = name.rpartition(".")
        depth = sum(f"{experts}.{other}" in whole for other in specs[name].parameters[1:2] if other != leaf)
        key = f"{_PREFIX}{experts}.{'base_layer.' * depth}lora_{{}}.weight"
        a, b = _stack(factors, ranks[leaf])
        left[key.format("A")], left[key.format("B")] = peft_layout.a_to_peft(a), peft_layout.b_to_peft(b)
    return config, left


def _part(matrix: HubMatrix, a: Tensor, b: Tensor, config: Any) -> _Part:
    assert matrix.outputs is not None
    rank = config.rank_pattern.get(get_pattern_key(config.rank_pattern, matrix.name), config.r)
    alpha = config.alpha_pattern.get(get_pattern_key(config.alpha_pattern, matrix.name), config.lora_alpha)
    return _Part(matrix.outputs, a, b, alpha / (rank**0.5 if config.use_rslora else rank))


def _joined(parts: list[_Part], num_outputs: int, scaling: float) -> tuple[Tensor | None, Tensor | None]:
    """One expert's [r, in] and [out, r] of its parts, under one scaling."""
    if not parts:
        return None, None
    shared = all(torch.equal(part.a, parts[0].a) for part in parts)
    rank = parts[0].a.size(0) if shared else sum(part.a.size(0) for part in parts)
    b = parts[0].b.new_zeros(num_outputs, rank)
    start = 0
    for part in parts:
        in_b = part.b if part.scaling == scaling else part.b * (part.scaling / scaling)
        b[part.outputs, start : start + part.a.size(0)] = in_b
        start += 0 if shared else part.a.size(0)
    return (parts[0].a if shared else torch.cat([part.a for part in parts])), b


def _stack(factors: list[tuple[Tensor | None, Tensor | None]], rank: int) -> tuple[Tensor, Tensor]:
    """[E, r, in] and [E, out, r]; an expert without an adapter, or of a smaller rank, is filled up with zeros."""
    some_a, some_b = next((a, b) for a, b in factors if a is not None and b is not None)
    stacked_a = some_a.new_zeros(len(factors), rank, some_a.size(1))
    stacked_b = some_b.new_zeros(len(factors), some_b.size(0), rank)
    for expert, (a, b) in enumerate(factors):
        if a is not None and b is not None:
            stacked_a[expert, : a.size(0)], stacked_b[expert, :, : b.size(1)] = a, b
    return stacked_a, stacked_b
