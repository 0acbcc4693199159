"""The filter of `logging_nan_inf_filter`, on the device.

Trainer asks the host after each backward pass whether the loss is finite. Until the device has come so far, nothing
of the optimizer's step and of the next forward pass is launched, and the device waits for it afterwards.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only


class _Finite(Tensor):
    """A tensor that is known to be finite, so that nobody has to look."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """As of a plain tensor, but for the two questions."""
        if func in (torch.isnan, torch.isinf):
            return False
        with torch._C.DisableTorchFunctionSubclass():
            plain = tree_map_only(_Finite, lambda each: each.as_subclass(Tensor), (args, kwargs or {}))
            return func(*plain[0], **plain[1])


def finite_loss(loss: Tensor, instead: Tensor) -> Tensor:
    """The loss, or where it is not finite what Trainer logs in its place; `isnan` and `isinf` of it are plain False.

    Args:
        loss: one number.
        instead: another.
    """
    return torch.where(torch.isfinite(loss), loss, instead.to(loss.device)).as_subclass(_Finite)
