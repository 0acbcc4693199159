"""transformers' auto classes, sharded and accelerated by us."""

from __future__ import annotations

import os
from typing import Any

import transformers

from hf_moe_accel.config import MoEAccelConfig
from hf_moe_accel.hf.discover import find_experts
from hf_moe_accel.hf.loading import distributed_config, meta_model
from hf_moe_accel.prepare import check_model, choose_setup, prepare_moe_model


class AutoModelForCausalLM:
    """`transformers.AutoModelForCausalLM` with the same calls: `AutoModelForCausalLM.from_pretrained(...)`.

    Under torchrun every rank reads only its own slices of the weights. `model.save_pretrained` (all ranks must call)
    writes a standard checkpoint. How a loop of your own must scale the loss, clip and build its optimizer:
    `prepare_moe_model`.
    """

    _auto_class: Any = transformers.AutoModelForCausalLM

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        *model_args: Any,
        moe_config: MoEAccelConfig | None = None,
        fsdp_mixed_precision: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Load, shard and prepare. All ranks must call.

        Args:
            pretrained_model_name_or_path: hub id or local path.
            model_args: as in transformers.
            moe_config: None means: choose well.
            fsdp_mixed_precision: see `prepare_moe_model`; load with `dtype=torch.float32` for fp32 masters.
            kwargs: as in transformers.

        Returns:
            The model, prepared; a dense model comes back as transformers loads it, with a warning.

        Raises:
            ValueError: an argument that does not fit, before any weight is read.
        """
        moe_config = moe_config or MoEAccelConfig()
        structure = meta_model(cls._auto_class, pretrained_model_name_or_path, kwargs.get("config"), **kwargs)
        setup = choose_setup(structure, find_experts(structure), moe_config, mixed_precision=fsdp_mixed_precision)
        if setup is None:
            return cls._auto_class.from_pretrained(pretrained_model_name_or_path, *model_args, **kwargs)
        refuse_load_arguments(kwargs)
        check_model(structure, setup.topology)
        if setup.topology.world_size > 1:
            kwargs["distributed_config"] = distributed_config(setup.topology, mixed_precision=fsdp_mixed_precision)
        loaded = cls._auto_class.from_pretrained(pretrained_model_name_or_path, *model_args, **kwargs)
        if kwargs.get("output_loading_info"):
            model, info = loaded
            return prepare_moe_model(model, moe_config, fsdp_mixed_precision=fsdp_mixed_precision), info
        return prepare_moe_model(loaded, moe_config, fsdp_mixed_precision=fsdp_mixed_precision)

    @classmethod
    def from_config(cls, config: Any, *, moe_config: MoEAccelConfig | None = None, **kwargs: Any) -> Any:
        """A model with random weights, prepared; rank 0's weights win. All ranks must call."""
        return prepare_moe_model(cls._auto_class.from_config(config, **kwargs), moe_config)


def refuse_load_arguments(kwargs: dict[str, Any]) -> None:
    """Refuse arguments of `from_pretrained` that do not go with our sharding.

    Raises:
        ValueError: names the argument to delete.
    """
    reasons = {
        "device_map": "each rank places its own part of the model",
        "quantization_config": "quantized experts are not supported",
        "load_in_4bit": "quantized experts are not supported",
        "load_in_8bit": "quantized experts are not supported",
        "distributed_config": "the layout is chosen by MoEAccelConfig",
        "tp_plan": "tensor parallelism does not go with expert parallelism here",
        "experts_implementation": "MoEAccelConfig(expert_backend=...) chooses how the experts compute",
        "tp_size": "tp_size does not carry expert parallelism; use MoEAccelConfig(ep_size=...)",
    }
    for name, reason in reasons.items():
        if kwargs.get(name) is not None:
            raise ValueError(f"{name}={kwargs[name]!r} is not supported: {reason}. Delete `{name}=` from the call.")
