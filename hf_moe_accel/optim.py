"""For loops of your own: what stock torch cannot do when parameters live on different device meshes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm


def clip_grad_norm_(model: nn.Module, max_norm: float) -> Tensor:
    """`torch.nn.utils.clip_grad_norm_` for an expert-parallel model. All ranks must call.

    Expert parameters live on another device mesh than the others, and the stock function cannot span both.

    Args:
        model: after `backward`.
        max_norm: the largest 2-norm over all gradients of all ranks.

    Returns:
        The norm before clipping, a scalar, the same on all ranks.
    """
    groups = list(_by_mesh(p for p in model.parameters() if p.grad is not None).values())
    norms = [get_total_norm([p.grad for p in group if p.grad is not None]) for group in groups]
    if not norms:
        return torch.zeros(())
    total: Tensor = torch.linalg.vector_norm(
        torch.stack([n.full_tensor() if isinstance(n, DTensor) else n for n in norms])
    )
    for group in groups:
        clip_grads_with_norm_(group, max_norm, total)
    return total


def parameter_groups(model: nn.Module, **options: Any) -> list[dict[str, Any]]:
    """Parameter groups for an optimizer, one per device mesh: `AdamW(parameter_groups(model), lr=1e-5)`.

    As transformers' Trainer does: foreach and fused optimizers raise on a group of sharded and plain parameters, and
    torch does not promise that they take parameters of several meshes.

    Args:
        model: prepared.
        options: put into every group, for example `weight_decay=0.1`.

    Returns:
        Groups of the parameters that train.
    """
    groups = _by_mesh(p for p in model.parameters() if p.requires_grad)
    return [{"params": group, **options} for group in groups.values()]


def _by_mesh(parameters: Iterable[nn.Parameter]) -> dict[Any, list[nn.Parameter]]:
    groups: dict[Any, list[nn.Parameter]] = defaultdict(list)
    for parameter in parameters:
        groups[parameter.device_mesh if isinstance(parameter, DTensor) else None].append(parameter)
    return groups
