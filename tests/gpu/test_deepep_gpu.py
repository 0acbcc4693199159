"""The dispatch contract on the real DeepEP: the same cases as on its double."""

from __future__ import annotations

import os

import pytest
import torch

from hf_moe_accel.ops import deep_ep
from tests.helpers.ranks import launch

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize("name", ["deepep", "deepep narrow"])
def test_dispatch_and_combine_are_the_weighted_sum(name: str, world_size: int) -> None:
    reason = deep_ep.why_not_device(torch.device("cuda", torch.cuda.current_device())) or deep_ep.why_not_installed()
    if reason is not None:
        pytest.skip(reason)
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(torch.cuda.device_count()))))
    done = launch(["-m", "tests.gpu.deepep_job", name], world_size, timeout=600, env={"CUDA_VISIBLE_DEVICES": visible})
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count(f"the contract holds for {name}") == world_size
