"""Writes a LoRA adapter in the form that vLLM and SGLang read: plain matrices for each expert, under the hub's names.

PEFT keeps one pair of factors for each stacked parameter of the experts. Which rows of it are expert 3's `gate_proj`,
and what the hub calls that, says the key plan of the model.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator, Set
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor
from torch.distributed.tensor import DTensor

from hf_moe_accel.hf.discover import class_name
from hf_moe_accel.hf.keys import compile_key_plan
from hf_moe_accel.hf.peft_bridge.attach import adopt_expert_adapters
from hf_moe_accel.hf.peft_bridge.files import FILE_NAME
from hf_moe_accel.hf.peft_bridge.fold import without_adapters
from hf_moe_accel.hf.peft_bridge.hub_names import hub_matrices
from hf_moe_accel.hf.peft_bridge.layers import ParameterLora
from hf_moe_accel.weights.ranks import Ranks
from hf_moe_accel.weights.shards import LowRank


def export_adapter(model: Any, directory: str | os.PathLike[str]) -> None:
    """Write the active adapter with a pair of matrices for each expert and projection. All ranks must call.

    The keys are `base_model.model.<hub name without .weight>.lora_A.weight` [r, in] and `lora_B` [out, r]. The gate
    and the up projection of an expert, which transformers stacks, have the same A, and their rows of B. One rank and
    one alpha serve all: smaller ranks are padded with zeros, and other scalings go into B. `save_pretrained` of the
    model writes the files of PEFT instead.

    Args:
        model: a PEFT model with LoRA, possibly prepared and sharded.
        directory: made if it does not exist.

    Raises:
        ValueError: several adapters are active; the hub stores the model's experts stacked, so that there are no names
            for each; or the adapter does more than to add products of factors.
        AllRanksError: rank 0 could not write. One process raises the error itself.
    """
    if len(model.active_adapters) != 1:
        raise ValueError(f"{model.active_adapters} are active: choose one with set_adapter.")
    (adapter,) = model.active_adapters
    adopt_expert_adapters(model)
    ranks = Ranks.of(model.parameters())
    base = model.get_base_model()
    state, added = without_adapters(model)
    plan = compile_key_plan(base, state)
    _check_plan(plan, {name for name, pairs in added.items() if pairs}, class_name(base))
    whole = {name: _whole(pairs[0], base, name) for name, pairs in added.items() if pairs}
    found = dict(_by_hub_name(plan, state, whole))
    with ranks.same_outcome(f"Saving the adapter to {directory}"):
        if ranks.rank == 0:
            _write(found, copy.copy(model.peft_config[adapter]), Path(directory))


def _whole(pair: LowRank, base: Any, name: str) -> LowRank:
    """An adapter of a parameter with all its rows, in host memory. All ranks must call."""
    module, _, key = name.rpartition(".")
    layer = base.get_submodule(module)
    lora = layer._modules.get("lora")
    holder = lora[key] if lora is not None and isinstance(lora[key], ParameterLora) else layer
    (adapter,) = holder.active_adapters
    a, b = (
        (each.full_tensor() if isinstance(each, DTensor) else each).detach().cpu()
        for each in (holder.lora_A[adapter].weight, holder.lora_B[adapter].weight)
    )
    return pair._replace(a=a, b=b)


def check_per_expert(model: Any) -> None:
    """Refuse a model whose adapters cannot be written expert by expert. All ranks must call.

    Raises:
        ValueError: as `export_adapter`.
    """
    base = model.get_base_model()
    state, added = without_adapters(model)
    _check_plan(compile_key_plan(base, state), {name for name, pairs in added.items() if pairs}, class_name(base))


def _check_plan(plan: Any, adapted: Set[str], model: str) -> None:
    for group in plan.groups:
        if hit := sorted(adapted & set(group.sources)):
            raise ValueError(
                f"{hit[0]!r} is converted when it is saved, so that its adapter has no place in the hub's."
            )
    for tensor in plan.tensors:
        if any(view.source in adapted for view in tensor.views) and (len(tensor.views) > 1 or len(tensor.shape) != 2):
            raise ValueError(
                f"the hub stores {tensor.key!r} for all experts of {model} together, so that there are no names for "
                "each: save_pretrained writes the adapter as PEFT has it, export_checkpoint the merged model."
            )


def _by_hub_name(plan: Any, state: dict[str, Tensor], whole: dict[str, LowRank]) -> Iterator[tuple[str, LowRank]]:
    is_transposed = {name: pair.is_transposed for name, pair in whole.items() if pair.a.ndim == 3}
    for matrix in hub_matrices(plan, state, is_transposed):
        if matrix.parameter not in whole:
            continue
        pair = whole[matrix.parameter]
        if matrix.expert is not None:
            pair = pair._replace(a=pair.a[matrix.expert], b=pair.b[matrix.expert][matrix.outputs])
        yield matrix.name, pair


def _write(found: dict[str, LowRank], config: Any, directory: Path) -> None:
    rank = max(pair.a.size(0) for pair in found.values())
    scaling = next(iter(found.values())).scaling
    tensors: dict[str, Tensor] = {}
    for name, pair in found.items():
        padding = rank - pair.a.size(0)
        b = pair.b if pair.scaling == scaling else pair.b * (pair.scaling / scaling)
        tensors[f"base_model.model.{name}.lora_A.weight"] = torch.nn.functional.pad(pair.a, (0, 0, 0, padding))
        tensors[f"base_model.model.{name}.lora_B.weight"] = torch.nn.functional.pad(b, (0, padding))
    config.target_modules = sorted({name.rpartition(".")[2] for name in found})
    config.target_parameters, config.rank_pattern, config.alpha_pattern = None, {}, {}
    config.r, config.lora_alpha, config.use_rslora, config.inference_mode = rank, scaling * rank, False, True
    directory.mkdir(parents=True, exist_ok=True)
    # One memory for A of gate and up would be refused.
    own = {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}
    (directory / FILE_NAME).write_bytes(save(own, metadata={"format": "pt"}))
    config.save_pretrained(directory)
