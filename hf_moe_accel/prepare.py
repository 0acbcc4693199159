"""`prepare_moe_model`: the composition root. Everything is chosen, checked and put together here."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from types import MethodType
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from hf_moe_accel.config import MoEAccelConfig
from hf_moe_accel.dispatch import DISPATCHERS
from hf_moe_accel.dispatch.base import TokenDispatcher, Traffic
from hf_moe_accel.experts import EXPERT_BACKENDS
from hf_moe_accel.experts.base import ExpertBackend
from hf_moe_accel.hf.checkpointing import keep_exchanges_when_checkpointing
from hf_moe_accel.hf.compat import check_versions
from hf_moe_accel.hf.discover import (
    FoundExperts,
    base_of,
    class_name,
    find_experts,
    refuse_quantized,
    why_not_standard,
)
from hf_moe_accel.hf.export import MAX_SHARD_SIZE, export_and_upload, prepare_export
from hf_moe_accel.hf.install import bind
from hf_moe_accel.hf.keys import original_classes
from hf_moe_accel.hf.loading import distributed_config, flatten_expert_mesh, is_sharded, shard_in_place
from hf_moe_accel.hf.loss import chunk_loss
from hf_moe_accel.hf.norms import fuse_norms
from hf_moe_accel.hf.shared import overlap_shared, why_not_shared
from hf_moe_accel.log import say, warn_once
from hf_moe_accel.ops import triton as triton_ops
from hf_moe_accel.registry import Registry
from hf_moe_accel.runtime import MoERuntime, runtime_of
from hf_moe_accel.topology import ExpertTopology


@dataclass(frozen=True)
class Setup:
    """What was chosen for a model, before any weight is read or moved.

    Attributes:
        topology: how the experts lie on the ranks.
        dispatcher: name of the token dispatcher.
        backend: name of the expert backend.
        notes: for each choice that was not taken, one sentence why.
        traffic: what the dispatcher will carry.
    """

    topology: ExpertTopology
    dispatcher: str
    backend: str
    notes: tuple[str, ...]
    traffic: Traffic


def prepare_moe_model(
    model: Any, config: MoEAccelConfig | None = None, *, fsdp_mixed_precision: bool = False, like: Any = None
) -> Any:
    """Spread a mixture-of-experts model over the ranks and put the fast token path in place. All ranks must call.

    With one process nothing is sharded; with several (torchrun) the dense weights are sharded by FSDP2 and the experts
    by expert parallelism, in place: each rank keeps its slices of the copy it holds. To read only this rank's slices
    from disk, load with `hf_moe_accel.AutoModelForCausalLM` instead. Parameter names do not change. The usual loss of
    a causal language model takes less memory; another one stays. Norms whose formula is known run in one kernel each
    way on a GPU.

    As a plugin for a Trainer that you cannot change: prepare the model, pass `MoEAccelCallback()`, set
    `save_only_model=True`. Checkpoints are then standard model files, written through the model's `save_pretrained`
    (all ranks must call it); such a run cannot be resumed.

    For a loop of your own: give each rank its own batch and scale each rank's loss as FSDP expects, that is
    `loss = sum of token losses on this rank * world_size / number of tokens on all ranks` (gradients are averaged over
    the ranks; for batches of equal size this is the usual mean). Clip with `clip_grad_norm_`, and give the optimizer
    `parameter_groups(model)`. All ranks must run the same number of forward and backward passes. Where tokens go by
    DeepEP, all ranks call `model.moe_runtime.close()` at the end, before the process group is destroyed.

    Args:
        model: a loaded `PreTrainedModel`, or a PEFT model around one. A dense model is returned as it is, with a
            warning.
        config: None means: choose well.
        fsdp_mixed_precision: keep fp32 master weights and compute in bf16 (FSDP2's mixed precision; several ranks
            only). On one process use `torch.autocast`.
        like: a model that was prepared before, whose process groups serve this one as well where the layout is the
            same (a reference model, the next trial of a search). None: groups of its own.

    Returns:
        The same model.

    Raises:
        ValueError: a choice cannot be honoured, or the model is sharded, quantized or adapted in a way that does not
            fit; names the value and the fix.
    """
    check_versions()
    config = config or MoEAccelConfig()
    base = base_of(model)
    prepared = runtime_of(base)
    rules = adopt_adapters(model)
    if prepared is not None:
        _check_prepared(prepared, config)
        return model
    found = find_experts(base)
    setup = choose_setup(base, found, config, mixed_precision=fsdp_mixed_precision)
    if setup is None:
        return model
    check_model(base, setup.topology)
    names = [name for name, _ in base.named_parameters()]
    if setup.topology.world_size > 1 and not is_sharded(base):
        mesh = _mesh_of(like, setup.topology)
        shard_in_place(base, setup.topology, mixed_precision=fsdp_mixed_precision, mesh=mesh, rules=rules)
    if setup.topology.ep_size > 1:
        flatten_expert_mesh(base)
        setup = _agreed(setup)
    runtime = MoERuntime(
        setup.topology,
        _make_dispatcher(setup, base),
        _make_backend(setup),
        [experts.spec.num_experts for experts in found],
        config.collective_timeout,
        config.overlap_chunks or "auto",
        config.expert_checkpointing,
        config.check_tokens,
        config.expert_metrics,
        within_node=setup.traffic.within_node,
    )
    bind(base, found, runtime)
    if setup.topology.ep_size > 1 and runtime.chunks.wanted != 1:
        overlap_shared(base, found)
        reason = why_not_shared(base, found)
        if reason is not None:
            setup = replace(setup, notes=(*setup.notes, f"shared experts while tokens travel: {reason}"))
    norms = fuse_norms(base) if triton_ops.why_not(_device()) is None else 0
    runtime.report, runtime.settings = report(base, found, setup, norms), asdict(config)
    runtime.follow(base)
    keep_exchanges_when_checkpointing(base)
    chunk_loss(base)
    base.moe_runtime = runtime
    base.save_pretrained = MethodType(_save_pretrained, base)
    base.push_to_hub = MethodType(_push_to_hub, base)
    if setup.topology.world_size > 1:
        # Trainer tells by the name of the class what a model is for.
        base._get_name = MethodType(class_name, base)
        base.resize_token_embeddings = MethodType(_resize_token_embeddings, base)
        base.load_state_dict = MethodType(_load_state_dict, base)
    assert [name for name, _ in base.named_parameters()] == names, "preparing a model must not rename its parameters"
    say(runtime.report)
    return model


def choose_setup(
    model: nn.Module, found: Sequence[FoundExperts], config: MoEAccelConfig, *, mixed_precision: bool = False
) -> Setup | None:
    """Choose for a model (which may be on the meta device); None for a model that trains as without us.

    Args:
        model: loaded, or on the meta device.
        found: its experts.
        config: what the user wrote.
        mixed_precision: fp32 weights will compute in bf16.

    Raises:
        ValueError: an explicit choice cannot be honoured.
    """
    world_size, ranks_per_node = _world()
    explicit_ep = config.ep_size != "auto" and int(config.ep_size or 1) > 1
    notes: list[str] = []
    if not found:
        reason = why_not_standard(model) or f"{type(model).__name__} has no mixture-of-experts layers"
        if explicit_ep:
            raise ValueError(f"ep_size={config.ep_size} cannot be honoured: {reason.rstrip('.')}. Leave ep_size out.")
        warn_once(f"hf_moe_accel: nothing to accelerate: {reason.rstrip('.')}. It trains as with Trainer.")
        return None
    for name, registry in (("token_dispatcher", DISPATCHERS), ("expert_backend", EXPERT_BACKENDS)):
        value = getattr(config, name)
        if value != "auto":
            registry.check(value)
    ep_size = config.ep_size if config.ep_size is not None else "auto"
    if config.token_dispatcher == "local":
        if explicit_ep:
            raise ValueError(
                f"token_dispatcher='local' moves no tokens and cannot serve ep_size={ep_size}: use 'all_to_all', or "
                "ep_size=1."
            )
        ep_size = 1
    unruled = _without_ep_plan(model, found)
    if unruled and ep_size != 1 and world_size > 1:
        reason = (
            f"{type(model).__name__} has no expert-parallel rule for {unruled!r} in its `base_model_ep_plan`, so "
            "transformers cannot shard it by expert"
        )
        if explicit_ep:
            raise ValueError(f"ep_size={ep_size} cannot be honoured: {reason}. Use ep_size=1 (FSDP only).")
        notes.append(f"expert parallelism: {reason}")
        ep_size = 1
    topology = ExpertTopology.choose(
        ep_size,
        world_size=world_size,
        ranks_per_node=ranks_per_node,
        num_experts=math.gcd(*(experts.spec.num_experts for experts in found)),
        dp_replicate_size=config.dp_replicate_size,
    )
    if topology.ep_size == 1 and world_size > 1 and ep_size == "auto":
        notes.append(
            f"expert parallelism: no number above 1 divides the {topology.num_experts} experts, the "
            f"{topology.fsdp_size} ranks of a replica and the {ranks_per_node} ranks of a node"
        )
    traffic = _traffic(model, found, topology, ranks_per_node, mixed_precision)
    dispatcher, dispatcher_notes = _choose_dispatcher(topology, traffic, config.token_dispatcher)
    backend, backend_notes = _choose_backend(found, config.expert_backend)
    return Setup(topology, dispatcher, backend, (*notes, *dispatcher_notes, *backend_notes), traffic)


def check_model(model: Any, topology: ExpertTopology) -> None:
    """Refuse what would break in the middle of a run, before any weight of the model is read or moved.

    Args:
        model: loaded, or on the meta device.
        topology: the one chosen for it.

    Raises:
        ValueError: the model is quantized, split by device_map, or sharded by something else.
    """
    refuse_quantized(model)
    devices = {str(device) for device in (getattr(model, "hf_device_map", None) or {}).values()}
    if len(devices) > 1:
        raise ValueError(
            f"the model was split over {sorted(devices)} by device_map: load it without device_map=; each rank places "
            "its own part."
        )
    if getattr(model, "_tp_size", None) not in (None, 1):
        raise ValueError(
            f"the model was loaded with tp_size={model._tp_size}: tp_size does not carry expert parallelism. Load it "
            f"without tp_size and pass MoEAccelConfig(ep_size={model._tp_size})."
        )
    if is_sharded(model):
        loaded, ours = getattr(model.config, "distributed_config", None), distributed_config(topology)
        sizes = ("ep_implementation", "ep_size", "fsdp_size", "dp_replicate_size")
        if loaded is None or any(getattr(loaded, name) != getattr(ours, name) for name in sizes):
            raise ValueError(
                "the model is already sharded by something else (DTensor parameters): pass it unsharded, or load it "
                "with hf_moe_accel.AutoModelForCausalLM."
            )


def adopt_adapters(model: Any) -> dict[str, str]:
    """Take over PEFT's adapters on experts; returns the rules by which they are sharded."""
    if not hasattr(model, "get_base_model"):
        return {}
    # PEFT need not be installed for a model without adapters.
    from hf_moe_accel.hf.peft_bridge import adopt_expert_adapters, expert_parallel_rules

    adopt_expert_adapters(model)
    return expert_parallel_rules(model.get_base_model())


def _check_prepared(runtime: MoERuntime, config: MoEAccelConfig) -> None:
    """Refuse choices for a model that was prepared with others."""
    topology = runtime.topology
    dispatcher, backend = config.token_dispatcher, config.expert_backend
    for name, kept in (
        ("ep_size", config.ep_size in ("auto", topology.ep_size)),
        ("dp_replicate_size", config.dp_replicate_size in (1, topology.dp_replicate_size)),
        ("token_dispatcher", dispatcher == "auto" or DISPATCHERS.load(dispatcher) is type(runtime.dispatcher)),
        ("expert_backend", backend == "auto" or EXPERT_BACKENDS.load(backend) is type(runtime.backend)),
        ("overlap_chunks", config.overlap_chunks in ("auto", runtime.chunks.wanted)),
        ("expert_checkpointing", config.expert_checkpointing in ("activation", runtime.expert_checkpointing)),
        ("check_tokens", config.check_tokens <= runtime.check_tokens),
        ("expert_metrics", config.expert_metrics or runtime.stats is None),
    ):
        if not kept:
            raise ValueError(
                f"{name}={getattr(config, name)!r} comes too late: the model was prepared with {topology.describe()}, "
                f"{type(runtime.dispatcher).__name__} and {type(runtime.backend).__name__}. Give {name} where the "
                "model is loaded or first prepared."
            )


def report(model: Any, found: Sequence[FoundExperts], setup: Setup, norms: int = 0) -> str:
    """What was prepared, for people; of `norms`, how many run in our kernels."""
    experts = sorted({item.spec.num_experts for item in found})
    lines = [
        f"hf_moe_accel: {class_name(model)}, {len(found)} MoE layers of {' or '.join(map(str, experts))} experts",
        f"  layout      {setup.topology.describe()}",
        f"  dispatcher  {setup.dispatcher}",
        f"  experts     {setup.backend}",
        *([f"  norms       {norms} in one kernel each way"] if norms else []),
        *(f"  not taken   {note}" for note in setup.notes),
    ]
    return "\n".join(lines)


def _mesh_of(model: Any, topology: ExpertTopology) -> Any:
    """The meshes of a prepared model, if it lies on the ranks in this way."""
    runtime = None if model is None else runtime_of(model)
    if runtime is None or runtime.topology.sizes != topology.sizes:
        return None
    return next((module._mesh_manager for module in model.modules() if "_mesh_manager" in module.__dict__), None)


def _world() -> tuple[int, int]:
    """(ranks of the run, ranks of this node)."""
    world_size = dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", "1"))
    return world_size, min(world_size, int(os.environ.get("LOCAL_WORLD_SIZE", str(world_size))))


def _without_ep_plan(model: Any, found: Sequence[FoundExperts]) -> str | None:
    """The first experts module that transformers has no expert-parallel rule for."""
    plan = model._expand_parallel_plan(model.ep_plan or {})
    return next((item.name for item in found if plan.get(item.name) != "ep_dispatch_experts"), None)


def _traffic(
    model: Any, found: Sequence[FoundExperts], topology: ExpertTopology, ranks_per_node: int, mixed_precision: bool
) -> Traffic:
    stored = found[0].weight(0).dtype
    return Traffic(
        hidden=max(experts.spec.hidden_size for experts in found),
        num_experts=max(experts.spec.num_experts for experts in found),
        # The name that transformers has for it in most configurations; where it has another one, the plan tells.
        top_k=getattr(model.config.get_text_config(), "num_experts_per_tok", None),
        dtype=torch.bfloat16 if stored == torch.float32 and mixed_precision else stored,
        ep_size=topology.ep_size,
        ranks_per_node=ranks_per_node,
        device=_device(),
    )


def _choose_dispatcher(topology: ExpertTopology, traffic: Traffic, wanted: str) -> tuple[str, list[str]]:
    """What this rank would take; `_agreed` makes it one choice of all."""
    if topology.ep_size == 1:
        if wanted not in ("auto", "local"):
            raise ValueError(
                f"token_dispatcher={wanted!r} needs ep_size > 1, but {topology.describe()} leaves every expert on "
                "every rank: start more ranks with torchrun, or leave token_dispatcher out."
            )
        return "local", []
    notes: list[str] = []
    for name in _for_this_device(DISPATCHERS) if wanted == "auto" else [wanted]:
        reason = DISPATCHERS.load(name).why_not(traffic)
        if reason is None:
            return name, notes
        notes.append(f"{name}: {reason}")
    raise ValueError(
        f"token_dispatcher={wanted!r} cannot serve this run: {reason}. Use token_dispatcher='all_to_all', or 'auto'."
    )


def _agreed(setup: Setup) -> Setup:
    """The same dispatcher on all ranks: of those that they would take, the last of the registry. All ranks must call.

    Where a rank would take a better one, a rank that would not says why.
    """
    chosen: list[Any] = [None] * setup.topology.world_size
    dist.all_gather_object(chosen, (setup.dispatcher, setup.notes))
    names = [name for name, _ in chosen]
    order = list(DISPATCHERS)
    agreed = max(names, key=order.index)
    if setup.dispatcher == agreed:
        return setup
    rank = names.index(agreed)
    reasons = [note for note in chosen[rank][1] if note.startswith(f"{setup.dispatcher}: ")]
    return replace(setup, dispatcher=agreed, notes=(*setup.notes, *(f"{note} (rank {rank})" for note in reasons)))


def _choose_backend(found: Sequence[FoundExperts], wanted: str) -> tuple[str, list[str]]:
    def why_not(name: str) -> str | None:
        backend = EXPERT_BACKENDS.load(name)
        for item in found:
            stored = item.weight(0).dtype
            # fp32 masters compute in bf16 under mixed precision.
            for dtype in {stored, torch.bfloat16} if stored == torch.float32 else {stored}:
                reason = backend.why_not(item.spec, dtype, _device())
                if reason is not None:
                    return reason
        return None

    if wanted != "auto":
        reason = why_not(wanted)
        if reason is not None:
            raise ValueError(
                f"expert_backend={wanted!r} cannot serve this model: {reason}. Use expert_backend='auto'."
            )
        return wanted, []
    notes: list[str] = []
    for name in _for_this_device(EXPERT_BACKENDS):
        reason = why_not(name) or EXPERT_BACKENDS.load(name).why_by_name(_device())
        if reason is None:
            return name, notes
        notes.append(f"{name}: {reason}")
    raise AssertionError("the eager backend serves everything")


def _for_this_device(registry: Registry[Any]) -> list[str]:
    return [name for name in registry if _device().type in (registry.load(name).device_types or (_device().type,))]


def _device() -> torch.device:
    return torch.accelerator.current_accelerator() or torch.device("cpu")


def _make_dispatcher(setup: Setup, model: Any) -> TokenDispatcher:
    group = model._mesh_manager.get_mesh("ep").get_group() if setup.topology.ep_size > 1 else None
    return DISPATCHERS.load(setup.dispatcher).create(group, setup.traffic)


def _make_backend(setup: Setup) -> ExpertBackend:
    return EXPERT_BACKENDS.load(setup.backend)()


def _resize_token_embeddings(
    model: Any, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, **_: Any
) -> Any:
    """`resize_token_embeddings` of a sharded model: only for the size that it has.

    Raises:
        ValueError: another size.
    """
    embeddings = model.get_input_embeddings()
    size = embeddings.weight.shape[0]
    if new_num_tokens not in (None, size) or size % (pad_to_multiple_of or 1):
        raise ValueError(
            f"resize_token_embeddings({new_num_tokens}) cannot change the {size} embeddings of a model that is "
            "sharded already: resize it before the trainer or prepare_moe_model gets it, or, where it is loaded by "
            "name, load it once with transformers, resize and save it."
        )
    return embeddings


def _save_pretrained(
    model: Any,
    save_directory: str | os.PathLike[str],
    is_main_process: bool = True,
    state_dict: dict[str, Any] | None = None,
    push_to_hub: bool = False,
    max_shard_size: int | str = MAX_SHARD_SIZE,
    **kwargs: Any,
) -> None:
    """`save_pretrained` of a prepared model: a standard checkpoint, each rank writing its part. All ranks must call.

    Files are in the original hub keys and load with plain transformers. Arguments are those of
    `PreTrainedModel.save_pretrained`; with others than named here, and those of the upload, transformers' own code
    runs, which gathers the whole model on rank 0.
    """
    adapters = getattr(model, "_hf_peft_config_loaded", False)
    uploads = {"repo_id", "commit_message", "create_pr", "private", "token"} if push_to_hub else set()
    if state_dict is not None or adapters or not set(kwargs) <= uploads:
        with original_classes(model):
            type(model).save_pretrained(
                model, save_directory, is_main_process, state_dict, push_to_hub, max_shard_size, **kwargs
            )
        return
    if push_to_hub:
        kwargs.setdefault("repo_id", os.path.basename(os.path.abspath(save_directory)))
        export_and_upload(model, save_directory, max_shard_size=max_shard_size, tags=model.model_tags, **kwargs)
        return
    runtime = runtime_of(model)
    assert runtime is not None
    prepare_export(model, save_directory, max_shard_size=max_shard_size).finish(runtime.saving)


def _push_to_hub(model: Any, repo_id: str, **kwargs: Any) -> str | None:
    """`push_to_hub` of a prepared model, with its arguments. All ranks must call."""
    return export_and_upload(model, None, repo_id=repo_id, **kwargs)


def _load_state_dict(model: Any, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
    """`load_state_dict` of a prepared model; Trainers use it to resume and to load the best checkpoint.

    Raises:
        ValueError: the parameters are sharded and the state is not; torch would raise on each of them.
    """
    sharded = {name for name, parameter in model.named_parameters() if isinstance(parameter, DTensor)}
    if any(name in sharded and not isinstance(value, DTensor) for name, value in state_dict.items()):
        raise ValueError(
            "the weights of a sharded model cannot be replaced by those of a plain state dict, as Trainers do to "
            "resume or to load the best checkpoint: use AcceleratedMoETrainer, or load that checkpoint as the model "
            "and train without resume_from_checkpoint and load_best_model_at_end."
        )
    return type(model).load_state_dict(model, state_dict, *args, **kwargs)
