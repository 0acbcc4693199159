"""quack-kernels (https://github.com/Dao-AILab/quack): grouped products that read their rows through an index.

The only importer. Its `gemm` takes rows of variable number for each expert, ordered by expert or through an index, for
the products of rows with weights ("varlen_m") and for the gradients of weights ("varlen_k"), without a look at the
numbers from the host. `tuned=False` takes its fixed choice for the device: tuning would compile dozens of kernels.
"""

from __future__ import annotations

import re
from functools import cache
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor

# Arguments have moved between releases: no older one than we have read.
_LEAST_VERSION = (0, 6, 5)
_CAPABILITIES = (9, 10)
_DTYPES = (torch.bfloat16, torch.float16)


class Through(NamedTuple):
    """Rows that a product reads by itself.

    Attributes:
        source_NK: [N, K].
        row_of_R: [R] int32, which of them each row is.
    """

    source_NK: Tensor
    row_of_R: Tensor


def why_not(dtype: torch.dtype, device: torch.device) -> str | None:
    """Why quack-kernels cannot compute grouped products here, as one sentence; None if it can.

    Args:
        dtype: of the products.
        device: where they run.
    """
    reason = why_not_device(device) or _why_not_installed()
    if reason is None and dtype not in _DTYPES:
        return (
            f"quack-kernels computes products in bf16 and fp16, and these are {str(dtype).removeprefix('torch.')}: "
            "load the model in bf16"
        )
    return reason


def why_not_device(device: torch.device) -> str | None:
    """Why quack-kernels cannot run on a device, whatever it is to compute."""
    if device.type != "cuda":
        return f"quack-kernels needs a CUDA device, and this is {device.type}"
    major, minor = torch.cuda.get_device_capability(device)
    if major not in _CAPABILITIES:
        return f"quack-kernels is used on GPUs of compute capability 9 and 10, and this one has {major}.{minor}"
    return None


def grouped_linear(x_RK: Tensor | Through, weight_eKM: Tensor, starts_E: Tensor) -> Tensor:
    """Rows of expert e times `weight_eKM[e]`.

    Args:
        x_RK: [R, K] rows ordered by expert.
        weight_eKM: [e, K, M]; a transposed view is fine, no copy is made.
        starts_E: [e + 1] int32, the first row of each expert, and R.

    Returns:
        [R, M] in the dtype of the rows.
    """
    source, index = x_RK if isinstance(x_RK, Through) else (x_RK, None)
    num_rows = source.size(0) if index is None else index.numel()
    out_RM = source.new_empty(num_rows, weight_eKM.size(2))
    if num_rows:
        _gemm()(source, weight_eKM, out=out_RM, cu_seqlens_m=starts_E, A_idx=index, tuned=False)
    return out_RM


def grouped_outer(
    a_RM: Tensor | Through, b_RK: Tensor | Through, starts_E: Tensor, *, transposed: bool = False
) -> Tensor:
    """The weight gradient of `grouped_linear`: for each expert the sum over its rows of outer products.

    Args:
        a_RM: [R, M] rows ordered by expert.
        b_RK: [R, K] the same; one of both at most through an index.
        starts_E: as in `grouped_linear`.
        transposed: whether the result is laid out as [e, K, M] in memory.

    Returns:
        [e, M, K], or [e, K, M] where it is transposed; contiguous, zeros for an expert without rows.
    """
    if isinstance(b_RK, Through):
        # The product reads its first operand through an index.
        return grouped_outer(b_RK, a_RM, starts_E, transposed=not transposed)
    source, index = a_RM if isinstance(a_RM, Through) else (a_RM, None)
    sizes = (starts_E.numel() - 1, source.size(1), b_RK.size(1))
    if b_RK.size(0) == 0:
        return source.new_zeros(sizes[0], *(reversed(sizes[1:]) if transposed else sizes[1:]))
    out_eMK = source.new_empty(sizes[0], sizes[2], sizes[1]).mT if transposed else source.new_empty(sizes)
    _gemm()(source.t(), b_RK, out=out_eMK, cu_seqlens_k=starts_E, A_idx=index, tuned=False)
    return out_eMK.mT if transposed else out_eMK


@cache
def _gemm() -> Any:
    from quack.gemm_interface import gemm  # type: ignore[import-not-found]

    return gemm


@cache
def _why_not_installed() -> str | None:
    if find_spec("quack") is None:
        return "quack-kernels is not installed (pip install 'hf_moe_accel[quack]')"
    found = version("quack-kernels")
    if tuple(map(int, re.findall(r"\d+", found)[:3])) < _LEAST_VERSION:
        least = ".".join(map(str, _LEAST_VERSION))
        return f"quack-kernels {least} or later is needed, and {found} is installed"
    try:
        _gemm()
    except Exception as error:
        # What it is made of may be missing, or raise whatever its loader does.
        return f"quack-kernels cannot be imported: {type(error).__name__}: {error}"
    return None
