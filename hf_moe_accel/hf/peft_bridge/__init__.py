"""LoRA on the experts for PEFT. The one importer of peft: what others need is here."""

from hf_moe_accel.hf.peft_bridge.attach import (
    PeftModel,
    adapter_config,
    adopt_expert_adapters,
    expert_parallel_rules,
    get_peft_model,
    why_not_after_sharding,
)
from hf_moe_accel.hf.peft_bridge.files import load_adapter
from hf_moe_accel.hf.peft_bridge.fold import without_adapters
from hf_moe_accel.hf.peft_bridge.per_expert import check_per_expert, export_adapter
from hf_moe_accel.hf.peft_bridge.saved import saved_adapter

__all__ = [
    "PeftModel",
    "adapter_config",
    "adopt_expert_adapters",
    "expert_parallel_rules",
    "check_per_expert",
    "export_adapter",
    "get_peft_model",
    "load_adapter",
    "saved_adapter",
    "why_not_after_sharding",
    "without_adapters",
]
