"""quack-kernels' `gemm_tuned.fn` and `run_gemm_plan` without its kernels: a package `quack`, on any device.

Written from the Python of quack-kernels 0.6.5: the argument checks of both and of what they call, its comments on
shapes, and `gemm_ref`, which says what is computed. What is not for us (scales, biases, splits) is not there. fp32
is taken here and not there, since Triton's interpreter, which runs beside it, cuts digits off bf16.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor

from hf_moe_accel.ops import quack as library
from tests.helpers.vendors import empty_modules

VERSION = "0.6.5"
MULTIPLE = 8  # of what lies side by side in memory


class Call(NamedTuple):
    """A product: where its second operand and output lie, and its plan."""

    second: int
    out: int
    plan: Plan


class Plan(NamedTuple):
    """What quack-kernels compiles for, and takes for granted when it multiplies once more.

    Of rows or of weights, whether through an index, and what is cut how.
    """

    of_rows: bool
    through: bool
    dtype: torch.dtype
    side_by_side: tuple[bool, bool, bool]  # whether the last dimension of each operand and of the output is
    tiles: Any


@contextmanager
def installed(found: str = VERSION) -> Iterator[list[Call]]:
    """`import quack` gives the double, and the library takes any device for one that it runs on.

    Gives the calls, in their order.
    """
    calls: list[Call] = []
    modules = empty_modules("quack", "quack.gemm", "quack.gemm_config", "quack.gemm_interface")
    modules["quack.gemm_config"].GemmConfig = SimpleNamespace

    def multiply(plan: Plan, A: Tensor, B: Tensor, out: Tensor, where: dict[str, Any]) -> None:
        calls.append(Call(B.data_ptr(), out.data_ptr(), plan))
        gemm(A, B, out, **where)

    def gemm_tuned(A: Tensor, B: Tensor, out: Tensor, config: Any = None, **where: Any) -> tuple[Any, int, bool, Plan]:
        plan = plan_of(A, B, out, config, where)
        multiply(plan, A, B, out, where)
        return config, 1, False, plan

    def run_gemm_plan(plan: Plan, A: Tensor, B: Tensor, D: Tensor, C: None, **where: Any) -> None:
        assert plan == plan_of(A, B.mT, D, plan.tiles, where), "made for another kind of operands"
        multiply(plan, A, B.mT, D, where)

    modules["quack.gemm_interface"].gemm_tuned = SimpleNamespace(fn=gemm_tuned)
    modules["quack.gemm"].run_gemm_plan = run_gemm_plan
    forget()
    try:
        with (
            mock.patch.dict(sys.modules, modules),
            mock.patch.object(library, "version", lambda name: found),
            mock.patch.object(library, "why_not_device", lambda device: None),
            mock.patch.object(torch.cuda, "get_device_capability", lambda device: (9, 0)),
            mock.patch.object(library, "_DTYPES", (*library._DTYPES, torch.float32)),
        ):
            yield calls
    finally:
        forget()


def forget() -> None:
    """What the library remembers of the package."""
    for remembered in (library._gemm, library._plans, library._why_not_installed):
        remembered.cache_clear()


def plan_of(A: Tensor, B: Tensor, out: Tensor, tiles: Any, where: dict[str, Any]) -> Plan:
    """Of a product with these arguments."""
    side_by_side = (A.stride(-1) == 1, B.stride(-1) == 1, out.stride(-1) == 1)
    return Plan("cu_seqlens_m" in where, where.get("A_idx") is not None, A.dtype, side_by_side, tiles)


def gemm(
    A: Tensor,
    B: Tensor,
    out: Tensor,
    *,
    cu_seqlens_m: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    A_idx: Tensor | None = None,
) -> None:
    """`out[rows of e] = A[rows of e] @ B[e]` with `cu_seqlens_m`, `out[e] = A[:, rows of e] @ B[rows of e]` else."""
    starts = cu_seqlens_k if cu_seqlens_m is None else cu_seqlens_m
    assert starts is not None and (cu_seqlens_m is None or cu_seqlens_k is None)
    for index in (starts, A_idx):
        assert index is None or (index.dtype == torch.int32 and index.is_contiguous())
    assert A.dtype == B.dtype == out.dtype and A.numel() and out.numel()
    for matrix in (A, B, out):
        side_by_side = [size for size, step in zip(matrix.shape[-2:], matrix.stride()[-2:], strict=True) if step == 1]
        assert side_by_side and max(side_by_side) % MULTIPLE == 0, "no dimension lies side by side in 16 bytes"
    counts = starts.diff().tolist()
    assert starts[0] == 0 and min(counts) >= 0
    out.fill_(torch.nan)
    if cu_seqlens_m is not None:
        rows = A if A_idx is None else A[A_idx.long()]
        assert A.stride(1) == 1, "rows lie one after the other"
        assert starts[-1] == rows.size(0) == out.size(0) and B.shape == (len(counts), A.size(1), out.size(1))
        torch.cat([each @ B[e] for e, each in enumerate(rows.split(counts))], out=out)
    else:
        columns = A if A_idx is None else A[:, A_idx.long()]
        assert A.stride(0) == 1 and B.stride(1) == 1, "both operands by rows of what is summed over"
        assert starts[-1] == columns.size(1) == B.size(0) and out.shape == (len(counts), A.size(0), B.size(1))
        for each, left, right in zip(out, columns.split(counts, 1), B.split(counts), strict=True):
            each.copy_(left @ right)
