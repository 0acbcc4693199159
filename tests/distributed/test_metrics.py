"""The numbers of a run, against loads counted by hand.

Every router here sends token t of a pass to expert t mod 4, and to a second one: expert 4 where t is even, else expert
(t + 1) mod 4. Of 64 tokens the 8 experts get 32, 16, 32, 16, 32, 0, 0, 0. With two EP ranks of 4 experts the first is
sent all tokens and computes 96 rows, the second every other token and 32 rows.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from transformers import Trainer, TrainerCallback, TrainingArguments, trainer
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter

from hf_moe_accel import AcceleratedMoETrainer, MoEAccelCallback, MoEAccelConfig, add_metrics, prepare_moe_model
from hf_moe_accel.callbacks import metrics
from hf_moe_accel.callbacks.metrics import MoEMetricsCallback
from hf_moe_accel.callbacks.run_file import METRICS, NAME, read_run
from hf_moe_accel.runtime import runtime_of
from tests.helpers.models import ragged_batch_dataset, tiny_model

Ranks = Callable[..., list[Any]]
LENGTH, GLOBAL_BATCH, ACCUMULATED, STEPS_OF_A_LOG = 16, 4, 2, 2
TOKENS = LENGTH * GLOBAL_BATCH * ACCUMULATED * STEPS_OF_A_LOG
LOAD = [TOKENS // 64 * load for load in (32, 16, 32, 16, 32, 0, 0, 0)]
ONLY_ON_GPU = {"moe/mfu"}
ONLY_WITH_AUX_LOSS = {"moe/aux_loss"}
ONLY_ON_SEVERAL_RANKS = {"moe/rank_max_over_mean", "moe/rank_tokens_max", "moe/rank_tokens_min"}


def route(router: Any, x_TD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    token = torch.arange(x_TD.shape[0], device=x_TD.device)
    second = torch.where(token % 2 == 0, 4, (token + 1) % 4)
    ids = torch.stack([token % 4, second], dim=1)
    # Two experts of eight alike and the others out of the question: an entropy of ln 2 / ln 8.
    logits = torch.tensor([0.0, 0.0] + [-1e9] * 6).expand(len(token), 8) + 0 * (x_TD @ router.weight.T)
    return logits, torch.full(ids.shape, 0.5), ids


@contextmanager
def known_routing() -> Iterator[None]:
    with mock.patch.object(Qwen3MoeTopKRouter, "forward", route):
        yield


class Reporter(TrainerCallback):
    """Stands where the callbacks of `report_to` stand, and keeps what they see."""

    seen: list[dict[str, Any]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **kwargs: Any) -> None:
        self.seen.append(dict(logs))


def arguments(output_dir: str, **more: Any) -> TrainingArguments:
    defaults: dict[str, Any] = {
        "output_dir": output_dir,
        "use_cpu": True,
        "per_device_train_batch_size": GLOBAL_BATCH // int(os.environ.get("WORLD_SIZE", "1")),
        "per_device_eval_batch_size": 1,
        "gradient_accumulation_steps": ACCUMULATED,
        "max_steps": 2 * STEPS_OF_A_LOG,
        "logging_steps": STEPS_OF_A_LOG,
        "train_sampling_strategy": "sequential",
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
    }
    return TrainingArguments(**(defaults | more))


def train(
    output_dir: str,
    choices: dict[str, Any],
    *,
    resume: str | None = None,
    model: dict[str, Any] | None = None,
    **more: Any,
) -> tuple[list[dict[str, Any]], list[dict[str, Any]], dict[str, Any]]:
    """The trainer's log, what a reporter saw and what was counted last, under the known routing."""
    data = ragged_batch_dataset(64, LENGTH)
    Reporter.seen = []
    with known_routing(), mock.patch.object(trainer, "DEFAULT_CALLBACKS", [*trainer.DEFAULT_CALLBACKS, Reporter]):
        ours = AcceleratedMoETrainer(
            model=tiny_model("qwen3_moe", **(model or {})),
            args=arguments(output_dir, **more),
            moe_config=MoEAccelConfig(**choices),
            train_dataset=data,
            eval_dataset=data[:4],
        )
        ours.train(resume_from_checkpoint=resume)
    (counting,) = [each for each in ours.callback_handler.callbacks if isinstance(each, MoEMetricsCallback)]
    return ours.state.log_history, Reporter.seen, counting.experts


def of_training(log: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [entry for entry in log if "loss" in entry]


@pytest.mark.parametrize(
    ("world_size", "choices", "more"),
    [
        (1, {}, {}),
        (1, {}, {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}),
        (2, {"ep_size": 2}, {}),
        (2, {"ep_size": 2, "overlap_chunks": 2}, {"gradient_checkpointing": True}),
        (2, {"ep_size": 1}, {}),
    ],
    ids=["one process", "reentrant", "ep 2", "chunks and checkpointing", "ep 1"],
)
def test_counts_are_those_counted_by_hand(
    world_size: int, choices: dict[str, Any], more: dict[str, Any], ranks: Ranks, tmp_path: Path
) -> None:
    more = more | {"eval_strategy": "steps", "eval_steps": 1, "eval_on_start": True}
    results = ranks(train, world_size, str(tmp_path), choices, **more, init=False)
    ep = choices.get("ep_size", 1) > 1
    layers = 2
    expected = {
        "tokens": TOKENS,
        "load": [LOAD] * layers,
        "rank_rows": [3 * TOKENS, TOKENS] if ep else [layers * 2 * TOKENS // world_size] * world_size,
        "rank_tokens": [2 * TOKENS, TOKENS] if ep else [layers * TOKENS // world_size] * world_size,
        "rank_max_over_mean": [1.5 if ep else 1.0] * layers,
        "dropped": 0,
    }
    names = set(METRICS) - ONLY_ON_GPU - ONLY_WITH_AUX_LOSS - (ONLY_ON_SEVERAL_RANKS if world_size == 1 else set())
    for log, seen, experts in results:
        assert len(of_training(log)) == 2
        for entry in of_training(log):
            assert {name for name in entry if name.startswith("moe/")} == names
            assert entry["moe/load_max_over_mean"] == 2
            assert entry["moe/load_cv"] == pytest.approx(math.sqrt(3) / 2)
            assert entry["moe/idle_experts"] == 3 / 8
            assert entry["moe/router_entropy"] == pytest.approx(1 / 3)
            assert entry["moe/dropped"] == 0
            if world_size > 1:
                assert entry["moe/rank_max_over_mean"] == (1.5 if ep else 1)
                assert entry["moe/rank_tokens_max"] == max(expected["rank_tokens"])
                assert entry["moe/rank_tokens_min"] == min(expected["rank_tokens"])
            assert entry["moe/peak_memory_gib"] > 0.1
        assert {key: experts[key] for key in expected} == expected
        # A reporter sees what is in the trainer's log.
        assert [{k: v for k, v in entry.items() if k != "step"} for entry in log] == seen
    run = read_run(tmp_path)
    assert [step for step, _ in run.counted()] == [2, 4]
    assert all({key: counted[key] for key in expected} == expected for _, counted in run.counted())
    assert [step for step, _ in run.series("eval_loss")] == [0, 1, 2, 3, 4]
    assert run.about["num_experts"] == [8, 8] and run.about["world_size"] == world_size
    assert run.about["config"]["expert_metrics"] is True and "MoE layers of 8 experts" in run.about["prepared"]


def test_times_fit_into_each_other(ranks: Ranks, tmp_path: Path) -> None:
    for log, _, _ in ranks(train, 2, str(tmp_path), {"ep_size": 2}, logging_steps=1, init=False):
        for entry in of_training(log)[1:]:
            spent = {name.removeprefix("moe/time/"): entry[name] for name in entry if name.startswith("moe/time/")}
            assert all(seconds > 0 for seconds in spent.values())
            apart = sum(spent[name] for name in ("data", "forward", "backward", "optimizer"))
            assert apart <= entry["moe/step_time"]
            assert spent["dispatch"] + spent["experts"] + spent["combine"] <= spent["forward"] + spent["backward"]
            tokens = LENGTH * GLOBAL_BATCH * ACCUMULATED
            assert entry["moe/tokens_per_second"] * entry["moe/step_time"] == pytest.approx(tokens)
            assert entry["moe/tokens_per_second_per_device"] == entry["moe/tokens_per_second"] / 2
            # 2 layers of attention over half of 16 positions, 2 experts of 8: see test_flops.
            flops = 6 * (2 * 12288 + 8192) + 2 * 6 * 2 * 3 * 64 * 32 + 2 * 3 * 2 * 4 * 32 * 8
            speed = entry["moe/tokens_per_second_per_device"]
            assert entry["moe/tflops_per_device"] == pytest.approx(flops * speed / 1e12)


class SlowEvaluation(TrainerCallback):
    def on_prediction_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        time.sleep(1.0)


def test_evaluation_and_saving_take_no_time_of_a_step(tmp_path: Path) -> None:
    data = ragged_batch_dataset(32, LENGTH)
    args = arguments(
        str(tmp_path), logging_steps=1, eval_strategy="steps", eval_steps=1, max_steps=3, gradient_accumulation_steps=1
    )
    ours = AcceleratedMoETrainer(
        model=tiny_model("qwen3_moe"),
        args=args,
        train_dataset=data,
        eval_dataset=data[:1],
        callbacks=[SlowEvaluation()],
    )
    ours.train()
    assert all(entry["moe/step_time"] < 1.0 for entry in of_training(ours.state.log_history)[1:])


def test_the_auxiliary_loss_is_logged_where_the_model_gives_it(ranks: Ranks, tmp_path: Path) -> None:
    model = {"output_router_logits": True, "router_aux_loss_coef": 0.1}
    for log, _, _ in ranks(train, 2, str(tmp_path), {"ep_size": 2}, model=model, init=False):
        # transformers' load_balancing_loss_func: top-2 of the logits are experts 0 and 1, of probability 1/2 each, so
        # 8 experts * (1 * 1/2 + 1 * 1/2).
        assert [entry["moe/aux_loss"] for entry in of_training(log)] == pytest.approx([8.0, 8.0])


def test_a_resumed_run_goes_on_in_the_same_file(ranks: Ranks, tmp_path: Path) -> None:
    saves = {"save_strategy": "steps", "save_steps": 2}
    ranks(train, 2, str(tmp_path), {"ep_size": 2}, **saves, init=False)
    before = (tmp_path / NAME).read_bytes()
    # As if the run had been killed while it wrote.
    (tmp_path / NAME).write_bytes(before + b'{"step":5,"lo')
    assert read_run(tmp_path).records[-1]["step"] == 4
    resume = str(tmp_path / "checkpoint-2")
    for log, _, experts in ranks(
        train, 2, str(tmp_path), {"ep_size": 2}, resume=resume, max_steps=6, **saves, init=False
    ):
        assert [entry["step"] for entry in of_training(log)] == [2, 4, 6]
        assert experts["load"] == [LOAD, LOAD]
    run = read_run(tmp_path)
    assert [step for step, _ in run.counted()] == [2, 4, 6]
    assert all(counted["load"] == [LOAD, LOAD] for _, counted in run.counted())
    # A run from the beginning begins a new file.
    ranks(train, 2, str(tmp_path), {"ep_size": 2}, max_steps=2, init=False)
    assert [step for step, _ in read_run(tmp_path).counted()] == [2]


def test_what_cannot_be_written_does_not_end_the_run(tmp_path: Path) -> None:
    (tmp_path / NAME).mkdir()
    log, _, _ = train(str(tmp_path), {})
    assert len(of_training(log)) == 2 and all("moe/step_time" in entry for entry in of_training(log))


def test_logging_by_epoch(tmp_path: Path) -> None:
    more = {"logging_strategy": "epoch", "max_steps": -1, "num_train_epochs": 2}
    log, _, experts = train(str(tmp_path), {}, **more)
    # 64 rows are 8 steps: none of the first epoch is the tenth, which is measured.
    first, second = of_training(log)
    assert experts["tokens"] == 64 * LENGTH
    assert "moe/time/forward" not in first and "moe/time/forward" in second
    assert first["moe/load_max_over_mean"] == second["moe/load_max_over_mean"] == 2


@pytest.mark.parametrize(("strategy", "expected"), [("steps", [2, 6, 10]), ("epoch", [10]), ("no", [])])
def test_layers_that_are_graphs_stand_back_now_and_then(strategy: str, expected: list[int], tmp_path: Path) -> None:
    """With logs of every second step, which are measured."""
    wanted: list[int] = []

    class Look(TrainerCallback):
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            runtime = runtime_of(kwargs["model"])
            assert runtime is not None
            if runtime.timer.in_layers:
                wanted.append(state.global_step + 1)

    with mock.patch.object(metrics, "_IN_LAYERS_EVERY", 4):
        ours = AcceleratedMoETrainer(
            model=tiny_model("qwen3_moe"),
            args=arguments(str(tmp_path), max_steps=10, logging_strategy=strategy),
            callbacks=[Look()],
            train_dataset=ragged_batch_dataset(80, LENGTH),
        )
        ours.train()
    assert wanted == expected


def switched_off(output_dir: str) -> tuple[list[str], list[str], bool]:
    ours = AcceleratedMoETrainer(
        model=tiny_model("qwen3_moe"),
        args=arguments(output_dir, max_steps=2),
        moe_config=MoEAccelConfig(expert_metrics=False),
        train_dataset=ragged_batch_dataset(32, LENGTH),
    )
    ours.train()
    names = [name for entry in ours.state.log_history for name in entry if name.startswith("moe/")]
    runtime = runtime_of(ours.model)
    assert runtime is not None
    return names, os.listdir(output_dir), runtime.stats is None


def test_switched_off_nothing_is_counted_or_written(ranks: Ranks, tmp_path: Path) -> None:
    assert ranks(switched_off, 2, str(tmp_path), init=False) == [([], [], True)] * 2


def test_a_dense_model_logs_as_before(tmp_path: Path) -> None:
    data = ragged_batch_dataset(32, LENGTH)
    ours = AcceleratedMoETrainer(model=tiny_model("llama"), args=arguments(str(tmp_path)), train_dataset=data)
    ours.train()
    assert not any(name.startswith("moe/") for entry in ours.state.log_history for name in entry)
    assert not (tmp_path / NAME).exists()


def as_a_plugin(output_dir: str, choices: dict[str, Any]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    Reporter.seen = []
    with known_routing(), mock.patch.object(trainer, "DEFAULT_CALLBACKS", [*trainer.DEFAULT_CALLBACKS, Reporter]):
        model = prepare_moe_model(tiny_model("qwen3_moe"), MoEAccelConfig(**choices))
        data = ragged_batch_dataset(64, LENGTH)
        theirs = Trainer(model, arguments(output_dir), train_dataset=data, callbacks=[MoEAccelCallback()])
        add_metrics(theirs)
        theirs.train()
    return theirs.state.log_history, Reporter.seen


@pytest.mark.parametrize(("world_size", "choices"), [(1, {}), (2, {"ep_size": 2}), (1, {"expert_metrics": False})])
def test_a_trainer_of_others_logs_the_same(
    world_size: int, choices: dict[str, Any], ranks: Ranks, tmp_path: Path
) -> None:
    for log, seen in ranks(as_a_plugin, world_size, str(tmp_path), choices):
        assert [{k: v for k, v in entry.items() if k != "step"} for entry in log] == seen
        for entry in of_training(log):
            expected = 2 if choices.get("expert_metrics", True) else None
            assert entry.get("moe/load_max_over_mean") == expected
    if choices.get("expert_metrics", True):
        assert [counted["load"] for _, counted in read_run(tmp_path).counted()] == [[LOAD, LOAD]] * 2


def test_the_trainer_state_of_a_checkpoint_holds_the_numbers(tmp_path: Path) -> None:
    train(str(tmp_path), {}, save_strategy="steps", save_steps=4)
    state = json.loads((tmp_path / "checkpoint-4" / "trainer_state.json").read_text())
    assert [entry["moe/dropped"] for entry in state["log_history"] if "loss" in entry] == [0, 0]
