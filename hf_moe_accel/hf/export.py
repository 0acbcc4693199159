"""Saves a model as the checkpoint that plain transformers would have saved, with all ranks at work."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from transformers import PreTrainedModel
from transformers.dynamic_module_utils import custom_object_save
from transformers.modeling_utils import unwrap_model
from transformers.utils.hub import convert_file_size_to_int, create_and_tag_model_card, hf_api

from hf_moe_accel.hf.discover import class_name
from hf_moe_accel.hf.keys import compile_key_plan, to_hub_keys
from hf_moe_accel.weights.checkpoint import CheckpointSave
from hf_moe_accel.weights.export import Convert, export_state, sources
from hf_moe_accel.weights.plan import KeyPlan
from hf_moe_accel.weights.ranks import Ranks
from hf_moe_accel.weights.shards import LowRank, Shard, shards_of

MAX_SHARD_SIZE = "5GB"


def export_checkpoint(
    model: PreTrainedModel, directory: str | os.PathLike[str], *, max_shard_size: int | str = MAX_SHARD_SIZE
) -> None:
    """Write what `model.save_pretrained(directory)` would write, each rank the weights that it owns.

    The tensors, their keys, config.json and generation_config.json are those of transformers; only the cut into files
    follows the ranks. No rank holds more than its shard of the model and `max_shard_size`. A checkpoint that lies in
    `directory` is replaced once the new files are complete and on the disk.

    Of a PEFT model, what is written is the plain model with the active adapters folded in: in fp32, rounded once to
    the dtype of the weight.

    All ranks must call, with a directory that they share. Works without a process group, for a model on one device.

    Args:
        model: a model on one device or one sharded by transformers' `DistributedConfig` (FSDP2 and expert
            parallelism), possibly wrapped (DDP, torch.compile), or a PEFT model with LoRA around one.
        directory: made if it does not exist.
        max_shard_size: upper limit of a file in bytes, or a text such as "5GB". A larger tensor gets a file of its
            own.

    Raises:
        ValueError: not a transformers model, or one whose weights are quantized, adapters or otherwise not to be
            exported shard by shard; the message says what to call instead.
        AllRanksError: a rank failed, for example because its disk is full; raised on all ranks. One process raises
            the error itself.
    """
    prepare_export(model, directory, max_shard_size=max_shard_size).finish(None)


@dataclass(frozen=True)
class Export:
    """A model's weights on their way to `directory`; its configuration is there already."""

    plan: KeyPlan
    shards: Mapping[str, Shard]
    directory: str | os.PathLike[str]
    max_file_bytes: int
    convert: Convert
    ranks: Ranks

    def finish(self, saving: CheckpointSave | None) -> None:
        """Write the weights, or leave that to a checkpoint that is being saved. All ranks must call."""
        # Groups are made by the model's own converters, for which it must not be training meanwhile.
        if saving is None or self.plan.groups:
            self.write(self.ranks)
        else:
            saving.add(self)

    def copy(self) -> Export:
        """The same from a copy of the weights in host memory."""
        return replace(self, shards={name: shard.copy() for name, shard in self.shards.items()})

    def write(self, ranks: Ranks) -> None:
        """Write the weights. All ranks must call."""
        export_state(
            self.plan,
            self.shards,
            self.directory,
            max_file_bytes=self.max_file_bytes,
            convert=self.convert,
            ranks=ranks,
        )


def prepare_export(model: PreTrainedModel, directory: str | os.PathLike[str], *, max_shard_size: int | str) -> Export:
    """The first half of `export_checkpoint`: all checks, and all files but the weights. All ranks must call."""
    max_file_bytes = _size_in_bytes(max_shard_size)
    model = unwrap_model(model)
    added: Mapping[str, tuple[LowRank, ...]] = {}
    if hasattr(model, "get_base_model"):
        # PEFT need not be installed for others.
        from hf_moe_accel.hf.peft_bridge import adopt_expert_adapters, without_adapters

        adopt_expert_adapters(model)
        state, added = without_adapters(model)
        model = model.get_base_model()
    else:
        state = model.state_dict(keep_vars=True) if isinstance(model, PreTrainedModel) else {}
        _check_no_adapters(state)
    _check(model)
    plan = compile_key_plan(model, state)
    ranks = Ranks.of(state.values())
    with ranks.same_outcome(f"Saving to {directory}"):
        os.makedirs(directory, exist_ok=True)
        _save_config(model, directory, ranks)
    shards = shards_of({name: state[name] for name in sources(plan)}, ranks.world_size)
    shards |= {name: replace(shards[name], added=each) for name, each in added.items()}
    return Export(plan, shards, directory, max_file_bytes, partial(to_hub_keys, model), ranks)


def export_and_upload(
    model: Any,
    directory: str | os.PathLike[str] | None,
    *,
    repo_id: str,
    max_shard_size: int | str = MAX_SHARD_SIZE,
    commit_message: str | None = None,
    commit_description: str | None = None,
    private: bool | None = None,
    token: bool | str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    tags: list[str] | None = None,
) -> str | None:
    """What `push_to_hub` of transformers does, with all ranks at work. All ranks must call; rank 0 uploads.

    Args:
        model: prepared.
        directory: where the files go and stay; None is a temporary directory, which all ranks must share.
        repo_id: and all others: as for `PreTrainedModel.push_to_hub`.

    Returns:
        The commit, on rank 0.
    """
    ranks = Ranks.of(model.parameters())
    with tempfile.TemporaryDirectory() as temporary:
        directory = directory or ranks.share(temporary)
        before: dict[str, float] = {}
        with ranks.same_outcome(f"Creating the repository {repo_id}"):
            if ranks.rank == 0:
                # Before anything is written: the likeliest reasons to fail are here.
                repo_id = hf_api().create_repo(repo_id, private=private, token=token, exist_ok=True).repo_id
                card = create_and_tag_model_card(repo_id, tags, token=token)
                os.makedirs(directory, exist_ok=True)
                before = model._get_files_timestamps(directory)
        export_checkpoint(model, directory, max_shard_size=max_shard_size)
        with ranks.same_outcome(f"Uploading to {repo_id}"):
            if ranks.rank != 0:
                return None
            card.save(os.path.join(directory, "README.md"))
            commit: str = model._upload_modified_files(
                directory,
                repo_id,
                files_timestamps=before,
                commit_message=commit_message,
                token=token,
                create_pr=create_pr,
                revision=revision,
                commit_description=commit_description,
            )
            return commit


def _size_in_bytes(max_shard_size: int | str) -> int:
    try:
        size: int = convert_file_size_to_int(max_shard_size)
    except ValueError:
        size = 0
    if size < 1:
        raise ValueError(
            f"max_shard_size={max_shard_size!r} must be a number of bytes or a text such as {MAX_SHARD_SIZE!r} (the "
            "default) or '500MB'."
        )
    return size


def _check_no_adapters(state: Mapping[str, Any]) -> None:
    if any(".lora_A." in name for name in state):
        raise ValueError(
            "the model carries PEFT's adapters: export_checkpoint of the PEFT model around it writes the merged "
            "model, its save_pretrained the adapter."
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


def _save_config(model: PreTrainedModel, directory: str | os.PathLike[str], ranks: Ranks) -> None:
    """What `save_pretrained` does beside the weights; on rank 0 only, but for the values that it sets."""
    model.config.dtype = str(model.dtype).removeprefix("torch.")
    model.config.architectures = [class_name(model)]
    if ranks.rank != 0:
        return
    if model.is_remote_code():
        custom_object_save(model, directory, config=model.config)
    model.config.save_pretrained(directory)
    if model.can_generate():
        model.generation_config.save_pretrained(directory)
