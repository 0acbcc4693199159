"""Graphs of layers, against a double of torch's: `tests/gpu` runs the same cases on the real thing."""

from __future__ import annotations

import copy
import functools
import logging
import pickle
import re
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from hf_moe_accel import AcceleratedMoETrainer, MoEAccelConfig, prepare_moe_model
from hf_moe_accel.hf import cuda_graphs as library
from hf_moe_accel.hf.compiling import CompiledLayer
from hf_moe_accel.hf.cuda_graphs import LayerGraphs, _Pace, replay_where_nothing_else_changes, why_not
from hf_moe_accel.hf.loss import causal_lm_loss
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


def taken(asked: bool = False, **config: Any) -> tuple[Any, LayerGraphs]:
    """Graphs that nobody asked for."""
    model = prepare_moe_model(tiny_model("qwen3_moe", **config))
    runtime = runtime_of(model)
    assert runtime is not None
    return model, LayerGraphs(model, runtime, CPU, asked=asked)


def assert_over(model: Any, graphs: LayerGraphs) -> None:
    assert LayerGraphs.of(model) is None
    assert not any("forward" in layer.__dict__ for layer in model.model.layers)
    assert not any(layer.captured for layer in graphs._layers)


@pytest.mark.parametrize("name", ["full", "adapters", "checkpointing", "reentrant checkpointing"])
def test_nobody_asked_for_them(name: str) -> None:
    case = CASES[name]._replace(script="t" * 8)
    expected, counted, _ = run(case, CPU, graphs=False, disable=True)
    numbers, counted_again, replayed = run(case, CPU, graphs=True, asked=False)
    assert numbers == pytest.approx(expected, rel=1e-4)
    assert counted_again == counted
    assert replayed == 3


def test_nothing_is_compiled_that_nobody_asked_for() -> None:
    model, _ = taken()
    assert model.loss_function is causal_lm_loss
    assert all(layer.forward._plain == types.MethodType(type(layer).forward, layer) for layer in model.model.layers)


@pytest.mark.parametrize("where", ["a layer", "in a layer", "all modules"])
@pytest.mark.parametrize("kind", ["forward", "forward_pre", "full_backward", "full_backward_pre"])
def test_hooks_are_called(kind: str, where: str, caplog: pytest.LogCaptureFixture) -> None:
    model, graphs = taken()
    loop = Loop(model, CPU)
    layer = model.model.layers[1]
    called: list[int] = []
    loop.run("t" * 7)
    assert graphs.replayed == 2
    if where == "all modules":
        watched = layer.mlp.gate
        register = getattr(torch.nn.modules.module, f"register_module_{kind}_hook")
        handle = register(lambda module, *_: called.extend([1] * (module is watched)))
    else:
        module = layer if where == "a layer" else layer.mlp.gate
        handle = getattr(module, f"register_{kind}_hook")(lambda *_: called.append(1))
    try:
        with caplog.at_level(logging.INFO, "hf_moe_accel"):
            loop.run("tt")
    finally:
        handle.remove()
    assert len(called) == 2 and graphs.replayed == 2
    assert_over(model, graphs)
    assert "layers run without CUDA graphs from here on: layers or parts of them have hooks" in caplog.text


def test_layers_with_hooks_are_not_captured(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(library, "_GIVE_UP", 9)
    model, graphs = taken()
    loop = Loop(model, CPU)
    hook = model.model.layers[1].register_forward_hook(lambda *_: None)
    loop.run("t" * 7)
    hook.remove()
    loop.run("t")
    assert graphs.replayed == 1
    model, graphs = taken()
    model.model.layers[1].register_forward_hook(lambda *_: None)
    with caplog.at_level(logging.INFO, "hf_moe_accel"):
        Loop(model, CPU).run("t" * 9)
    assert graphs.replayed == 0
    assert_over(model, graphs)
    assert "have hooks, which no graph calls" in caplog.text


@pytest.mark.parametrize("asked", [False, True])
def test_hooks_on_saved_tensors_are_called(asked: bool, caplog: pytest.LogCaptureFixture) -> None:
    """As where activations are offloaded."""
    warn_once.cache_clear()
    model, graphs = graphed() if asked else taken()
    loop = Loop(model, CPU)
    with caplog.at_level(logging.WARNING, "hf_moe_accel"):
        for _ in range(21):
            with save_on_cpu():
                loop.run("t")
    assert graphs.replayed == 0
    assert ("layers run under hooks on saved tensors" in caplog.text) == asked


@pytest.mark.parametrize("error", [RuntimeError("was invalidated\nby something"), ValueError()])
def test_a_capture_that_fails_is_the_last_one(
    error: Exception, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    expected, _, _ = run(CASES["full"]._replace(script="t" * 8), CPU, graphs=False, disable=True)
    model, graphs = taken()
    loop = Loop(model, CPU)

    def fails(*args: Any, **kwargs: Any) -> None:
        raise error

    monkeypatch.setattr(torch.cuda, "make_graphed_callables", fails)
    with caplog.at_level(logging.INFO, "hf_moe_accel"):
        loop.run("t" * 8)
    assert loop.numbers == pytest.approx(expected, rel=1e-6)
    assert graphs.replayed == 0
    assert_over(model, graphs)
    assert f"none can hold a Qwen3MoeDecoderLayer ({str(error).partition(chr(10))[0]})" in caplog.text


def test_memory_has_to_be_left(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(LayerGraphs, "_is_full", lambda graphs: True)
    model, graphs = taken()
    with caplog.at_level(logging.INFO, "hf_moe_accel"):
        Loop(model, CPU).run("t" * 8)
    assert graphs.replayed == 0
    assert_over(model, graphs)
    assert "less than 5% of the device's memory would be left" in caplog.text


def test_they_end_when_batches_change(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    model, graphs = taken()
    with caplog.at_level(logging.INFO, "hf_moe_accel"):
        Loop(model, CPU).run("t" * 7 + "s" * 19 + "t" + "s" * 20)
    assert graphs.replayed == 3
    assert_over(model, graphs)
    assert "the last 20 passes were not like those that were captured" in caplog.text
    monkeypatch.setattr(library, "_GIVE_UP", 10)
    model, graphs = taken()
    with caplog.at_level(logging.INFO, "hf_moe_accel"):
        Loop(model, CPU).run("ttttts" * 2)
    assert graphs.replayed == 0
    assert_over(model, graphs)
    assert "no six passes were alike" in caplog.text and "pad to a fixed length" in caplog.text


class Event:
    """Of a device that needs so many times as long for a layer as the host, from a common start on."""

    device_over_host, made = 0.0, 0

    def __init__(self) -> None:
        self.due = Event.made * Event.device_over_host
        Event.made += 1

    def record(self) -> None:
        pass

    def query(self) -> bool:
        return self.due <= Event.made - 1


@pytest.mark.parametrize(
    ("device_over_host", "waits"),
    [([0.3], True), ([0.9], True), ([1.1], False), ([3.0], False), ([0.9, 0.9, 0.9, 1.2], False)],
    ids=str,
)
def test_a_device_that_does_not_wait_for_the_host(device_over_host: list[float], waits: bool) -> None:
    pace = _Pace(Event)
    for number in range(12):
        Event.device_over_host, Event.made = device_over_host[number % len(device_over_host)], 0
        pace.begin_pass()
        assert pace.device_waits == (waits and number >= 4), "of four passes in a row"
        for _ in range(16):
            pace.enter_layer()


@pytest.mark.parametrize("device_over_host", [0.5, 4.0])
def test_graphs_are_taken_where_the_device_waits(
    device_over_host: float, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(library, "_GIVE_UP", 8)
    model, graphs = taken(num_hidden_layers=6)
    loop = Loop(model, CPU)
    graphs._pace = _Pace(Event)
    Event.device_over_host = device_over_host
    with caplog.at_level(logging.INFO, "hf_moe_accel"):
        for _ in range(8):
            Event.made = 0
            loop.run("t")
    if device_over_host < 1:
        assert graphs.replayed == 3
    else:
        assert graphs.replayed == 0
        assert_over(model, graphs)
        assert "layers keep the device busy, which need not wait for the host" in caplog.text


def test_a_step_whose_layers_are_timed_is_not_replayed() -> None:
    model, graphs = taken()
    loop, runtime = Loop(model, CPU), runtime_of(model)
    assert runtime is not None
    loop.run("t" * 6)
    runtime.timer.active = True
    runtime.timer.clear()
    loop.run("t")
    assert graphs.replayed == 2, "parts of layers are not wanted in each step"
    runtime.timer.clear()
    runtime.timer.in_layers = True
    loop.run("t")
    assert graphs.replayed == 2
    assert runtime.timer.take()["experts"] > 0
    loop.run("t" * 20)
    runtime.timer.active = False
    loop.run("t")
    assert graphs.replayed == 3, "such steps do not count as passes that were not alike"


def test_where_they_are_taken() -> None:
    model = prepare_moe_model(tiny_model("qwen3_moe"), MoEAccelConfig(expert_backend="grouped_mm"))
    runtime = runtime_of(model)
    assert runtime is not None
    replay_where_nothing_else_changes(model, runtime, CPU)
    assert LayerGraphs.of(model) is None
    layer = model.model.layers[1]
    layer.forward = layer.forward
    replay_where_nothing_else_changes(model, runtime, torch.device("cuda"))
    assert LayerGraphs.of(model) is None, "somebody else has replaced the forward function of a layer"
    del layer.forward
    replay_where_nothing_else_changes(model, runtime, torch.device("cuda"))
    graphs = LayerGraphs.of(model)
    assert graphs is not None and not graphs.asked
    graphs.remove()
    runtime.check_tokens = True
    replay_where_nothing_else_changes(model, runtime, torch.device("cuda"))
    assert LayerGraphs.of(model) is None


def test_another_trainer_takes_them_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    taking: list[Any] = []
    monkeypatch.setattr(
        library, "replay_where_nothing_else_changes", lambda model, runtime, _: taking.append((model, runtime))
    )
    model, args = with_sdpa(), given(tmp_path)
    for choice, number in (("auto", 1), ("off", 1)):
        AcceleratedMoETrainer(model=model, args=args, moe_config=MoEAccelConfig(cuda_graphs=choice))
        assert len(taking) == number and LayerGraphs.of(model) is None
        LayerGraphs(*taking[0], CPU, asked=False)
    AcceleratedMoETrainer(model=model, args=args)
    assert len(taking) == 2 and LayerGraphs.of(model) is None


def test_a_layer_can_be_pickled() -> None:
    layer = tiny_model("qwen3_moe").model.layers[0]
    layer.forward = CompiledLayer(layer, disable=True)
    again = pickle.loads(pickle.dumps(layer))
    assert again.forward.__self__ is again and again is not layer
