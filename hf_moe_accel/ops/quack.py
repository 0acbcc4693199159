"""quack-kernels (https://github.com/Dao-AILab/quack): grouped products that read their rows through an index.

The only importer. Its `gemm` takes rows of variable number for each expert, ordered by expert or through an index, for
the products of rows with weights ("varlen_m") and for the gradients of weights ("varlen_k"), without a look at the
numbers from the host. Tiles are chosen here or by its fixed choice for the device: its tuning compiles dozens of
kernels.
"""

from __future__ import annotations

import re
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any, NamedTuple

import torch
from torch import Tensor

# Arguments have moved between releases: no other ones than we have read.
_LEAST_VERSION, _NEXT_VERSION = (0, 6, 5), (0, 7)
_CAPABILITIES = (9, 10)
_DTYPES = (torch.bfloat16, torch.float16)
# Rows of an expert, on average, from which on a product is cut in the other of its two ways: of rows in order, and of
# rows through an index.
_MANY_IN_ORDER, _MANY_THROUGH = 512, 4096


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
        limit = _MANY_IN_ORDER if index is None else _MANY_THROUGH
        many = num_rows >= limit * weight_eKM.size(0)
        _product(source, weight_eKM, out_RM, starts_E, index, of_rows=True, many=many)
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
    _product(source.t(), b_RK, out_eMK, starts_E, index, of_rows=False, many=False)
    return out_eMK.mT if transposed else out_eMK


def _product(
    a: Tensor, b: Tensor, out: Tensor, starts_E: Tensor, index: Tensor | None, *, of_rows: bool, many: bool
) -> None:
    """`out = a @ b` by expert, whose rows are the rows of `a` or what is summed over."""
    first, again = _gemm()
    through = index is not None
    where = {"cu_seqlens_m" if of_rows else "cu_seqlens_k": starts_E, "A_idx": index}
    # All that a launch depends on. By itself quack-kernels keeps one for each number of rows, for ever: where that is
    # another one in each pass, they would fill the host's memory.
    kind = (a.device, a.dtype, of_rows, through, b.stride(-1) == 1, out.stride(-1) == 1)
    plan = _plans().get((*kind, many))
    if plan is not None:
        again(plan, a, b.mT, out, None, **where)
        return
    # Both ways to cut rows, the wanted one last: how many an expert has changes as a router learns, and each is
    # compiled for seconds.
    for each in (not many, many) if of_rows else (many,):
        tiles = _tiles(a.device, in_order=of_rows and not through, many=each)
        *_, _plans()[(*kind, each)] = first(a, b, out, config=tiles, **where)


@cache
def _plans() -> dict[tuple[Any, ...], Any]:
    return {}


@cache
def _gemm() -> tuple[Any, Any]:
    """What multiplies and returns how it did so, and what does the same again with other tensors of that kind."""
    from quack.gemm import run_gemm_plan  # type: ignore[import-not-found]
    from quack.gemm_interface import gemm_tuned  # type: ignore[import-not-found]

    # Both are what its `gemm(..., tuned=False)` consists of, which takes no choice of tiles.
    return gemm_tuned.fn, run_gemm_plan


def _tiles(device: torch.device, *, in_order: bool, many: bool) -> Any:
    """How a product is cut; None for quack-kernels' own choice.

    Of those tried on an H200 at the sizes of Qwen3-30B-A3B, OLMoE and Mixtral, with 64 to 4,096 rows for each expert,
    these were the fastest or within 9 % of it, as far as figures were kept. Its own choice (128 x 192, two blocks of
    rows side by side) took as long for rows in order where they are 4,096, up to 7 % longer from 512 on, up to 14 %
    with 256, 48 % with 64.

    Args:
        device: of the product.
        in_order: whether it is of rows with weights, and rows lie in the order of experts.
        many: whether experts have many rows, on average.
    """
    if torch.cuda.get_device_capability(device)[0] != 9:
        return None
    from quack.gemm_config import GemmConfig  # type: ignore[import-not-found]

    tile_m, tile_n = ((192, 128) if many else (128, 192)) if in_order else (128, 256)
    return GemmConfig(
        tile_m=tile_m,
        tile_n=tile_n,
        pingpong=in_order,
        cluster_m=2 if many and not in_order else 1,
        is_dynamic_persistent=False,
        device_capacity=9,
    )


@cache
def _why_not_installed() -> str | None:
    try:
        found = version("quack-kernels")
    except PackageNotFoundError:
        return "quack-kernels is not installed (pip install 'hf_moe_accel[quack]')"
    if not _LEAST_VERSION <= tuple(map(int, re.findall(r"\d+", found)[:3])) < _NEXT_VERSION:
        least, following = (".".join(map(str, each)) for each in (_LEAST_VERSION, _NEXT_VERSION))
        return f"quack-kernels from {least} and below {following} is needed, and {found} is installed"
    try:
        _gemm()
    except Exception as error:
        # What it is made of may be missing, or raise whatever its loader does.
        return f"quack-kernels cannot be imported: {type(error).__name__}: {error}"
    return None
