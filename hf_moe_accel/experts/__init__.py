"""STATION 2: rows are computed by this rank's experts."""

from hf_moe_accel.experts.base import ExpertBackend
from hf_moe_accel.registry import Registry

EXPERT_BACKENDS: Registry[type[ExpertBackend]] = Registry("expert backend")
EXPERT_BACKENDS.register("fused", "hf_moe_accel.experts.fused:FusedBackend")
EXPERT_BACKENDS.register("padded_bmm", "hf_moe_accel.experts.padded_bmm:PaddedBMMBackend")
EXPERT_BACKENDS.register("grouped_mm", "hf_moe_accel.experts.grouped_mm:GroupedMMBackend")
EXPERT_BACKENDS.register("eager", "hf_moe_accel.experts.eager:EagerBackend")
# After the one that serves everything: by name only.
EXPERT_BACKENDS.register("transformer_engine", "hf_moe_accel.experts.transformer_engine:TransformerEngineBackend")
