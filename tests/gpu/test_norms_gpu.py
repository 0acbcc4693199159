"""Norms in one kernel on a GPU: the formulas in all dtypes, reproducible, without a wait, with less memory kept."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hf_moe_accel import prepare_moe_model
from hf_moe_accel.ops.norms import rms_norm
from tests.gpu.test_backends_gpu import host_syncs
from tests.helpers.models import tiny_model
from tests.helpers.tolerances import assert_close
from tests.unit import test_norms as contract
from tests.unit.test_triton_ops import draw

pytestmark = pytest.mark.gpu

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def on_gpu(*shape: int, seed: int, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    return draw(*shape, seed=seed, scale=scale).to("cuda", dtype)


@pytest.mark.parametrize("trained", [True, False], ids=["trained", "frozen"])
@pytest.mark.parametrize("shape", [(1, 64), (5000, 16, 128), (777, 2048), (33, 7168), (5, 16384)], ids=str)
@pytest.mark.parametrize("dtypes", [(BF16, BF16), (BF16, FP32), (FP32, FP32), (FP16, FP16)], ids=str)
@pytest.mark.parametrize("formula", contract.FORMULAS, ids=["llama", "fp32", "shifted"])
def test_the_kernels_compute_the_formula(
    formula: Any, dtypes: tuple[torch.dtype, torch.dtype], shape: tuple[int, ...], trained: bool
) -> None:
    x = on_gpu(*shape, seed=0, dtype=dtypes[0]).requires_grad_()
    weight = on_gpu(shape[-1], seed=1, dtype=dtypes[1]).requires_grad_(trained)
    # A weight's gradient is a sum over all rows: small ones keep it of the order of one.
    rows = x.numel() // shape[-1]
    grad = on_gpu(*shape, seed=2, dtype=dtypes[0], scale=rows**-0.5)
    contract.check(formula, x, weight, grad, "backend")


def test_rows_may_lie_anyhow() -> None:
    x = on_gpu(6, 5, 96, seed=0, dtype=BF16).transpose(0, 1)[..., :48].requires_grad_()
    grad = on_gpu(6, 5, 48, seed=2, dtype=BF16).transpose(0, 1)
    contract.check(contract.LLAMA, x, on_gpu(48, seed=1, dtype=BF16).requires_grad_(), grad, "backend")


def test_forward_rounds_as_the_model_does() -> None:
    """Sums in another order change the last bit of few results only."""
    x, weight = on_gpu(4096, 2048, seed=0, dtype=BF16), on_gpu(2048, seed=1, dtype=BF16)
    for formula in contract.FORMULAS:
        assert (rms_norm(x, weight, formula) != formula(x, weight)).float().mean() < 1e-3


def test_nothing_waits_and_results_are_reproducible() -> None:
    x = on_gpu(8192, 2048, seed=0, dtype=BF16).requires_grad_()
    weight = on_gpu(2048, seed=1, dtype=BF16).requires_grad_()
    grad = on_gpu(8192, 2048, seed=2, dtype=BF16)

    def gradients() -> tuple[Tensor, ...]:
        return torch.autograd.grad(rms_norm(x, weight, contract.LLAMA), (x, weight), grad)

    first = gradients()
    with host_syncs() as syncs:
        again = gradients()
    assert [str(sync) for sync in syncs] == []
    assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))


@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
@pytest.mark.parametrize("name", ["qwen3_moe", "mixtral", "deepseek_v3", "gpt_oss"])
def test_a_model_trains_as_before(name: str, dtype: torch.dtype) -> None:
    model = prepare_moe_model(tiny_model(name, dtype=dtype).cuda())
    assert "norms" in model.moe_runtime.report
    plain = copy.deepcopy(model)
    for module in plain.modules():
        if type(module).__name__.endswith("RMSNorm"):
            del module.forward
    ids = contract.IDS.cuda()
    kind = {BF16: "backend", FP32: "training"}[dtype]
    assert_close(contract.step(model, ids)["loss"], contract.step(plain, ids)["loss"], kind)


def test_less_is_kept() -> None:
    kept = []
    for fused in (False, True):
        model = tiny_model("qwen3_moe", hidden_size=1024, dtype=BF16).cuda()
        norms = nn.Sequential(model.model.layers[0].input_layernorm, model.model.layers[1].input_layernorm)
        if fused:
            assert contract.fuse_norms(norms) == 2
        x = on_gpu(4096, 1024, seed=0, dtype=BF16).requires_grad_()
        before = torch.cuda.memory_allocated()
        out = norms(x)
        kept.append((torch.cuda.memory_allocated() - before - out.nbytes) / x.nbytes)
        del out
    assert kept[0] > 6 and kept[1] < 1.1, kept  # of what goes in; ours keeps what goes in between
