"""Putting a model, or weights, onto this rank's shard."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
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
        kwargs: of `from_pretrained`; those that choose the configuration's source, and the dtype, are used.
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
    passed = {name: kwargs[name] for name in ("trust_remote_code", "dtype") if kwargs.get(name) not in (None, "auto")}
    with torch.device("meta"):
        return auto_class.from_config(config, **passed)


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


def is_sharded(model: nn.Module) -> bool:
    """Whether ranks hold parts of the parameters."""
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


def shard_added(model: Any, modules: Sequence[nn.Module], *, with_experts: bool) -> None:
    """Shard modules that were added to a sharded model, as its experts are or as all else. All ranks must call.

    Each pass that uses one of the modules must call all of them, one after the other, with a tensor that what reads
    their parameters depends on: FSDP2 gathers them at the first call, keeps them until the backward pass is over, and
    reduces their gradients then.

    Args:
        model: sharded by transformers.
        modules: with plain parameters, equal on all ranks; those for experts have the experts along dim 0.
        with_experts: whether they belong to experts.
    """
    config, mesh = model.config.distributed_config, model._mesh_manager
    by_expert = with_experts and config.ep_size > 1
    if by_expert:
        for module in modules:
            for name, parameter in module.named_parameters():
                local = distribute_tensor(parameter.detach(), mesh.get_mesh("ep"), [Shard(0)], src_data_rank=None)
                module.register_parameter(name, nn.Parameter(local, requires_grad=parameter.requires_grad))
    policy = MixedPrecisionPolicy(cast_forward_inputs=False)
    if config.fsdp_mixed_precision:
        policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    axes = ("dp_replicate",) if config.dp_replicate_size > 1 else ()
    # One group costs one gather, but FSDP2 takes a group only before the model's first pass.
    has_run = model._get_fsdp_state()._is_root is not None
    for group in [[module] for module in modules] if has_run else [list(modules)]:
        first: Any = group[0]
        fully_shard(
            group,
            mesh=mesh.get_mesh((*axes, "efsdp" if by_expert else "fsdp")),
            reshard_after_forward=False,
            mp_policy=policy,
        )
        if by_expert:
            # As transformers does for experts: their gradients are sums over the batches of all ranks.
            first.set_gradient_divide_factor(float(config.dp_size))
            if config.efsdp_size > 1:
                first.set_force_sum_reduction_for_comms(True)


def share(parameters: Iterable[nn.Parameter]) -> None:
    """Rank 0's values, on all ranks. All ranks must call."""
    with torch.no_grad():
        for parameter in parameters:
            dist.broadcast(parameter.data, src=0)


def average_gradients(parameter: nn.Parameter) -> None:
    """Average, over all ranks, the gradient of a parameter that a sharded model has whole on each rank.

    At the end of each backward pass that computes one. A Trainer does this by itself for what it trains, once for
    several micro-batches; its way then takes over.
    """

    def average(parameter: Any) -> None:
        # Trainer's mark that it averages this one.
        if not getattr(parameter, "_replicated_grad_hook_registered", False):
            dist.all_reduce(parameter.grad, op=dist.ReduceOp.AVG)

    # Hooks can be put only on what trains, and which adapter trains may change.
    trains = parameter.requires_grad
    parameter.requires_grad_().register_post_accumulate_grad_hook(average)
    parameter.requires_grad_(trains)


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
