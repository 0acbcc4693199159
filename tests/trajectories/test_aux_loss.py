"""With the routers' auxiliary loss on, training equals stock data parallel on as many ranks.

The loss is a mean over the tokens of one rank, so that one process, which sees all tokens, is no measure.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer

from hf_moe_accel import AcceleratedMoETrainer, MoEAccelConfig
from tests.helpers.loops import load_checkpoint
from tests.helpers.models import ragged_batch_dataset, tiny_model
from tests.helpers.ranks import run_ranks
from tests.helpers.tolerances import assert_close
from tests.helpers.trajectories import trajectory_arguments

WORLD_SIZE = 2
STEPS = 6
BATCH = 4
COEFFICIENT = 0.01


def train(name: str, output_dir: str, ours: bool) -> dict[str, Any]:
    model = tiny_model(name, output_router_logits=True, router_aux_loss_coef=COEFFICIENT)
    auxiliary: list[float] = []
    model.register_forward_hook(lambda _, args, output: auxiliary.append(float(output.aux_loss)))
    args = trajectory_arguments(output_dir, BATCH, 2, STEPS)
    data = ragged_batch_dataset(2 * BATCH * WORLD_SIZE * STEPS, 24, seed=7)
    if ours:
        trainer = AcceleratedMoETrainer(model, args, train_dataset=data, moe_config=MoEAccelConfig(ep_size=2))
    else:
        trainer = Trainer(model, args, train_dataset=data)
    trainer.train()
    assert isinstance(trainer.model_wrapped, DistributedDataParallel) == (not ours)
    trainer.save_model(f"{output_dir}/final")
    steps = [(entry["loss"], float(entry["grad_norm"])) for entry in trainer.state.log_history if "loss" in entry]
    return {"steps": steps, "auxiliary": auxiliary}


@pytest.mark.parametrize("name", ["qwen3_moe", "mixtral"])
def test_training_with_auxiliary_loss_equals_data_parallel(name: str, tmp_path: Path) -> None:
    expected = run_ranks(train, WORLD_SIZE, name, str(tmp_path / "plain"), False, init=False)
    actual = run_ranks(train, WORLD_SIZE, name, str(tmp_path / "ours"), True, init=False)
    assert_close(actual, expected, "training")
    # Both ranks see the same global loss, and auxiliary losses of their own.
    assert actual[0]["steps"] == actual[1]["steps"]
    assert actual[0]["auxiliary"] != actual[1]["auxiliary"]
    # A perfectly balanced top-2 router has an auxiliary loss of 2.
    assert min(actual[0]["auxiliary"]) > 1.9
    assert_close(load_checkpoint(tmp_path / "ours/final"), load_checkpoint(tmp_path / "plain/final"), "training")
