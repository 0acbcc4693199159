"""Tiny models with random weights, a ragged data set and a tokenizer: nothing is downloaded.

Every mixture of experts here has 8 experts of which a token takes 2, and layers of hidden size 64; the auxiliary loss
is off.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

VOCAB_SIZE = 128
NUM_EXPERTS = 8

_COMMON = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": 1,
    # Some of these models have no sdpa attention.
    "attn_implementation": "eager",
}
_MOE = _COMMON | {"num_experts_per_tok": 2, "output_router_logits": False}
_NO_AUX_LOSS = {"router_aux_loss_coef": 0.0}

_CONFIGS: dict[str, dict[str, Any]] = {
    "llama": _COMMON,
    "qwen3_moe": _MOE
    | _NO_AUX_LOSS
    | {"num_experts": NUM_EXPERTS, "moe_intermediate_size": 32, "norm_topk_prob": True, "mlp_only_layers": []},
    "mixtral": _MOE | _NO_AUX_LOSS | {"num_local_experts": NUM_EXPERTS, "intermediate_size": 32},
    # One dense layer first, and a shared expert beside the routed ones, as in the real model.
    "deepseek_v3": _MOE
    | {
        "n_routed_experts": NUM_EXPERTS,
        "moe_intermediate_size": 32,
        "num_key_value_heads": 4,
        "first_k_dense_replace": 1,
        "n_group": 4,
        "topk_group": 2,
        "q_lora_rank": 32,
        "kv_lora_rank": 32,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 16,
        "v_head_dim": 16,
    },
    # One layer with a sliding window and one without.
    "gpt_oss": _MOE
    | _NO_AUX_LOSS
    | {
        "num_local_experts": NUM_EXPERTS,
        "intermediate_size": 32,
        "sliding_window": 8,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    },
    "nemotron_h": _MOE
    | {
        "num_hidden_layers": 4,
        "layers_block_type": ["linear_attention", "moe", "full_attention", "moe"],
        "n_routed_experts": NUM_EXPERTS,
        "moe_intermediate_size": 32,
        "moe_shared_expert_intermediate_size": 32,
        "routed_scaling_factor": 2.5,
        "ssm_state_size": 16,
        "mamba_num_heads": 8,
        "mamba_head_dim": 16,
        "n_groups": 2,
        "chunk_size": 16,
    },
    "olmoe": _MOE | _NO_AUX_LOSS | {"num_experts": NUM_EXPERTS, "intermediate_size": 32},
    "granitemoe": _MOE
    | _NO_AUX_LOSS
    | {
        "num_local_experts": NUM_EXPERTS,
        "intermediate_size": 32,
        "embedding_multiplier": 2.0,
        "residual_multiplier": 0.5,
        "attention_multiplier": 0.25,
        "logits_scaling": 2.0,
    },
    "qwen2_moe": _MOE
    | _NO_AUX_LOSS
    | {
        "num_experts": NUM_EXPERTS,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 32,
        "mlp_only_layers": [],
    },
    # In training mode its router samples, whatever the jitter: only its eval mode is repeatable.
    "phimoe": _MOE | _NO_AUX_LOSS | {"num_local_experts": NUM_EXPERTS, "intermediate_size": 32},
    "glm4_moe": _MOE
    | {
        "n_routed_experts": NUM_EXPERTS,
        "moe_intermediate_size": 32,
        "first_k_dense_replace": 0,
        "routed_scaling_factor": 1.5,
    },
}

DENSE = ("llama",)
MOE = tuple(name for name in _CONFIGS if name not in DENSE)
# The architectures whose whole training runs are compared.
TRAINED_MOE = ("qwen3_moe", "mixtral", "deepseek_v3", "gpt_oss", "nemotron_h", "olmoe")

_DRAWN_VECTORS = re.compile(r"(?<!dt_)bias$|sinks$")


def tiny_config(name: str, **overrides: Any) -> PreTrainedConfig:
    """Returns the configuration of a tiny model, with fields replaced by `overrides`."""
    return AutoConfig.for_model(name, **(_CONFIGS[name] | overrides))


def tiny_model(name: str, seed: int = 0, dtype: torch.dtype = torch.float32, **overrides: Any) -> PreTrainedModel:
    """Builds a tiny model in training mode; equal arguments give equal weights, in every process.

    Weights are normal with deviation 0.1, wide enough for the router to prefer different experts for different tokens;
    biases and the routers' correction biases are not zero, so that a forgotten one shows. In another dtype the weights
    are those of fp32, rounded, and what `from_pretrained` keeps in fp32 stays there.

    Args:
        name: One of `MOE` or `DENSE`.
        seed: Seed of the weights.
        dtype: Of the parameters.
        overrides: Fields of the configuration.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(tiny_config(name, **overrides), dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, tensor in model.state_dict().items():
            if tensor.is_floating_point() and (tensor.dim() > 1 or _DRAWN_VECTORS.search(key)):
                tensor.normal_(std=0.1, generator=generator)
    if dtype is not torch.float32:
        _cast(model, dtype)
    return model.train()


def _cast(model: PreTrainedModel, dtype: torch.dtype) -> None:
    kept = model._keep_in_fp32_modules_strict | (model._keep_in_fp32_modules if dtype is torch.float16 else set())
    for key, tensor in model.state_dict(keep_vars=True).items():
        if tensor.is_floating_point() and not any(part in kept for part in key.split(".")):
            tensor.data = tensor.data.to(dtype)
    model.config.dtype = dtype


def ragged_batch_dataset(
    num: int, length: int, vocab: int = VOCAB_SIZE, seed: int = 0
) -> list[dict[str, torch.Tensor]]:
    """Returns `num` rows of `length` random tokens whose labels end, with -100 from there on, at different places.

    Each row is {"input_ids": int64 [length], "labels": int64 [length]}; at least two labels of a row count. The
    special tokens 0 to 2 of `toy_tokenizer` are not drawn.
    """
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for _ in range(num):
        input_ids = torch.randint(3, vocab, (length,), generator=generator)
        num_labels = torch.randint(3, length + 1, (), generator=generator)  # the first is nobody's next token
        labels = torch.where(torch.arange(length) < num_labels, input_ids, -100)
        rows.append({"input_ids": input_ids, "labels": labels})
    return rows


def toy_tokenizer() -> PreTrainedTokenizerFast:
    """Returns a tokenizer over the words w0 to w124, with a chat template: 128 tokens, as the tiny models have."""
    words = ["<pad>", "<eos>", "<unk>"] + [f"w{i}" for i in range(VOCAB_SIZE - 3)]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", model_max_length=128
    )
    fast.chat_template = "{% for message in messages %}{{ message['content'] }} {% endfor %}"
    return fast
