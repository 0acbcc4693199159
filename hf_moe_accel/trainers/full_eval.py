"""Evaluation in another dtype (`bf16_full_eval`, `fp16_full_eval`) of a model that FSDP2 shards."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule


def full_eval_dtype(args: Any) -> torch.dtype | None:
    """The dtype that `TrainingArguments` ask to cast the model to for evaluation, or None."""
    if args.fp16_full_eval:
        return torch.float16
    return torch.bfloat16 if args.bf16_full_eval else None


def cast_sharded(model: nn.Module, dtype: torch.dtype) -> None:
    """`model.to(dtype)`, also after the first forward pass.

    FSDP2 keeps the buffers and parameters that it gathers weights into, and notes the dtype of the weights, at the
    first forward pass. `to` leaves them as they are, and the next gather raises.
    """
    model.to(dtype)
    for module in model.modules():
        if not isinstance(module, FSDPModule):
            continue
        for group in module._get_fsdp_state()._fsdp_param_groups:
            for parameter in group.fsdp_params:
                parameter.all_gather_outputs = []
                parameter.__dict__.pop("_unsharded_param", None)
            group._init_mp_dtypes()
