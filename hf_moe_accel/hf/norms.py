"""A model's norms in one kernel each way on GPUs, where that is the same function (`ops/norms`).

Modules stay, with their hooks: what is replaced is what runs in them. Others' kernels (Liger's, those of transformers'
`use_kernels`) are left alone. torch's compiler, which joins a norm with what stands around it, sees the model's own.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn

from hf_moe_accel.ops.norms import NormFormula, find_formula, rms_norm, takes


def fuse_norms(model: nn.Module) -> int:
    """Put the kernels in place, for rows on GPUs that `ops/triton` can serve. On a CPU nothing changes.

    Args:
        model: of transformers, whole or sharded, on any device.

    Returns:
        how many norms will run in them on a GPU.
    """
    count = 0
    for norm in model.modules():
        if not type(norm).__name__.endswith("Norm") or "forward" in norm.__dict__:
            continue
        formula = find_formula(norm)
        if formula is not None:
            # No closure and no bound method: a copy of the module has a partial of its own, and it can be pickled.
            norm.forward = functools.partial(_forward, norm, formula)
            count += 1
    return count


def _forward(norm: Any, formula: NormFormula, hidden: Any, *args: Any, **kwargs: Any) -> Any:
    weight = norm.weight
    if args or kwargs or torch.compiler.is_compiling() or not _has_kernels(hidden) or not takes(hidden, weight):
        return type(norm).forward(norm, hidden, *args, **kwargs)
    return rms_norm(hidden, weight, formula)


def _has_kernels(hidden: Any) -> bool:
    return getattr(hidden, "is_cuda", False)
