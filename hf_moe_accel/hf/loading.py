"""Putting a model, or weights, onto this rank's shard."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule
from transformers import AutoConfig
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.distributed import DistributedConfig
from transformers.modeling_utils import LoadStateDictConfig
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from hf_moe_accel.hf.install import NAME
from hf_moe_accel.hf.keys import original_classes
from hf_moe_accel.topology import ExpertTopology


def distributed_config(
    topology: ExpertTopology, *, mixed_precision: bool = False, rules: dict[str, str] | None = None
) -> DistributedConfig:
    """Our topology in transformers' words.

    Args:
        topology: the layout.
        mixed_precision: fp32 masters, bf16 parameters in forward and backward, fp32 reduction.
        rules: of expert parallelism, beside the model's own.
    """
    return DistributedConfig(
        fsdp_size=topology.fsdp_size,
        dp_replicate_size=topology.dp_replicate_size,
        ep_size=topology.ep_size,
        ep_implementation=NAME,
        fsdp_mixed_precision=mixed_precision,
        ep_plan=rules or None,
    )


def meta_model(auto_class: Any, source: str | os.PathLike[str], config: Any, **kwargs: Any) -> Any:
    """The model of a hub id or path without weights or memory: for reading off its structure before anything is read.

    Args:
        auto_class: transformers' auto class that will load it.
        source: hub id or local path.
        config: its configuration, or None to read it.
        kwargs: of `from_pretrained`; those that choose the configuration's source are used.
    """
    if config is None:
        names = (
            "cache_dir",
            "force_download",
            "local_files_only",
            "revision",
            "subfolder",
            "token",
            "trust_remote_code",
        )
        config = AutoConfig.from_pretrained(source, **{name: kwargs[name] for name in names if name in kwargs})
    trust = {"trust_remote_code": kwargs["trust_remote_code"]} if "trust_remote_code" in kwargs else {}
    with torch.device("meta"):
        return auto_class.from_config(config, **trust)


def shard_in_place(
    model: Any,
    topology: ExpertTopology,
    *,
    mixed_precision: bool,
    mesh: Any = None,
    rules: dict[str, str] | None = None,
) -> None:
    """Shard a loaded model: each rank keeps its slices of its own full copy. All ranks must call.

    Rank 0's weights win, as in DDP: ranks that initialised differently would otherwise shard a mixture.

    Args:
        model: with all its weights.
        topology: the layout.
        mixed_precision: see `distributed_config`.
        mesh: transformers' meshes of another model of the same layout, or None for process groups of its own.
        rules: of expert parallelism, beside the model's own.
    """
    config = distributed_config(
        topology, mixed_precision=mixed_precision, rules=rules if topology.ep_size > 1 else None
    )
    if mesh is None:
        _, _, mesh = type(model).prepare_distribute_model(config)
    device = mesh.get_mesh("fsdp").device_type
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            on_device = tensor.detach().to(device)
            dist.broadcast(on_device, src=0)
            tensor.copy_(on_device)
    _untie(model)
    type(model).maybe_distribute_model(model, config, mesh)
    model.tie_weights(recompute_mapping=False)


def _untie(model: Any) -> None:
    """Give each tied weight an empty parameter of its own, as in `from_pretrained`: FSDP2 shards no shared one."""
    for target, source in model.all_tied_weights_keys.items():
        weight = model.get_parameter_or_buffer(target)
        if weight is model.get_parameter_or_buffer(source):
            module, _, key = target.rpartition(".")
            empty = nn.Parameter(torch.empty_like(weight, device="meta"), requires_grad=weight.requires_grad)
            setattr(model.get_submodule(module), key, empty)


def flatten_expert_mesh(model: Any) -> None:
    """Let DTensor reduce expert parameters in one collective instead of one a mesh axis. All ranks must call.

    Gradient norms then also have one order of summation on all ranks; torch warns of the axes that are not flattened.
    """
    model._mesh_manager.get_mesh(("efsdp", "ep"))._flatten("efsdp_ep")


def reshard(model: nn.Module) -> None:
    """Give back what FSDP2 has gathered for a forward pass: only then are a module's parameters those that train."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def load_weights(model: Any, directory: str | os.PathLike[str]) -> None:
    """Read a standard checkpoint into a live model, sharded or not, in place. All ranks must call.

    Every rank reads only its own slices. Parameters keep their identity, so optimizer and FSDP2 still hold them.

    Raises:
        ValueError: there are no safetensors weights, or their keys are not the model's.
    """
    files = weight_files(Path(directory))
    reshard(model)
    live = {name: (module, key, p) for name, module, key, p in _named_parameters(model)}
    device = next(model.parameters()).device
    mesh = model._device_mesh
    with original_classes(model):
        conversions = get_model_conversion_mapping(model)
    config = LoadStateDictConfig(
        pretrained_model_name_or_path=str(directory),
        device_map={"": device},
        dtype=model.dtype,
        dtype_plan=model._get_dtype_plan(model.dtype),
        device_mesh=mesh,
        weight_mapping=conversions,
    )
    info, _ = type(model)._load_pretrained_model(model, None, files, config)
    tied = set(model.all_tied_weights_keys)
    wrong = {
        "missing": sorted(set(info.missing_keys) - tied),
        "unexpected": sorted(info.unexpected_keys),
        "mismatched": sorted(map(str, info.mismatched_keys)),
    }
    with torch.no_grad():
        for name, (module, key, parameter) in live.items():
            loaded = module._parameters[key]
            if loaded is not parameter and name not in tied:
                parameter.copy_(loaded)
            module._parameters[key] = parameter
    if any(wrong.values()):
        raise ValueError(f"{directory} does not fit {type(model).__name__}: {wrong}")


def weight_files(directory: Path) -> list[str]:
    """The files that belong to the checkpoint, whatever else lies in its directory."""
    index = directory / SAFE_WEIGHTS_INDEX_NAME
    names = set(json.loads(index.read_text())["weight_map"].values()) if index.exists() else {SAFE_WEIGHTS_NAME}
    files = sorted(str(directory / name) for name in names)
    missing = [file for file in files if not os.path.exists(file)]
    if missing:
        raise ValueError(f"{directory} lacks {missing[0]}: give the directory of a saved checkpoint.")
    return files


def _named_parameters(model: Any) -> list[tuple[str, Any, str, Any]]:
    return [
        (f"{prefix}.{key}" if prefix else key, module, key, parameter)
        for prefix, module in model.named_modules()
        for key, parameter in module._parameters.items()
        if parameter is not None
    ]
