"""What a training step has to compute, by a stated formula, and what devices can.

[Note: model FLOPs]
A token costs, forward and backward,

    linear      sum over weight matrices of (2 forward + 2 for the gradient of the inputs + 2 where the weight trains)
                times its elements; a stack of expert weights [E, ...] counts K experts
    attention   3 * 2 * heads * (d_qk + d_v) * keys, summed over the layers with softmax attention

with `keys` the mean number of positions that a token attends to: half the sequence (causal), or the window where the
layer has a shorter one; documents packed into one row count by themselves where the batch holds `position_ids`. Not
counted: embeddings, routers, norms, biases, convolutions, the state of linear attention, and what checkpointing
computes again. For full fine-tuning this is the usual 6 x active parameters + attention: 2.301e10 a token for
Qwen3-30B-A3B at 4,096 positions, as by `qwen3_flops` of NeMo AutoModel (https://github.com/NVIDIA-NeMo/Automodel).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from hf_moe_accel.hf.discover import find_experts, find_routers

# Dense bf16 FLOP/s by the vendors' data sheets; the first name that a device's name contains counts.
_PEAKS = (
    ("GB200", 2.5e15),
    ("B200", 2.25e15),
    ("H200", 989e12),
    ("H100 PCIe", 756e12),
    ("H100 NVL", 835e12),
    ("H100", 989e12),
    ("A100", 312e12),
    ("L40S", 362e12),
    ("MI325X", 1307e12),
    ("MI300X", 1307e12),
)


class ModelFlops(NamedTuple):
    """See [Note: model FLOPs].

    Attributes:
        dense: FLOPs of a token in the weight matrices that all tokens see.
        expert: FLOPs of a token in one expert of each layer.
        attention: window, or None for a layer without -> FLOPs of a token for each position attended to.
    """

    dense: float
    expert: float
    attention: dict[int | None, float]

    def per_token(self, keys: Iterable[float], top_k: int) -> float:
        """FLOPs of a token.

        Args:
            keys: the mean of positions attended to, in the order of `attention`.
            top_k: experts of a token.
        """
        attention = sum(cost * mean for cost, mean in zip(self.attention.values(), keys, strict=True))
        return self.dense + top_k * self.expert + attention

    def keys_of(self, positions: Tensor) -> Tensor:
        """[windows] fp32, on the device: the mean of positions that these attend to, for each kind of layer.

        Args:
            positions: integer, of each token in its document; of any shape.
        """
        # A token sees those before it and half of itself, so that a whole sequence gives S / 2.
        seen = positions.float() + 0.5
        return torch.stack([(seen if w is None else seen.clamp(max=w)).mean() for w in self.attention])


def model_flops(model: Any) -> ModelFlops | None:
    """What a token costs in a model; None where not all of its weights see every token (vision and audio parts).

    Args:
        model: of transformers, without PEFT's wrapper; may be sharded, or on the meta device.
    """
    config = model.config.get_text_config()
    if config is not model.config:
        return None
    return ModelFlops(*_linear(model), _attention(config))


def peak_flops(device: torch.device) -> float | None:
    """Dense bf16 FLOP/s of a device; None where the table does not have it."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return next((peak for part, peak in _PEAKS if part in name), None)


def _linear(model: Any) -> tuple[float, float]:
    experts = {id(p) for found in find_experts(model) for p in found.module.parameters()}
    passed = {id(p) for router, _ in find_routers(model) for p in router.parameters()}
    dense = expert = 0.0
    for name, module in model.named_modules():
        # Embeddings are looked up; one that is the output layer's weight as well counts there. PEFT keeps the
        # originals of what it replaces, which compute nothing.
        if isinstance(module, nn.Embedding) or "original_module" in name:
            continue
        for parameter in module.parameters(recurse=False):
            if id(parameter) in passed:
                continue
            passed.add(id(parameter))
            is_expert = id(parameter) in experts
            cost = (6 if parameter.requires_grad else 4) * parameter.numel()
            # Other dimensions are those of biases, norms and convolutions.
            if is_expert and parameter.dim() == 3:
                expert += cost / parameter.shape[0]
            elif not is_expert and parameter.dim() == 2:
                dense += cost
    return dense, expert


def _attention(config: Any) -> dict[int | None, float]:
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    d_qk, d_v = getattr(config, "qk_head_dim", None) or width, getattr(config, "v_head_dim", None) or width
    costs: dict[int | None, float] = {}
    for kind in kinds:
        if kind in ("full_attention", "sliding_attention"):
            window = config.sliding_window if kind == "sliding_attention" else None
            costs[window] = costs.get(window, 0.0) + 3 * 2 * heads * (d_qk + d_v)
    return costs
