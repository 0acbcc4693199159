"""The plugin form: a Trainer that we do not change, a prepared model and `MoEAccelCallback`."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM as PlainAutoModel
from transformers import Trainer, TrainingArguments

from hf_moe_accel import MoEAccelCallback, MoEAccelConfig, prepare_moe_model
from hf_moe_accel.runtime import runtime_of
from tests.helpers.loops import load_checkpoint
from tests.helpers.models import ragged_batch_dataset, tiny_model
from tests.helpers.tolerances import assert_close

Ranks = Callable[..., list[Any]]
STEPS = 4


class TheirTrainer(Trainer):
    """Somebody's own loss: each step twice as heavy."""

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        return 2 * super().compute_loss(*args, **kwargs)


def make_trainer(output_dir: str, choices: dict[str, Any] | None, **more: Any) -> TheirTrainer:
    model = tiny_model("qwen3_moe")
    args = {"save_strategy": "steps", "save_steps": 2, "save_only_model": True} | more
    arguments = TrainingArguments(
        output_dir=output_dir,
        use_cpu=True,
        per_device_train_batch_size=4 // int(os.environ.get("WORLD_SIZE", "1")),
        gradient_accumulation_steps=2,
        max_steps=STEPS,
        logging_steps=1,
        learning_rate=3e-3,
        adam_epsilon=1e-3,
        max_grad_norm=1.0,
        train_sampling_strategy="sequential",
        report_to=[],
        disable_tqdm=True,
        **args,
    )
    callbacks = None
    if choices is not None:
        model = prepare_moe_model(model, MoEAccelConfig(**choices))
        callbacks = [MoEAccelCallback()]
    data = ragged_batch_dataset(8 * STEPS, 16, seed=6)
    return TheirTrainer(model, arguments, train_dataset=data, eval_dataset=data[:4], callbacks=callbacks)


def train(output_dir: str, choices: dict[str, Any] | None) -> list[tuple[float, float]]:
    trainer = make_trainer(output_dir, choices)
    trainer.train()
    runtime = runtime_of(trainer.model)
    assert runtime is None or runtime._watchdog is None, "the callback has not closed the runtime"
    trainer.save_model(f"{output_dir}/final")
    return [(entry["loss"], float(entry["grad_norm"])) for entry in trainer.state.log_history if "loss" in entry]


@pytest.fixture(scope="module")
def plain_run(ranks: Ranks, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    directory = tmp_path_factory.mktemp("plain")
    (values,) = ranks(train, 1, str(directory), None)
    return values, directory


@pytest.mark.parametrize(("world_size", "choices"), [(1, {}), (2, {"ep_size": 2}), (4, {"ep_size": 2})])
def test_their_trainer_trains_and_saves_as_before(
    world_size: int, choices: dict[str, Any], plain_run: tuple[Any, Path], ranks: Ranks, tmp_path: Path
) -> None:
    expected, directory = plain_run
    values = ranks(train, world_size, str(tmp_path), choices)
    assert_close(values, [expected] * world_size, "training")
    for saved in ("checkpoint-2", f"checkpoint-{STEPS}", "final"):
        assert_close(load_checkpoint(tmp_path / saved), load_checkpoint(directory / saved), "training")
    _, info = PlainAutoModel.from_pretrained(tmp_path / "final", output_loading_info=True)
    assert not any(info.values()), info


def messages_of_refusals(output_dir: str, choices: dict[str, Any]) -> dict[str, str]:
    messages = {}
    for case, make in {
        "not prepared": lambda: make_trainer(output_dir, None, save_strategy="no"),
        "saves its optimizer": lambda: make_trainer(output_dir, choices, save_only_model=False),
        "saves nothing": lambda: make_trainer(output_dir, choices, save_only_model=False, save_strategy="no"),
        "loads the best": lambda: make_trainer(
            output_dir, choices, load_best_model_at_end=True, eval_strategy="steps", eval_steps=2
        ),
        "resumed": lambda: make_trainer(output_dir, choices),
    }.items():
        try:
            trainer = make()
            if case == "not prepared":
                trainer.add_callback(MoEAccelCallback())
            trainer.train(resume_from_checkpoint=f"{output_dir}/checkpoint-2" if case == "resumed" else None)
            messages[case] = ""
        except ValueError as error:
            messages[case] = str(error)
    return messages


@pytest.mark.parametrize(
    ("world_size", "choices", "optimizer", "resumed"),
    [
        (1, {}, "MoEAccelCallback needs save_only_model=True", r"resumed at step 2.*train\(\) without resume_from"),
        # Where the model is sharded, transformers itself wants save_only_model, and the weights are read before a
        # callback is asked.
        (2, {"ep_size": 2}, "save_only_model", "train without resume_from_checkpoint"),
    ],
)
def test_refusals(
    world_size: int, choices: dict[str, Any], optimizer: str, resumed: str, plain_run: tuple[Any, Path], ranks: Ranks
) -> None:
    for messages in ranks(messages_of_refusals, world_size, str(plain_run[1]), choices):
        assert "call prepare_moe_model(model) before the trainer is made" in messages["not prepared"]
        assert optimizer in messages["saves its optimizer"]
        assert messages["saves nothing"] == ""
        assert "load_best_model_at_end=True is not supported in this form" in messages["loads the best"]
        assert re.search(resumed, messages["resumed"])


def test_liger_is_kept_off_the_experts(tmp_path: Path) -> None:
    arguments = TrainingArguments(str(tmp_path), use_cpu=True, save_strategy="no", use_liger_kernel=True)
    MoEAccelCallback().on_init_end(arguments, None, None)
    assert arguments.liger_kernel_config == {"swiglu": False}


def test_liger_leaves_norms_and_rope_to_the_compiler(tmp_path: Path) -> None:
    given = {"use_cpu": True, "save_strategy": "no", "use_liger_kernel": True, "torch_compile": True}
    for config, expected in (
        (None, {"rms_norm": False, "rope": False}),
        ({"rope": True}, {"rms_norm": False, "rope": True}),
    ):
        arguments = TrainingArguments(str(tmp_path), liger_kernel_config=config, **given)
        MoEAccelCallback().on_init_end(arguments, None, None)
        assert arguments.liger_kernel_config == {**expected, "swiglu": False}
