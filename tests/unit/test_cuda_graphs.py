"""Graphs of layers, against a double of torch's: `tests/gpu` runs the same cases on the real thing."""

from __future__ import annotations

import copy
import functools
import logging
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from hf_moe_accel import MoEAccelConfig, prepare_moe_model
from hf_moe_accel.hf.cuda_graphs import LayerGraphs, why_not
from hf_moe_accel.log import warn_once
from hf_moe_accel.moe.stats import RoutingStats
from hf_moe_accel.runtime import runtime_of
from hf_moe_accel.topology import ExpertTopology
from tests.helpers.graph_cases import CASES, Loop, run
from tests.helpers.graphs_double import Graphs
from tests.helpers.models import tiny_config, tiny_model
from tests.unit.test_compiling import assert_compiled, given, train, with_sdpa

CPU = torch.device("cpu")
COUNTED_BY_THE_HOST = ("_tokens_L", "_received_L", "_top_k", "_newest")


@pytest.fixture(autouse=True)
def double(monkeypatch: pytest.MonkeyPatch) -> Graphs:
    graphs = Graphs()
    monkeypatch.setattr(torch.cuda, "make_graphed_callables", graphs.make_graphed_callables)

    def on_the_device_only(function: Any) -> Any:
        def counts(stats: RoutingStats, *args: Any) -> None:
            before = {name: copy.copy(getattr(stats, name)) for name in COUNTED_BY_THE_HOST}
            function(stats, *args)
            if graphs.replaying:
                vars(stats).update(before)

        return counts

    for name in ("add", "add_rows"):
        monkeypatch.setattr(RoutingStats, name, on_the_device_only(getattr(RoutingStats, name)))
    return graphs


@pytest.mark.parametrize("name", CASES)
def test_replays_change_nothing(name: str, double: Graphs) -> None:
    case = CASES[name]
    # The first case is enough to see that compiled layers can be captured.
    how: dict[str, Any] = {"backend": "eager"} if name == "full" else {"disable": True}
    expected, counted, _ = run(case, CPU, graphs=False, **how)
    numbers, counted_again, replayed = run(case, CPU, graphs=True, **how)
    assert numbers == pytest.approx(expected, rel=1e-4)
    assert counted_again == counted
    assert replayed == case.replayed
    num_layers = tiny_config(case.model).num_hidden_layers
    assert double.replays == replayed * num_layers, "not all layers were replayed"


def graphed(**config: Any) -> tuple[Any, LayerGraphs]:
    model = prepare_moe_model(tiny_model("qwen3_moe", **config))
    runtime = runtime_of(model)
    assert runtime is not None
    return model, LayerGraphs(model, runtime, CPU, disable=True)


def test_released_graphs_are_captured_again() -> None:
    model, graphs = graphed()
    loop = Loop(model, CPU)
    loop.run("ttt")
    assert graphs.replayed == 1
    graphs.release()
    loop.run("tt")
    assert graphs.replayed == 1
    loop.run("t")
    assert graphs.replayed == 2


def test_a_copy_has_no_graphs() -> None:
    model, graphs = graphed()
    Loop(model, CPU).run("ttt")
    copied = copy.deepcopy(model)
    assert LayerGraphs.of(model) is graphs and LayerGraphs.of(copied) is None
    layer = copied.model.layers[0]
    assert layer.forward.__self__ is layer
    ids = torch.arange(3, 11)[None]
    with torch.no_grad():
        assert torch.equal(copied(input_ids=ids).logits, model(input_ids=ids).logits)


def test_why_nothing_is_captured_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    warn_once.cache_clear()
    model, _ = graphed()
    with caplog.at_level(logging.WARNING, "hf_moe_accel"):
        Loop(model, CPU).run("ts" * 12)
    (said,) = [record.getMessage() for record in caplog.records if "CUDA graph" in record.getMessage()]
    assert "no three passes were alike" in said and "(2, 5, 64)" in said and "(2, 8, 64)" in said
    assert "pad to a fixed length" in said


def test_what_no_graph_can_hold_is_named(caplog: pytest.LogCaptureFixture) -> None:
    warn_once.cache_clear()
    model, graphs = graphed()
    ids = torch.arange(3, 11)[None]
    with caplog.at_level(logging.WARNING, "hf_moe_accel"):
        for _ in range(21):
            model.train()(input_ids=ids, labels=ids, use_cache=True).loss.backward()
    (said,) = [record.getMessage() for record in caplog.records if "CUDA graph" in record.getMessage()]
    assert "past_key_values" in said and graphs.replayed == 0


@pytest.mark.parametrize("checkpoints", [False, True])
def test_random_numbers_are_not_captured_if_a_recompute_needs_them(
    checkpoints: bool, caplog: pytest.LogCaptureFixture
) -> None:
    warn_once.cache_clear()
    model, graphs = graphed(attention_dropout=0.1)
    if checkpoints:
        model.activation_checkpointing_enable({"use_reentrant": False})
    with caplog.at_level(logging.WARNING, "hf_moe_accel"):
        Loop(model, CPU).run("t" * 21)
    said = [record.getMessage() for record in caplog.records if "CUDA graph" in record.getMessage()]
    assert len(said) == checkpoints and graphs.replayed == (0 if checkpoints else 19)
    assert all("layers draw random numbers, such as for dropout" in each for each in said)


def offloading(*args: Any, **kwargs: Any) -> Any:
    with save_on_cpu():
        return checkpoint(*args, **kwargs)


def keeps_products() -> Any:
    return create_selective_checkpoint_contexts([torch.ops.aten.mm.default])


@pytest.mark.parametrize(
    "function",
    [functools.partial(offloading), functools.partial(checkpoint, context_fn=keeps_products)],
    ids=["offloading", "context"],
)
def test_what_is_checkpointed_otherwise_is_not_captured(function: Any, caplog: pytest.LogCaptureFixture) -> None:
    warn_once.cache_clear()
    model, graphs = graphed()
    model.activation_checkpointing_enable({"use_reentrant": False})
    for layer in model.model.layers:
        layer._gradient_checkpointing_func = functools.partial(function, use_reentrant=False)
    with caplog.at_level(logging.WARNING, "hf_moe_accel"):
        Loop(model, CPU).run("t" * 21)
    (said,) = [record.getMessage() for record in caplog.records if "CUDA graph" in record.getMessage()]
    assert "layers are checkpointed by more than torch's function" in said and graphs.replayed == 0


REFUSED: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({}, {"check_tokens": True, "expert_backend": "grouped_mm"}, "check_tokens=True reads values"),
    ({}, {"expert_backend": "eager"}, "EagerBackend reads .* how many rows .*expert_backend='fused'"),
    ({"output_router_logits": True}, {"expert_backend": "grouped_mm"}, "output_router_logits=True takes logits"),
]


@pytest.mark.parametrize(("config", "choices", "message"), REFUSED)
def test_what_graphs_cannot_hold_is_refused(config: dict[str, Any], choices: dict[str, Any], message: str) -> None:
    model = prepare_moe_model(tiny_model("qwen3_moe", **config), MoEAccelConfig(**choices))
    runtime = runtime_of(model)
    assert runtime is not None
    assert re.search(message, why_not(model, runtime) or "")


def test_several_processes_are_refused() -> None:
    model = prepare_moe_model(tiny_model("qwen3_moe"), MoEAccelConfig(expert_backend="grouped_mm"))
    runtime = runtime_of(model)
    assert runtime is not None and why_not(model, runtime) is None
    runtime.topology = ExpertTopology(2, 8, ep_size=2)
    assert "with 2 processes the host reads" in (why_not(model, runtime) or "")


def test_on_a_cpu_layers_are_compiled_without_graphs(tmp_path: Path) -> None:
    args = given(tmp_path, torch_compile=True, torch_compile_backend="eager", torch_compile_mode="reduce-overhead")
    _, trainer = train(with_sdpa(), args)
    assert_compiled(trainer.model_wrapped)
    assert LayerGraphs.of(trainer.model) is None
