"""The filter of losses that are not finite: as Trainer's, without a look at the loss."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import Trainer

from hf_moe_accel import AcceleratedMoETrainer
from hf_moe_accel.trainers.finite import finite_loss
from tests.helpers.models import tiny_model
from tests.unit.test_bad_input import arguments


@pytest.mark.parametrize("value", [1.5, float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_is_replaced(value: float) -> None:
    loss = finite_loss(torch.tensor(value), torch.tensor(0.25))
    assert torch.isnan(loss) is False and torch.isinf(loss) is False, "somebody has to look"
    total = torch.tensor(1.0)
    total += loss
    assert total.item() == (2.5 if value == 1.5 else 1.25)
    assert type(total) is Tensor and type(loss + 1) is Tensor and loss.device == total.device


class Spoiled:
    """Losses of which some are not finite."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        self.calls += 1
        logits = outputs.logits[:, :-1].flatten(0, 1)
        loss = torch.nn.functional.cross_entropy(logits, labels[:, 1:].flatten())
        return loss * {2: torch.nan, 5: torch.inf}.get(self.calls, 1.0)


class Looks(AcceleratedMoETrainer):
    """A trainer that looks at the losses itself."""

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        loss = super().training_step(*args, **kwargs)
        self.seen = [*getattr(self, "seen", []), bool(torch.isfinite(loss)), bool(torch.isnan(loss))]
        return loss


@pytest.mark.parametrize("trainer_class", [AcceleratedMoETrainer, Looks])
def test_losses_are_logged_as_by_trainer(trainer_class: type[Any], tmp_path: Path) -> None:
    rows = torch.randint(3, 128, (16, 8), generator=torch.Generator().manual_seed(0))
    logged: list[list[float]] = []
    for each in (Trainer, trainer_class):
        trainer = each(
            model=tiny_model("qwen3_moe"),
            # Without a learning rate the weights stay finite.
            args=arguments(
                tmp_path,
                max_steps=6,
                learning_rate=0.0,
                weight_decay=0.0,
                logging_steps=3,
                per_device_train_batch_size=2,
            ),
            train_dataset=[{"input_ids": row, "labels": row} for row in rows],
            compute_loss_func=Spoiled(),
        )
        trainer.train()
        logged.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert np.isfinite(logged[0]).all() and logged[1] == pytest.approx(logged[0], rel=1e-5)
    if trainer_class is Looks:
        assert trainer.seen[:4] == [True, False, False, True], "a subclass gets the loss as it is"
