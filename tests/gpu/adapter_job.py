"""A run with LoRA on the experts, ours or stock: `python -m tests.gpu.adapter_job KIND OUT RESULT`, or by torchrun."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import Trainer

from hf_moe_accel import AcceleratedMoETrainer, AutoModelForCausalLM, PeftModel, export_checkpoint
from tests.distributed.test_training_arguments import log_of, make_trainer
from tests.helpers.adapters import Adapted
from tests.helpers.models import tiny_model


def sharded_first() -> Any:
    """The same model and adapter: each rank reads its slices, and the adapter comes after."""
    with tempfile.TemporaryDirectory() as directory:
        adapted: Any = Adapted("qwen3_moe", torch.bfloat16)()
        adapted.save_pretrained(f"{directory}/adapter")
        tiny_model("qwen3_moe", dtype=torch.bfloat16).save_pretrained(f"{directory}/model")
        model = AutoModelForCausalLM.from_pretrained(
            f"{directory}/model", dtype=torch.bfloat16, attn_implementation="eager"
        )
        return PeftModel.from_pretrained(model, f"{directory}/adapter", is_trainable=True).train()


def main(kind: str, output_dir: str, result: str) -> None:
    trainer_class = Trainer if kind == "stock" else AcceleratedMoETrainer
    model: Any = Adapted("qwen3_moe", torch.bfloat16)
    if kind == "sharded first":
        model = sharded_first
    arguments = {"max_steps": 6, "use_cpu": False, "bf16": True, "use_liger_kernel": kind == "liger"}
    trainer = make_trainer(trainer_class, output_dir, model=model, arguments=arguments)
    trainer.train()
    trainer.save_model(output_dir)
    if kind != "stock":
        export_checkpoint(trainer.model, f"{output_dir}/merged")
    if int(os.environ.get("RANK", "0")) == 0:
        losses = [entry["loss"] for entry in log_of(trainer) if "loss" in entry]
        Path(result).write_text(json.dumps({"losses": losses, "device": torch.cuda.get_device_name()}))
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
