"""Shared experts while tokens travel, on two GPUs over NCCL: results as without overlap."""

from __future__ import annotations

import os

import pytest
import torch

from tests.helpers.ranks import launch

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")]


@pytest.mark.parametrize("name", ["deepseek_v3", "glm4_moe", "qwen2_moe"])
def test_results_are_those_without_overlap(name: str) -> None:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(torch.cuda.device_count()))))
    done = launch(["-m", "tests.gpu.shared_job", name], 2, timeout=300, env={"CUDA_VISIBLE_DEVICES": visible})
    assert done.returncode == 0, done.stdout + done.stderr[-8000:]
    print(done.stdout)
    assert done.stdout.count(f"equal for {name}") == 2
