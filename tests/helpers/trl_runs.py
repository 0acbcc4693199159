"""Runs of TRL's trainers, stock or ours, on tiny models and made data."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from types import FunctionType
from typing import Any

import datasets
import trl
from datasets import Dataset, load_dataset
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

import hf_moe_accel
from hf_moe_accel.log import warn_once
from tests.distributed.test_training_arguments import log_of
from tests.helpers.models import tiny_config, tiny_model, toy_tokenizer

GLOBAL_BATCH = 8
STEPS = 3
ROWS = 32


def words(number: int, seed: int) -> str:
    drawn = random.Random(seed)
    return " ".join(f"w{drawn.randrange(120)}" for _ in range(number))


def _texts(i: int) -> dict[str, Any]:
    return {"text": words(5 + i % 9, i)}


def _completions(i: int) -> dict[str, Any]:
    return {"prompt": words(3 + i % 4, i) + " ", "completion": words(3 + i % 6, 1000 + i)}


def _chats(i: int) -> dict[str, Any]:
    roles = ("user", "assistant", "user", "assistant")
    return {"messages": [{"role": role, "content": words(2 + (i + j) % 4, 7 * i + j)} for j, role in enumerate(roles)]}


def _prompts(i: int) -> dict[str, Any]:
    return {"prompt": words(3 + i % 4, i)}


def _preferences(i: int) -> dict[str, Any]:
    return {
        "prompt": words(3 + i % 4, i) + " ",
        "chosen": words(4 + i % 5, 1000 + i),
        "rejected": words(3 + i % 6, 2000 + i),
    }


def _judged(i: int) -> dict[str, Any]:
    return _completions(i) | {"label": i % 3 != 0}


ROW_OF: dict[str, Callable[[int], dict[str, Any]]] = {
    "texts": _texts,
    "completions": _completions,
    "chats": _chats,
    "preferences": _preferences,
    "judged": _judged,
    "prompts": _prompts,
}
DATA_OF = {"SFT": "texts", "DPO": "preferences", "KTO": "judged", "Reward": "preferences", "GRPO": "prompts"}


def write_inputs(directory: Path, name: str = "qwen3_moe", **overrides: Any) -> None:
    """Writes `model`, `other` (other weights), `judge` (one label) and the data sets, each as lines of JSON."""
    tokenizer = toy_tokenizer()
    for folder, seed in (("model", 0), ("other", 1)):
        tiny_model(name, seed, **overrides).save_pretrained(directory / folder)
        tokenizer.save_pretrained(directory / folder)
    # Not every architecture has one.
    if name == "qwen3_moe":
        judge = AutoModelForSequenceClassification.from_config(tiny_config(name, num_labels=1, **overrides))
        judge.load_state_dict(tiny_model(name, **overrides).state_dict(), strict=False)
        judge.save_pretrained(directory / "judge")
        tokenizer.save_pretrained(directory / "judge")
    for kind, row_of in ROW_OF.items():
        (directory / f"{kind}.jsonl").write_text("".join(json.dumps(row_of(i)) + "\n" for i in range(ROWS)))


def data(directory: str | Path, kind: str, **kwargs: Any) -> Dataset:
    """On disk, as TRL needs it to share what one rank has precomputed."""
    datasets.disable_progress_bars()
    files = f"{directory}/{kind}.jsonl"
    return load_dataset("json", data_files=files, split="train", cache_dir=f"{directory}/cache", **kwargs)


def make(
    kind: str, ours: bool, directory: str, *, load: Any = None, options: Any = None, name: str = "", **arguments: Any
) -> Any:
    """A trainer on however many ranks this is called on.

    Args:
        kind: "SFT", "DPO", "KTO", "Reward" or "GRPO".
        ours: our trainer, or TRL's.
        directory: of `write_inputs`.
        load: makes the model of its directory; None: TRL gets the name.
        options: more keyword arguments of the trainer; those of which are functions are called with the directory.
        name: kind of data; "" for the one that fits.
        arguments: of the trainer's config.
    """
    warn_once.cache_clear()
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    source = f"{directory}/{'judge' if kind == 'Reward' else 'model'}"
    config = getattr(trl, f"{kind}Config")
    defaults: dict[str, Any] = {
        "output_dir": f"{directory}/{'ours' if ours else 'stock'}",
        "use_cpu": True,
        "bf16": False,
        "per_device_train_batch_size": GLOBAL_BATCH // world_size // arguments.get("gradient_accumulation_steps", 1),
        "max_steps": STEPS,
        "logging_steps": 1,
        "learning_rate": 1e-5,
        "lr_scheduler_type": "constant",
        "train_sampling_strategy": "sequential",
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
    }
    options = {"train_dataset": data(directory, name or DATA_OF[kind]), "processing_class": toy_tokenizer()} | {
        key: value(directory) if isinstance(value, FunctionType) else value for key, value in (options or {}).items()
    }
    trainer_class = getattr(hf_moe_accel, f"AcceleratedMoE{kind}Trainer") if ours else getattr(trl, f"{kind}Trainer")
    args = config(**(defaults | arguments))
    return trainer_class(load(source) if load else source, args=args, **options)


def run(*args: Any, after: Callable[[Any], Any] | None = None, **kwargs: Any) -> Any:
    """Trains; returns the log without times, and what `after` says of the trainer."""
    trainer = make(*args, **kwargs)
    trainer.train()
    return (log_of(trainer), after(trainer)) if after else log_of(trainer)


def loaded(source: str) -> Any:
    """The model as transformers loads it."""
    return AutoModelForCausalLM.from_pretrained(source)


def other(directory: str) -> Any:
    """A reference model with other weights."""
    return AutoModelForCausalLM.from_pretrained(f"{directory}/other")
