"""The table of docs/training_arguments.md, one test a row: what a trainer's arguments do under expert parallelism."""

from __future__ import annotations

import copy
import gc
import json
import os
import re
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils.data import IterableDataset
from transformers import (
    AutoModelForCausalLM,
    EarlyStoppingCallback,
    PreTrainedModel,
    SchedulerType,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from hf_moe_accel import AcceleratedMoETrainer, MoEAccelConfig
from tests.helpers.models import VOCAB_SIZE, ragged_batch_dataset, tiny_model, toy_tokenizer
from tests.helpers.ranks import RanksError, run_ranks
from tests.helpers.tolerances import assert_close

GLOBAL_BATCH = 8
LENGTH = 16
STEPS = 3


# The rows of the table. -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """Some arguments, whether they work, and what to know."""

    arguments: tuple[str, ...]
    verdict: str
    note: str


ROWS: list[Row] = []


def row(*arguments: str, note: str, verdict: str = "works") -> Callable[[Any], Any]:
    """Puts what a test shows into the table."""
    ROWS.append(Row(arguments, verdict, note))
    return lambda test: test


# A training run, on however many ranks it is called on. ---------------------------------------------------------------


@dataclass
class Run:
    """What came of a run on one rank.

    log: the trainer's log, without times; weights: all parameters, whole; extra: what `after` returned.
    """

    log: list[dict[str, Any]]
    weights: dict[str, torch.Tensor]
    extra: Any = None

    @property
    def losses(self) -> list[float]:
        return [entry["loss"] for entry in self.log if "loss" in entry]


def run(
    trainer_class: type[Trainer],
    output_dir: str,
    *,
    model: Callable[[], nn.Module] | None = None,
    arguments: dict[str, Any] | None = None,
    options: dict[str, Any] | None = None,
    after: Callable[[Trainer], Any] | None = None,
) -> Run:
    """Trains tiny Qwen3-MoE for three steps of a global batch of eight; equal arguments, equal batches."""
    trainer = make_trainer(trainer_class, output_dir, model=model, arguments=arguments, options=options)
    trainer.train()
    extra = after(trainer) if after else None
    return Run(log_of(trainer), whole_weights(trainer.model), extra)


def make_trainer(
    trainer_class: type[Trainer],
    output_dir: str,
    *,
    model: Callable[[], nn.Module] | None = None,
    arguments: dict[str, Any] | None = None,
    options: dict[str, Any] | None = None,
) -> Trainer:
    arguments, options = arguments or {}, options or {}
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    micro_batch = GLOBAL_BATCH // world_size // arguments.get("gradient_accumulation_steps", 1)
    defaults: dict[str, Any] = dict(
        output_dir=output_dir,
        use_cpu=True,
        per_device_train_batch_size=micro_batch,
        per_device_eval_batch_size=4 // world_size,
        max_steps=STEPS,
        logging_steps=1,
        learning_rate=3e-3,
        lr_scheduler_type="constant",
        # At the first step nothing is left of a gradient but its sign, however small and inexact it is.
        adam_epsilon=1e-3,
        train_sampling_strategy="sequential",
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    data = {
        "train_dataset": ragged_batch_dataset(GLOBAL_BATCH * STEPS, LENGTH, seed=3),
        "eval_dataset": ragged_batch_dataset(8, LENGTH, seed=5),
    }
    if "model_init" not in options:
        options = {"model": (model or qwen3_moe)()} | options
    return trainer_class(args=TrainingArguments(**(defaults | arguments)), **(data | options))


def qwen3_moe() -> PreTrainedModel:
    return tiny_model("qwen3_moe")


def log_of(trainer: Trainer) -> list[dict[str, Any]]:
    times = re.compile("runtime|per_second|preparation_time")
    return [{k: v for k, v in entry.items() if not times.search(k)} for entry in trainer.state.log_history]


def whole_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {
        name: (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone()
        for name, p in model.named_parameters()
    }


def compare(
    tmp_path: Path,
    *,
    reference_ranks: int = 1,
    ignore: tuple[str, ...] = (),
    kind: str = "training",
    **case: Any,
) -> tuple[list[Run], Run]:
    """Asserts that our run on two ranks logs and leaves what plain `Trainer` does, and returns both.

    Args:
        tmp_path: for the runs' output.
        reference_ranks: plain `Trainer` runs in one process, or as DDP on two ranks where the data depend on it.
        ignore: keys of the log not to compare.
        kind: of the tolerance.
        case: arguments of `run`.
    """
    expected, *_ = run_ranks(run, reference_ranks, Trainer, str(tmp_path / "plain"), init=False, **case)
    actual = run_ranks(run, 2, AcceleratedMoETrainer, str(tmp_path / "ours"), init=False, **case)
    for rank in actual:
        assert_close(without(rank.log, ignore), without(expected.log, ignore), kind, "log")
        weights = {name.removeprefix("module."): weight for name, weight in expected.weights.items()}
        assert_close(rank.weights, weights, kind, "weights")
    return actual, expected


def without(log: list[dict[str, Any]], keys: tuple[str, ...]) -> list[dict[str, Any]]:
    return [{k: v for k, v in entry.items() if k not in keys} for entry in log]


# Loss and gradients. --------------------------------------------------------------------------------------------------


@row("label_smoothing_factor", note="Equal to one process.")
def test_label_smoothing(tmp_path: Path) -> None:
    compare(tmp_path, arguments={"label_smoothing_factor": 0.1})


@row("max_grad_norm", note="One norm over all parameters of all ranks; 0 does not clip.")
@pytest.mark.parametrize("max_grad_norm", [0.0, 0.5])
def test_max_grad_norm(max_grad_norm: float, tmp_path: Path) -> None:
    compare(tmp_path, arguments={"max_grad_norm": max_grad_norm})


@row(
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "max_steps",
    "num_train_epochs",
    note="Equal to one process with the same global batch, below an epoch and over several.",
)
def test_steps_and_epochs(tmp_path: Path) -> None:
    compare(tmp_path / "below", arguments={"max_steps": 2, "gradient_accumulation_steps": 2})
    compare(tmp_path / "over", arguments={"max_steps": -1, "num_train_epochs": 1.7})


@row("average_tokens_across_devices", note="False: as DDP on as many ranks.")
def test_average_tokens_across_devices(tmp_path: Path) -> None:
    compare(tmp_path, reference_ranks=2, arguments={"average_tokens_across_devices": False})


class AddNaN:
    """The usual loss, with a NaN in the second step that leaves the gradients alone."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
        logits = outputs["logits"][:, :-1].flatten(0, 1)
        loss = nn.functional.cross_entropy(logits, labels[:, 1:].flatten(), reduction="sum") / num_items_in_batch
        self.calls += 1
        return loss + (torch.nan if self.calls == 2 else 0.0)


@row("logging_nan_inf_filter", note="Equal to one process.")
@row("`Trainer(compute_loss_func=)`", note="Equal to one process.")
def test_compute_loss_func_and_nan_filter(tmp_path: Path) -> None:
    (ours, _), _ = compare(tmp_path, options={"compute_loss_func": AddNaN()})
    assert np.isfinite(ours.losses).all()


# Optimizer and schedule. ----------------------------------------------------------------------------------------------


def weight_decays(trainer: Trainer) -> dict[str, float]:
    names = {id(p): name for name, p in trainer.model.named_parameters()}
    groups = trainer.optimizer.param_groups
    return {names[id(p)]: group["weight_decay"] for group in groups for p in group["params"]}


@row(
    "learning_rate",
    "weight_decay",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    note="The same parameters decay as in one process.",
)
def test_weight_decay(tmp_path: Path) -> None:
    arguments = {"weight_decay": 0.3, "adam_beta1": 0.8, "adam_beta2": 0.95, "learning_rate": 1e-2}
    ours, expected = compare(tmp_path, arguments=arguments, after=weight_decays)
    assert all(rank.extra == expected.extra for rank in ours)
    assert set(expected.extra.values()) == {0.0, 0.3}


SCHEDULES: dict[str, dict[str, Any]] = {
    "cosine_with_min_lr": {"min_lr": 1e-4},
    "cosine_warmup_with_min_lr": {"min_lr": 1e-4},
    "warmup_stable_decay": {"num_decay_steps": 1},
    "reduce_lr_on_plateau": {"patience": 0, "threshold": 10.0},
    "greedy": {"patience": 0, "min_lr": 1e-4},
}


def run_schedules(trainer_class: type[Trainer], output_dir: str) -> dict[str, Run]:
    runs = {}
    for kind in SchedulerType:
        arguments = {
            "lr_scheduler_type": kind.value,
            "lr_scheduler_kwargs": SCHEDULES.get(kind.value, {}),
            "warmup_steps": 1,
            "eval_strategy": "steps" if kind.value in ("reduce_lr_on_plateau", "greedy") else "no",
            "eval_steps": 1,
        }
        runs[kind.value] = run(trainer_class, output_dir, arguments=arguments)
    return runs


@row(
    "lr_scheduler_type",
    "lr_scheduler_kwargs",
    "warmup_steps",
    note="Every schedule of transformers, those that follow the evaluation loss included.",
)
def test_schedules(tmp_path: Path) -> None:
    (expected,) = run_ranks(run_schedules, 1, Trainer, str(tmp_path))
    for runs in run_ranks(run_schedules, 2, AcceleratedMoETrainer, str(tmp_path), init=False):
        for name, ours in runs.items():
            assert_close(ours.log, expected[name].log, "training", name)
    rates = [entry["learning_rate"] for entry in expected["reduce_lr_on_plateau"].log if "learning_rate" in entry]
    assert rates[-1] < rates[0]


# Data. ----------------------------------------------------------------------------------------------------------------


class Stream(IterableDataset):
    """Rows without a length; `cut` gives each rank another number of them."""

    def __init__(self, rows: list[dict[str, torch.Tensor]], cut: tuple[int, ...] = ()) -> None:
        self.rows = rows
        self.cut = cut

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        end = self.cut[int(os.environ["RANK"])] if self.cut else len(self.rows)
        return iter(self.rows[:end])


def rows_of_many_lengths(num: int) -> list[dict[str, torch.Tensor]]:
    rows = ragged_batch_dataset(num, LENGTH, seed=11)
    return [{key: value[: 6 + i * 7 % 11] for key, value in row.items()} for i, row in enumerate(rows)]


def pad(rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    def stacked(name: str, filler: int) -> torch.Tensor:
        return nn.utils.rnn.pad_sequence([row[name] for row in rows], batch_first=True, padding_value=filler)

    ids = stacked("input_ids", 0)
    return {"input_ids": ids, "attention_mask": (ids != 0).long(), "labels": stacked("labels", -100)}


VARIED = {"train_dataset": rows_of_many_lengths(21), "data_collator": pad}


@row(
    "train_sampling_strategy",
    "length_column_name",
    "data_seed",
    note="Each rank draws the batches that it draws as a rank of DDP.",
)
@pytest.mark.parametrize("strategy", ["random", "sequential", "group_by_length", "batch_rebalance"])
def test_sampling(strategy: str, tmp_path: Path) -> None:
    arguments = {"train_sampling_strategy": strategy, "max_steps": 5, "data_seed": 7}
    compare(tmp_path, reference_ranks=2, arguments=arguments, options=VARIED)


@row("dataloader_drop_last", note="As DDP on as many ranks.")
def test_drop_last(tmp_path: Path) -> None:
    arguments = {"max_steps": -1, "num_train_epochs": 2}
    ours, _ = compare(tmp_path / "keep", reference_ranks=2, arguments=arguments, options=VARIED)
    assert len(ours[0].losses) == 6
    arguments |= {"dataloader_drop_last": True}
    ours, _ = compare(tmp_path / "drop", reference_ranks=2, arguments=arguments, options=VARIED)
    assert len(ours[0].losses) == 4


@row(
    "accelerator_config",
    note="`dispatch_batches`, `split_batches`, `use_seedable_sampler`, `non_blocking`: as DDP on as many ranks.",
)
@pytest.mark.parametrize(
    "config",
    [
        {"dispatch_batches": True},
        {"dispatch_batches": False},
        {"split_batches": True},
        {"use_seedable_sampler": False, "non_blocking": True},
    ],
    ids=str,
)
def test_accelerator_config(config: dict[str, bool], tmp_path: Path) -> None:
    arguments = {"accelerator_config": config, "train_sampling_strategy": "random", "max_steps": 4}
    compare(tmp_path, reference_ranks=2, arguments=arguments)


@row(
    "dataloader_num_workers",
    "dataloader_persistent_workers",
    "dataloader_prefetch_factor",
    "dataloader_multiprocessing_context",
    "dataloader_in_order",
    "dataloader_pin_memory",
    note="Equal to one process.",
)
def test_dataloader_workers(tmp_path: Path) -> None:
    arguments = {
        "dataloader_num_workers": 1,
        "dataloader_persistent_workers": True,
        "dataloader_prefetch_factor": 2,
        "dataloader_multiprocessing_context": "fork",
        "dataloader_in_order": True,
        "dataloader_pin_memory": False,
    }
    compare(tmp_path, arguments=arguments)


@row("`IterableDataset`", note="With `max_steps`, equal to one process. Ranks whose data end early stop all ranks.")
@pytest.mark.parametrize("dispatch_batches", [None, True, False])
def test_iterable_dataset(dispatch_batches: bool | None, tmp_path: Path) -> None:
    options = {"train_dataset": Stream(ragged_batch_dataset(28, LENGTH)), "eval_dataset": Stream(VARIED["train_dataset"])}
    arguments = {"accelerator_config": {"dispatch_batches": dispatch_batches}, "max_steps": 5}
    compare(tmp_path, arguments=arguments, options=options | {"data_collator": pad})


@pytest.mark.parametrize("accumulation", [1, 2])
def test_iterable_dataset_of_unequal_lengths(accumulation: int, tmp_path: Path) -> None:
    rows = ragged_batch_dataset(40, LENGTH)
    arguments = {
        "accelerator_config": {"dispatch_batches": False},
        "gradient_accumulation_steps": accumulation,
        "max_steps": 4,
        "eval_strategy": "steps",
        "eval_steps": 2,
    }
    case: dict[str, Any] = {"arguments": arguments}
    (expected,) = run_ranks(run, 1, Trainer, str(tmp_path), **case, options=streams(rows[:16]))
    for ours in run_ranks(run, 2, AcceleratedMoETrainer, str(tmp_path), init=False, **case, options=streams(rows, (40, 16))):
        assert_close(ours.log, expected.log, "training", "log")
        assert_close(ours.weights, expected.weights, "training", "weights")


def streams(rows: list[dict[str, torch.Tensor]], cut: tuple[int, ...] = ()) -> dict[str, Any]:
    return {"train_dataset": Stream(rows, cut), "eval_dataset": Stream(rows, cut), "compute_metrics": shares}


def shares(prediction: Any) -> dict[str, float]:
    """Some numbers of an evaluation."""
    labels = prediction.label_ids[:, 1:]
    hits = (prediction.predictions[:, :-1].argmax(-1) == labels)[labels != -100]
    return {"accuracy": float(hits.mean()), "logit": float(np.abs(prediction.predictions).mean())}


def run_uneven_batches(trainer_class: type[Trainer], output_dir: str, rows: Any, batch_sizes: tuple[int, ...]) -> Run:
    batch_size = batch_sizes[int(os.environ.get("RANK", "0"))]
    arguments = {"per_device_train_batch_size": batch_size, "max_steps": -1, "num_train_epochs": 2}
    return run(trainer_class, output_dir, arguments=arguments, options={"train_dataset": rows})


@row("Batch sizes that differ between ranks", note="An epoch ends when the first rank has no batch left.")
def test_batch_sizes_that_differ(tmp_path: Path) -> None:
    rows = ragged_batch_dataset(48, LENGTH, seed=13)
    # Accelerate gives rank 0 its even batches (of 2) and rank 1 its odd ones (of 6).
    together = [rows[i] for k in range(4) for i in (*range(4 * k, 4 * k + 2), *range(12 * k + 6, 12 * k + 12))]
    (expected,) = run_ranks(run_uneven_batches, 1, Trainer, str(tmp_path), together, (8,))
    for ours in run_ranks(run_uneven_batches, 2, AcceleratedMoETrainer, str(tmp_path), rows, (2, 6), init=False):
        assert_close(ours.losses, expected.losses, "training")
        assert_close(ours.weights, expected.weights, "training")


def with_more_columns(rows: list[dict[str, torch.Tensor]]) -> list[dict[str, Any]]:
    return [entry | {"rowid": i, "position_ids": torch.arange(LENGTH)} for i, entry in enumerate(rows)]


@row("remove_unused_columns", "label_names", note="The model's own arguments are found through the sharding.")
def test_remove_unused_columns(tmp_path: Path) -> None:
    rows = with_more_columns(ragged_batch_dataset(24, LENGTH))
    compare(tmp_path / "list", options={"train_dataset": rows}, arguments={"label_names": ["labels"]})
    datasets = pytest.importorskip("datasets")
    table = datasets.Dataset.from_list([{k: np.asarray(v) for k, v in entry.items()} for entry in rows])
    compare(tmp_path / "datasets", options={"train_dataset": table.with_format("torch")})
    rows = [{key: value for key, value in entry.items() if key != "rowid"} for entry in rows]
    compare(tmp_path / "kept", options={"train_dataset": rows}, arguments={"remove_unused_columns": False})


@row("include_num_input_tokens_seen", note="Counts the tokens of all ranks.")
@pytest.mark.parametrize("kind", ["all", "non_padding"])
def test_num_input_tokens_seen(kind: str, tmp_path: Path) -> None:
    # Padded to one length, as the tokens of padding count too.
    rows = [{key: value[0] for key, value in pad([entry, VARIED["train_dataset"][5]]).items()} for entry in []]
    arguments = {"include_num_input_tokens_seen": kind}
    ours, _ = compare(tmp_path, arguments=arguments, options={"processing_class": toy_tokenizer()} if rows else {})
    assert ours[0].log[0]["num_input_tokens_seen"] == GLOBAL_BATCH * LENGTH
