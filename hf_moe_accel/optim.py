"""Steps of many parameters: over several device meshes, and at the speed of memory."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from functools import reduce
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from hf_moe_accel.ops import triton as triton_ops

# Torch takes many tensors in one launch, at 2.8 of the 4.3 TB/s that an H200 moves. A tensor of this many elements
# keeps it busy for longer than it takes to launch a kernel for that one alone.
_LARGE = 2**24
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)

_T = TypeVar("_T")


class AdamW(torch.optim.AdamW):
    """`torch.optim.AdamW` with the same arguments, state and results (up to rounding), in less time.

    Experts are most of a model's parameters, and all of them take a step where a token uses a few. With `fused=True`
    on CUDA a kernel of ours updates the parameters of 16 million elements and more, of this rank's shard where they
    are sharded; all else is torch's: smaller ones, other devices, `amsgrad`, `maximize`, `capturable`, a learning rate
    that is a tensor, and a gradient scaler. Our trainers use it for `optim="adamw_torch_fused"`.
    """

    def _init_group(
        self,
        group: dict[str, Any],
        params: list[Tensor],
        grads: list[Tensor],
        exp_avgs: list[Tensor],
        exp_avg_sqs: list[Tensor],
        max_exp_avg_sqs: list[Tensor],
        steps: list[Tensor],
    ) -> bool:
        """Take a step with those that are ours to update, and leave the others to the caller."""
        collected = (params, grads, exp_avgs, exp_avg_sqs, steps)
        has_complex: bool = super()._init_group(  # type: ignore[no-untyped-call]
            group, *collected[:-1], max_exp_avg_sqs, steps
        )
        others = ("amsgrad", "maximize", "capturable", "differentiable")
        scaled = getattr(self, "grad_scale", None) is not None or getattr(self, "found_inf", None) is not None
        ours = group["fused"] and not (isinstance(group["lr"], Tensor) or scaled or any(group[n] for n in others))
        large, small = _split(zip(*collected, strict=True), lambda row: ours and all(map(_is_large, row[:-1])))
        for _, grad, *_ in small:
            factor = _factor_of(grad)
            if factor is not None:
                _shrink(grad, factor)
        if large:
            self._step_large(group, large)
            for position, tensors in enumerate(collected):
                tensors[:] = [row[position] for row in small]
        return has_complex

    def clips_in_step(self) -> set[int]:
        """The parameters, by `id`, whose large gradients a step can clip as it reads them; none if it has hooks."""
        if self._optimizer_step_pre_hooks or self._optimizer_step_post_hooks:
            return set()
        return {id(parameter) for group in self.param_groups for parameter in group["params"]}

    @staticmethod
    def _step_large(group: dict[str, Any], rows: Sequence[Sequence[Tensor]]) -> None:
        from hf_moe_accel.ops.triton.elementwise import adamw_

        steps = [row[-1] for row in rows]
        torch._foreach_add_(steps, 1)
        of_P = torch.stack(steps).double()
        beta1, beta2 = group["betas"]
        corrections_P2 = torch.stack((1 - beta1**of_P, (1 - beta2**of_P).sqrt()), 1).float()
        for which, row in enumerate(rows):
            adamw_(
                *map(_local, row[:-1]),
                corrections_P2=corrections_P2,
                which=which,
                factor=_factor_of(row[1]),
                lr=group["lr"],
                betas=(beta1, beta2),
                eps=group["eps"],
                weight_decay=group["weight_decay"],
            )
        # Autograd cannot see what a kernel writes.
        increment_version([row[0] for row in rows])


def clip_grad_norm_(model: nn.Module, max_norm: float, *, optimizer: AdamW | None = None) -> Tensor:
    """`torch.nn.utils.clip_grad_norm_` for an expert-parallel model. All ranks must call.

    Expert parameters live on another device mesh than the others, and the stock function cannot span both. Gradients
    of 16 million elements and more take less time on CUDA, and none where the norm is within its limit.

    Args:
        model: after `backward`.
        max_norm: the largest 2-norm over all gradients of all ranks.
        optimizer: ours, whose step comes next, with nobody looking at gradients before they are set to zero: it takes
            large ones clipped, as it reads them, and they stay as they are. None, or one with hooks around its step:
            all are clipped here.

    Returns:
        The norm before clipping, a scalar, the same on all ranks.
    """
    groups = list(_by_mesh(p for p in model.parameters() if p.grad is not None).values())
    norms = [norm for group in groups for norm in _norms(_grads(group))]
    if not norms:
        return torch.zeros(())
    total: Tensor = torch.linalg.vector_norm(
        torch.stack([n.full_tensor() if isinstance(n, DTensor) else n for n in norms])
    )
    for group in groups:
        others = _shrink_large(group, max_norm, total, optimizer)
        dtypes = [grad.dtype for grad in _grads(others)]
        if dtypes:
            # That of torch's own norm: with another one it multiplies them one by one.
            clip_grads_with_norm_(others, max_norm, total.to(reduce(torch.promote_types, dtypes)))
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


def _grads(parameters: Iterable[nn.Parameter]) -> list[Tensor]:
    return [parameter.grad for parameter in parameters if parameter.grad is not None]


def _norms(grads: Sequence[Tensor]) -> list[Tensor]:
    """Of parts of the gradients of one mesh: those of large ones, and that of all others."""
    large, others = _split(grads, lambda grad: not isinstance(grad, DTensor) and _is_large(grad))
    # One kernel of torch's for all is slower, and rounds to the dtype of the gradients.
    norms = [torch.linalg.vector_norm(grad, dtype=torch.float32) for grad in large]
    return norms + ([get_total_norm(others)] if others else [])


def _shrink_large(
    parameters: Sequence[nn.Parameter], max_norm: float, total: Tensor, optimizer: AdamW | None
) -> list[nn.Parameter]:
    """Clip the large gradients, or have it done by the optimizer, and return the parameters of the other ones."""
    large, others = _split(parameters, lambda parameter: parameter.grad is not None and _is_large(parameter.grad))
    if large:
        later = set() if optimizer is None else optimizer.clips_in_step()
        factor = (max_norm / (total.float() + 1e-6)).to(large[0].device)  # torch's
        for parameter in large:
            grad: Any = parameter.grad
            if id(parameter) in later:
                # It goes when the gradient does, and does not count for what is written into it from here on.
                grad.moe_clip = (factor, grad._version)
            else:
                _shrink(grad, factor)
    return others


def _factor_of(grad: Any) -> Tensor | None:
    """What a gradient is still to be multiplied by."""
    factor, version = getattr(grad, "moe_clip", (None, None))
    return factor if version == grad._version else None


def _shrink(grad: Tensor, factor: Tensor) -> None:
    from hf_moe_accel.ops.triton.elementwise import shrink_

    shrink_(_local(grad), factor)
    # Also: it is not to be done again.
    increment_version([grad])


def _split(items: Iterable[_T], is_first: Callable[[_T], bool]) -> tuple[list[_T], list[_T]]:
    parts: tuple[list[_T], list[_T]] = ([], [])
    for item in items:
        parts[0 if is_first(item) else 1].append(item)
    return parts


def _local(tensor: Any) -> Tensor:
    local: Tensor = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return local


def _is_large(tensor: Tensor) -> bool:
    """Whether a kernel of ours updates this one."""
    local = _local(tensor)
    return (
        local.numel() >= _LARGE
        and local.dtype in _DTYPES
        and local.is_contiguous()
        and triton_ops.why_not(local.device) is None
    )
