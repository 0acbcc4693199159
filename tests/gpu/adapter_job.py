"""A run with LoRA on the experts, ours or stock: `python -m tests.gpu.adapter_job KIND OUT RESULT`, or by torchrun."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import Trainer

from hf_moe_accel import AcceleratedMoETrainer, export_checkpoint
from tests.distributed.test_training_arguments import log_of, make_trainer
from tests.helpers.adapters import Adapted


def main(kind: str, output_dir: str, result: str) -> None:
    trainer_class = {"ours": AcceleratedMoETrainer, "stock": Trainer}[kind]
    model: Any = Adapted("qwen3_moe", torch.bfloat16)
    arguments = {"max_steps": 6, "use_cpu": False, "bf16": True}
    trainer = make_trainer(trainer_class, output_dir, model=model, arguments=arguments)
    trainer.train()
    trainer.save_model(output_dir)
    if kind == "ours":
        export_checkpoint(trainer.model, f"{output_dir}/merged")
    if int(os.environ.get("RANK", "0")) == 0:
        losses = [entry["loss"] for entry in log_of(trainer) if "loss" in entry]
        Path(result).write_text(json.dumps({"losses": losses, "device": torch.cuda.get_device_name()}))
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
