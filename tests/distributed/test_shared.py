"""Shared experts compute while tokens travel: by the order of launches and waits, and with unchanged results."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from hf_moe_accel import MoEAccelConfig, prepare_moe_model
from hf_moe_accel.hf.shared import SharedExperts
from tests.helpers.links import RecordingDispatcher
from tests.helpers.models import tiny_model
from tests.helpers.ranks import run_ranks
from tests.helpers.tolerances import assert_close

# How a block calls them: DeepSeek after the routed experts, Qwen2-MoE before, and gates their result.
ORDERS = {"after": "deepseek_v3", "before": "qwen2_moe"}
ONE_MOE_LAYER: dict[str, dict[str, Any]] = {"deepseek_v3": {}, "qwen2_moe": {"num_hidden_layers": 1}}


def whole(tensor: Any) -> Any:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def batch() -> dict[str, Any]:
    rank = dist.get_rank()
    ids = torch.randint(3, 128, (2, 16 + rank), generator=torch.Generator().manual_seed(rank))
    return {"input_ids": ids, "labels": ids}


def deferring(model: Any) -> list[SharedExperts]:
    return [m.forward for m in model.modules() if isinstance(m.__dict__.get("forward"), SharedExperts)]


# ---------------------------------------------------------------------------------------------------------------------
# The order


def trace_of(name: str, chunks: int | str) -> list[str]:
    """Launches and waits of the last chunk's results and of the first gradients, and the shared experts between."""
    model = prepare_moe_model(
        tiny_model(name, **ONE_MOE_LAYER[name]), MoEAccelConfig(ep_size=2, overlap_chunks=chunks)
    )
    trace: list[Any] = []
    runtime = model.moe_runtime
    runtime.dispatcher = RecordingDispatcher(runtime.dispatcher, trace)
    (shared,) = [m for n, m in model.named_modules() if n.rpartition(".")[2] in ("shared_expert", "shared_experts")]

    def note(_: Any, __: Any, out: torch.Tensor) -> None:
        trace.append(("compute", "shared", 0))
        out.register_hook(lambda grad: trace.append(("compute", "shared backward", 0)))

    shared.down_proj.register_forward_hook(note)
    model(**batch()).loss.backward()
    runtime.close()
    return [f"{kind} {what} {chunk}" for kind, what, chunk in trace]


@pytest.mark.parametrize("chunks", [2, 3, "auto"])
@pytest.mark.parametrize("order", ORDERS)
def test_shared_experts_compute_between_launch_and_wait(order: str, chunks: int | str) -> None:
    traces = run_ranks(trace_of, 2, ORDERS[order], chunks)
    last = 0 if chunks == "auto" else int(chunks) - 1  # "auto" does not cut so few tokens
    for trace in traces:
        assert trace == traces[0], "the ranks order their transfers differently"
        at = {event: place for place, event in enumerate(trace)}
        forward = at["compute shared 0"]
        assert at[f"launch combine {last}"] < forward < at[f"wait combine {last}"]
        backward = at["compute shared backward 0"]
        assert at["launch combine_backward 0"] < backward < at["wait combine_backward 0"]


@pytest.mark.parametrize("order", ORDERS)
def test_with_one_chunk_nothing_is_deferred(order: str) -> None:
    for trace in run_ranks(trace_of, 2, ORDERS[order], 1):
        at = {event: place for place, event in enumerate(trace)}
        assert not at["launch combine 0"] < at["compute shared 0"] < at["wait combine 0"]


def reports(name: str, **sizes: Any) -> str:
    said: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hf_moe_accel.prepare.say", said.append)
        prepare_moe_model(tiny_model(name, **sizes), MoEAccelConfig(ep_size=2, overlap_chunks=2)).moe_runtime.close()
    return "\n".join(said)


def test_shared_experts_that_are_not_recognised_are_reported() -> None:
    # Its experts work in a hidden size of their own, and what leads back from it needs their result at once.
    report = run_ranks(partial(reports, moe_latent_size=32), 2, "nemotron_h")[0]
    assert "shared experts while tokens travel: model.layers.1.mixer.shared_experts does not lie beside" in report
    assert "shared experts" not in run_ranks(reports, 2, "deepseek_v3")[0]


# ---------------------------------------------------------------------------------------------------------------------
# The results


def results(name: str, chunks: int | str, checkpointing: dict[str, Any] | None) -> dict[str, Any]:
    """Of two passes whose gradients add up, and of an evaluation."""
    model = prepare_moe_model(tiny_model(name), MoEAccelConfig(ep_size=2, overlap_chunks=chunks))
    if checkpointing is not None:
        model.activation_checkpointing_enable(checkpointing)
    found: dict[str, Any] = {"deferring": len(deferring(model))}
    for i in range(2):
        loss = model(**batch()).loss
        loss.backward()
        found[f"loss {i}"] = loss.detach()
    with torch.no_grad():
        found["evaluated"] = model.eval()(**batch()).logits
    with torch.inference_mode():
        found["inferred"] = model(**batch()).logits.clone()
    model.moe_runtime.close()
    return found | {"grads": {n: whole(p.grad) for n, p in model.named_parameters() if p.grad is not None}}


LAYERS = {"deepseek_v3": 1, "qwen2_moe": 2, "nemotron_h": 2, "glm4_moe": 2}
CHECKPOINTING: list[dict[str, Any] | None] = [None, {"use_reentrant": False}, {"use_reentrant": True}]


@pytest.mark.parametrize(
    ("name", "checkpointing"),
    [
        pytest.param(name, how, marks=pytest.mark.slow if how and name not in ORDERS.values() else ())
        for name in LAYERS
        for how in CHECKPOINTING
    ],
    ids=str,
)
def test_results_are_those_without_overlap(name: str, checkpointing: dict[str, Any] | None) -> None:
    expected = run_ranks(results, 2, name, 1, checkpointing)
    for ours, plain in zip(run_ranks(results, 2, name, 2, checkpointing), expected, strict=True):
        assert (plain.pop("deferring"), ours.pop("deferring")) == (0, LAYERS[name])
        assert_close(ours, plain, "training")
