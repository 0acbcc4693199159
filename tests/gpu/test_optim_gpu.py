"""Our optimizer's kernels on a GPU: the same bodies as on the CPU, in bf16 as well, and a parameter of real size."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import Trainer

from hf_moe_accel import AcceleratedMoETrainer, AdamW, optim
from tests.gpu.test_backends_gpu import host_syncs
from tests.helpers.large import kernels
from tests.helpers.tolerances import assert_close
from tests.unit import test_optim as contract

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_adamw_steps_as_torch(dtype: torch.dtype) -> None:
    with kernels() as ran:
        contract.check_steps(dtype, "cuda", "backend" if dtype == torch.float16 else "training")
    assert ran == ["adamw_"] * 6


@pytest.mark.parametrize("max_norm", [1.0, 1e4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_clipping_as_torch(dtype: torch.dtype, max_norm: float) -> None:
    with kernels() as ran:
        contract.check_clipping(dtype, "cuda", max_norm)
    assert ran == ["shrink_"] * 2


def test_a_parameter_of_real_size() -> None:
    """Clipped, without anything of a test in between, and without a wait for the device."""
    of = {}
    for cls in (AdamW, torch.optim.AdamW):
        torch.manual_seed(0)
        value = nn.Parameter(torch.randn(optim._LARGE + 12345, device="cuda", dtype=torch.bfloat16))
        value.grad = torch.randn_like(value)
        optimizer = cls([value], lr=1e-2, fused=True)
        optimizer.step()
        with host_syncs() as syncs:
            contract.clip_for(optimizer, [value], 1.0)
            optimizer.step()
        assert not syncs
        of[cls] = [value.data, optimizer.state[value]["exp_avg"], optimizer.state[value]["exp_avg_sq"]]
    assert_close(of[AdamW], of[torch.optim.AdamW], "training")


def test_the_trainer_takes_it(tmp_path: Path) -> None:
    more = {"optim": "adamw_torch_fused", "max_grad_norm": 0.5, "use_cpu": False}
    stock = contract.run(Trainer, tmp_path, **more)
    for callbacks, expected in (([], {"adamw_"}), ([contract.Looks()], {"adamw_", "shrink_"})):
        with kernels() as ran:
            ours = contract.run(AcceleratedMoETrainer, tmp_path, callbacks=callbacks, **more)
        assert set(ran) == expected
        assert_close(contract.logs_of(ours), contract.logs_of(stock), "backend")
