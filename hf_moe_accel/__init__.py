"""Fine-tune mixture-of-experts models with one changed import.

`Trainer` -> `AcceleratedMoETrainer`, TRL's `SFTTrainer` -> `AcceleratedMoESFTTrainer` and so on, or transformers'
`AutoModelForCausalLM` -> ours. Names load on first use, so that `import hf_moe_accel` costs nothing and has no side
effect.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hf_moe_accel.auto import AutoModelForCausalLM
    from hf_moe_accel.callbacks.metrics import MoEMetricsCallback, add_metrics
    from hf_moe_accel.callbacks.plugin import MoEAccelCallback
    from hf_moe_accel.callbacks.wandb import MoEWandbCallback
    from hf_moe_accel.config import MoEAccelConfig
    from hf_moe_accel.hf.export import export_checkpoint
    from hf_moe_accel.hf.peft_bridge import PeftModel, export_adapter, get_peft_model
    from hf_moe_accel.optim import AdamW, clip_grad_norm_, parameter_groups
    from hf_moe_accel.prepare import prepare_moe_model
    from hf_moe_accel.trainers.hf import AcceleratedMoETrainer
    from hf_moe_accel.trainers.mixin import AcceleratedMoEMixin
    from hf_moe_accel.trainers.trl import (
        AcceleratedMoEDPOTrainer,
        AcceleratedMoEGRPOTrainer,
        AcceleratedMoEKTOTrainer,
        AcceleratedMoERewardTrainer,
        AcceleratedMoESFTTrainer,
    )

__version__ = "0.1.0.dev0"

_MODULE_OF = {
    "AcceleratedMoEDPOTrainer": "trainers.trl",
    "AcceleratedMoEGRPOTrainer": "trainers.trl",
    "AcceleratedMoEKTOTrainer": "trainers.trl",
    "AcceleratedMoEMixin": "trainers.mixin",
    "AcceleratedMoERewardTrainer": "trainers.trl",
    "AcceleratedMoESFTTrainer": "trainers.trl",
    "AcceleratedMoETrainer": "trainers.hf",
    "AdamW": "optim",
    "AutoModelForCausalLM": "auto",
    "MoEAccelCallback": "callbacks.plugin",
    "MoEAccelConfig": "config",
    "MoEMetricsCallback": "callbacks.metrics",
    "MoEWandbCallback": "callbacks.wandb",
    "PeftModel": "hf.peft_bridge",
    "add_metrics": "callbacks.metrics",
    "clip_grad_norm_": "optim",
    "export_adapter": "hf.peft_bridge",
    "export_checkpoint": "hf.export",
    "get_peft_model": "hf.peft_bridge",
    "parameter_groups": "optim",
    "prepare_moe_model": "prepare",
}

__all__ = [
    "AcceleratedMoEDPOTrainer",
    "AcceleratedMoEGRPOTrainer",
    "AcceleratedMoEKTOTrainer",
    "AcceleratedMoEMixin",
    "AcceleratedMoERewardTrainer",
    "AcceleratedMoESFTTrainer",
    "AcceleratedMoETrainer",
    "AdamW",
    "AutoModelForCausalLM",
    "MoEAccelCallback",
    "MoEAccelConfig",
    "MoEMetricsCallback",
    "MoEWandbCallback",
    "PeftModel",
    "add_metrics",
    "clip_grad_norm_",
    "export_adapter",
    "export_checkpoint",
    "get_peft_model",
    "parameter_groups",
    "prepare_moe_model",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
