"""TransformerEngine (https://github.com/NVIDIA/TransformerEngine): a matrix product for each expert, in one call.

The only importer. `general_grouped_gemm`, which its `GroupedLinear` is made of, takes lists of matrices: here views of
the stacked weights, of the rows and of one stacked gradient, so that nothing is copied or renamed. How many rows each
expert has must be known on the host.

In FP8 both operands are rounded just before the product, with the recipes of TransformerEngine ("current": one scale
for each matrix, E4M3, gradients in E5M2; "block": a scale for each 1 x 128 of rows or 128 x 128 of weights, all in
E4M3). The results are in the dtype of the rows, and so are the parameters and their gradients.
"""

from __future__ import annotations

import re
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Literal

import torch
from torch import Tensor

Scaling = Literal["current", "block"]
Role = Literal["input", "weight", "grad"]

# FP8 products take all sizes, rows of an expert too, in multiples of this.
FP8_MULTIPLE = 16
# Arguments have moved between releases: no older one than we have run.
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


def why_not_fp8(scaling: Scaling, sizes: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> str | None:
    """Why it cannot compute them in FP8, as one sentence; None if it can.

    Args:
        scaling: how values are scaled before they are rounded.
        sizes: the sizes of the weights.
        dtype: of parameters, rows and results.
        device: where they run.
    """
    reason = why_not(dtype, device)
    if reason is not None:
        return reason
    for size in sizes:
        if size % FP8_MULTIPLE:
            return f"FP8 products take sizes that are multiples of {FP8_MULTIPLE}, not {size}"
    pytorch = _pytorch()
    available = pytorch.is_fp8_available if scaling == "current" else pytorch.is_fp8_block_scaling_available
    can, answer = available(return_reason=True)
    return None if can else f"TransformerEngine has no FP8 with {scaling} scaling here: {answer.strip().rstrip('.')}"


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
    try:
        found = version("transformer_engine")
    except PackageNotFoundError:
        return "TransformerEngine is not installed (pip install --no-build-isolation 'hf_moe_accel[te]')"
    try:
        _pytorch()
    except Exception as error:
        # A half of it that is missing or was built for another torch raises whatever the loader does.
        return f"TransformerEngine cannot be imported: {type(error).__name__}: {error}"
    if tuple(map(int, re.findall(r"\d+", found)[:2])) < _LEAST_VERSION:
        return f"TransformerEngine {_dotted(_LEAST_VERSION)} or later is needed, and {found} is installed"
    return None


def grouped_linear(
    x_RK: Tensor,
    weight_eKM: Tensor,
    counts: list[int],
    *,
    scaling: Scaling | None = None,
    of_grads: bool = False,
) -> Tensor:
    """Rows of expert e times `weight_eKM[e]`.

    Args:
        x_RK: [R, K] rows ordered by expert.
        weight_eKM: [e, K, M] contiguous, or a transposed view of what is.
        counts: rows of each expert; they add up to R.
        scaling: of FP8; None for a product in the dtype of `x_RK`.
        of_grads: whether the rows are gradients.

    Returns:
        [R, M] in the dtype of `x_RK`.
    """
    y_RM = x_RK.new_empty(x_RK.size(0), weight_eKM.size(2))
    as_out_in = not weight_eKM.is_contiguous()
    weights = weight_eKM.transpose(1, 2) if as_out_in else weight_eKM
    _pytorch().cpp_extensions.general_grouped_gemm(
        _matrices(weights.flatten(0, 1), [weights.size(1)] * weights.size(0), scaling, "weight", along_rows=as_out_in),
        _matrices(x_RK, counts, scaling, "grad" if of_grads else "input", along_rows=True),
        [y_RM],
        [None] * len(counts),
        x_RK.dtype,
        layout="TN" if as_out_in else "NN",
        m_splits=counts,
        single_output=True,
        # As in TransformerEngine's recipes.
        use_split_accumulator=scaling == "block" or of_grads,
    )
    return y_RM


def grouped_outer(
    a_RM: Tensor,
    b_RK: Tensor,
    counts: list[int],
    *,
    scaling: Scaling | None = None,
    roles: tuple[Role, Role] = ("grad", "input"),
) -> Tensor:
    """The weight gradient of `grouped_linear`: for each expert the sum over its rows of outer products.

    Args:
        a_RM: [R, M] rows ordered by expert.
        b_RK: [R, K] rows ordered by expert.
        counts: rows of each expert; they add up to R.
        scaling: of FP8; None for products in the dtype of the rows.
        roles: what `a_RM` and `b_RK` are.

    Returns:
        [e, M, K] in the dtype of the rows; zeros for an expert without rows.
    """
    out_eMK = a_RM.new_empty(len(counts), a_RM.size(1), b_RK.size(1))
    _pytorch().cpp_extensions.general_grouped_gemm(
        _matrices(b_RK, counts, scaling, roles[1], along_rows=False),
        _matrices(a_RM, counts, scaling, roles[0], along_rows=False),
        list(out_eMK.unbind()),
        [None] * len(counts),
        a_RM.dtype,
        layout="NT",
        m_splits=counts,
        use_split_accumulator=True,
    )
    return out_eMK


def _matrices(rows: Tensor, counts: list[int], scaling: Scaling | None, role: Role, *, along_rows: bool) -> list[Any]:
    """The rows of each expert, in FP8 for a product that sums along rows, or over them."""
    # It reads memory from where a matrix starts, whatever its strides: what is contiguous already is not copied.
    rows = rows.contiguous()
    if scaling is None:
        return list(rows.split(counts))
    import transformer_engine_torch  # type: ignore[import-not-found]

    quantizers = _quantizers(scaling, role, len(counts), along_rows)
    found: list[Any] = transformer_engine_torch.split_quantize(rows, counts, quantizers)
    return found


@cache
def _quantizers(scaling: Scaling, role: Role, num: int, along_rows: bool) -> list[Any]:
    """They hold settings and no values, so the same ones serve everywhere."""
    from transformer_engine_torch import DType

    pytorch = _pytorch()
    # Of one scale for a matrix, the transpose is made together with the matrix.
    usage = {"rowwise": along_rows or scaling == "current", "columnwise": not along_rows}
    made = []
    for _ in range(num):
        if scaling == "current":
            dtype = DType.kFloat8E5M2 if role == "grad" else DType.kFloat8E4M3
            quantizer = pytorch.Float8CurrentScalingQuantizer(dtype, device=torch.device("cuda"), **usage)
        else:
            dims = 2 if role == "weight" else 1
            quantizer = pytorch.Float8BlockQuantizer(fp8_dtype=DType.kFloat8E4M3, block_scaling_dim=dims, **usage)
        quantizer.internal = True  # plain holders instead of subclasses of tensors
        made.append(quantizer)
    return made


@cache
def _pytorch() -> Any:
    import transformer_engine.pytorch  # type: ignore[import-not-found]
    import transformer_engine.pytorch.cpp_extensions  # type: ignore[import-not-found]

    return transformer_engine.pytorch


def _dotted(numbers: tuple[int, ...]) -> str:
    return ".".join(map(str, numbers))
