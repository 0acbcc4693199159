"""The metrics in trackers that transformers reports to by itself: what their files hold afterwards."""

from __future__ import annotations

from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from hf_moe_accel import AcceleratedMoETrainer
from tests.helpers.models import ragged_batch_dataset, tiny_model
from tests.unit.test_bad_input import arguments


def test_tensorboard(tmp_path: Path) -> None:
    args = arguments(tmp_path, max_steps=4, per_device_train_batch_size=2, logging_steps=2, report_to=["tensorboard"])
    trainer = AcceleratedMoETrainer(
        model=tiny_model("qwen3_moe"), args=args, train_dataset=ragged_batch_dataset(16, 16)
    )
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    (events,) = {path.parent for path in tmp_path.rglob("events.out.tfevents.*")}
    read = EventAccumulator(str(events))
    read.Reload()
    ours = {name for name in logged[-1] if name.startswith("moe/")}
    assert {"moe/tokens_per_second", "moe/load_max_over_mean", "moe/time/experts"} <= ours
    for name in ours:
        (tag,) = [tag for tag in read.Tags()["scalars"] if tag.endswith(name)]
        values = {event.step: event.value for event in read.Scalars(tag)}
        expected = {entry["step"]: entry[name] for entry in logged if name in entry}
        assert values == pytest.approx(expected, rel=1e-6), tag
