"""Activation checkpointing: equal gradients, and a non-reentrant recompute that sends nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import create_selective_checkpoint_contexts

from hf_moe_accel import MoEAccelConfig, prepare_moe_model
from hf_moe_accel.dispatch.all_to_all import AllToAllDispatcher
from hf_moe_accel.experts.grouped_mm import GroupedMMBackend
from hf_moe_accel.hf.compiling import compile_layers
from hf_moe_accel.moe import replay
from tests.helpers.grids import slow
from tests.helpers.models import tiny_model
from tests.helpers.ranks import RanksError, run_ranks
from tests.helpers.tolerances import assert_close

pytestmark = pytest.mark.distributed
NUM_LAYERS = 2
EXCHANGES_FORWARD, EXCHANGES_BACKWARD = 3 * NUM_LAYERS, 3 * NUM_LAYERS  # rows, pairs, back; gradients of each


def save_everything(*_: Any) -> Any:
    return create_selective_checkpoint_contexts([torch.ops.aten.mm.default])


def gradients(
    checkpointing: dict[str, Any] | None,
    when: str = "after",
    passes: int = 1,
    level: str = "activation",
    *,
    compiles: bool = False,
) -> dict[str, Any]:
    """Loss, gradients and the number of exchanges of a backward pass."""
    model = tiny_model("qwen3_moe")
    if checkpointing is not None and when == "before":
        model.activation_checkpointing_enable(checkpointing)
    model = prepare_moe_model(model, MoEAccelConfig(ep_size=2, expert_checkpointing=level))
    if checkpointing is not None and when == "after":
        model.activation_checkpointing_enable(checkpointing)
    if compiles:
        compile_layers(model, backend="aot_eager")
    model.train()
    sent = []
    exchange = AllToAllDispatcher._exchange
    AllToAllDispatcher._exchange = lambda *args: sent.append(1) or exchange(*args)  # type: ignore[method-assign]
    try:
        rank = dist.get_rank()
        ids = torch.randint(3, 128, (2, 16 + rank), generator=torch.Generator().manual_seed(rank))
        for _ in range(passes):
            loss = model(input_ids=ids, labels=ids).loss
            forward = len(sent)
            loss.backward()
    finally:
        AllToAllDispatcher._exchange = exchange  # type: ignore[method-assign]
    stats = model.moe_runtime.stats.take().choices_LE
    return {
        "loss": loss.detach(),
        "forward": forward,
        "sent": len(sent),
        "choices": int(stats.sum()),
        "grads": {
            n: p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad for n, p in model.named_parameters()
        },
    }


@pytest.mark.parametrize("when", ["after", *slow("before")])
def test_a_recompute_sends_nothing(when: str) -> None:
    for plain, kept in zip(
        run_ranks(gradients, 2, None), run_ranks(gradients, 2, {"use_reentrant": False}, when), strict=True
    ):
        assert plain["sent"] == kept["sent"] == EXCHANGES_FORWARD + EXCHANGES_BACKWARD
        assert kept["choices"] == plain["choices"], "the recompute was counted as well"
        assert_close(kept["loss"], plain["loss"], "exact")
        assert_close(kept["grads"], plain["grads"], "training")


def test_a_compiled_recompute_sends_nothing() -> None:
    plains = run_ranks(gradients, 2, None)
    for plain, kept in zip(plains, run_ranks(gradients, 2, {"use_reentrant": False}, compiles=True), strict=True):
        assert kept["sent"] == EXCHANGES_FORWARD + EXCHANGES_BACKWARD
        assert kept["choices"] == plain["choices"]
        assert_close(kept["grads"], plain["grads"], "training")


@pytest.mark.parametrize(("level", "again"), [("up", 0), ("full", NUM_LAYERS)])
@pytest.mark.parametrize("checkpointing", [{"use_reentrant": False}, *slow(None)])
def test_levels_of_experts(checkpointing: dict[str, Any] | None, level: str, again: int) -> None:
    """ "full" sends the rows once more, and nothing else: neither the routing nor the result."""
    plains = run_ranks(gradients, 2, None)
    for plain, of_level in zip(plains, run_ranks(gradients, 2, checkpointing, "after", 1, level), strict=True):
        assert of_level["sent"] == EXCHANGES_FORWARD + EXCHANGES_BACKWARD + again
        assert of_level["choices"] == plain["choices"], "counted again"
        assert_close(of_level["loss"], plain["loss"], "exact")
        assert_close(of_level["grads"], plain["grads"], "training")


@pytest.mark.parametrize(
    "checkpointing", [{"use_reentrant": True}, {"use_reentrant": False, "context_fn": save_everything}]
)
def test_reentrant_and_a_context_of_the_user_send_once_again(checkpointing: dict[str, Any]) -> None:
    for plain, again in zip(run_ranks(gradients, 2, None), run_ranks(gradients, 2, checkpointing), strict=True):
        assert again["sent"] == 2 * EXCHANGES_FORWARD + EXCHANGES_BACKWARD
        assert_close(again["grads"], plain["grads"], "training")


@pytest.mark.parametrize(("kind", "again"), [("qwen3_moe", 0), ("deepseek_v3", 1)])
def test_on_one_rank_a_recompute_ends_where_the_result_is_not_read(
    kind: str, again: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shared experts come after it."""
    called: list[str] = []
    forward = GroupedMMBackend.forward

    def spy(*args: Any) -> Any:
        result, kept = forward(*args)
        called.append("forward")
        return lambda: called.append("result") or result(), kept

    monkeypatch.setattr(GroupedMMBackend, "forward", spy)
    grads = []
    for checkpointing in (None, {"use_reentrant": False}):
        model = prepare_moe_model(tiny_model(kind), MoEAccelConfig(expert_backend="grouped_mm"))
        num_layers = sum("moe_binding" in vars(module) for module in model.modules())
        if checkpointing is not None:
            model.activation_checkpointing_enable(checkpointing)
        called.clear()
        ids = torch.randint(3, 128, (2, 16), generator=torch.Generator().manual_seed(0))
        model.train()(input_ids=ids, labels=ids).loss.backward()
        grads.append({name: parameter.grad for name, parameter in model.named_parameters()})
    assert called.count("forward") == 2 * num_layers > 0
    assert called.count("result") == (1 + again) * num_layers
    assert_close(grads[1], grads[0], "training")


def test_accumulation_keeps_micro_batches_apart() -> None:
    for plain, kept in zip(
        run_ranks(gradients, 2, None, passes=2),
        run_ranks(gradients, 2, {"use_reentrant": False}, passes=2),
        strict=True,
    ):
        assert_close(kept["grads"], plain["grads"], "training")


def reroute(use_reentrant: bool) -> None:
    """A model whose router chooses anew in the recompute."""
    chosen = replay.Region.replay

    def changed(region: replay.Region, ids: torch.Tensor) -> Any:
        return chosen(region, ids.flip(0))

    replay.Region.replay = changed  # type: ignore[method-assign]
    try:
        gradients({"use_reentrant": use_reentrant})
    finally:
        replay.Region.replay = chosen  # type: ignore[method-assign]


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_recompute_that_routes_differently_raises(use_reentrant: bool) -> None:
    with pytest.raises(RanksError, match="chose other experts in the recompute"):
        run_ranks(reroute, 2, use_reentrant)
