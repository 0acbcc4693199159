"""Which modules are shared experts is read off their place and their shape."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from hf_moe_accel.hf.discover import find_experts
from hf_moe_accel.hf.shared import SharedExperts, find_shared, why_not_shared
from tests.helpers.models import tiny_config


def found_in(config: Any) -> tuple[set[str], str | None]:
    """The names of the shared experts, and what is said of others."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    found = find_experts(model)
    names = {module: name for name, module in model.named_modules()}
    shared = {names[module] for experts in found for module in find_shared(model, experts)}
    return shared, why_not_shared(model, found)


@pytest.mark.parametrize(
    ("name", "shared"),
    [
        ("deepseek_v3", {"model.layers.1.mlp.shared_experts"}),
        ("qwen2_moe", {"model.layers.0.mlp.shared_expert", "model.layers.1.mlp.shared_expert"}),
        ("nemotron_h", {"model.layers.1.mixer.shared_experts", "model.layers.3.mixer.shared_experts"}),
        ("glm4_moe", {"model.layers.0.mlp.shared_experts", "model.layers.1.mlp.shared_experts"}),
        ("qwen3_moe", set()),
        ("mixtral", set()),
    ],
)
def test_shared_experts_lie_beside_the_experts(name: str, shared: set[str]) -> None:
    assert found_in(tiny_config(name)) == (shared, None)


def in_the_decoder_layer() -> Any:
    return AutoConfig.for_model(
        "granitemoeshared",
        hidden_size=32,
        intermediate_size=16,
        shared_intermediate_size=16,
        num_hidden_layers=1,
        num_local_experts=4,
    )


def with_another_input() -> Any:
    return tiny_config("nemotron_h", moe_latent_size=32)


@pytest.mark.parametrize(
    ("config", "name"),
    [(in_the_decoder_layer, "layers.0.shared_mlp"), (with_another_input, "layers.1.mixer.shared_experts")],
)
def test_others_are_named(config: Callable[[], Any], name: str) -> None:
    shared, reason = found_in(config())
    assert shared == set()
    assert reason is not None and name in reason


def test_an_input_that_is_written_into_is_refused() -> None:
    module = nn.Linear(2, 2)
    shared = SharedExperts(module)
    x = torch.ones(2)
    out = module(x)
    x += 1
    with pytest.raises(AssertionError, match="written into"):
        shared.compute()
    del out
