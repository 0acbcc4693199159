"""A run that is resumed: `python -m tests.gpu.checkpoint_job OUT RESUME RESULT [SETTINGS]`, or under torchrun."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM

from tests.helpers.models import tiny_model
from tests.helpers.resumable import run


def model() -> torch.nn.Module:
    return tiny_model("qwen3_moe", dtype=torch.bfloat16)


def main(output_dir: str, resume: str, result: str, settings: str = "{}") -> None:
    ours = run(output_dir, resume or None, model=model, use_cpu=False, **json.loads(settings))
    if int(os.environ.get("RANK", "0")) == 0:
        saved = AutoModelForCausalLM.from_pretrained(Path(output_dir, "checkpoint-7"), dtype=torch.bfloat16)
        values: dict[str, Any] = dict(saved.named_parameters())
        same = all(torch.equal(value.cpu(), values[name]) for name, value in ours.weights.items())
        Path(result).write_text(json.dumps({"log": ours.log, "saved_exactly": same, "device": str(saved.device)}))
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
