"""Adapters in PEFT's files: written from the live, sharded ones, and read into them."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save
from torch import Tensor
from torch.distributed.tensor import DTensor

from hf_moe_accel.hf.loading import reshard
from hf_moe_accel.hf.peft_bridge.layers import ParameterLora
from hf_moe_accel.weights.gather import gather_rows
from hf_moe_accel.weights.ranks import Ranks
from hf_moe_accel.weights.shards import shards_of

FILE_NAME = "adapter_model.safetensors"


def load_adapter(model: Any, directory: str | os.PathLike[str], adapter: str) -> None:
    """Read a saved adapter into the live, possibly sharded one of that name, in place. All ranks must call.

    Raises:
        ValueError: the file is not there, or holds other tensors than the adapter has; names them.
    """
    path = Path(directory, FILE_NAME)
    if not path.exists():
        path = Path(directory, adapter, FILE_NAME)
    if not path.exists():
        raise ValueError(f"{directory} holds no {FILE_NAME} of the adapter {adapter!r}.")
    wanted = {each.file_key: each for each in tensors_of(model, adapter)}
    ranks = Ranks.of(model.parameters())
    with safe_open(path, framework="pt") as file, torch.no_grad():
        saved = set(file.keys())
        if saved != set(wanted):
            raise ValueError(
                f"{path} does not fit the adapter {adapter!r}: only there {sorted(saved - set(wanted))[:3]}, "
                f"only here {sorted(set(wanted) - saved)[:3]}."
            )
        for key, each in wanted.items():
            (shard,) = shards_of({key: each.parameter}, ranks.world_size).values()
            first, end = shard.held[ranks.rank] if isinstance(each.parameter, DTensor) else (0, shard.num_rows)
            shard.local.copy_(each.out(file.get_tensor(key))[first:end])


class SavedTensor(NamedTuple):
    """One tensor of an adapter: its live name, its key in the file, the parameter, its way into the file and out."""

    name: str
    file_key: str
    parameter: Tensor
    into: Callable[[Tensor], Tensor]
    out: Callable[[Tensor], Tensor]


def tensors_of(model: Any, adapter: str) -> Iterator[SavedTensor]:
    """All that PEFT saves of an adapter."""
    reshard(model)
    prefixes = {}
    for name, module in model.named_modules():
        if isinstance(module, ParameterLora):
            experts = name.rpartition(".lora.")[0]
            for kind, parameter, into, out in module.factors(adapter):
                prefixes[id(parameter)] = (f"{experts}.{module.keys_prefix}{kind}.weight", into, out)
    for name, parameter in (*model.named_parameters(), *model.named_buffers()):
        if id(parameter) in prefixes:
            yield SavedTensor(name, prefixes[id(parameter)][0], parameter, *prefixes[id(parameter)][1:])
        elif "lora_" in name and f".{adapter}." in name:
            yield SavedTensor(name, name.replace(f".{adapter}.", "."), parameter, _same, _same)
        elif f".modules_to_save.{adapter}." in name:
            yield SavedTensor(name, name.replace(f".modules_to_save.{adapter}.", "."), parameter, _same, _same)


def _same(tensor: Tensor) -> Tensor:
    return tensor


def save_pretrained(model: Any, save_directory: str | os.PathLike[str], **kwargs: Any) -> None:
    """`save_pretrained` of a PEFT model with adapters on experts: the files of stock PEFT. All ranks must call.

    Gathers the adapters, tensor by tensor, and nothing else.
    """
    ranks = Ranks.of(model.parameters())
    state: dict[str, Tensor] = {}
    file_keys: dict[str, str] = {}
    for adapter in kwargs.get("selected_adapters") or list(model.peft_config):
        for each in tensors_of(model, adapter):
            (shard,) = shards_of({each.name: each.parameter}, ranks.world_size).values()
            whole = gather_rows(shard, (0, shard.num_rows), 0, ranks)
            if whole is not None:
                state[each.name] = each.into(whole.reshape(shard.shape)).contiguous().cpu()
                file_keys[each.name.replace(f".{adapter}.", ".")] = each.file_key
    with ranks.same_outcome(f"Saving the adapter to {save_directory}"):
        if ranks.rank == 0:
            kwargs = {name: value for name, value in kwargs.items() if name not in ("state_dict", "is_main_process")}
            os.makedirs(save_directory, exist_ok=True)
            # PEFT writes our own names; they get its own before a file takes its place.
            with tempfile.TemporaryDirectory(dir=save_directory) as folder, _loadable_by_stock_peft(model):
                type(model).save_pretrained(model, folder, state_dict=state, **kwargs)
                for path in Path(folder).rglob("*"):
                    target = Path(save_directory, path.relative_to(folder))
                    if path.name == FILE_NAME:
                        tensors = {file_keys.get(key, key): value for key, value in load_file(path).items()}
                        path.write_bytes(save(tensors, metadata={"format": "pt"}))
                    if path.is_dir():
                        target.mkdir(exist_ok=True)
                    else:
                        os.replace(path, target)


@contextmanager
def _loadable_by_stock_peft(model: Any) -> Iterator[None]:
    """PEFT's wrappers of experts refuse a configuration with dropout, which only training needs."""
    dropouts = {name: config.lora_dropout for name, config in model.peft_config.items()}
    try:
        for config in model.peft_config.values():
            config.lora_dropout = 0.0
        yield
    finally:
        for name, config in model.peft_config.items():
            config.lora_dropout = dropouts[name]
