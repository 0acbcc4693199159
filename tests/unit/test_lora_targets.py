"""The spellings of users: which parameters of experts they mean, and what is said where they mean none."""

from __future__ import annotations

from typing import Any

import pytest
from peft import LoraConfig
from peft import get_peft_model as stock_get_peft_model

from hf_moe_accel import get_peft_model
from hf_moe_accel.hf.peft_bridge import adapter_config
from tests.helpers.models import tiny_model

V4, W = ["gate_proj", "up_proj", "down_proj"], ["w1", "w2", "w3"]


def adapted(model: Any) -> dict[str, int]:
    """The end of each adapted module's or parameter's name -> its rank."""
    found = {}
    for name, parameter in model.named_parameters():
        stem, is_a, _ = name.partition(".lora_A.")
        if is_a:
            place = stem.replace(".experts.lora.", ".experts.").split(".layers.")[1].split(".", 1)[1]
            found[place] = parameter.size(1) if parameter.ndim == 3 else parameter.size(0)
    return found


def experts_of(model: Any) -> dict[str, int]:
    return {name: rank for name, rank in adapted(model).items() if ".experts." in name}


def ours(name: str, **more: Any) -> Any:
    return get_peft_model(tiny_model(name), LoraConfig(r=4, **more))


@pytest.mark.parametrize(
    ("name", "more", "expected"),
    [
        # Translated by PEFT: twice the rank for two stacked projections.
        ("qwen3_moe", {"target_modules": V4}, {"mlp.experts.gate_up_proj": 8, "mlp.experts.down_proj": 4}),
        ("mixtral", {"target_modules": W}, {"mlp.experts.gate_up_proj": 8, "mlp.experts.down_proj": 4}),
        # By us: the given rank.
        ("mixtral", {"target_modules": V4}, {"mlp.experts.gate_up_proj": 4, "mlp.experts.down_proj": 4}),
        ("qwen2_moe", {"target_modules": V4}, {"mlp.experts.gate_up_proj": 4, "mlp.experts.down_proj": 4}),
        ("gpt_oss", {"target_modules": V4}, {"mlp.experts.gate_up_proj": 4, "mlp.experts.down_proj": 4}),
        ("gpt_oss", {"target_modules": ["q_proj", "down_proj"]}, {"mlp.experts.down_proj": 4}),
        ("phimoe", {"target_modules": ["w1", "w3"]}, {"mlp.experts.gate_up_proj": 4}),
        ("nemotron_h", {"target_modules": ["up_proj"]}, {"mixer.experts.up_proj": 4}),
        ("nemotron_h", {"target_modules": ["mixer.experts.down_proj"]}, {"mixer.experts.down_proj": 4}),
        ("granitemoe", {"target_modules": r".*\.(gate|up)_proj"}, {"block_sparse_moe.experts.gate_up_proj": 4}),
        ("qwen2_moe", {"target_modules": r".*experts\.\d+\.down_proj"}, {"mlp.experts.down_proj": 4}),
        ("qwen3_moe", {"target_parameters": ["down_proj"]}, {"mlp.experts.down_proj": 4}),
    ],
    ids=str,
)  # fmt: skip
def test_spellings(name: str, more: dict[str, Any], expected: dict[str, int]) -> None:
    model = ours(name, **more)
    assert experts_of(model) == expected
    config = model.peft_config["default"]
    assert {p for p in config.target_parameters if "experts" in p or p in ("gate_up_proj", "down_proj")}
    # What is saved, stock PEFT understands by itself.
    again = stock_get_peft_model(tiny_model(name), config)
    assert again.get_nb_trainable_parameters() == model.get_nb_trainable_parameters()


def test_what_else_has_the_name_is_adapted_too() -> None:
    found = adapted(ours("qwen2_moe", target_modules=V4))
    assert found["mlp.shared_expert.gate_proj"] == 4


@pytest.mark.parametrize(
    ("name", "rank_of_up"),
    [("qwen3_moe", 8), ("deepseek_v3", 8), ("gpt_oss", 4), ("phimoe", 4), ("granitemoe", 4), ("nemotron_h", 4)],
)
def test_all_linear_means_experts_and_no_router(name: str, rank_of_up: int) -> None:
    found = adapted(ours(name, target_modules="all-linear"))
    experts = {place.rpartition(".")[2]: rank for place, rank in found.items() if ".experts." in place}
    assert experts == {"up_proj" if name == "nemotron_h" else "gate_up_proj": rank_of_up, "down_proj": 4}
    assert not [place for place in found if place.rpartition(".")[2] in ("gate", "router")]
    assert any(place.endswith("o_proj") for place in found)


def test_all_linear_with_a_router_that_was_named() -> None:
    found = adapted(ours("qwen3_moe", target_modules="all-linear", target_parameters=["gate.weight"]))
    assert "mlp.gate" in found and "mlp.experts.gate_up_proj" in found


def test_all_linear_without_experts() -> None:
    for excluded in (["experts"], r".*\.experts"):
        found = adapted(ours("deepseek_v3", target_modules="all-linear", exclude_modules=excluded))
        assert "self_attn.o_proj" in found and not [place for place in found if ".experts." in place]


def test_all_linear_and_layers_that_the_user_leaves_out() -> None:
    for excluded in (["q_proj"], r".*q_proj"):
        found = adapted(ours("phimoe", target_modules="all-linear", exclude_modules=excluded))
        assert "self_attn.k_proj" in found and not {"self_attn.q_proj", "mlp.router"} & found.keys()


@pytest.mark.parametrize(
    ("name", "more", "message"),
    [
        ("gpt_oss", {"target_modules": ["gate_proj", "q_proj"]}, r"\['gate_proj'\] .* without \['up_proj'\]"),
        ("phimoe", {"target_modules": ["w1"]}, r"\['w1'\] of the experts without \['w3'\]"),
        ("qwen3_moe", {"target_modules": ["q_proj", "mlp.experts.w9"]}, "hit no experts of Qwen3Moe"),
        ("qwen3_moe", {"target_parameters": ["experts.down_proj", "experts.w9"]}, r"\['experts.w9'\] hit no experts"),
    ],
    ids=str,
)
def test_what_hits_no_experts_is_said(name: str, more: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ours(name, **more)


def test_the_users_configuration_is_left_alone() -> None:
    config = LoraConfig(r=4, target_modules=V4, lora_dropout=0.1)
    ranks = adapter_config(tiny_model("qwen3_moe"), config).rank_pattern
    assert ranks and not config.rank_pattern
    assert set(config.target_modules) == set(V4) and config.lora_dropout == 0.1


def test_the_first_values_are_those_of_each_expert_alone() -> None:
    """A: uniform within 1/sqrt(in), or normal with deviation 1/r, whatever the number of experts; B: zero."""
    for init, deviation in ((True, (1 / 64) ** 0.5 / 3**0.5), ("gaussian", 1 / 4)):
        model = ours("qwen3_moe", target_parameters=["experts.gate_up_proj"], init_lora_weights=init)
        lora = model.get_base_model().model.layers[0].mlp.experts.lora["gate_up_proj"]
        a = lora.lora_A["default"].weight
        assert a.shape == (8, 4, 64) and not lora.lora_B["default"].weight.any()
        assert float(a.detach().std()) == pytest.approx(deviation, rel=0.05)
        assert (a.std(dim=(1, 2)) - deviation).abs().max() < 0.2 * deviation
