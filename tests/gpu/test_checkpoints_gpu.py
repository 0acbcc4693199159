"""Checkpoints and resume on GPUs: one, and over NCCL as many as there are up to four."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.ranks import launch

pytestmark = pytest.mark.gpu

JOB = "tests.gpu.checkpoint_job"


def train(tmp_path: Path, ranks: int, name: str, resume: str = "", **settings: Any) -> dict[str, Any]:
    result = tmp_path / f"{name}.json"
    seen = (os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(torch.cuda.device_count())))).split(",")
    visible = {"CUDA_VISIBLE_DEVICES": ",".join(seen[:ranks])}
    arguments = ["-m", JOB, str(tmp_path / name), resume, str(result), json.dumps(settings)]
    done = launch(arguments, ranks, timeout=240, env=visible)
    assert done.returncode == 0, done.stderr[-4000:]
    values: dict[str, Any] = json.loads(result.read_text())
    assert values["saved_exactly"]
    return values


def numbers_of_ranks() -> list[int]:
    return [ranks for ranks in (1, 2, 4) if ranks <= max(1, torch.cuda.device_count())]


@pytest.mark.parametrize("async_save", [False, True])
def test_a_run_goes_on(async_save: bool, tmp_path: Path) -> None:
    most = numbers_of_ranks()[-1]
    whole = train(tmp_path, most, "whole", async_save=async_save)
    checkpoint = tmp_path / "from" / "checkpoint-4"
    shutil.copytree(tmp_path / "whole" / "checkpoint-4", checkpoint)
    for ranks in numbers_of_ranks():
        resumed = train(tmp_path, ranks, f"on {ranks}", str(checkpoint), async_save=async_save)
        for mine, theirs in zip(resumed["log"], whole["log"], strict=True):
            print(f"{most} -> {ranks} ranks, step {mine['step']}: {mine['loss']!r} resumed, {theirs['loss']!r} not")
            assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-2)
            assert mine["learning_rate"] == theirs["learning_rate"]
