"""Six training steps on 1, 2 and 4 ranks equal plain `Trainer` in one process, and so does what is saved."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from transformers import AutoModelForCausalLM, Trainer

from hf_moe_accel import AcceleratedMoETrainer, MoEAccelConfig
from hf_moe_accel.dispatch.all_to_all import AllToAllDispatcher
from tests.helpers.grids import slow
from tests.helpers.loops import load_checkpoint
from tests.helpers.models import TRAINED_MOE, ragged_batch_dataset, tiny_config, tiny_model
from tests.helpers.ranks import run_ranks
from tests.helpers.tolerances import assert_close
from tests.helpers.trajectories import trajectory_arguments

pytestmark = pytest.mark.trajectory

GLOBAL_BATCH = 8
ACCUMULATION = 2
STEPS = 6


def train(
    name: str, output_dir: str, world_size: int, trainer_class: Any, arguments: dict[str, Any], **options: Any
) -> list[tuple[float, float]]:
    """[(loss, gradient norm)] by step; saves the model in `output_dir`/final."""
    batch = GLOBAL_BATCH // world_size // ACCUMULATION
    args = trajectory_arguments(output_dir, batch, ACCUMULATION, STEPS, **arguments)
    model = tiny_model(name, **options.pop("model", {}))
    trainer = trainer_class(
        model=model, args=args, train_dataset=ragged_batch_dataset(GLOBAL_BATCH * STEPS, 24, seed=3), **options
    )
    trainer.train()
    trainer.save_model(f"{output_dir}/final")
    return [(h["loss"], float(h["grad_norm"])) for h in trainer.state.log_history if "loss" in h]


def train_ours(name: str, output_dir: str, world_size: int, config: dict[str, Any], **arguments: Any) -> Any:
    return train(name, output_dir, world_size, AcceleratedMoETrainer, arguments, moe_config=MoEAccelConfig(**config))


def train_plain(name: str, output_dir: str, world_size: int, **arguments: Any) -> Any:
    return train(name, output_dir, world_size, Trainer, arguments)


@cache
def baseline(name: str, directory: Path) -> Any:
    (values,) = run_ranks(train_plain, 1, name, str(directory), 1)
    return values


@pytest.fixture(scope="session")
def baseline_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("baseline")


LAYOUTS = {
    "1 rank": (1, {}),
    "2 ranks, ep 2": (2, {"ep_size": 2}),
    "2 ranks, ep 1": (2, {"ep_size": 1}),
    "4 ranks, ep 4": (4, {"ep_size": 4}),
    "4 ranks, ep 2, efsdp 2": (4, {"ep_size": 2}),
    "4 ranks, ep 2, replicas 2": (4, {"ep_size": 2, "dp_replicate_size": 2}),
}
# One architecture on all layouts; the others on one rank and where EP and FSDP2 cut the same experts, and, slow, where
# EP alone does.
OTHERS = [name for name in TRAINED_MOE if name != "qwen3_moe"]
CASES = [
    *(("qwen3_moe", layout) for layout in LAYOUTS),
    *((name, layout) for name in OTHERS for layout in ("1 rank", "4 ranks, ep 2, efsdp 2")),
    *slow(*((name, layout) for name in OTHERS for layout in ("2 ranks, ep 2", "4 ranks, ep 4"))),
]


@pytest.mark.parametrize(("name", "layout"), CASES)
def test_training_equals_plain_trainer(name: str, layout: str, baseline_dir: Path, tmp_path: Path) -> None:
    world_size, config = LAYOUTS[layout]
    expected = baseline(name, baseline_dir / name)
    actual = run_ranks(train_ours, world_size, name, str(tmp_path), world_size, config, init=False)
    assert all(values == actual[0] for values in actual), "the ranks disagree"
    assert_close(actual[0], expected, "training")
    assert_same_checkpoint(tmp_path / "final", baseline_dir / name / "final")


def train_counting(
    name: str, output_dir: str, world_size: int, config: dict[str, Any], **arguments: Any
) -> tuple[Any, int]:
    """Also the number of transfers of rows."""
    sent = []
    exchange = AllToAllDispatcher._exchange
    with patch.object(AllToAllDispatcher, "_exchange", lambda *args: sent.append(1) or exchange(*args)):
        return train_ours(name, output_dir, world_size, config, **arguments), len(sent)


FORWARD, BACKWARD = 3, 3  # transfers of a layer and chunk: rows, their weights and numbers, results; gradients of each
RECOMPUTES = {
    "kept": (0, {}),
    "non-reentrant": (0, {"activation_checkpointing_kwargs": {"use_reentrant": False}}),
    "reentrant": (FORWARD, {"activation_checkpointing_kwargs": {"use_reentrant": True}}),
}


@pytest.mark.parametrize(
    ("layout", "chunks", "recompute"),
    [
        ("2 ranks, ep 2", 4, "non-reentrant"),
        ("2 ranks, ep 2", 2, "reentrant"),
        *slow(
            ("2 ranks, ep 2", 2, "kept"),
            ("4 ranks, ep 4", 2, "non-reentrant"),
            ("2 ranks, ep 2", 1, "non-reentrant"),
            ("2 ranks, ep 2", 1, "reentrant"),
            ("2 ranks, ep 2", 4, "kept"),
            ("4 ranks, ep 4", 4, "kept"),
            ("4 ranks, ep 4", 4, "reentrant"),
            ("4 ranks, ep 2, efsdp 2", 4, "non-reentrant"),
        ),
    ],
)
def test_training_in_chunks_equals_plain_trainer(
    layout: str, chunks: int, recompute: str, baseline_dir: Path, tmp_path: Path, name: str = "qwen3_moe"
) -> None:
    world_size, config = LAYOUTS[layout]
    again, arguments = RECOMPUTES[recompute]
    expected = baseline(name, baseline_dir / name)
    config = config | {"overlap_chunks": chunks}
    arguments = arguments | {"activation_checkpointing": recompute != "kept"}
    actual = run_ranks(train_counting, world_size, name, str(tmp_path), world_size, config, init=False, **arguments)
    layers = tiny_config(name).num_hidden_layers
    transfers = STEPS * ACCUMULATION * layers * chunks * (FORWARD + BACKWARD + again)
    assert [sent for _, sent in actual] == [transfers] * world_size
    assert all(values == actual[0][0] for values, _ in actual), "the ranks disagree"
    assert_close(actual[0][0], expected, "training")
    assert_same_checkpoint(tmp_path / "final", baseline_dir / name / "final")


def test_training_with_shared_experts_equals_plain_trainer(baseline_dir: Path, tmp_path: Path) -> None:
    # Called before the others, and computed while tokens travel; those of DeepSeek and Nemotron-H are called after.
    test_training_in_chunks_equals_plain_trainer(
        "4 ranks, ep 2, efsdp 2", 2, "non-reentrant", baseline_dir, tmp_path, name="qwen2_moe"
    )


def assert_same_checkpoint(actual: Path, expected: Path) -> None:
    ours, theirs = load_checkpoint(actual), load_checkpoint(expected)
    assert_close(ours, theirs, "training")
    _, info = AutoModelForCausalLM.from_pretrained(actual, output_loading_info=True)
    assert not any(info.values()), info
    assert "hf_moe_accel" not in (actual / "config.json").read_text()
