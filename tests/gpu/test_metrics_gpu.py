"""Counting and timing on a CUDA device: without waiting for it, and by its own clock."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from transformers import TrainingArguments

from hf_moe_accel import AcceleratedMoETrainer
from hf_moe_accel.callbacks.flops import peak_flops
from hf_moe_accel.callbacks.run_file import METRICS
from hf_moe_accel.moe.stats import RoutingStats
from hf_moe_accel.moe.timing import PartTimer
from tests.helpers.models import ragged_batch_dataset, tiny_model
from tests.unit.test_stats import rows_for

DEVICE = torch.device("cuda")


@contextmanager
def no_waiting() -> Iterator[None]:
    """Whatever waits for the device raises."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_counting_and_timing_do_not_wait_for_the_device() -> None:
    stats, timer = RoutingStats(2, 4), PartTimer()
    timer.active, timer.device = True, DEVICE
    ids = torch.tensor([[0, 1], [1, 3]], device=DEVICE)
    rows = rows_for([0, 1, 1, 3], 2, 4)
    rows = rows._replace(counts_e=rows.counts_e.to(DEVICE))
    with no_waiting():
        with timer.part("experts"):
            stats.add(0, ids)
            stats.add_rows(0, [rows])
        taken = stats.take()
    assert taken.choices_LE.tolist() == [[1, 2, 0, 1], [0, 0, 0, 0]]
    assert taken.rows_L.tolist() == [4, 0]
    assert timer.take()["experts"] > 0


def test_parts_are_timed_by_the_device() -> None:
    timer = PartTimer()
    timer.active, timer.device = True, DEVICE
    x = torch.randn(8192, 8192, device=DEVICE)
    x @ x
    torch.cuda.synchronize()
    began = time.perf_counter()
    with timer.part("experts"):
        for _ in range(20):
            x @ x
    launched = time.perf_counter() - began
    torch.cuda.synchronize()
    spent = time.perf_counter() - began
    assert launched < spent / 2 < timer.take()["experts"] < 1.5 * spent


def test_a_run_logs_every_number(tmp_path: Path) -> None:
    args = TrainingArguments(
        output_dir=str(tmp_path),
        bf16=True,
        per_device_train_batch_size=4,
        max_steps=4,
        logging_steps=2,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    trainer = AcceleratedMoETrainer(
        model=tiny_model("qwen3_moe", dtype=torch.bfloat16), args=args, train_dataset=ragged_batch_dataset(32, 16)
    )
    trainer.train()
    several_ranks = {name for name in METRICS if name.startswith("moe/rank_")}
    for entry in (entry for entry in trainer.state.log_history if "loss" in entry):
        names = {name for name in entry if name.startswith("moe/")}
        known = set() if peak_flops(DEVICE) else {"moe/mfu"}
        assert names == set(METRICS) - several_ranks - {"moe/aux_loss"} - known
        spent = {name.removeprefix("moe/time/"): entry[name] for name in names if name.startswith("moe/time/")}
        assert all(seconds > 0 for seconds in spent.values())
        assert spent["dispatch"] + spent["experts"] + spent["combine"] <= spent["forward"] + spent["backward"]
        assert entry["moe/dropped"] == 0 and entry["moe/peak_memory_gib"] == pytest.approx(
            torch.cuda.max_memory_allocated() / 2**30, abs=0.5
        )
