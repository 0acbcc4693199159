"""A resumed run is the run that was never stopped."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.utils.data import IterableDataset
from transformers import AutoModelForCausalLM, TrainerCallback

from hf_moe_accel.weights.manifest import check_manifest
from tests.helpers.grids import named, slow
from tests.helpers.models import tiny_model
from tests.helpers.ranks import RanksError, run_ranks
from tests.helpers.resumable import (
    GLOBAL_BATCH,
    NUM_ROWS,
    Result,
    dropping_model,
    make_trainer,
    numbered_rows,
    run,
    saved_in,
)
from tests.helpers.tolerances import assert_close

STEPS_PER_EPOCH = NUM_ROWS // GLOBAL_BATCH


def only(run_dir: Path, step: int, to: Path) -> str:
    """A copy of one checkpoint, alone in a run's directory of its own."""
    target = to / f"checkpoint-{step}"
    shutil.copytree(run_dir / target.name, target)
    return str(target)


def assert_identical(resumed: Result, whole: Result, step: int) -> None:
    assert resumed.log == whole.log
    assert resumed.from_step(step)
    assert resumed.weights.keys() == whole.weights.keys()
    assert all(torch.equal(value, whole.weights[name]) for name, value in resumed.weights.items())
    assert resumed.ids == {number: rows for number, rows in whole.ids.items() if number > step}


def rows_by_step(results: list[Result]) -> dict[int, list[int]]:
    """The rows that all ranks together trained on."""
    return {step: sorted(i for result in results for i in result.ids[step]) for step in results[0].ids}


# --- The same layout: bit for bit ---


@pytest.mark.parametrize(
    ("world_size", "settings"),
    [
        (2, {"gradient_accumulation_steps": 2}),
        (4, {"ep_size": 2}),
        *slow((1, {}), (2, {"ep_size": 1})),
    ],
    ids=["2 ranks", "4 ranks, ep 2", "1 rank", "2 ranks, fsdp"],
)
def test_the_same_layout_goes_on_bit_for_bit(world_size: int, settings: dict[str, Any], tmp_path: Path) -> None:
    settings = settings | {"model": dropping_model}
    whole = run_ranks(run, world_size, str(tmp_path / "whole"), **settings, init=False)
    for step in (2, 4, 6):  # within an epoch, and at the end of one
        checkpoint = only(tmp_path / "whole", step, tmp_path / f"from {step}")
        resumed = run_ranks(run, world_size, str(tmp_path / f"from {step}"), checkpoint, **settings, init=False)
        for mine, theirs in zip(resumed, whole, strict=True):
            assert_identical(mine, theirs, step)


def in_bf16() -> torch.nn.Module:
    return tiny_model("deepseek_v3", dtype=torch.bfloat16)  # with tensors that stay in fp32


def adapted() -> torch.nn.Module:
    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    return get_peft_model(tiny_model("qwen3_moe"), config)


def partly_frozen() -> torch.nn.Module:
    model = tiny_model("qwen3_moe")
    model.model.embed_tokens.requires_grad_(False)
    model.model.layers[0].mlp.experts.requires_grad_(False)
    return model


CASES: dict[str, dict[str, Any]] = {
    "fp32 masters": {"bf16": True},
    "bf16 weights": {"model": in_bf16},
    "adapters": {"model": adapted},
    "frozen experts": {"model": partly_frozen},
    "sgd": {"optim": "sgd", "optim_args": "momentum=0.9"},
    "adagrad": {"optim": "adagrad"},
    "rmsprop": {"optim": "rmsprop", "optim_args": "momentum=0.9"},
    "adamw not fused": {"optim": "adamw_torch", "optim_args": "amsgrad=True"},
    "checkpointing": {"gradient_checkpointing": True, "model": dropping_model},
    "cosine": {"lr_scheduler_type": "cosine_with_restarts", "warmup_steps": 3},
    "whole epochs": {"num_train_epochs": 2, "max_steps": -1},
    "rarely logged": {"logging_steps": 3},
    "no data skipped": {"ignore_data_skip": True},
    "in the background": {"async_save": True, "model": dropping_model},
}


SLOW_CASES = (
    "frozen experts",
    "sgd",
    "adagrad",
    "rmsprop",
    "adamw not fused",
    "checkpointing",
    "cosine",
    "whole epochs",
    "rarely logged",
)


@pytest.mark.parametrize("case", named(CASES, SLOW_CASES))
def test_what_goes_on_bit_for_bit_on_two_ranks(case: str, tmp_path: Path) -> None:
    settings = CASES[case]
    whole = run_ranks(run, 2, str(tmp_path / "whole"), **settings, init=False)
    checkpoint = only(tmp_path / "whole", 4, tmp_path / "resumed")
    resumed = run_ranks(run, 2, str(tmp_path / "resumed"), checkpoint, **settings, init=False)
    for mine, theirs in zip(resumed, whole, strict=True):
        if settings.get("ignore_data_skip"):
            assert [entry["step"] for entry in mine.log] == [entry["step"] for entry in theirs.log]
            assert mine.ids[5] != theirs.ids[5]  # from the start of the epoch
        else:
            assert_identical(mine, theirs, 4)


# --- Other layouts: the same losses, each row once an epoch ---


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ((2, {}), (4, {"ep_size": 4})),
        ((4, {"ep_size": 4}), (2, {"gradient_accumulation_steps": 2})),
        ((1, {"gradient_accumulation_steps": 4}), (2, {})),
        *slow(
            ((2, {}), (1, {"gradient_accumulation_steps": 2})),
            ((4, {"ep_size": 2}), (4, {"ep_size": 4, "gradient_accumulation_steps": 2})),
            ((4, {"ep_size": 2}), (1, {})),
            ((1, {}), (2, {"ep_size": 1})),
        ),
    ],
    ids=str,
)
def test_another_layout_goes_on_with_the_same_losses(before: Any, after: Any, tmp_path: Path) -> None:
    assert_goes_on("qwen3_moe", before, after, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt_oss", "nemotron_h", "deepseek_v3"])
def test_architectures_on_another_layout(name: str, tmp_path: Path) -> None:
    assert_goes_on(name, (4, {"ep_size": 2}), (2, {}), tmp_path)


class Model:
    """Makes a model of a name, in another process."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self) -> torch.nn.Module:
        return tiny_model(self.name)


def assert_goes_on(name: str, before: Any, after: Any, tmp_path: Path) -> None:
    (ranks_before, settings_before), (ranks_after, settings_after) = before, after
    model = Model(name)
    whole = run_ranks(run, ranks_before, str(tmp_path / "whole"), model=model, **settings_before, init=False)
    step = 4
    checkpoint = only(tmp_path / "whole", step, tmp_path / "resumed")
    resumed = run_ranks(
        run, ranks_after, str(tmp_path / "resumed"), checkpoint, model=model, **settings_after, init=False
    )
    for rank in resumed:
        assert_close(rank.log, whole[0].log, "training", "log")
        assert_close(rank.weights, whole[0].weights, "training", "weights")
    seen = {n: rows for n, rows in rows_by_step(whole).items() if n <= step} | rows_by_step(resumed)
    assert sorted(seen) == list(range(1, 8))
    for epoch in range(2):
        steps = range(epoch * STEPS_PER_EPOCH + 1, (epoch + 1) * STEPS_PER_EPOCH + 1)
        assert sorted(i for n in steps for i in seen[n]) == list(range(NUM_ROWS))
    # And what this run saves goes on where it came from.
    shutil.rmtree(tmp_path / "resumed" / "checkpoint-7")
    back = run_ranks(run, ranks_before, str(tmp_path / "resumed"), True, model=model, **settings_before, init=False)
    assert back[0].from_step(6)
    assert_close(back[0].log, whole[0].log, "training", "log")


@pytest.mark.slow
def test_a_schedule_that_follows_the_loss_on_another_layout(tmp_path: Path) -> None:
    """It keeps something for each of the optimizer's groups, of which there are fewer on one rank."""
    settings: dict[str, Any] = {
        "lr_scheduler_type": "reduce_lr_on_plateau",
        "lr_scheduler_kwargs": {"patience": 0, "threshold": 10.0, "min_lr": 1e-5},
        "eval_strategy": "steps",
        "eval_steps": 1,
        "options": {"train_dataset": numbered_rows(), "eval_dataset": numbered_rows(4)},
    }
    (whole, _) = run_ranks(run, 2, str(tmp_path / "whole"), **settings, init=False)
    checkpoint = only(tmp_path / "whole", 4, tmp_path / "resumed")
    (resumed,) = run_ranks(run, 1, str(tmp_path / "resumed"), checkpoint, **settings)
    assert len({entry["learning_rate"] for entry in whole.log}) > 3
    assert_close(resumed.log, whole.log, "training", "log")


def test_another_global_batch_goes_on_after_the_same_rows(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"num_train_epochs": 2, "max_steps": -1, "save_steps": 1}
    first = run_ranks(run, 2, str(tmp_path / "whole"), **settings, init=False)
    checkpoint = only(tmp_path / "whole", 2, tmp_path / "resumed")
    outputs = run_ranks(
        run,
        2,
        str(tmp_path / "resumed"),
        checkpoint,
        per_device_train_batch_size=2,
        **settings,
        init=False,
        capture=True,
    )
    resumed = [result for result, _ in outputs]
    text = outputs[0][1]
    assert "the global batch was 8 (4 a rank x 1 accumulated x 2 ranks) and is 4 (2 a rank x 1 accumulated" in text
    assert "at step 4 (was 2)" in text and "global batch" not in outputs[1][1]
    before = [i for n, rows in rows_by_step(first).items() if n <= 2 for i in rows]
    after = rows_by_step(resumed)
    assert sorted(after) == list(range(5, 13))
    assert sorted(before + after[5] + after[6]) == list(range(NUM_ROWS))
    assert sorted(i for n in range(7, 13) for i in after[n]) == list(range(NUM_ROWS))
    # The schedule is that of a run that had always had the new batch.
    rates = [entry["learning_rate"] for entry in resumed[0].from_step(4)]
    assert rates == pytest.approx([3e-3 * (1 - step / 12) for step in range(4, 12)])


class NextNumbers(TrainerCallback):
    """Draws from all generators once training has begun anew."""

    def __init__(self) -> None:
        self.drawn: list[float] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not self.drawn:
            self.drawn = [float(torch.rand(())), float(np.random.rand())]


def numbers_after_resume(output_dir: str, checkpoint: str) -> list[float]:
    callback = NextNumbers()
    run(output_dir, checkpoint, callbacks=[callback])
    return callback.drawn


@pytest.mark.slow
def test_new_ranks_draw_numbers_of_their_own(tmp_path: Path) -> None:
    run_ranks(run, 2, str(tmp_path), max_steps=4, init=False)
    checkpoint = str(tmp_path / "checkpoint-4")
    drawn = run_ranks(numbers_after_resume, 4, str(tmp_path / "a"), checkpoint, init=False)
    assert drawn == run_ranks(numbers_after_resume, 4, str(tmp_path / "b"), checkpoint, init=False)
    assert drawn[2] != drawn[3] and len({tuple(each) for each in drawn[1:]}) == 3


# --- Streams ---


class Rows(IterableDataset):
    """Rows without a length."""

    def __init__(self) -> None:
        self.rows = numbered_rows(5 * GLOBAL_BATCH)
        self.read: list[int] = []

    def __iter__(self) -> Iterator[Any]:
        for number, row in enumerate(self.rows):
            self.read.append(number)
            yield row


class StatefulRows(Rows):
    """Rows that can say where they are."""

    place = 0
    start = 0

    def __iter__(self) -> Iterator[Any]:
        start, self.start = self.start, 0
        for number in range(start, len(self.rows)):
            self.place = number + 1
            self.read.append(number)
            yield self.rows[number]

    def state_dict(self) -> dict[str, Any]:
        return {"place": self.place}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.start = self.place = state["place"]


def run_stream(output_dir: str, resume: Any, kind: type[Rows], **settings: Any) -> tuple[Result, list[int]]:
    rows = kind()
    return run(output_dir, resume, options={"train_dataset": rows}, **settings), rows.read


DISPATCHED = {"gradient_accumulation_steps": 2}
EACH_READS = {"accelerator_config": {"dispatch_batches": False}}


@pytest.mark.parametrize(
    ("kind", "world_size", "settings"),
    [
        (Rows, 1, {}),
        (StatefulRows, 1, {}),
        (StatefulRows, 2, DISPATCHED),
        *slow((Rows, 2, DISPATCHED), (Rows, 2, EACH_READS), (StatefulRows, 2, EACH_READS)),
    ],
    ids=["1 rank", "1 rank, stateful", "dispatched, stateful", "dispatched", "each reading", "each reading, stateful"],
)
def test_streams_go_on(kind: type[Rows], world_size: int, settings: dict[str, Any], tmp_path: Path) -> None:
    settings = settings | {"model": dropping_model, "save_steps": 1, "max_steps": 9}
    whole = run_ranks(run_stream, world_size, str(tmp_path / "whole"), None, kind, **settings, init=False)
    for step in (4, 5, 8):  # within the first pass through the rows, at its end, within the second
        checkpoint = only(tmp_path / "whole", step, tmp_path / f"from {step}")
        resumed = run_ranks(
            run_stream,
            world_size,
            str(tmp_path / f"from {step}"),
            checkpoint,
            kind,
            **settings,
            init=False,
            capture=True,
        )
        for ((mine, read), _), (theirs, _) in zip(resumed, whole, strict=True):
            assert_identical(mine, theirs, step)
            if kind is StatefulRows and read:
                assert read[0] >= (step - 1) % 5 * GLOBAL_BATCH
        # A stream that cannot say where it is has to be read again.
        assert ("reading" in resumed[0][1]) == (kind is Rows)


def test_a_stream_on_another_number_of_ranks(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"accelerator_config": {"dispatch_batches": False}}
    whole = run_ranks(run_stream, 2, str(tmp_path / "whole"), None, StatefulRows, **settings, init=False)
    checkpoint = only(tmp_path / "whole", 4, tmp_path / "resumed")
    for world_size in (1, 4):
        resumed = run_ranks(
            run_stream, world_size, str(tmp_path / "resumed"), checkpoint, StatefulRows, **settings, init=False
        )
        assert_close(resumed[0][0].log, whole[0][0].log, "training", "log")
        rows = rows_by_step([result for result, _ in resumed])
        expected = rows_by_step([result for result, _ in whole])
        assert rows == {step: expected[step] for step in rows}


# --- What a checkpoint is ---


def test_a_checkpoint_is_a_standard_model_and_keeps_what_trainer_keeps(tmp_path: Path) -> None:
    (result, *_) = run_ranks(run, 2, str(tmp_path), save_total_limit=2, init=False)
    assert saved_in(tmp_path) == ["checkpoint-6", "checkpoint-7"]
    for path in map(tmp_path.joinpath, saved_in(tmp_path)):
        assert not check_manifest(path).problems and not check_manifest(path).foreign
    last = tmp_path / "checkpoint-7"
    saved, info = AutoModelForCausalLM.from_pretrained(last, output_loading_info=True)
    assert not any(info.values()), info
    assert_close(dict(saved.named_parameters()), result.weights, "exact")
    assert json.loads((last / "trainer_state.json").read_text())["global_step"] == 7
    listed = json.loads((last / "manifest.json").read_text())["files"]
    assert {"config.json", "trainer_state.json", "training_state/state.json"} <= set(listed)
    # Nothing that is read back is unpickled without torch's own guard.
    assert [name for name in listed if not name.endswith((".json", ".safetensors"))] == [
        "training_args.bin",
        "training_state/scheduler.pt",
    ]


def test_the_best_checkpoint_is_recorded_where_it_lies(tmp_path: Path) -> None:
    settings: dict[str, Any] = {
        "eval_strategy": "steps",
        "eval_steps": 2,
        "load_best_model_at_end": True,
        "options": {"train_dataset": numbered_rows(), "eval_dataset": numbered_rows(4)},
        "max_steps": 6,
    }
    for name, async_save in (("now", False), ("later", True)):
        run_ranks(run, 2, str(tmp_path / name), async_save=async_save, **settings, init=False)
        for step in (2, 4, 6):
            state = json.loads((tmp_path / name / f"checkpoint-{step}" / "trainer_state.json").read_text())
            assert state["best_model_checkpoint"] == str(tmp_path / name / f"checkpoint-{state['best_global_step']}")


def test_a_checkpoint_of_the_same_name_is_replaced(tmp_path: Path) -> None:
    run_ranks(run, 2, str(tmp_path), init=False)
    before = (tmp_path / "checkpoint-4" / "manifest.json").read_text()
    run_ranks(run, 2, str(tmp_path), str(tmp_path / "checkpoint-2"), learning_rate=1e-4, init=False)
    assert (tmp_path / "checkpoint-4" / "manifest.json").read_text() != before
    assert not check_manifest(tmp_path / "checkpoint-4").problems
    assert not [path for path in tmp_path.iterdir() if path.name.startswith("_")]


def test_a_run_that_is_at_its_end_trains_no_further(tmp_path: Path) -> None:
    run_ranks(run, 2, str(tmp_path), init=False)
    for result in run_ranks(run, 2, str(tmp_path), True, init=False):
        assert len(result.log) == 7 and not result.ids


# --- What cannot be resumed ---


def refusal(output_dir: str, resume: Any, **settings: Any) -> str:
    trainer = make_trainer(output_dir, **settings)
    with pytest.raises(ValueError) as error:
        trainer.train(resume_from_checkpoint=resume)
    return str(error.value)


def test_what_cannot_be_resumed_is_said(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for text in run_ranks(refusal, 2, str(tmp_path / "empty"), True, init=False):
        assert f"there is no checkpoint in {tmp_path / 'empty'}" in text and "holds no checkpoint at all" in text
    run_ranks(run, 2, str(tmp_path / "models"), save_only_model=True, max_steps=2, init=False)
    (text, _) = run_ranks(refusal, 2, str(tmp_path / "models"), True, init=False)
    assert "checkpoint-2 holds a model and no training state (save_only_model=True)" in text
    (text, _) = run_ranks(refusal, 2, str(tmp_path / "models"), str(tmp_path / "models/checkpoint-2"), init=False)
    assert "load it as the model" in text
    run_ranks(run, 2, str(tmp_path / "run"), max_steps=2, init=False)
    (text, _) = run_ranks(refusal, 2, str(tmp_path / "run"), True, optim="sgd", init=False)
    assert "holds the state of AdamW, but this run trains with SGD" in text
    (text, _) = run_ranks(refusal, 2, str(tmp_path / "run"), True, model=partly_frozen, init=False)
    assert "another set of parameters. Trained there only: model.embed_tokens.weight" in text


class ModuleState(torch.optim.SGD):
    """An optimizer that keeps what no file can hold."""

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter]["projector"] = torch.nn.Linear(1, 1)
        return super().step(closure)


def test_an_optimizer_that_cannot_be_saved_is_named(tmp_path: Path) -> None:
    options = {"optimizer_cls_and_kwargs": (ModuleState, {"lr": 1e-3})}
    with pytest.raises(RanksError, match="ModuleState keeps 'projector' of .* as a Linear, which cannot be saved"):
        run_ranks(run, 2, str(tmp_path), options={"train_dataset": numbered_rows(), **options}, init=False)
    assert not saved_in(tmp_path)
    options["train_dataset"] = numbered_rows()
    run_ranks(run, 2, str(tmp_path), options=options, save_only_model=True, init=False)
