"""STATION 2: rows are computed by this rank's experts."""

from hf_moe_accel.experts.base import ExpertBackend
from hf_moe_accel.registry import Registry

EXPERT_BACKENDS: Registry[type[ExpertBackend]] = Registry("expert backend")
EXPERT_BACKENDS.register("quack", "hf_moe_accel.experts.quack:QuackBackend")
EXPERT_BACKENDS.register("fused", "hf_moe_accel.experts.fused:FusedBackend")
EXPERT_BACKENDS.register("padded_bmm", "hf_moe_accel.experts.padded_bmm:PaddedBMMBackend")
EXPERT_BACKENDS.register("grouped_mm", "hf_moe_accel.experts.grouped_mm:GroupedMMBackend")
EXPERT_BACKENDS.register("eager", "hf_moe_accel.experts.eager:EagerBackend")
# After the one that serves everything, so by name only: at Qwen3-30B's sizes TransformerEngine's bf16 products took an
# H100 1.4 to 9 times as long as torch's with 128 experts, since the host launches each, and 0.9 to 1.3 times with 16.
_TE = "hf_moe_accel.experts.transformer_engine"
EXPERT_BACKENDS.register("transformer_engine", f"{_TE}:TransformerEngineBackend")
EXPERT_BACKENDS.register("transformer_engine_fp8", f"{_TE}:FP8CurrentScalingBackend")
EXPERT_BACKENDS.register("transformer_engine_fp8_block", f"{_TE}:FP8BlockScalingBackend")
