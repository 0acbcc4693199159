"""Graphs of layers on a GPU: the cases that the double serves on CPU, and trainers with torch's compiler."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import TrainingArguments
from trl import SFTConfig

from hf_moe_accel import AcceleratedMoESFTTrainer, AcceleratedMoETrainer, MoEAccelConfig
from hf_moe_accel.hf.cuda_graphs import LayerGraphs
from hf_moe_accel.hf.discover import base_of
from tests.helpers.adapters import Adapted
from tests.helpers.graph_cases import CASES, run
from tests.helpers.models import tiny_model, toy_tokenizer
from tests.helpers.vendors import needs_quack

pytestmark = pytest.mark.gpu

CUDA = torch.device("cuda")


@pytest.mark.parametrize("name", CASES)
def test_replays_change_nothing(name: str) -> None:
    case = CASES[name]
    expected, counted, _ = run(case, CUDA, graphs=False, backend="eager")
    numbers, counted_again, replayed = run(case, CUDA, graphs=True, backend="eager")
    assert numbers == pytest.approx(expected, rel=2e-2)
    assert replayed == case.replayed
    # The routing follows the weights, whose last bits may differ.
    assert counted_again[1:] == counted[1:]


def train(
    output_dir: Path, model: Any, mode: str, *, checkpoints: bool = False, **more: Any
) -> tuple[list[dict[str, float]], LayerGraphs | None]:
    args = TrainingArguments(
        output_dir=str(output_dir),
        bf16=True,
        max_steps=8,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        logging_steps=2,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        gradient_checkpointing=checkpoints,
        torch_compile=True,
        torch_compile_mode=mode,
    )
    rows = torch.randint(3, 128, (32, 16), generator=torch.Generator().manual_seed(0))
    dataset = [{"input_ids": row, "labels": row} for row in rows]
    trainer = AcceleratedMoETrainer(model=model, args=args, train_dataset=dataset, **more)
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    return logs, LayerGraphs.of(base_of(trainer.model))


@pytest.mark.parametrize("backend", ["fused", "grouped_mm", pytest.param("quack", marks=needs_quack)])
@pytest.mark.parametrize("checkpoints", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize("adapted", [False, True], ids=["full", "adapters"])
def test_a_trainer_replays(backend: str, adapted: bool, checkpoints: bool, tmp_path: Path) -> None:
    def model() -> Any:
        return Adapted("qwen3_moe", torch.bfloat16)() if adapted else tiny_model("qwen3_moe", dtype=torch.bfloat16)

    config = MoEAccelConfig(expert_backend=backend)
    expected, without = train(tmp_path / "plain", model(), "default", moe_config=config)
    logs, graphs = train(tmp_path / "graphs", model(), "reduce-overhead", checkpoints=checkpoints, moe_config=config)
    assert without is None and graphs is not None
    assert graphs.replayed == 14, "of 16 passes"
    assert not any(layer.captured for layer in graphs._layers), "memory is not given back"
    for name in ("loss", "grad_norm", "moe/dropped", "moe/load_max_over_mean"):
        assert [log[name] for log in logs] == pytest.approx([log[name] for log in expected], rel=5e-2), name
    assert all(log["moe/tokens_per_second"] > 0 and "moe/time/backward" in log for log in logs)


def test_what_no_graph_can_hold_is_refused(tmp_path: Path) -> None:
    config = MoEAccelConfig(check_tokens=True)
    with pytest.raises(ValueError, match="torch_compile_mode='reduce-overhead' makes CUDA graphs.*check_tokens=True"):
        train(tmp_path, tiny_model("qwen3_moe", dtype=torch.bfloat16), "reduce-overhead", moe_config=config)


def test_sft_as_it_is_replays(tmp_path: Path) -> None:
    """TRL checkpoints activations unless it is told not to."""
    rows = torch.randint(3, 128, (32, 16), generator=torch.Generator().manual_seed(0)).tolist()
    given: dict[str, Any] = {"max_steps": 8, "per_device_train_batch_size": 2, "logging_steps": 2, "report_to": []}
    losses = []
    for mode in ("default", "reduce-overhead"):
        args = SFTConfig(
            str(tmp_path / mode), bf16=True, torch_compile=True, torch_compile_mode=mode, save_strategy="no", **given
        )
        assert args.gradient_checkpointing
        trainer = AcceleratedMoESFTTrainer(
            model=Adapted("qwen3_moe", torch.bfloat16)(),
            args=args,
            train_dataset=Dataset.from_dict({"input_ids": rows}),
            processing_class=toy_tokenizer(),
        )
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    graphs = LayerGraphs.of(base_of(trainer.model))
    assert graphs is not None and graphs.replayed == 6, "of 8 passes"
    assert losses[1] == pytest.approx(losses[0], rel=5e-2)
