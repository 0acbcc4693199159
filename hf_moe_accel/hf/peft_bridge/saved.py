"""What a saved adapter does to the parameters of a model, without a model in memory: for merging offline."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import peft
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from hf_moe_accel.hf.peft_bridge.attach import adopt_expert_adapters
from hf_moe_accel.hf.peft_bridge.files import FILE_NAME, SavedTensor, tensors_of
from hf_moe_accel.hf.peft_bridge.fold import without_adapters
from hf_moe_accel.hf.peft_bridge.older_files import Layout, current_files
from hf_moe_accel.weights.shards import LowRank


def saved_adapter(
    model: Any, directory: str | os.PathLike[str], layout: Layout | None = None
) -> dict[str, list[Callable[[], LowRank | Tensor]]]:
    """What a saved LoRA adapter does to the parameters of a model; its values are read when they are asked for.

    Args:
        model: a transformers model on the meta device, which PEFT changes in place.
        directory: with the adapter's configuration and its file, of today's form or an older one.
        layout: see `PeftModel.from_pretrained`.

    Returns:
        By the names of the model's parameters and buffers, what reads the tensor that takes its place (of
        `modules_to_save`, or an embedding that PEFT has saved too), and then the factors to fold in.

    Raises:
        ValueError: the adapter does not fit the model, or does more than to add products of factors.
    """
    with current_files(model, directory, layout) as current:
        path = current / FILE_NAME
        config = peft.LoraConfig.from_pretrained(current)
        # What was turned into today's form is gone when this ends: those few are held.
        held = None if current == Path(directory) else load_file(path)
        with safe_open(path, framework="pt") as file:
            saved = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}
    for option in config.__dataclass_fields__.values():
        if option.metadata.get("is_lora_variant") and getattr(config, option.name):
            raise ValueError(f"its {option.name} makes it a variant of LoRA, which is not folded in here")
    # What only training needs: PEFT's wrappers of experts refuse dropout, and the first values never count.
    config.lora_dropout, config.init_lora_weights, config.inference_mode = 0.0, False, True
    with torch.device("meta"):
        wrapped = peft.get_peft_model(model, config)
    adopt_expert_adapters(wrapped)
    _, added = without_adapters(wrapped)

    prefix, kept = "base_model.model.", ".modules_to_save.default."
    state = wrapped.state_dict()
    factors = {
        each.name.removeprefix(prefix): each for each in tensors_of(wrapped, "default") if kept not in each.name
    }
    replaced = {name.replace(kept, "."): tensor.shape for name, tensor in state.items() if kept in name}
    wanted = {each.file_key: each.into(each.parameter).shape for each in factors.values()} | replaced
    # PEFT saves embeddings with the adapter where it takes them for changed.
    replaced |= {key: state[key].shape for key in saved if key in state and key not in wanted}
    wanted |= replaced
    for key, shape in saved.items():
        if key not in wanted:
            raise ValueError(f"it holds {key!r}, for which {type(model).__name__} with its configuration has no place")
        if shape != tuple(wanted[key]):
            raise ValueError(f"its {key!r} is {list(shape)}, where {list(wanted[key])} fits the model")
    if missing := sorted(wanted.keys() - saved.keys()):
        raise ValueError(f"it lacks {missing[0]!r}, which its configuration asks for")

    def read(key: str) -> Tensor:
        if held is not None:
            return held[key]
        with safe_open(path, framework="pt") as file:
            tensor: Tensor = file.get_tensor(key)
            return tensor

    def low_rank(target: str, a: SavedTensor, b: SavedTensor) -> LowRank:
        (adapter,) = added[target]
        return adapter._replace(a=a.out(read(a.file_key)), b=b.out(read(b.file_key)))

    found: dict[str, list[Callable[[], LowRank | Tensor]]] = {}
    for key in replaced:
        found[key.removeprefix(prefix).replace(".base_layer.", ".")] = [partial(read, key)]
    for name, a in factors.items():
        layer, is_a, rest = name.rpartition(".lora_A.")
        if is_a:
            linear = f"{layer}.weight"
            target = linear if linear in added else ".".join(layer.rsplit(".lora.", 1))
            found.setdefault(target, []).append(partial(low_rank, target, a, factors[f"{layer}.lora_B.{rest}"]))
    return found
