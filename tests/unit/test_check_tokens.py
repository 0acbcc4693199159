"""Under `check_tokens`, what cannot be sent is named: layer, rank, how many and the first."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hf_moe_accel import MoEAccelConfig, prepare_moe_model
from hf_moe_accel.moe.check import check_tokens
from tests.helpers.models import tiny_model


def tokens(num: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(num, 4), torch.tensor([0, 7]).repeat(num, 1)


def test_good_tokens_pass() -> None:
    check_tokens(*tokens(), 8, "step 1, layer 0")
    check_tokens(*tokens(0), 8, "step 1, layer 0")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_rows_that_are_not_finite(value: float) -> None:
    x, ids = tokens()
    x[2, 1] = x[4] = value
    message = (
        r"check_tokens: step 3, layer 1, rank 0: 2 of 5 tokens have values that are not finite, the first of them "
        r"token 2 \(1 of 4 values\)"
    )
    with pytest.raises(RuntimeError, match=message):
        check_tokens(x, ids, 8, "step 3, layer 1")


@pytest.mark.parametrize("expert", [-1, 8])
def test_experts_that_do_not_exist(expert: int) -> None:
    x, ids = tokens()
    ids[1, 1] = expert
    message = rf"rank 0: 1 of 5 tokens chose experts outside 0 to 7, the first of them token 1 \(\[0, {expert}\]\)"
    with pytest.raises(RuntimeError, match=message):
        check_tokens(x, ids, 8, "step 3, layer 1")


def test_both_are_named() -> None:
    x, ids = tokens()
    x[0] = float("nan")
    ids[3] = 9
    with pytest.raises(RuntimeError, match=r"1 of 5 tokens have values.*1 of 5 tokens chose experts.*token 3"):
        check_tokens(x, ids, 8, "step 3, layer 1")


def spoil(model: Any) -> None:
    """What the second layer's experts get of the third token is not a number."""

    def hook(norm: Any, args: Any, out: torch.Tensor) -> torch.Tensor:
        out = out.clone()
        out[:, 2] = float("nan")
        return out

    model.model.layers[1].post_attention_layernorm.register_forward_hook(hook)


def test_a_model_names_the_layer_where_its_flag_is_set() -> None:
    ids = torch.arange(3, 9)[None]
    model = prepare_moe_model(tiny_model("qwen3_moe"), MoEAccelConfig(check_tokens=True))
    model(input_ids=ids)
    spoil(model)
    with pytest.raises(RuntimeError, match=r"check_tokens: step 2, layer 1, rank 0: 1 of 6 tokens .* token 2 "):
        model(input_ids=ids)
    unchecked = prepare_moe_model(tiny_model("qwen3_moe"))
    spoil(unchecked)
    unchecked(input_ids=ids)
