"""TrainingArguments that do not go with our sharding: refused by name before any weight is read."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

from transformers.trainer_utils import SaveStrategy
from transformers.training_args import DebugOption, OptimizerNames


def refuse_arguments(args: Any) -> None:
    """Refuse arguments, and settings of `accelerate launch`, that would break a mixture-of-experts run.

    Args:
        args: `TrainingArguments`, or None for the defaults.

    Raises:
        ValueError: names the argument, the reason and the line to delete.
    """
    for setting, reason in _of_the_launcher():
        raise ValueError(
            f"accelerate's {setting} is switched on, but {reason}: take it out of the accelerate configuration "
            "(`accelerate config`, or the options of `accelerate launch`), or start with torchrun."
        )
    if args is not None and args.n_gpu > 1:
        raise ValueError(
            f"this one process sees {args.n_gpu} GPUs, over which Trainer would split each batch (DataParallel): "
            f"start one process a GPU (`--nproc {args.n_gpu}` of hf-moe-accel's commands, or `torchrun "
            f"--nproc-per-node {args.n_gpu}`), or show it one (CUDA_VISIBLE_DEVICES=0)."
        )
    for line, reason in _of_any_run(args) if args is not None else ():
        raise ValueError(f"{line} is not supported for mixture-of-experts models: {reason}. Delete {line}.")
    if (
        args is not None
        and args.optim in UNSAVED
        and args.save_strategy != SaveStrategy.NO
        and not args.save_only_model
    ):
        raise ValueError(
            f"optim={args.optim.value!r} cannot save what a run is resumed from: {UNSAVED[args.optim]}. Set "
            "save_only_model=True, or save_strategy='no', or use 'adamw_torch_fused'."
        )
    for line, reason in _of_several_ranks(args) if args is not None and args.world_size > 1 else ():
        raise ValueError(f"{line} is not supported on several ranks: {reason}. Delete {line}.")


_SHARDED = "the model is sharded by FSDP2 already, experts included"
_LAYOUT = "the layout is chosen by MoEAccelConfig(ep_size=..., dp_replicate_size=...)"
_NO_SCALER = "the gradient scaler of fp16 does not see the gradients of sharded experts; use bf16"


def _of_the_launcher() -> Iterator[tuple[str, str]]:
    for variable, setting, reason in (
        ("ACCELERATE_USE_FSDP", "FSDP plugin", _SHARDED),
        ("ACCELERATE_USE_DEEPSPEED", "DeepSpeed plugin", _SHARDED),
        ("ACCELERATE_USE_MEGATRON_LM", "Megatron-LM plugin", _SHARDED),
        ("ACCELERATE_USE_PARALLELISM_CONFIG", "parallelism_config", _LAYOUT),
    ):
        if os.environ.get(variable, "false").lower() in ("true", "1"):
            yield setting, reason
    if os.environ.get("ACCELERATE_MIXED_PRECISION", "no") == "fp16":
        yield "mixed_precision fp16", _NO_SCALER


def _of_any_run(args: Any) -> Iterator[tuple[str, str]]:
    if args.auto_find_batch_size:
        yield (
            "auto_find_batch_size=True",
            "one rank running out of memory would retry alone while the others wait for its tokens",
        )
    if args.fp16:
        yield "fp16=True", _NO_SCALER
    if args.fsdp:
        yield f"fsdp={args.fsdp!r}", _SHARDED
    if args.deepspeed:
        yield f"deepspeed={args.deepspeed!r}", _SHARDED
    if args.parallelism_config is not None:
        yield "parallelism_config=...", _LAYOUT
    if args.use_liger_kernel and (args.liger_kernel_config or {}).get("swiglu"):
        yield "liger_kernel_config['swiglu']=True", "it takes the place of the experts, and of the exchange of tokens"
    # TRL's own arguments are not there on others'.
    if getattr(args, "use_vllm", False):
        yield (
            "use_vllm=True",
            "handing weights and adapters of experts to vLLM is not there yet; transformers generates",
        )
    if args.enable_jit_checkpoint:
        yield (
            "enable_jit_checkpoint=True",
            "a signal reaches the ranks at different steps, and each would save another one; save often instead "
            "(save_steps=), in the background with MoEAccelConfig(async_save=True)",
        )


def _of_several_ranks(args: Any) -> Iterator[tuple[str, str]]:
    if args.accelerator_config.even_batches is False:
        yield (
            "even_batches=False in accelerator_config",
            "ranks would have batches of different number and size, which cannot be gathered in evaluation",
        )
    for tracker, variable in _SAVE_AT_THE_END.items():
        value = os.environ.get(variable, "false")
        if tracker in args.report_to and value.lower() != "false":
            yield (
                f"{variable}={value}",
                "transformers saves the model for it on rank 0 alone, which waits for the others; with W&B, "
                "MoEWandbCallback(artifacts=...) uploads what all ranks have saved",
            )
    if args.save_on_each_node:
        yield (
            "save_on_each_node=True",
            "each rank writes its part of a checkpoint into one directory, which all nodes have to share",
        )
    for name in ("bf16_full_eval", "fp16_full_eval"):
        if getattr(args, name):
            yield f"{name}=True", "FSDP2 keeps the dtype of its first forward pass; use bf16=True"
    if getattr(args, "use_transformers_continuous_batching", False):
        yield (
            "use_transformers_continuous_batching=True",
            "ranks would run different numbers of passes and wait for each other",
        )
    if getattr(args, "cast_lm_head_to_fp32", False):
        yield "cast_lm_head_to_fp32=True", "it puts another weight in the place of the sharded one"
    if DebugOption.UNDERFLOW_OVERFLOW in args.debug:
        yield "debug='underflow_overflow'", "it cannot print sharded weights"
    if args.optim in OPTIMIZERS:
        yield f"optim={args.optim.value!r}", OPTIMIZERS[args.optim]


# Trackers that have the model saved when training ends.
_SAVE_AT_THE_END = {"wandb": "WANDB_LOG_MODEL", "swanlab": "SWANLAB_LOG_MODEL", "dvclive": "HF_DVCLIVE_LOG_MODEL"}

_NO_DTENSOR = "the kernels of bitsandbytes take no sharded parameters; 'adamw_torch_fused' shards its state instead"
_NO_LAYERWISE = "transformers runs layer-wise optimizers in one process only"

# What steps sharded parameters, and keeps a state that cannot be cut for another number of ranks.
UNSAVED: dict[OptimizerNames, str] = {
    OptimizerNames.ADAMW_TORCH_4BIT: "it keeps its state in blocks that follow the shards",
    OptimizerNames.ADAMW_TORCH_8BIT: "it keeps its state in blocks that follow the shards",
    OptimizerNames.GALORE_ADAMW: "it keeps projections that are no tensors",
}

# What cannot step sharded parameters, or steps them differently than whole ones.
OPTIMIZERS: dict[OptimizerNames, str] = {
    OptimizerNames.ADAFACTOR: "its factored statistics are not sharded with the parameters",
    OptimizerNames.GALORE_ADAFACTOR: "its factored statistics are not sharded with the parameters",
    OptimizerNames.APOLLO_ADAMW: "its projections are not sharded with the parameters",
    OptimizerNames.GROKADAMW: "it treats parameters by their place in a group, and groups follow the sharding",
    OptimizerNames.ADALOMO: "its factored statistics are not sharded with the parameters",
    OptimizerNames.GALORE_ADAMW_LAYERWISE: _NO_LAYERWISE,
    OptimizerNames.GALORE_ADAMW_8BIT_LAYERWISE: _NO_LAYERWISE,
    OptimizerNames.GALORE_ADAFACTOR_LAYERWISE: _NO_LAYERWISE,
    OptimizerNames.APOLLO_ADAMW_LAYERWISE: _NO_LAYERWISE,
    OptimizerNames.ADEMAMIX: _NO_DTENSOR,
    OptimizerNames.ADAMW_BNB: _NO_DTENSOR,
    OptimizerNames.ADAMW_8BIT: _NO_DTENSOR,
    OptimizerNames.ADEMAMIX_8BIT: _NO_DTENSOR,
    OptimizerNames.LION_8BIT: _NO_DTENSOR,
    OptimizerNames.LION: _NO_DTENSOR,
    OptimizerNames.PAGED_ADAMW: _NO_DTENSOR,
    OptimizerNames.PAGED_ADAMW_8BIT: _NO_DTENSOR,
    OptimizerNames.PAGED_ADEMAMIX: _NO_DTENSOR,
    OptimizerNames.PAGED_ADEMAMIX_8BIT: _NO_DTENSOR,
    OptimizerNames.PAGED_LION: _NO_DTENSOR,
    OptimizerNames.PAGED_LION_8BIT: _NO_DTENSOR,
    OptimizerNames.RMSPROP_BNB: _NO_DTENSOR,
    OptimizerNames.RMSPROP_8BIT: _NO_DTENSOR,
    OptimizerNames.RMSPROP_32BIT: _NO_DTENSOR,
    OptimizerNames.GALORE_ADAMW_8BIT: _NO_DTENSOR,
}
