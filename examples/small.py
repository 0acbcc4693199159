"""What the examples run on where nothing is downloaded: a small random mixture of experts, and sums to learn."""

from __future__ import annotations

import argparse
import tempfile
from typing import Any

import torch
from datasets import Dataset, load_dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast


def parse_arguments(description: str | None) -> argparse.Namespace:
    """`MODEL --data DATA --output OUTPUT --steps N`; without a model and data, small ones are made."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="hub id or path")
    parser.add_argument("--data", help="hub id of a data set, or a file of JSON lines")
    parser.add_argument("--output", default="example-output")
    parser.add_argument("--steps", type=int, default=20)
    args = parser.parse_args()
    args.model = args.model or small_model()
    return args


def on_this_machine() -> dict[str, Any]:
    """The training arguments that a machine without GPUs needs."""
    gpu = torch.cuda.is_available()
    return {"use_cpu": not gpu, "bf16": gpu, "report_to": [], "logging_steps": 5}


def small_model() -> str:
    """Writes a Qwen3-MoE with 8 experts and a tokenizer of single characters; returns their directory."""
    directory = tempfile.mkdtemp()
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<eos>", "<unk>", *"0123456789+= "])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    ).save_pretrained(directory)
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "qwen3_moe",
        vocab_size=len(vocabulary),
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_experts=8,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    return directory


def small_adapter(model: str) -> str:
    """Writes a LoRA adapter with random factors on attention and experts of `model`; returns its directory."""
    from peft import LoraConfig, get_peft_model  # here, since the other examples do without

    directory = tempfile.mkdtemp()
    torch.manual_seed(1)
    config = LoraConfig(
        r=4,
        target_modules=["q_proj", "v_proj"],
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
        init_lora_weights=False,
    )
    get_peft_model(AutoModelForCausalLM.from_pretrained(model), config).save_pretrained(directory)
    return directory


def texts(data: str | None) -> Dataset:
    """Rows of `text`, or whatever `data` holds."""
    if data:
        return read(data)
    pairs = [(i % 10, i // 10 % 10) for i in range(400)]
    return Dataset.from_list([{"text": f"{a}+{b}={a + b}"} for a, b in pairs])


def completions(data: str | None) -> Dataset:
    """Rows of `prompt` and `completion`, or whatever `data` holds."""
    if data:
        return read(data)
    pairs = [(i % 10, i // 10 % 10) for i in range(400)]
    return Dataset.from_list([{"prompt": f"{a}+{b}=", "completion": str(a + b)} for a, b in pairs])


def preferences(data: str | None) -> Dataset:
    """Rows of `prompt`, `chosen` and `rejected`, or whatever `data` holds."""
    if data:
        return read(data)
    pairs = [(i % 10, i // 10 % 10) for i in range(400)]
    return Dataset.from_list(
        [{"prompt": f"{a}+{b}=", "chosen": str(a + b), "rejected": str(a + b + 1)} for a, b in pairs]
    )


def read(data: str) -> Dataset:
    if data.endswith((".json", ".jsonl")):
        return load_dataset("json", data_files=data, split="train")
    return load_dataset(data, split="train")
