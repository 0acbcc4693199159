"""A training run that saves checkpoints and can be resumed, and what is to be compared of it."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import Trainer, TrainerCallback, TrainingArguments

from hf_moe_accel import AcceleratedMoETrainer, MoEAccelConfig
from hf_moe_accel.callbacks.run_file import NAME
from hf_moe_accel.log import warn_once
from tests.helpers.models import ragged_batch_dataset, tiny_model

LENGTH = 12
NUM_ROWS = 24
GLOBAL_BATCH = 8
FIRST_ID = 3  # the first token of row i is FIRST_ID + i


@dataclass
class Result:
    """What a run left on one rank.

    log: the trainer's log of training steps, without times; weights: all parameters, whole; ids: step -> the rows
    that this rank trained on; extra: what `after` returned.
    """

    log: list[dict[str, Any]]
    weights: dict[str, torch.Tensor]
    ids: dict[int, list[int]]
    extra: Any = None

    def from_step(self, step: int) -> list[dict[str, Any]]:
        """The log after a step."""
        return [entry for entry in self.log if entry["step"] > step]


class RecordingTrainer(AcceleratedMoETrainer):
    """Writes down which rows each step trains on."""

    def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        rows = (inputs["input_ids"][:, 0] - FIRST_ID).tolist()
        self.__dict__.setdefault("ids", {}).setdefault(self.state.global_step + 1, []).extend(rows)
        return super().training_step(model, inputs, *args, **kwargs)


def numbered_rows(num: int = NUM_ROWS) -> list[dict[str, torch.Tensor]]:
    """Rows that can be told apart by their first token."""
    rows = ragged_batch_dataset(num, LENGTH, seed=3)
    for number, row in enumerate(rows):
        row["input_ids"][0] = FIRST_ID + number
    return rows


def dropping_model(**overrides: Any) -> nn.Module:
    """A model whose losses depend on the random state."""
    return tiny_model("qwen3_moe", attention_dropout=0.2, **overrides)


def make_trainer(
    output_dir: str,
    *,
    model: Callable[[], nn.Module] | None = None,
    ep_size: int | str = "auto",
    async_save: bool = False,
    merge_adapters_on_save: bool = False,
    trainer_class: type[Trainer] = RecordingTrainer,
    options: dict[str, Any] | None = None,
    **arguments: Any,
) -> Any:
    """A trainer of tiny Qwen3-MoE with a global batch of eight, on however many ranks this is called on."""
    warn_once.cache_clear()  # other cases have run in this process
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    accumulation = arguments.get("gradient_accumulation_steps", 1)
    defaults: dict[str, Any] = dict(
        output_dir=output_dir,
        use_cpu=True,
        per_device_train_batch_size=GLOBAL_BATCH // world_size // accumulation,
        max_steps=7,
        logging_steps=1,
        learning_rate=3e-3,
        weight_decay=0.01,
        lr_scheduler_type="linear",
        # At the first step nothing is left of a gradient but its sign, however small and inexact it is.
        adam_epsilon=1e-3,
        save_strategy="steps",
        save_steps=2,
        report_to=[],
        disable_tqdm=True,
    )
    return trainer_class(
        args=TrainingArguments(**(defaults | arguments)),
        moe_config=MoEAccelConfig(
            ep_size=ep_size, async_save=async_save, merge_adapters_on_save=merge_adapters_on_save
        ),
        **({"model": (model or _plain_model)(), "train_dataset": numbered_rows()} | (options or {})),
    )


def run(
    output_dir: str,
    resume: Any = None,
    *,
    after: Callable[[Any], Any] | None = None,
    callbacks: list[TrainerCallback] | None = None,
    **settings: Any,
) -> Result:
    """Trains to the end."""
    trainer = make_trainer(output_dir, **settings)
    for callback in callbacks or ():
        trainer.add_callback(callback)
    trainer.train(resume_from_checkpoint=resume)
    extra = after(trainer) if after else None
    times = re.compile("runtime|per_second|preparation_time|_mem_|^moe/")
    log = [{k: v for k, v in entry.items() if not times.search(k)} for entry in trainer.state.log_history]
    weights = {
        name: (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone()
        for name, p in trainer.model.named_parameters()
    }
    return Result([entry for entry in log if "loss" in entry], weights, trainer.__dict__.get("ids", {}), extra)


def saved_in(output_dir: Path) -> list[str]:
    """The names of what saving has left, in order: all but the file of the metrics, which grows with every log."""
    return sorted(path.name for path in output_dir.iterdir() if path.name != NAME)


def _plain_model() -> nn.Module:
    return tiny_model("qwen3_moe")
