"""Shared experts while tokens travel, on GPUs over NCCL, as one rank of torchrun: `-m tests.gpu.shared_job MODEL`.

With fewer GPUs than ranks, ranks share them over gloo: for correctness only, never for speed.
"""

from __future__ import annotations

import itertools
import os
import sys
from contextlib import nullcontext
from datetime import timedelta
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import record
from torch.distributed.tensor import DTensor

from hf_moe_accel import MoEAccelConfig, prepare_moe_model
from tests.distributed.test_shared import deferring
from tests.helpers.models import tiny_model
from tests.helpers.tolerances import assert_close


def prepared(name: str, chunks: int, dtype: torch.dtype, *, overlap: bool, **sizes: Any) -> Any:
    config = MoEAccelConfig(ep_size=dist.get_world_size(), overlap_chunks=chunks, token_dispatcher="all_to_all")
    model = tiny_model(name, dtype=dtype, **sizes).to("cuda")
    with nullcontext() if overlap else mock.patch("hf_moe_accel.prepare.overlap_shared"):
        return prepare_moe_model(model, config)


def batch(rows: int, length: int, seed: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(10 * seed + dist.get_rank())
    ids = torch.randint(3, 128, (rows, length), generator=generator).to("cuda")
    return {"input_ids": ids, "labels": ids}


def results(name: str, chunks: int, checkpointing: bool, overlap: bool) -> dict[str, Any]:
    """Of passes whose gradients add up, and of an evaluation."""
    model = prepared(name, chunks, torch.float32, overlap=overlap, hidden_size=512, moe_intermediate_size=256)
    assert bool(deferring(model)) == overlap
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    found: dict[str, Any] = {}
    for i in range(4):
        loss = model(**batch(4 + dist.get_rank(), 128, i)).loss
        loss.backward()
        found[f"loss {i}"] = loss.detach().cpu()
    with torch.no_grad():
        found["evaluated"] = model.eval()(**batch(4, 128, 9)).logits.cpu()
    for key, parameter in model.named_parameters():
        grad = parameter.grad
        if grad is not None:
            found[key] = (grad.full_tensor() if isinstance(grad, DTensor) else grad).cpu()
    model.moe_runtime.close()
    return found


def covered(name: str, chunks: int, overlap: bool) -> str:
    """How much of the time of NCCL's exchanges other kernels ran as well, in a pass of a wide layer."""
    sizes = {"hidden_size": 2048, "moe_intermediate_size": 1024, "num_hidden_layers": 2}
    if name == "qwen2_moe":
        sizes["shared_expert_intermediate_size"] = 2048
    model = prepared(name, chunks, torch.bfloat16, overlap=overlap, **sizes)
    inputs = batch(16, 128, 0)
    for _ in range(3):
        model(**inputs).loss.backward()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        model(**inputs).loss.backward()
        torch.cuda.synchronize()
    kernels = [e for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    spans = [(e.time_range.start, e.time_range.end, "SendRecv" in e.name, "nccl" in e.name) for e in kernels]
    sent = [(start, end) for start, end, sends, _ in spans if sends]
    others = sorted((start, end) for start, end, _, nccl in spans if not nccl)
    total = sum(end - start for start, end in sent)
    shared = 0.0
    for start, end in sent:
        at = start
        for first, last in others:
            first, last = max(first, at), min(last, end)
            if first < last:
                shared += last - first
                at = last
    model.moe_runtime.close()
    return f"{shared:.0f} of {total:.0f} us"


@record
def main(name: str) -> None:
    rank, world_size, devices = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), torch.cuda.device_count()
    device = torch.device("cuda", rank % devices)
    torch.cuda.set_device(device)
    if world_size <= devices:
        dist.init_process_group("nccl", device_id=device, timeout=timedelta(seconds=120))
    else:
        dist.init_process_group("cpu:gloo,cuda:gloo", timeout=timedelta(seconds=120))
    # Both with as many chunks: the products of another number round otherwise, and two layers of routers magnify that.
    for checkpointing, chunks in itertools.product((False, True), (2, 3)):
        ours, expected = (results(name, chunks, checkpointing, overlap) for overlap in (True, False))
        most = max(float((ours[key] - expected[key]).abs().max()) for key in expected)
        print(f"rank {rank}, {name}, checkpointing {checkpointing}, chunks {chunks}: differs by {most:.1e} at most")
        assert_close(ours, expected, "training")
    if world_size <= devices:
        for chunks, overlap in itertools.product((2, 3), (False, True)):
            took = covered(name, chunks, overlap)
            if rank == 0:
                how = "with" if overlap else "without"
                print(f"{name}, {chunks} chunks, {how} shared experts: other kernels ran in {took} of exchanges")
    dist.destroy_process_group()
    print(f"rank {rank} of {world_size}: equal for {name}")


if __name__ == "__main__":
    main(sys.argv[1])
