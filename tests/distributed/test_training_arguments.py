"""The table of docs/training_arguments.md, one test a row: what a trainer's arguments do under expert parallelism."""

from __future__ import annotations

import copy
import json
import os
import re
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from accelerate import ParallelismConfig
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
from transformers.integrations.liger import apply_liger_kernel
from transformers.models.qwen3_moe import modeling_qwen3_moe
from transformers.trainer_callback import ExportableState

from hf_moe_accel import AcceleratedMoETrainer, parameter_groups
from hf_moe_accel import AutoModelForCausalLM as AcceleratedAutoModel
from hf_moe_accel.log import warn_once
from hf_moe_accel.runtime import runtime_of
from tests.helpers.grids import slow
from tests.helpers.models import VOCAB_SIZE, ragged_batch_dataset, tiny_model, toy_tokenizer
from tests.helpers.ranks import RanksError, run_ranks
from tests.helpers.resumable import saved_in
from tests.helpers.tolerances import assert_close

GLOBAL_BATCH = 8
LENGTH = 16
STEPS = 3


# --- The rows of the table ---


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


# --- A training run, on however many ranks it is called on ---


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
    warn_once.cache_clear()  # other cases have run in this process
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
    times = re.compile("runtime|per_second|preparation_time|_mem_|^moe/")
    return [{k: v for k, v in entry.items() if not times.search(k)} for entry in trainer.state.log_history]


def whole_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {
        name: (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone()
        for name, p in model.named_parameters()
    }


def compare_with_plain_arguments(tmp_path: Path, arguments: dict[str, Any], **case: Any) -> None:
    """Asserts that our run with some arguments on two ranks equals the run of plain `Trainer` without them."""
    (expected,) = run_ranks(run, 1, Trainer, str(tmp_path), **case)
    for ours in run_ranks(run, 2, AcceleratedMoETrainer, str(tmp_path), **case, arguments=arguments, init=False):
        assert_close(ours.log, expected.log, "training")
        assert_close(ours.weights, expected.weights, "training")


def compare(tmp_path: Path, *, reference_ranks: int = 1, **case: Any) -> tuple[list[Run], Run]:
    """Asserts that our run on two ranks logs and leaves what plain `Trainer` does, and returns both.

    Args:
        tmp_path: for the runs' output.
        reference_ranks: plain `Trainer` runs in one process, or as DDP on two ranks where the data depend on it.
        case: arguments of `run`.
    """
    expected, *_ = run_ranks(run, reference_ranks, Trainer, str(tmp_path / "plain"), init=False, **case)
    actual = run_ranks(run, 2, AcceleratedMoETrainer, str(tmp_path / "ours"), init=False, **case)
    for rank in actual:
        assert_close(rank.log, expected.log, "training", "log")
        assert_close(rank.weights, expected.weights, "training", "weights")
    return actual, expected


# --- Loss and gradients ---


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
@pytest.mark.slow
def test_compute_loss_func_and_nan_filter(tmp_path: Path) -> None:
    (ours, _), _ = compare(tmp_path, options={"compute_loss_func": AddNaN()})
    assert np.isfinite(ours.losses).all()
    case: dict[str, Any] = {"options": {"compute_loss_func": AddNaN()}, "arguments": {"logging_nan_inf_filter": False}}
    for ours in run_ranks(run, 2, AcceleratedMoETrainer, str(tmp_path), **case, init=False):
        assert np.isnan(ours.losses).tolist() == [False, True, True]  # transformers does not get rid of it


# --- Optimizer and schedule ---


@row("optim", "optim_args", "optim_target_modules", note="See the optimizers below.")
def test_optim_args(tmp_path: Path) -> None:
    compare(tmp_path, arguments={"optim": "sgd", "optim_args": "momentum=0.9,nesterov=True", "learning_rate": 0.1})


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
@pytest.mark.slow
def test_schedules(tmp_path: Path) -> None:
    (expected,) = run_ranks(run_schedules, 1, Trainer, str(tmp_path))
    for runs in run_ranks(run_schedules, 2, AcceleratedMoETrainer, str(tmp_path), init=False):
        for name, ours in runs.items():
            assert_close(ours.log, expected[name].log, "training", name)
    rates = [entry["learning_rate"] for entry in expected["reduce_lr_on_plateau"].log if "learning_rate" in entry]
    assert rates[-1] < rates[0]


# --- Data ---


class Stream(IterableDataset):
    """Rows without a length; `cut` gives each rank another number of them."""

    def __init__(self, rows: list[dict[str, torch.Tensor]], cut: tuple[int, ...] = ()) -> None:
        self.rows = rows
        self.cut = cut
        self.num_read = 0

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        end = self.cut[int(os.environ["RANK"])] if self.cut else len(self.rows)
        for entry in self.rows[:end]:
            self.num_read += 1
            yield entry


def rows_of_many_lengths(num: int) -> list[dict[str, torch.Tensor]]:
    rows = ragged_batch_dataset(num, LENGTH, seed=11)
    return [{key: value[: 6 + i * 7 % 11] for key, value in entry.items()} for i, entry in enumerate(rows)]


def pad(rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    def stacked(name: str, filler: int) -> torch.Tensor:
        return nn.utils.rnn.pad_sequence([entry[name] for entry in rows], batch_first=True, padding_value=filler)

    ids = stacked("input_ids", 0)
    return {"input_ids": ids, "attention_mask": (ids != 0).long(), "labels": stacked("labels", -100)}


VARIED = {"train_dataset": rows_of_many_lengths(21), "data_collator": pad}


@row(
    "train_sampling_strategy",
    "length_column_name",
    "data_seed",
    note="Each rank draws the batches that it draws as a rank of DDP.",
)
@pytest.mark.parametrize("strategy", ["random", "batch_rebalance", *slow("sequential", "group_by_length")])
def test_sampling(strategy: str, tmp_path: Path) -> None:
    arguments = {"train_sampling_strategy": strategy, "max_steps": 5, "data_seed": 7}
    compare(tmp_path, reference_ranks=2, arguments=arguments, options=VARIED)


@pytest.mark.slow
def test_sampling_by_a_column_of_lengths(tmp_path: Path) -> None:
    import datasets

    rows = [entry | {"size": len(entry["input_ids"])} for entry in VARIED["train_dataset"]]
    table = datasets.Dataset.from_list([{k: np.asarray(v) for k, v in entry.items()} for entry in rows])
    arguments = {"train_sampling_strategy": "group_by_length", "length_column_name": "size"}
    options = VARIED | {"train_dataset": table.with_format("torch")}
    compare(tmp_path, reference_ranks=2, arguments=arguments, options=options)


@row("dataloader_drop_last", note="As DDP on as many ranks.")
@pytest.mark.slow
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
        {"split_batches": True},
        *slow({"dispatch_batches": False}, {"use_seedable_sampler": False, "non_blocking": True}),
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
    note="Equal to one process.",
)
@pytest.mark.slow
def test_dataloader_workers(tmp_path: Path) -> None:
    arguments = {
        "dataloader_num_workers": 1,
        "dataloader_persistent_workers": True,
        "dataloader_prefetch_factor": 2,
        "dataloader_multiprocessing_context": "fork",
        "dataloader_in_order": True,
    }
    compare(tmp_path, arguments=arguments)


@row(
    "`IterableDataset`",
    note="With `max_steps`, as DDP on as many ranks. Where the data of one rank end, all ranks stop.",
)
@pytest.mark.parametrize("dispatch_batches", [None, False, *slow(True)])
def test_iterable_dataset(dispatch_batches: bool | None, tmp_path: Path) -> None:
    options = {
        "train_dataset": Stream(ragged_batch_dataset(28, LENGTH)),
        "eval_dataset": Stream(VARIED["train_dataset"]),
    }
    arguments = {"accelerator_config": {"dispatch_batches": dispatch_batches}, "max_steps": 5}
    compare(tmp_path, reference_ranks=2, arguments=arguments, options=options | {"data_collator": pad})


@pytest.mark.parametrize("accumulation", [2, *slow(1)])
def test_iterable_dataset_of_unequal_lengths(accumulation: int, tmp_path: Path) -> None:
    rows = ragged_batch_dataset(80, LENGTH)
    arguments = {
        "accelerator_config": {"dispatch_batches": False},
        "gradient_accumulation_steps": accumulation,
        "max_steps": 4,
        "eval_strategy": "steps",
        "eval_steps": 2,
    }
    case: dict[str, Any] = {"arguments": arguments}
    (expected,) = run_ranks(run, 1, Trainer, str(tmp_path), **case, options=streams(rows[:16]))
    case |= {"options": streams(rows, (80, 16)), "after": rows_read}
    for ours in run_ranks(run, 2, AcceleratedMoETrainer, str(tmp_path), init=False, **case):
        assert_close(ours.log, expected.log, "training", "log")
        assert_close(ours.weights, expected.weights, "training", "weights")
        assert ours.extra < 60


def rows_read(trainer: Trainer) -> int:
    return trainer.train_dataset.num_read


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
    import datasets

    table = datasets.Dataset.from_list([{k: np.asarray(v) for k, v in entry.items()} for entry in rows])
    compare(tmp_path / "datasets", options={"train_dataset": table.with_format("torch")})
    rows = [{key: value for key, value in entry.items() if key != "rowid"} for entry in rows]
    compare(tmp_path / "kept", options={"train_dataset": rows}, arguments={"remove_unused_columns": False})


@row("include_num_input_tokens_seen", note="Counts the tokens of all ranks.")
@pytest.mark.parametrize("kind", ["non_padding", *slow("all")])
def test_num_input_tokens_seen(kind: str, tmp_path: Path) -> None:
    # As DDP on as many ranks, whose batches are padded to the same lengths.
    arguments = {"include_num_input_tokens_seen": kind}
    ours, _ = compare(tmp_path, reference_ranks=2, arguments=arguments, options=VARIED)
    seen = [entry["num_input_tokens_seen"] for entry in ours[0].log]
    lengths = [len(entry["input_ids"]) for entry in VARIED["train_dataset"][:GLOBAL_BATCH]]
    assert (seen[0] == sum(lengths)) == (kind == "non_padding")


# --- Evaluation ---


@row(
    "eval_strategy",
    "eval_steps",
    "eval_delay",
    "eval_on_start",
    "per_device_eval_batch_size",
    note="Equal to one process.",
)
def test_evaluation_loss(tmp_path: Path) -> None:
    arguments = {"eval_strategy": "steps", "eval_steps": 1, "eval_delay": 2, "eval_on_start": True}
    ours, _ = compare(tmp_path, arguments=arguments)
    assert [entry["step"] for entry in ours[0].log if "eval_loss" in entry] == [0, 2, 3]


def all_shares(prediction: Any) -> dict[str, float]:
    losses = prediction.losses
    return shares(prediction) | {"inputs": float(prediction.inputs.sum()), "mean_loss": float(np.mean(losses))}


@row(
    "eval_accumulation_steps",
    "include_for_metrics",
    "prediction_loss_only",
    note="As DDP on as many ranks.",
)
@row("`Trainer(compute_metrics=)`", note="Gets the predictions of all ranks; rank 0's numbers count on all of them.")
def test_compute_metrics(tmp_path: Path) -> None:
    # Seven rows: one of the last batch is there twice, to make it even, and must not be counted.
    options = {"compute_metrics": all_shares, "eval_dataset": ragged_batch_dataset(7, LENGTH)}
    arguments: dict[str, Any] = {"eval_strategy": "steps", "eval_steps": 3, "include_for_metrics": ["inputs", "loss"]}
    case: dict[str, Any] = {"reference_ranks": 2, "options": options}
    ours, _ = compare(tmp_path / "plain", **case, arguments=arguments)
    assert "eval_accuracy" in ours[0].log[-2]
    compare(tmp_path / "accumulated", **case, arguments=arguments | {"eval_accumulation_steps": 1})
    compare(tmp_path / "loss only", **case, arguments=arguments | {"prediction_loss_only": True})


def number_of_rows(prediction: Any) -> dict[str, float]:
    return {"rows": len(prediction.label_ids)}


@row("eval_use_gather_object", note="As DDP on as many ranks.")
@pytest.mark.slow
def test_gather_objects(tmp_path: Path) -> None:
    arguments = {"eval_strategy": "steps", "eval_steps": 3, "eval_use_gather_object": True}
    compare(tmp_path, reference_ranks=2, arguments=arguments, options={"compute_metrics": number_of_rows})


def best_tokens(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return logits.argmax(-1)


def token_accuracy(prediction: Any) -> dict[str, float]:
    labels = prediction.label_ids[:, 1:]
    return {"accuracy": float((prediction.predictions[:, :-1] == labels)[labels != -100].mean())}


@row("`Trainer(preprocess_logits_for_metrics=)`", note="Equal to one process.")
def test_preprocess_logits_for_metrics(tmp_path: Path) -> None:
    options = {"compute_metrics": token_accuracy, "preprocess_logits_for_metrics": best_tokens}
    compare(tmp_path, arguments={"eval_strategy": "steps", "eval_steps": 3}, options=options)


class BatchAccuracy:
    """Adds up over the batches of an evaluation."""

    def __init__(self) -> None:
        self.hits = self.all = 0

    def __call__(self, prediction: Any, compute_result: bool) -> dict[str, float]:
        labels = prediction.label_ids[:, 1:]
        hits = (prediction.predictions[:, :-1].argmax(-1) == labels)[labels != -100]
        self.hits, self.all = self.hits + int(hits.sum()), self.all + hits.numel()
        return {"accuracy": self.hits / self.all, "tokens": self.all} if compute_result else {}


@row("batch_eval_metrics", note="Equal to one process.")
def test_batch_eval_metrics(tmp_path: Path) -> None:
    arguments = {"eval_strategy": "steps", "eval_steps": 3, "batch_eval_metrics": True}
    ours, _ = compare(tmp_path, arguments=arguments, options={"compute_metrics": BatchAccuracy()})
    assert ours[0].log[-2]["eval_tokens"] > 0


def predictions(trainer: Trainer) -> dict[str, Any]:
    out = trainer.predict(ragged_batch_dataset(7, LENGTH, seed=17))
    return {"predictions": out.predictions, "labels": out.label_ids, "loss": out.metrics["test_loss"]}


@row("eval_do_concat_batches", note="As DDP on as many ranks.")
@row("`predict()`", note="As DDP on as many ranks: every rank has all predictions, in order.")
@pytest.mark.parametrize("concat", [True, *slow(False)])
def test_predict(concat: bool, tmp_path: Path) -> None:
    arguments = {"eval_do_concat_batches": concat}
    ours, expected = compare(tmp_path, reference_ranks=2, after=predictions, arguments=arguments)
    for rank in ours:
        assert_close(to_tensors(rank.extra), to_tensors(expected.extra), "training")


def to_tensors(values: Any) -> Any:
    if isinstance(values, dict):
        return {key: to_tensors(value) for key, value in values.items()}
    return [torch.as_tensor(value) for value in values] if isinstance(values, list) else torch.as_tensor(values)


class Score:
    """A metric that gets better, but on rank 0 only up to step 2: a metric that samples differs as well."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, prediction: Any) -> dict[str, float]:
        self.calls += 1
        worse = os.environ.get("RANK", "0") == "0" and self.calls > 2
        return {"score": -float(self.calls) if worse else float(self.calls)}


def run_early_stopping(trainer_class: type[Trainer], output_dir: str) -> dict[str, Any]:
    trainer = make_trainer(
        trainer_class,
        output_dir,
        arguments={
            "max_steps": 6,
            "save_strategy": "steps",
            "save_steps": 1,
            "eval_strategy": "steps",
            "eval_steps": 1,
            "load_best_model_at_end": True,
            "metric_for_best_model": "score",
            "greater_is_better": True,
        },
        options={"compute_metrics": Score(), "callbacks": [EarlyStoppingCallback(2)]},
    )
    trainer.train()
    log, best, weights = log_of(trainer), trainer.state.best_model_checkpoint, whole_weights(trainer.model)
    # Whether the optimizer of a new run reaches the weights that were read back.
    trainer.remove_callback(EarlyStoppingCallback)
    trainer.args.load_best_model_at_end, trainer.args.eval_strategy, trainer.args.save_strategy = False, "no", "no"
    trainer.optimizer = None
    trainer.train()
    return {"log": log, "best": Path(best).name, "weights": weights, "then": whole_weights(trainer.model)}


@row(
    "load_best_model_at_end",
    "metric_for_best_model",
    "greater_is_better",
    note="With `EarlyStoppingCallback` all ranks take rank 0's decision. The best weights are read back into the "
    "live, sharded model.",
)
def test_early_stopping_with_load_best(tmp_path: Path) -> None:
    (expected,) = run_ranks(run_early_stopping, 1, Trainer, str(tmp_path / "plain"))
    ours = run_ranks(run_early_stopping, 2, AcceleratedMoETrainer, str(tmp_path / "ours"), init=False)
    for rank in ours:
        assert rank["best"] == "checkpoint-2"
        assert len([entry for entry in rank["log"] if "loss" in entry]) == 4
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "ours" / "checkpoint-2")
    assert_close(ours[0]["weights"], whole_weights(saved), "exact")
    # Plain Trainer reads nothing back into the experts, whose keys differ on disk: its weights are nothing to go by.
    del expected["weights"], expected["then"]
    for rank in ours:
        assert_close(rank["log"], expected["log"], "training")
        assert all(torch.isfinite(value).all() for value in rank["then"].values())
        assert not any(torch.equal(rank["then"][name], value) for name, value in rank["weights"].items())


# --- Saving ---


def user_arguments(trainer: Trainer) -> Any:
    return trainer.args.save_only_model


@row(
    "save_strategy",
    "save_steps",
    "save_total_limit",
    "save_only_model",
    note="A checkpoint is there whole or not at all, and holds the model in standard files. Old ones are deleted "
    "after the new one is complete.",
)
@pytest.mark.parametrize("save_only_model", [True, False])
def test_saving(save_only_model: bool, tmp_path: Path) -> None:
    arguments = {
        "save_strategy": "steps",
        "save_steps": 1,
        "save_total_limit": 2,
        "save_only_model": save_only_model,
    }
    case: dict[str, Any] = {"arguments": arguments, "after": user_arguments}
    (expected,) = run_ranks(run, 1, Trainer, str(tmp_path / "plain"), **case)
    ours = run_ranks(run, 2, AcceleratedMoETrainer, str(tmp_path / "ours"), **case, init=False)
    for result in ours:
        assert result.extra is save_only_model
        assert_close(result.log, expected.log, "training")
    assert saved_in(tmp_path / "ours") == ["checkpoint-2", "checkpoint-3"]
    saved, info = AutoModelForCausalLM.from_pretrained(tmp_path / "ours" / "checkpoint-3", output_loading_info=True)
    assert not any(info.values()), info
    assert_close(whole_weights(saved), expected.weights, "training")
    state = json.loads((tmp_path / "ours" / "checkpoint-3" / "trainer_state.json").read_text())
    assert state["global_step"] == 3
    assert (tmp_path / "ours" / "checkpoint-3" / "training_state" / "optimizer").exists() != save_only_model


class Hub:
    """Stands in for the client of the hub: keeps what is uploaded, as it is at that moment."""

    def __init__(self) -> None:
        self.calls: list[dict[str, Any]] = []
        self.contents: list[tuple[list[str], dict[str, torch.Tensor]]] = []

    def create_repo(self, name: str, **kwargs: Any) -> Any:
        self.calls.append({"name": name, **kwargs})
        return mock.Mock(repo_id=name)

    def upload_folder(self, *, folder_path: str, run_as_future: bool = False, **kwargs: Any) -> Any:
        self.calls.append(kwargs)
        kept = {"README.md", "trainer_state.json", "training_args.bin", "config.json", "tokenizer.json"}
        names = sorted(kept & set(os.listdir(folder_path)))
        self.contents.append((names, whole_weights(AutoModelForCausalLM.from_pretrained(folder_path))))
        future: Future[str] = Future()
        future.set_result("uploaded")
        return future if run_as_future else "uploaded"


def run_and_push(trainer_class: type[Trainer], output_dir: str, strategy: str) -> Any:
    hub = Hub()
    arguments = {
        "push_to_hub": True,
        "hub_strategy": strategy,
        "hub_always_push": True,
        "hub_model_id": "me/model",
        "hub_revision": "tried",
        "hub_private_repo": True,
        "hub_token": "secret",
        "save_strategy": "steps",
        "save_steps": 2,
        "max_steps": 4,
    }
    with mock.patch("transformers.trainer.hf_api", lambda: hub):
        options = {"processing_class": toy_tokenizer()}
        trainer = make_trainer(trainer_class, output_dir, arguments=arguments, options=options)
        trainer.train()
        trainer.push_to_hub()
    return hub.calls, hub.contents


@row(
    "push_to_hub",
    "hub_strategy",
    "hub_always_push",
    "hub_model_id",
    "hub_revision",
    "hub_private_repo",
    "hub_token",
    note="Rank 0 uploads what one process uploads: a standard model.",
)
@pytest.mark.parametrize("strategy", ["all_checkpoints", *slow("end", "every_save", "checkpoint")])
def test_push_to_hub(strategy: str, tmp_path: Path) -> None:
    ((expected_calls, expected),) = run_ranks(run_and_push, 1, Trainer, str(tmp_path / "plain"), strategy)
    first, second = run_ranks(run_and_push, 2, AcceleratedMoETrainer, str(tmp_path / "ours"), strategy, init=False)
    assert first[0] == expected_calls
    assert second == ([], [])
    for (names, weights), (expected_names, expected_weights) in zip(first[1], expected, strict=True):
        assert names == expected_names
        assert_close(weights, expected_weights, "training")


# --- Memory, precision and compilation ---


@row(
    "activation_checkpointing",
    "activation_checkpointing_kwargs",
    "gradient_checkpointing",
    "gradient_checkpointing_kwargs",
    note="Losses as without. Without `use_reentrant=True` the recompute sends no tokens again.",
)
@pytest.mark.parametrize(
    "arguments",
    [
        {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"every_n_layers": 2}},
        *slow(
            {"activation_checkpointing": True},
            {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
        ),
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
    ],
    ids=str,
)
def test_checkpointing(arguments: dict[str, Any], tmp_path: Path) -> None:
    compare_with_plain_arguments(tmp_path, arguments)


def one_layer() -> PreTrainedModel:
    return tiny_model("qwen3_moe", num_hidden_layers=1)


@row(
    "torch_compile",
    "torch_compile_backend",
    "torch_compile_mode",
    note="Losses as without. Layer by layer, within checkpoints of activations, and the loss; the exchange of tokens "
    "and the experts are left out. On "
    'several GPUs "reduce-overhead" is refused: it makes CUDA graphs of layers, in one process.',
)
@pytest.mark.parametrize("checkpoints", [True, *slow(False)])
@pytest.mark.parametrize("backend", ["eager", *slow("aot_eager")])
def test_torch_compile(backend: str, checkpoints: bool, tmp_path: Path) -> None:
    arguments = {"torch_compile": True, "torch_compile_backend": backend, "torch_compile_mode": "default"}
    arguments["gradient_checkpointing"] = checkpoints
    compare_with_plain_arguments(tmp_path, arguments, model=one_layer)


def apply_liger(output_dir: str, trainer_class: type[Trainer]) -> tuple[bool, list[str], dict[str, Any]]:
    """What `train` does first, whose kernels need a GPU."""
    trainer = make_trainer(trainer_class, output_dir, arguments={"use_liger_kernel": True, "liger_kernel_config": {}})
    experts = trainer.model.model.layers[0].mlp.experts
    before = experts.forward
    with mock.patch.dict(vars(modeling_qwen3_moe)):  # Liger puts its classes there too
        apply_liger_kernel(trainer.model, trainer.args.liger_kernel_config)
    others = (trainer.model.model.norm, trainer.model)
    return experts.forward == before, [each.forward.__module__ for each in others], trainer.args.liger_kernel_config


@row(
    "use_liger_kernel",
    "liger_kernel_config",
    note="Norms, rotary embeddings and the loss (with `torch_compile` the loss alone); `swiglu` is set to False. It "
    "needs GPUs: `pytest -m gpu` trains.",
)
def test_liger_leaves_the_experts_alone(tmp_path: Path) -> None:
    for same, modules, config in run_ranks(apply_liger, 2, str(tmp_path), AcceleratedMoETrainer, init=False):
        assert same and all(name.startswith("liger_kernel") for name in modules) and config == {"swiglu": False}
    ((same, _, _),) = run_ranks(apply_liger, 1, str(tmp_path), Trainer, init=False)
    assert not same  # what would be without


class SpyOnExperts(TrainerCallback):
    """Notes the dtypes in which experts compute."""

    def __init__(self) -> None:
        self.dtypes: set[tuple[torch.dtype, torch.dtype]] = set()

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        backend = runtime_of(model).backend
        forward = backend.forward

        def spy(spec: Any, weights: Any, rows: Any) -> Any:
            self.dtypes.add((weights.up.dtype, rows.x_ND.dtype))
            return forward(spec, weights, rows)

        backend.forward = spy


def dtypes(trainer: Trainer) -> Any:
    spy = next(c for c in trainer.callback_handler.callbacks if isinstance(c, SpyOnExperts))
    config = getattr(trainer.model.config, "distributed_config", None)
    mixed_precision = config is not None and config.fsdp_mixed_precision
    return {p.dtype for p in trainer.model.parameters()}, spy.dtypes, mixed_precision


def bf16_qwen3_moe() -> PreTrainedModel:
    return tiny_model("qwen3_moe", dtype=torch.bfloat16)


@row("bf16", note="fp32 weights stay fp32 masters, and the experts compute in bf16; bf16 weights train in bf16.")
@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("how", ["accelerate launch", "model from disk", *slow("argument")])
def test_bf16(weights: torch.dtype, how: str, tmp_path: Path) -> None:
    model: Any = qwen3_moe if weights == torch.float32 else bf16_qwen3_moe
    (expected,) = run_ranks(run, 1, Trainer, str(tmp_path), model=model)
    arguments, env = ({}, {"ACCELERATE_MIXED_PRECISION": "bf16"}) if "launch" in how else ({"bf16": True}, {})
    if "disk" in how:
        model().save_pretrained(tmp_path / "model")
        model = partial(str, tmp_path / "model")
    case: dict[str, Any] = {"model": model, "arguments": arguments, "after": dtypes, "init": False, "env": env}
    for world_size in (1, 2):
        options = {"callbacks": [SpyOnExperts()]}
        for ours in run_ranks(run, world_size, AcceleratedMoETrainer, str(tmp_path), **case, options=options):
            masters = weights == torch.float32 and world_size == 2
            assert ours.extra == ({weights}, {(torch.bfloat16, torch.bfloat16)}, masters)
            assert_close(torch.tensor(ours.losses).bfloat16(), torch.tensor(expected.losses).bfloat16(), "training")


@row("neftune_noise_alpha", note="As DDP on as many ranks; the hook is gone after training.")
@pytest.mark.slow
def test_neftune(tmp_path: Path) -> None:
    arguments = {"neftune_noise_alpha": 5.0}
    ours, _ = compare(tmp_path, reference_ranks=2, arguments=arguments, after=embedding_hooks)
    assert [rank.extra for rank in ours] == [0, 0]


def embedding_hooks(trainer: Trainer) -> int:
    return sum("neftune" in hook.__name__ for hook in trainer.model.get_input_embeddings()._forward_hooks.values())


@row(
    "ddp_find_unused_parameters",
    "ddp_bucket_cap_mb",
    "ddp_broadcast_buffers",
    "ddp_static_graph",
    verdict="no effect",
    note="FSDP2 stands in for DDP.",
)
@row("ddp_backend", "ddp_timeout", note="Of the process group.")
def test_ddp_arguments(tmp_path: Path) -> None:
    arguments = {
        "ddp_find_unused_parameters": True,
        "ddp_bucket_cap_mb": 1,
        "ddp_broadcast_buffers": True,
        "ddp_static_graph": True,
        "ddp_backend": "gloo",
        "ddp_timeout": 100,
    }
    compare_with_plain_arguments(tmp_path, arguments)


@row(
    "torch_empty_cache_steps",
    "full_determinism",
    "seed",
    "use_cache",
    "skip_memory_metrics",
    note="Equal to one process.",
)
def test_the_rest(tmp_path: Path) -> None:
    arguments = {"torch_empty_cache_steps": 1, "use_cache": True, "seed": 3}
    compare(tmp_path / "cache", arguments=arguments)
    compare(tmp_path / "deterministic", arguments={"full_determinism": True})
    compare(tmp_path / "memory", arguments={"skip_memory_metrics": False})


# --- What trainers can do besides ---


class Complete(TrainerCallback):
    """After each step, completes prompts of different lengths: each rank its own, one process all of them."""

    def __init__(self) -> None:
        self.completions: dict[int, list[list[int]]] = {0: [], 1: []}

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        mine = [args.process_index] if args.world_size > 1 else [0, 1]
        for i in mine:
            prompt = torch.arange(5, 8 + 5 * i)[None]
            with torch.no_grad():
                out = model.generate(prompt, max_new_tokens=3 + 4 * i, do_sample=False, eos_token_id=None)
            self.completions[i].append(out[0].tolist())


def completions(trainer: Trainer) -> dict[int, list[list[int]]]:
    return next(c for c in trainer.callback_handler.callbacks if isinstance(c, Complete)).completions


@row("`model.generate` in a callback", note="On all ranks; their prompts and completions may differ in length.")
def test_generate_while_training(tmp_path: Path) -> None:
    ours, expected = compare(tmp_path, options={"callbacks": [Complete()]}, after=completions)
    for rank, result in enumerate(ours):
        assert len(result.extra[rank]) == STEPS
        assert result.extra[rank] == expected.extra[rank]


@row("`Trainer(model_init=)`", note="Equal to one process.")
def test_model_init(tmp_path: Path) -> None:
    compare(tmp_path, options={"model_init": qwen3_moe})


def run_search(trainer_class: type[Trainer], output_dir: str) -> dict[str, Any]:
    import optuna

    class PruneTheSecond(optuna.pruners.BasePruner):
        def prune(self, study: Any, trial: Any) -> bool:
            return trial.number == 1

    def space(trial: Any) -> dict[str, float]:
        return {"learning_rate": trial.suggest_float("learning_rate", 1e-4, 1e-2, log=True)}

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    arguments = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 3}
    trainer = make_trainer(trainer_class, output_dir, arguments=arguments, options={"model_init": qwen3_moe})
    best = trainer.hyperparameter_search(
        space,
        n_trials=3,
        direction="minimize",
        backend="optuna",
        sampler=optuna.samplers.RandomSampler(seed=1),
        pruner=PruneTheSecond(),
    )
    found = best and {"objective": best.objective, "rate": best.hyperparameters["learning_rate"]}
    return {"best": found, "log": log_of(trainer), "save_only_model": trainer.args.save_only_model}


@row("`hyperparameter_search`", note="With optuna, pruning included: all ranks run rank 0's trials.")
@pytest.mark.slow
def test_hyperparameter_search(tmp_path: Path) -> None:
    (expected,) = run_ranks(run_search, 1, Trainer, str(tmp_path / "plain"))
    first, second = run_ranks(run_search, 2, AcceleratedMoETrainer, str(tmp_path / "ours"), init=False)
    assert_close(first["best"], expected["best"], "training")
    assert second["best"] is None
    for rank in (first, second):
        assert_close(rank["log"], expected["log"], "training")
        assert rank["save_only_model"] is False
    assert list((tmp_path / "ours" / "run-2" / "checkpoint-3").glob("*.safetensors"))


def adapted_qwen3_moe(dtype: torch.dtype = torch.float32) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights="gaussian", task_type="CAUSAL_LM")
    return get_peft_model(tiny_model("qwen3_moe", dtype=dtype), config)


@row("PEFT LoRA on attention", note="Equal to one process; the adapter that is saved loads with stock PEFT.")
# peft reads an attribute that transformers has deprecated.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_lora_on_attention(tmp_path: Path) -> None:
    from peft import PeftModel

    arguments = {
        "save_strategy": "steps",
        "save_steps": 1,
        "eval_strategy": "steps",
        "eval_steps": 1,
        "load_best_model_at_end": True,
    }
    ours, expected = compare(tmp_path, model=adapted_qwen3_moe, arguments=arguments, after=best_checkpoint)
    loaded = PeftModel.from_pretrained(tiny_model("qwen3_moe"), tmp_path / "ours" / ours[0].extra)
    assert_close(whole_weights(loaded), expected.weights, "training")


def trained_dtypes(trainer: Trainer) -> set[torch.dtype]:
    return {parameter.dtype for parameter in trainer.model.parameters() if parameter.requires_grad}


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_lora_over_bf16_with_checkpointing(use_reentrant: bool, tmp_path: Path) -> None:
    case: dict[str, Any] = {"model": partial(adapted_qwen3_moe, torch.bfloat16), "after": trained_dtypes}
    arguments: dict[str, Any] = {"bf16": True, "learning_rate": 0.1}
    (expected,) = run_ranks(run, 1, Trainer, str(tmp_path), **case, arguments=arguments)
    arguments |= {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": use_reentrant}}
    for ours in run_ranks(run, 2, AcceleratedMoETrainer, str(tmp_path), **case, arguments=arguments, init=False):
        assert ours.extra == {torch.float32}
        assert_close(torch.tensor(ours.losses).bfloat16(), torch.tensor(expected.losses).bfloat16(), "training")


def best_checkpoint(trainer: Trainer) -> str:
    return Path(trainer.state.best_model_checkpoint).name


def dense() -> PreTrainedModel:
    return tiny_model("llama")


@row("A dense model", note="Trains as with `Trainer`, with one warning.")
def test_dense_model(tmp_path: Path) -> None:
    case: dict[str, Any] = {"model": dense, "init": False, "capture": True}
    expected = run_ranks(run, 2, Trainer, str(tmp_path), **case)
    actual = run_ranks(run, 2, AcceleratedMoETrainer, str(tmp_path), **case)
    for rank, ((ours, output), (theirs, _)) in enumerate(zip(actual, expected, strict=True)):
        assert_close(ours.log, theirs.log, "exact")
        assert_close(ours.weights, theirs.weights, "exact")
        assert output.count("nothing to accelerate") == (rank == 0)


def copy_and_train(output_dir: str) -> Any:
    trainer = make_trainer(AcceleratedMoETrainer, output_dir)
    before = whole_weights(trainer.model)
    copied = copy.deepcopy(trainer.model)
    trainer.train()
    return before, whole_weights(copied), whole_weights(trainer.model), run_on(copied), run_on(qwen3_moe())


def run_on(model: nn.Module) -> float:
    entry = ragged_batch_dataset(1, LENGTH)[0]
    return float(model(**{key: value[None] for key, value in entry.items()}).loss)


@row(
    "`copy.deepcopy(model)`",
    verdict="in one process",
    note="The copy is independent; an error where the model is sharded.",
)
def test_deepcopy(tmp_path: Path) -> None:
    ((before, copied, trained, loss, expected),) = run_ranks(copy_and_train, 1, str(tmp_path))
    assert_close(copied, before, "exact")
    assert not any(torch.equal(trained[name], before[name]) for name in before)
    assert_close(loss, expected, "training")
    with pytest.raises(RanksError, match="does not support deepcopy"):
        run_ranks(copy_and_train, 2, str(tmp_path), init=False)


def resize_and_train(output_dir: str) -> None:
    trainer = make_trainer(AcceleratedMoETrainer, output_dir)
    trainer.model.resize_token_embeddings(VOCAB_SIZE + 8)
    trainer.train()


@row(
    "`resize_token_embeddings`",
    verdict="before sharding",
    note="Before the trainer is made; an error where the model is sharded already.",
)
def test_resize_token_embeddings(tmp_path: Path) -> None:
    run_ranks(resize_and_train, 1, str(tmp_path))
    with pytest.raises(RanksError, match="ValueError: resize_token_embeddings"):
        run_ranks(resize_and_train, 2, str(tmp_path), init=False)


def sgd(model: nn.Module) -> Any:
    return torch.optim.SGD(parameter_groups(model), lr=0.1)


def run_with_optimizer(trainer_class: type[Trainer], output_dir: str, source: str | None = None) -> Run:
    model = AcceleratedAutoModel.from_pretrained(source) if source else qwen3_moe()
    return run(trainer_class, output_dir, options={"model": model, "optimizers": (sgd(model), None)})


@row("`Trainer(optimizer_cls_and_kwargs=)`", note="Equal to one process.")
@row(
    "`Trainer(optimizers=)`",
    note="With a model that was sharded before, by `AutoModelForCausalLM` or `prepare_moe_model`; otherwise an error, "
    "since sharding makes new parameters.",
)
def test_own_optimizer(saved_model: str, tmp_path: Path) -> None:
    compare(tmp_path, options={"optimizer_cls_and_kwargs": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9})})
    (expected,) = run_ranks(run_with_optimizer, 1, Trainer, str(tmp_path))
    for ours in (
        *run_ranks(run_with_optimizer, 1, AcceleratedMoETrainer, str(tmp_path)),
        *run_ranks(run_with_optimizer, 2, AcceleratedMoETrainer, str(tmp_path), saved_model),
    ):
        assert_close(ours.log, expected.log, "training")
    with pytest.raises(RanksError, match="ValueError: optimizers="):
        run_ranks(run_with_optimizer, 2, AcceleratedMoETrainer, str(tmp_path), init=False)


class Count(TrainerCallback, ExportableState):
    """A callback whose state is saved: the steps that it has seen."""

    def __init__(self, start: int = 0) -> None:
        self.start = start
        self.steps = 0

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.steps += 1

    def state(self) -> dict[str, Any]:
        return {"args": {"start": self.start}, "attributes": {"steps": self.steps}}


def stop_and_resume(output_dir: str, value: Any) -> Any:
    arguments = {"save_strategy": "steps", "save_steps": 2, "restore_callback_states_from_checkpoint": True}
    options: dict[str, Any] = {"callbacks": [Count()]}
    make_trainer(AcceleratedMoETrainer, output_dir, arguments=arguments | {"max_steps": 2}, options=options).train()
    options["callbacks"] = [Count()]
    trainer = make_trainer(AcceleratedMoETrainer, output_dir, arguments=arguments, options=options)
    trainer.train(resume_from_checkpoint=os.path.join(output_dir, "checkpoint-2") if value else True)
    counts = [callback.steps for callback in trainer.callback_handler.callbacks if isinstance(callback, Count)]
    return counts, Run(log_of(trainer), whole_weights(trainer.model))


@row(
    "`train(resume_from_checkpoint=)`",
    "resume_from_checkpoint",
    "ignore_data_skip",
    "restore_callback_states_from_checkpoint",
    note="Exactly, on any number of ranks: see [checkpoints.md](checkpoints.md).",
)
@pytest.mark.parametrize("by_path", [False, *slow(True)])
def test_resume(by_path: bool, tmp_path: Path) -> None:
    (expected,) = run_ranks(run, 1, Trainer, str(tmp_path / "plain"))
    for counts, resumed in run_ranks(stop_and_resume, 2, str(tmp_path / "ours"), by_path, init=False):
        assert counts == [3]
        assert_close(resumed.losses, expected.losses, "training")
        assert_close(resumed.weights, expected.weights, "training")


# --- What is refused ---


@pytest.fixture(scope="session")
def saved_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    directory = tmp_path_factory.mktemp("model")
    qwen3_moe().save_pretrained(directory)
    return str(directory)


@dataclass(frozen=True)
class Refused:
    """Arguments, or settings of `accelerate launch`, and what the error says of them."""

    says: str
    arguments: dict[str, Any] = field(default_factory=dict)
    environ: dict[str, str] = field(default_factory=dict)

    def make(self, output_dir: str) -> TrainingArguments:
        later = {name: self.arguments[name] for name in ("deepspeed",) if name in self.arguments}
        given = {name: value for name, value in self.arguments.items() if name not in later}
        args = TrainingArguments(output_dir=output_dir, use_cpu=True, **({"report_to": []} | given))
        # DeepSpeed need not be installed: only its being asked for is looked at.
        for name, value in later.items():
            setattr(args, name, value)
        return args


REFUSED = {
    "auto_find_batch_size": Refused("Delete auto_find_batch_size=True.", {"auto_find_batch_size": True}),
    "fp16": Refused("use bf16. Delete fp16=True.", {"fp16": True}),
    "fsdp": Refused("Delete fsdp=True.", {"fsdp": True, "fsdp_config": {"cpu_offload": True}}),
    "deepspeed": Refused("Delete deepspeed='zero3.json'.", {"deepspeed": "zero3.json"}),
    "parallelism_config": Refused(
        "Delete parallelism_config=....", {"parallelism_config": ParallelismConfig(dp_shard_size=2)}
    ),
    "use_liger_kernel": Refused(
        "Delete liger_kernel_config['swiglu']=True.",
        {"use_liger_kernel": True, "liger_kernel_config": {"swiglu": True}},
    ),
    "enable_jit_checkpoint": Refused("Delete enable_jit_checkpoint=True.", {"enable_jit_checkpoint": True}),
    "bf16_full_eval": Refused("Delete bf16_full_eval=True.", {"bf16_full_eval": True}),
    "fp16_full_eval": Refused("Delete fp16_full_eval=True.", {"fp16_full_eval": True}),
    "even_batches": Refused(
        "Delete even_batches=False in accelerator_config.", {"accelerator_config": {"even_batches": False}}
    ),
    "save_on_each_node": Refused("Delete save_on_each_node=True.", {"save_on_each_node": True}),
    "WANDB_LOG_MODEL": Refused(
        "Delete WANDB_LOG_MODEL=end.", {"report_to": ["wandb"]}, environ={"WANDB_LOG_MODEL": "end"}
    ),
    "debug": Refused("Delete debug='underflow_overflow'.", {"debug": "underflow_overflow"}),
    "optim": Refused("Delete optim='adafactor'.", {"optim": "adafactor"}),
    "optim and saving": Refused("Set save_only_model=True, or save_strategy='no'", {"optim": "adamw_torch_8bit"}),
    "accelerate's FSDP": Refused("accelerate's FSDP plugin is", environ={"ACCELERATE_USE_FSDP": "true"}),
    "accelerate's DeepSpeed": Refused("accelerate's DeepSpeed plugin", environ={"ACCELERATE_USE_DEEPSPEED": "true"}),
    "accelerate's Megatron": Refused("accelerate's Megatron-LM", environ={"ACCELERATE_USE_MEGATRON_LM": "true"}),
    "accelerate's layout": Refused(
        "accelerate's parallelism_config", environ={"ACCELERATE_USE_PARALLELISM_CONFIG": "true"}
    ),
    "accelerate's fp16": Refused("mixed_precision fp16", environ={"ACCELERATE_MIXED_PRECISION": "fp16"}),
}


def refusals(output_dir: str, cases: dict[str, Refused], source: str | None) -> dict[str, str]:
    """The error of each case, for a model that would have to be read from `source`, or for one that is loaded."""
    errors = {}
    for name, case in cases.items():
        args = case.make(output_dir)
        with never_reading_weights(), mock.patch.dict(os.environ, case.environ), pytest.raises(ValueError) as error:
            AcceleratedMoETrainer(model=source or qwen3_moe(), args=args)
        errors[name] = str(error.value)
    return errors


@contextmanager
def never_reading_weights() -> Iterator[None]:
    with mock.patch.object(PreTrainedModel, "from_pretrained", side_effect=AssertionError("weights were read")):
        yield


@row("auto_find_batch_size", verdict="refused", note="A rank would retry alone.")
@row("fp16", verdict="refused", note="Also from `accelerate launch`. Use bf16.")
@row("fsdp", "fsdp_config", "deepspeed", verdict="refused", note="Also the plugins of `accelerate launch`.")
@row("parallelism_config", verdict="refused", note="`MoEAccelConfig` chooses the layout.")
@row("`liger_kernel_config` with `swiglu=True`", verdict="refused", note="It replaces the experts.")
@row("enable_jit_checkpoint", verdict="refused", note="A signal reaches the ranks at different steps.")
@row("`accelerator_config` with `even_batches=False`", verdict="refused", note="On several ranks.")
@row("bf16_full_eval", "fp16_full_eval", verdict="refused", note="On several ranks. `bf16` evaluates in bf16.")
@row("`WANDB_LOG_MODEL`", verdict="refused", note="On several ranks. `MoEWandbCallback(artifacts=...)` uploads.")
@row("save_on_each_node", verdict="refused", note="On several ranks, which write into one shared directory.")
@row("debug", verdict="refused", note="'underflow_overflow' on several ranks: it cannot print sharded weights.")
@pytest.mark.parametrize("loaded", [False, True], ids=["from disk", "loaded"])
def test_refused_arguments(loaded: bool, saved_model: str, tmp_path: Path) -> None:
    source = None if loaded else saved_model
    for errors in run_ranks(refusals, 2, str(tmp_path), REFUSED, source, init=False):
        for name, case in REFUSED.items():
            assert case.says in errors[name], name


def load_refusals(source: str) -> dict[str, str]:
    errors = {}
    for name, value in (("device_map", "auto"), ("quantization_config", {"load_in_4bit": True})):
        with never_reading_weights(), pytest.raises(ValueError) as error:
            AcceleratedAutoModel.from_pretrained(source, **{name: value})
        errors[name] = str(error.value)
    return errors


def split_by_device_map() -> PreTrainedModel:
    model = qwen3_moe()
    model.hf_device_map = {"model": "cuda:0", "lm_head": "cuda:1"}
    return model


def quantized() -> PreTrainedModel:
    model = qwen3_moe()
    model.config.quantization_config = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    return model


@row("`device_map`, `quantization_config`", verdict="refused", note="Where the model is loaded, and on a loaded one.")
def test_refused_ways_to_load(saved_model: str, tmp_path: Path) -> None:
    for errors in run_ranks(load_refusals, 2, saved_model):
        assert all(f"Delete `{name}=`" in error for name, error in errors.items())
    for model, name in ((split_by_device_map, "device_map"), (quantized, "quantization_config")):
        with pytest.raises(RanksError, match=f"ValueError: .*{name}"):
            run_ranks(make_trainer, 2, AcceleratedMoETrainer, str(tmp_path), model=model, init=False)


def one_process_refusals(output_dir: str) -> None:
    for name in ("debug", "optim", "even_batches", "save_on_each_node", "bf16_full_eval"):
        AcceleratedMoETrainer(model=qwen3_moe(), args=REFUSED[name].make(output_dir))


def test_what_only_sharding_forbids_works_in_one_process(tmp_path: Path) -> None:
    run_ranks(one_process_refusals, 1, str(tmp_path))


# --- The table ---

DOCUMENT = Path(__file__).parents[2] / "docs" / "training_arguments.md"

# Nothing here meets the model or its sharding.
UNTOUCHED = """
output_dir do_train do_eval do_predict run_name project disable_tqdm report_to log_level log_level_replica
log_on_each_node logging_strategy logging_steps logging_first_step trackio_space_id trackio_bucket_id
trackio_static_space_id use_cpu tf32 local_rank dataloader_pin_memory
""".split()


def table(rows: list[Row]) -> str:
    def cell(argument: str) -> str:
        return f"`{argument}`" if argument in FIELDS else argument

    lines = ["| Argument | | |", "|---|---|---|"]
    for entry in sorted(rows, key=lambda entry: (entry.arguments[0] not in FIELDS, FIELDS.get(entry.arguments[0], 0))):
        lines.append(f"| {', '.join(map(cell, entry.arguments))} | {entry.verdict} | {entry.note} |")
    return "\n".join(lines)


FIELDS = {f.name: i for i, f in enumerate(fields(TrainingArguments))}


def documented(part: str) -> str:
    """A part of the document, which stands between two comments."""
    return DOCUMENT.read_text().partition(f"<!-- {part} -->\n")[2].partition(f"\n<!-- end of {part} -->")[0]


def test_every_argument_is_decided() -> None:
    decided = {argument for entry in ROWS for argument in entry.arguments} | set(UNTOUCHED)
    assert FIELDS.keys() - decided == set()
    assert {name for name in decided if name.isidentifier()} - FIELDS.keys() == set()


def test_the_table_is_the_documented_one() -> None:
    assert documented("arguments") == table(ROWS)
    assert documented("untouched") == ", ".join(f"`{name}`" for name in UNTOUCHED)
