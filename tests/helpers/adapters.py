"""Tiny models with stock PEFT's LoRA on attention and experts."""

from __future__ import annotations

from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from tests.helpers.models import tiny_model


def config(name: str = "qwen3_moe", **more: Any) -> LoraConfig:
    up = "up_proj" if name == "nemotron_h" else "gate_up_proj"
    defaults: dict[str, Any] = {
        "r": 4,
        "lora_alpha": 8,
        "target_modules": ["q_proj", "o_proj"],
        "target_parameters": [f"experts.{up}", "experts.down_proj"],
        "task_type": "CAUSAL_LM",
    }
    return LoraConfig(**(defaults | more))


class Adapted:
    """Makes a model with stock PEFT's adapters, whose factors are both not zero."""

    def __init__(
        self, name: str, dtype: torch.dtype = torch.float32, sizes: dict[str, int] | None = None, **more: Any
    ) -> None:
        self.name, self.dtype, self.sizes, self.more = name, dtype, sizes or {}, more

    def __call__(self) -> nn.Module:
        model = get_peft_model(tiny_model(self.name, dtype=self.dtype, **self.sizes), config(self.name, **self.more))
        draw_factors(model)
        return model


def draw_factors(model: nn.Module, seed: int = 0) -> None:
    """In the order and the layout of stock PEFT."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
            elif "lora_A" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
