"""TransformerEngine (https://github.com/NVIDIA/TransformerEngine): a matrix product for each expert, in one call.

The only importer. `general_grouped_gemm`, which its `GroupedLinear` is made of, takes lists of matrices: here views of
the stacked weights, of the rows and of one stacked gradient, so that nothing is copied or renamed. How many rows each
expert has must be known on the host.
"""

from __future__ import annotations

from functools import cache
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

# Its arguments have moved between releases: no older one than we have run.
_LEAST_VERSION = (2, 20)
_LEAST_CAPABILITY = (8, 0)
_DTYPES = (torch.bfloat16, torch.float16)


def why_not(dtype: torch.dtype, device: torch.device) -> str | None:
    """Why TransformerEngine cannot compute grouped products here, as one sentence; None if it can.

    Args:
        dtype: of the products.
        device: where they run.
    """
    reason = why_not_device(device)
    if reason is None:
        reason = _why_not_installed()
    if reason is None and dtype not in _DTYPES:
        reason = (
            f"TransformerEngine computes products in bf16 and fp16, and these are {str(dtype).removeprefix('torch.')} "
            "(its fp32 products are TF32): load the model in bf16"
        )
    return reason


def why_not_device(device: torch.device) -> str | None:
    """Why TransformerEngine cannot run on a device, whatever it is to compute."""
    if device.type != "cuda":
        return f"TransformerEngine needs a CUDA device, and this is {device.type}"
    capability = torch.cuda.get_device_capability(device)
    if capability < _LEAST_CAPABILITY:
        return (
            f"TransformerEngine needs a GPU of compute capability {_dotted(_LEAST_CAPABILITY)} or more, and this one "
            f"has {_dotted(capability)}"
        )
    return None


@cache
def _why_not_installed() -> str | None:
    if find_spec("transformer_engine") is None:
        return "TransformerEngine is not installed (pip install --no-build-isolation 'hf_moe_accel[te]')"
    found = version("transformer_engine")
    if tuple(int(part) for part in found.split(".")[:2]) < _LEAST_VERSION:
        return f"TransformerEngine {_dotted(_LEAST_VERSION)} or later is needed, and {found} is installed"
    try:
        _grouped_gemm()
    except Exception as error:
        # A half of it that is missing or was built for another torch raises whatever the loader does.
        return f"TransformerEngine {found} cannot be imported: {type(error).__name__}: {error}"
    return None


def grouped_linear(x_RK: Tensor, weight_eKM: Tensor, counts: list[int]) -> Tensor:
    """Rows of expert e times `weight_eKM[e]`.

    Args:
        x_RK: [R, K] rows ordered by expert.
        weight_eKM: [e, K, M] contiguous, or a transposed view of what is.
        counts: rows of each expert; they add up to R.

    Returns:
        [R, M] in the dtype of `x_RK`.
    """
    y_RM = x_RK.new_empty(x_RK.size(0), weight_eKM.size(2))
    stored_as_out_in = not weight_eKM.is_contiguous()
    weights = weight_eKM.transpose(1, 2) if stored_as_out_in else weight_eKM
    # It reads memory from where a matrix starts, whatever its strides: what is contiguous already is not copied.
    _grouped_gemm()(
        list(weights.contiguous().unbind()),
        list(x_RK.contiguous().split(counts)),
        [y_RM],
        [None] * len(counts),
        x_RK.dtype,
        layout="TN" if stored_as_out_in else "NN",
        m_splits=counts,
        single_output=True,
    )
    return y_RM


def grouped_outer(a_RM: Tensor, b_RK: Tensor, counts: list[int]) -> Tensor:
    """The weight gradient of `grouped_linear`: for each expert the sum over its rows of outer products.

    Returns:
        [e, M, K]; zeros for an expert without rows.
    """
    out_eMK = a_RM.new_empty(len(counts), a_RM.size(1), b_RK.size(1))
    _grouped_gemm()(
        list(b_RK.contiguous().split(counts)),
        list(a_RM.contiguous().split(counts)),
        list(out_eMK.unbind()),
        [None] * len(counts),
        a_RM.dtype,
        layout="NT",
        m_splits=counts,
    )
    return out_eMK


@cache
def _grouped_gemm() -> Any:
    from transformer_engine.pytorch.cpp_extensions import (  # type: ignore[import-not-found]
        general_grouped_gemm,
    )

    return general_grouped_gemm


def _dotted(numbers: tuple[int, ...]) -> str:
    return ".".join(map(str, numbers))
