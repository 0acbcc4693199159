"""Norms in one kernel under FSDP2, which frees and gathers their weights: gradients as without."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from hf_moe_accel import MoEAccelConfig, prepare_moe_model
from hf_moe_accel.hf import norms
from tests.helpers.models import tiny_model
from tests.helpers.ranks import run_ranks
from tests.helpers.tolerances import assert_close
from tests.unit.test_triton_ops import interpreted

pytestmark = pytest.mark.distributed


def gradients(ep_size: int, fused: bool) -> dict[str, Any]:
    """Of two passes that add up."""
    model = prepare_moe_model(tiny_model("qwen3_moe"), MoEAccelConfig(ep_size=ep_size))
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    rank, plain = dist.get_rank(), norms._has_kernels
    found: dict[str, Any] = {"norms": norms.fuse_norms(model)}
    # Triton's interpreter stands in for a GPU.
    norms._has_kernels = lambda hidden: fused
    try:
        for number in range(2):
            generator = torch.Generator().manual_seed(2 * rank + number)
            ids = torch.randint(3, 128, (1, 8), generator=generator)
            loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
    finally:
        norms._has_kernels = plain
    found["loss"] = loss.detach()
    for name, parameter in model.named_parameters():
        grad = parameter.grad
        found[name] = grad.full_tensor() if isinstance(grad, DTensor) else grad
    return found


@interpreted
@pytest.mark.parametrize("ep_size", [1, 2])
def test_gradients_are_the_same(ep_size: int) -> None:
    for plain, fused in zip(
        run_ranks(gradients, 2, ep_size, False), run_ranks(gradients, 2, ep_size, True), strict=True
    ):
        assert fused["norms"] == 9
        assert_close(fused, plain, "training")
