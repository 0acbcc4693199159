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


def model_of(adapted: bool) -> Any:
    return Adapted("qwen3_moe", torch.bfloat16)() if adapted else tiny_model("qwen3_moe", dtype=torch.bfloat16)


def train(
    output_dir: Path, model: Any, mode: str | None, *, checkpoints: bool = False, **more: Any
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
        torch_compile=mode is not None,
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
    config = MoEAccelConfig(expert_backend=backend)
    expected, without = train(tmp_path / "plain", model_of(adapted), "default", moe_config=config)
    logs, graphs = train(
        tmp_path / "graphs", model_of(adapted), "reduce-overhead", checkpoints=checkpoints, moe_config=config
    )
    assert without is None and graphs is not None
    assert graphs.replayed == 14, "of 16 passes"
    assert not any(layer.captured for layer in graphs._layers), "memory is not given back"
    for name in ("loss", "grad_norm", "moe/dropped", "moe/load_max_over_mean"):
        assert [log[name] for log in logs] == pytest.approx([log[name] for log in expected], rel=5e-2), name
    assert all(log["moe/tokens_per_second"] > 0 and "moe/time/backward" in log for log in logs)


@pytest.mark.parametrize("checkpoints", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize("adapted", [False, True], ids=["full", "adapters"])
def test_a_trainer_replays_by_itself(adapted: bool, checkpoints: bool, tmp_path: Path) -> None:
    off = MoEAccelConfig(cuda_graphs="off")
    expected, without = train(tmp_path / "off", model_of(adapted), None, checkpoints=checkpoints, moe_config=off)
    logs, graphs = train(tmp_path / "auto", model_of(adapted), None, checkpoints=checkpoints)
    assert without is None and graphs is not None
    assert graphs.replayed == 11, "of 16 passes, of which five come before"
    for name in ("loss", "grad_norm", "moe/dropped", "moe/load_max_over_mean"):
        assert [log[name] for log in logs] == pytest.approx([log[name] for log in expected], rel=5e-2), name
    assert all("moe/router_entropy" in log and log["moe/time/experts"] > 0 for log in expected)
    assert ["moe/router_entropy" in log and "moe/time/experts" in log for log in logs] == [True] + 3 * [False]


def test_training_goes_on_after_a_capture_that_failed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def model() -> Any:
        """Whose host waits for the device in a layer, which no graph can hold."""
        made = model_of(adapted=True)
        gate = made.get_base_model().model.layers[1].mlp.gate
        plain = gate.forward

        def forward(hidden: Any) -> Any:
            assert hidden.sum().item() == hidden.sum().item()
            return plain(hidden)

        gate.forward = forward
        return made

    off = MoEAccelConfig(cuda_graphs="off")
    expected, _ = train(tmp_path / "off", model(), None, moe_config=off)
    with caplog.at_level("INFO", "hf_moe_accel"):
        logs, graphs = train(tmp_path / "auto", model(), None)
    assert graphs is None
    assert "layers run without CUDA graphs from here on: none can hold a Qwen3MoeDecoderLayer" in caplog.text
    for name in ("loss", "grad_norm"):
        assert [log[name] for log in logs] == pytest.approx([log[name] for log in expected], rel=5e-2), name


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
