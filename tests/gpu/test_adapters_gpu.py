"""LoRA on experts on GPUs, as stock PEFT on one: losses, the adapter that is saved, and the merged model."""

from __future__ import annotations

import itertools
import json
import os
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from tests.gpu.test_checkpoints_gpu import numbers_of_ranks
from tests.helpers.models import tiny_model
from tests.helpers.ranks import launch

pytestmark = pytest.mark.gpu

JOB = "tests.gpu.adapter_job"


def train(tmp_path: Path, kind: str, ranks: int) -> tuple[list[float], Path]:
    out, result = tmp_path / f"{kind} {ranks}", tmp_path / f"{kind} {ranks}.json"
    seen = (os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(torch.cuda.device_count())))).split(",")
    visible = {"CUDA_VISIBLE_DEVICES": ",".join(seen[:ranks])}
    done = launch(["-m", JOB, kind, str(out), str(result)], ranks, timeout=240, env=visible)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(result.read_text())["losses"], out


def test_as_stock_peft_on_a_gpu(tmp_path: Path) -> None:
    stock, _ = train(tmp_path, "stock", 1)
    for ranks, kind in itertools.product(numbers_of_ranks(), ("ours", "sharded first")):
        losses, out = train(tmp_path, kind, ranks)
        print(f"{ranks} ranks, {kind}: {losses}, stock on one: {stock}")
        assert losses == pytest.approx(stock, rel=1e-2)
        adapted = PeftModel.from_pretrained(tiny_model("qwen3_moe", dtype=torch.bfloat16), out).merge_and_unload()
        merged = AutoModelForCausalLM.from_pretrained(out / "merged", dtype=torch.bfloat16).state_dict()
        for name, expected in adapted.state_dict().items():
            # PEFT rounds the update to bf16 before it adds it. Weights, not logits: in a model as small as this what
            # rounds otherwise may send a token to other experts.
            torch.testing.assert_close(merged[name], expected, rtol=2**-7, atol=2**-9, msg=f"{{}} of {name}".format)


def test_liger_kernels_around_the_experts(tmp_path: Path) -> None:
    pytest.importorskip("liger_kernel")
    plain, _ = train(tmp_path, "ours", 1)
    for ranks in numbers_of_ranks():
        losses, _ = train(tmp_path, "liger", ranks)
        print(f"{ranks} ranks, liger: {losses}, without on one: {plain}")
        assert losses == pytest.approx(plain, rel=1e-2)
