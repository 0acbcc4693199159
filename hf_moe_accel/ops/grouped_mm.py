"""torch's grouped matrix product: one call for the products of all experts."""

from __future__ import annotations

import torch
from torch import Tensor

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def why_not(hidden: int, intermediate: int, dtype: torch.dtype, device: torch.device) -> str | None:
    """Why grouped products of these shapes cannot run here, as one sentence; None if they can.

    Args:
        hidden: hidden size D in elements.
        intermediate: the sizes of the experts' inner dimensions, in elements.
        dtype: dtype of the products.
        device: where they run.
    """
    if dtype not in _DTYPES:
        return f"torch's grouped_mm has no kernel for {dtype}"
    item = torch.empty((), dtype=dtype).element_size()
    for name, size in (("hidden size", hidden), ("intermediate size", intermediate)):
        if size * item % 16:
            return f"torch's grouped_mm needs rows of a multiple of 16 bytes, and {name} {size} in {dtype} is not"
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        return "torch's grouped_mm needs a GPU of compute capability 8.0 or more"
    return None


def grouped_linear(x_RK: Tensor, weight_eKM: Tensor, ends_e: Tensor) -> Tensor:
    """Rows of expert e times `weight_eKM[e]`.

    Args:
        x_RK: [R, K] rows ordered by expert.
        weight_eKM: [e, K, M]; a transposed view is fine, no copy is made.
        ends_e: [e] int32, the row after the last one of each expert; the last entry is R.

    Returns:
        [R, M] in the dtype of `x_RK`.
    """
    if x_RK.size(0) == 0:
        return x_RK.new_zeros(0, weight_eKM.size(2))
    return torch.nn.functional.grouped_mm(x_RK, weight_eKM, offs=ends_e)


def grouped_outer(a_RM: Tensor, b_RK: Tensor, ends_e: Tensor) -> Tensor:
    """The weight gradient of `grouped_linear`: for each expert the sum over its rows of outer products.

    Returns:
        [e, M, K]; zeros for an expert without rows.
    """
    if a_RM.size(0) == 0:
        return a_RM.new_zeros(ends_e.numel(), a_RM.size(1), b_RK.size(1))
    return torch.nn.functional.grouped_mm(a_RM.t(), b_RK, offs=ends_e)
