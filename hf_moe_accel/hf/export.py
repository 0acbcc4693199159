"""Saves a model as the checkpoint that plain transformers would have saved, with all ranks at work."""

from __future__ import annotations

import os
from functools import partial

from transformers import PreTrainedModel
from transformers.dynamic_module_utils import custom_object_save
from transformers.modeling_utils import unwrap_model

from hf_moe_accel.hf.discover import class_name
from hf_moe_accel.hf.keys import compile_key_plan, to_hub_keys
from hf_moe_accel.weights.export import export_state
from hf_moe_accel.weights.gather import rank_and_world_size, same_outcome


def export_checkpoint(
    model: PreTrainedModel, directory: str | os.PathLike[str], *, max_shard_size: int | str = "50GB"
) -> None:
    """Write what `model.save_pretrained(directory)` would write, each rank the weights that it owns.

    The tensors, their keys, config.json and generation_config.json are those of transformers; only the cut into files
    follows the ranks. No rank holds more than its shard of the model and one tensor of the checkpoint. A checkpoint
    that lies in `directory` is replaced once the new files are complete.

    All ranks must call, with a directory that they share. Works without a process group, for a model on one device.

    Args:
        model: a model on one device or one sharded by transformers' `DistributedConfig` (FSDP2 and expert
            parallelism), possibly wrapped (DDP, torch.compile).
        directory: made if it does not exist.
        max_shard_size: as for `save_pretrained`.

    Raises:
        ValueError: not a transformers model, or one whose weights are quantized, adapters or otherwise not to be
            exported shard by shard; the message says what to call instead.
        RuntimeError: a rank failed, for example because its disk is full; raised on all ranks.
    """
    model = unwrap_model(model)
    _check(model)
    plan = compile_key_plan(model)
    with same_outcome(f"Saving to {directory}"):
        os.makedirs(directory, exist_ok=True)
        _save_config(model, directory)
    export_state(
        plan, model.state_dict(), directory, max_shard_size=max_shard_size, convert=partial(to_hub_keys, model)
    )


def _check(model: PreTrainedModel) -> None:
    if not isinstance(model, PreTrainedModel):
        raise ValueError(
            f"export_checkpoint needs a transformers model, got {type(model).__name__}. Save adapters with the PEFT "
            "model's own save_pretrained."
        )
    if getattr(model, "_hf_peft_config_loaded", False):
        raise ValueError(
            "The model carries PEFT adapters: PreTrainedModel.save_pretrained(model, directory) saves them."
        )
    if getattr(model, "hf_quantizer", None) is not None:
        raise ValueError("The model is quantized: PreTrainedModel.save_pretrained(model, directory) saves it.")


def _save_config(model: PreTrainedModel, directory: str | os.PathLike[str]) -> None:
    """What `save_pretrained` does beside the weights; on rank 0 only, but for the values that it sets."""
    model.config.dtype = str(model.dtype).removeprefix("torch.")
    model.config.architectures = [class_name(model)]
    if rank_and_world_size()[0] != 0:
        return
    if model.is_remote_code():
        custom_object_save(model, directory, config=model.config)
    model.config.save_pretrained(directory)
    if model.can_generate():
        model.generation_config.save_pretrained(directory)
