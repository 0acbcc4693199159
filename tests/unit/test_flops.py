"""The formula of model FLOPs, against published figures and counts by hand."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

from hf_moe_accel import get_peft_model
from hf_moe_accel.callbacks.flops import ModelFlops, model_flops, peak_flops
from hf_moe_accel.hf.discover import find_routers
from tests.helpers.models import TRAINED_MOE, tiny_config, tiny_model

QWEN3_30B_A3B = Qwen3MoeConfig(
    vocab_size=151936,
    hidden_size=2048,
    intermediate_size=6144,
    num_hidden_layers=48,
    num_attention_heads=32,
    num_key_value_heads=4,
    head_dim=128,
    moe_intermediate_size=768,
    num_experts=128,
    num_experts_per_tok=8,
)


def on_meta(config: Any) -> Any:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def flops_of(model: Any) -> ModelFlops:
    flops = model_flops(model)
    assert flops is not None
    return flops


def test_qwen3_30b_a3b_has_the_published_figure() -> None:
    flops = flops_of(on_meta(QWEN3_30B_A3B))
    keys = flops.keys_of(torch.arange(4096)).tolist()
    assert keys == [2048]
    assert flops.per_token(keys, 8) == pytest.approx(2.301e10, rel=2e-4)


def test_a_count_by_hand() -> None:
    flops = flops_of(tiny_model("qwen3_moe"))
    # Two layers: q and o 64 x 64, k and v 64 x 32; an output layer of 64 x 128; an expert of 3 matrices of 64 x 32.
    assert flops.dense == 6 * (2 * (2 * 64 * 64 + 2 * 64 * 32) + 64 * 128)
    assert flops.expert == 6 * 2 * 3 * 64 * 32
    # Scores and values: 2 FLOPs for each of 4 heads of 16, forward, and twice that backward.
    assert flops.attention == {None: 2 * 3 * 2 * 4 * (16 + 16)}


def test_an_embedding_that_is_the_output_layer_too_counts_once() -> None:
    tied = flops_of(tiny_model("qwen3_moe", tie_word_embeddings=True))
    assert tied == flops_of(tiny_model("qwen3_moe"))


def test_frozen_weights_need_no_gradient_of_their_own() -> None:
    model = tiny_model("qwen3_moe")
    whole = flops_of(model)
    config = LoraConfig(
        r=4,
        target_modules=["q_proj"],
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
        task_type="CAUSAL_LM",
    )
    adapted = flops_of(get_peft_model(model, config).get_base_model())
    assert adapted.dense == whole.dense * 4 / 6 + 6 * 2 * 4 * (64 + 64)
    assert adapted.expert == whole.expert * 4 / 6 + 6 * 2 * 4 * ((64 + 64) + (32 + 64))


def test_windows_and_documents_bound_what_is_attended_to() -> None:
    flops = flops_of(tiny_model("gpt_oss"))
    assert list(flops.attention) == [8, None]
    windowed, whole = flops.keys_of(torch.arange(16)).tolist()
    assert whole == 8
    assert windowed == (sum(i + 0.5 for i in range(8)) + 8 * 8) / 16
    # Two documents of 4 tokens in one row.
    assert flops.keys_of(torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3]])).tolist() == [2, 2]


@pytest.mark.parametrize("name", TRAINED_MOE)
def test_every_architecture_has_a_figure_and_routers(name: str) -> None:
    model = on_meta(tiny_config(name))
    flops = flops_of(model)
    assert flops.dense > 0 and flops.expert > 0 and flops.attention
    assert find_routers(model)


def test_models_with_parts_that_few_tokens_see_have_none() -> None:
    model = mock.Mock()
    assert model_flops(model) is None, "its text configuration is not its configuration"


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA GB200", 2.5e15),
        ("NVIDIA GeForce GT 710", None),
    ],
)
def test_peaks_of_devices(name: str, peak: float | None) -> None:
    with mock.patch("torch.cuda.get_device_name", return_value=name):
        assert peak_flops(torch.device("cuda")) == peak
    assert peak_flops(torch.device("cpu")) is None
