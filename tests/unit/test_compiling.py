"""`torch_compile=True` in our trainers: layer by layer, in place."""

from __future__ import annotations

import copy
import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import create_selective_checkpoint_contexts
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.qwen3_moe import modeling_qwen3_moe

from hf_moe_accel import AcceleratedMoETrainer, prepare_moe_model
from hf_moe_accel.hf.compiling import CompiledLayer, compile_layers
from tests.helpers.models import tiny_model
from tests.unit.test_bad_input import arguments

COMPILED = {"torch_compile": True, "torch_compile_backend": "eager"}


def given(output_dir: Path, **more: Any) -> TrainingArguments:
    return arguments(output_dir, per_device_train_batch_size=2, logging_steps=1, **more)


def train(
    model: nn.Module, args: TrainingArguments, trainer_class: type[Trainer] = AcceleratedMoETrainer, **more: Any
) -> tuple[list[float], Trainer]:
    rows = torch.randint(3, 128, (4, 16), generator=torch.Generator().manual_seed(0))
    trainer = trainer_class(
        model=model, args=args, train_dataset=[{"input_ids": row, "labels": row} for row in rows], **more
    )
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry], trainer


@pytest.fixture
def masks(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The attention masks that transformers makes."""
    seen: list[Any] = []
    make = modeling_qwen3_moe.create_causal_mask

    def spy(*args: Any, **kwargs: Any) -> Any:
        seen.append(make(*args, **kwargs))
        return seen[-1]

    monkeypatch.setattr(modeling_qwen3_moe, "create_causal_mask", spy)
    return seen


def assert_compiled(model: nn.Module) -> None:
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    assert layers and all(isinstance(layer.forward, CompiledLayer) for layer in layers)


def with_sdpa() -> Any:
    model = tiny_model("qwen3_moe")
    model.set_attn_implementation("sdpa")
    return model


def test_layers_are_compiled_in_place(tmp_path: Path, masks: list[Any]) -> None:
    expected, plain = train(with_sdpa(), given(tmp_path))
    names = list(plain.model.state_dict())
    masks.clear()
    losses, trainer = train(with_sdpa(), given(tmp_path, **COMPILED))
    assert losses == pytest.approx(expected, abs=1e-5)
    model = trainer.model_wrapped
    assert_compiled(model)
    assert list(model.state_dict()) == names, "a wrapper has come between"
    assert masks == [None, None], "a causal mask was written out"


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointed_layers_are_compiled_in_both_passes(use_reentrant: bool) -> None:
    in_backward: list[bool] = []

    def backend(module: Any, _: Any) -> Any:
        def compiled(*args: Any) -> Any:
            in_backward.append(torch._C._current_graph_task_id() != -1)
            return module.forward(*args)

        return compiled

    ids = torch.randint(3, 128, (2, 16), generator=torch.Generator().manual_seed(0))
    losses, grads, compiled = [], [], []
    for compiles in (False, True):
        model = prepare_moe_model(with_sdpa())
        model.activation_checkpointing_enable({"use_reentrant": use_reentrant})
        if compiles:
            compile_layers(model, backend=backend)
        for _ in range(2):
            in_backward.clear()
            loss = model.train()(input_ids=ids, labels=ids, use_cache=False).loss
            loss.backward()
            compiled.append((in_backward.count(False), in_backward.count(True)))
        losses.append(loss.item())
        grads.append({name: parameter.grad for name, parameter in model.named_parameters()})
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    torch.testing.assert_close(grads[0], grads[1])
    num_layers = model.config.num_hidden_layers
    plain, again = compiled[:2], compiled[2:]
    assert plain == [(0, 0)] * 2 and again[0] == again[1]
    assert again[0][0] > num_layers and again[0][1] >= num_layers, "forward and recompute"
    assert copy.deepcopy(model).model.layers[0]._gradient_checkpointing_func is not None


def test_what_a_context_is_to_keep_is_not_compiled() -> None:
    compiled: list[Any] = []

    def backend(module: Any, _: Any) -> Any:
        compiled.append(module)
        return module.forward

    model = prepare_moe_model(with_sdpa())
    context = functools.partial(create_selective_checkpoint_contexts, [torch.ops.aten.mm.default])
    model.activation_checkpointing_enable({"use_reentrant": False, "context_fn": context})
    compile_layers(model, backend=backend)
    ids = torch.arange(3, 19)[None]
    model.train()(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    assert len(compiled) == 1, "the loss"


def test_arguments_serve_two_trainers(tmp_path: Path) -> None:
    """Accelerate's state, too, is that of the arguments."""
    args = given(tmp_path, **COMPILED)
    for _ in range(2):
        _, trainer = train(with_sdpa(), args)
        assert_compiled(trainer.model_wrapped)


def test_a_dense_model_is_compiled_as_in_the_trainer(tmp_path: Path) -> None:
    config = LlamaConfig(
        vocab_size=128, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    _, trainer = train(LlamaForCausalLM(config), given(tmp_path, **COMPILED))
    assert isinstance(trainer.model_wrapped, torch._dynamo.eval_frame.OptimizedModule)
