"""TransformerEngine's grouped product without its kernels: a module `transformer_engine`, on any device.

Written from the Python and the C++ of TransformerEngine 2.20.2 (`general_grouped_gemm` and `te_general_grouped_gemm`):
what it checks raises here too, and what it does not check goes as wrong as there. A matrix is read from where its
memory starts as if it were contiguous; one output for all takes the products one after the other, whatever `m_splits`
says; a product without rows is skipped, and its output zeroed. Of its dtypes fp32 is exact here, and TF32 there.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.machinery import ModuleSpec
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor

from hf_moe_accel.ops import transformer_engine as library

VERSION = "2.20.2"
PACKAGE = "transformer_engine"


class Call(NamedTuple):
    """A grouped product: its layout, and the memory of its first matrices and of its output."""

    layout: str
    first: int
    out: int


@contextmanager
def installed(found: str = VERSION) -> Iterator[list[Call]]:
    """`import transformer_engine` gives the double, and the library takes any device for one that it runs on.

    Gives the calls of grouped products, in their order.
    """
    calls: list[Call] = []
    names = [PACKAGE, f"{PACKAGE}.pytorch", f"{PACKAGE}.pytorch.cpp_extensions"]
    modules = {name: types.ModuleType(name) for name in names}
    for name, module in modules.items():
        module.__spec__ = ModuleSpec(name, None)

    def general_grouped_gemm(
        A: Sequence[Tensor],
        B: Sequence[Tensor],
        out: Sequence[Tensor],
        quantization_params: Sequence[Any],
        out_dtype: torch.dtype,
        **options: Any,
    ) -> None:
        calls.append(Call(options.get("layout", "TN"), A[0].data_ptr(), out[0].data_ptr()))
        grouped_gemm(A, B, out, quantization_params, out_dtype, **options)

    modules[names[-1]].general_grouped_gemm = general_grouped_gemm
    forget()
    try:
        with (
            mock.patch.dict(sys.modules, modules),
            mock.patch.object(library, "version", lambda name: found),
            mock.patch.object(library, "why_not_device", lambda device: None),
        ):
            yield calls
    finally:
        forget()


def forget() -> None:
    """What the library remembers of the package."""
    library._grouped_gemm.cache_clear()
    library._why_not_installed.cache_clear()


def grouped_gemm(
    A: Sequence[Tensor],
    B: Sequence[Tensor],
    out: Sequence[Tensor],
    quantization_params: Sequence[Any],
    out_dtype: torch.dtype,
    *,
    layout: str = "TN",
    m_splits: Sequence[int] | None = None,
    accumulate: bool = False,
    single_output: bool = False,
    grad: bool = False,
) -> None:
    """`out[i] = op(B[i]) @ op(A[i])`: "TN" is `B @ A.T`, "NN" `B @ A`, "NT" `B.T @ A`."""
    assert layout in ("TN", "NN", "NT")
    check(len(A) == len(B) == len(quantization_params), "as many matrices on either side as quantizers")
    check(all(quantizer is None for quantizer in quantization_params), "the double has no fp8")
    check(m_splits is None or all(isinstance(size, int) for size in m_splits), "numbers of rows on the host")
    check(len(out) == (1 if single_output else len(A)), "one output, or one each")
    position = 0
    for i, (a, b) in enumerate(zip(A, B, strict=True)):
        check(a.dim() == b.dim() == 2, "matrices")
        a, b = as_if_contiguous(a), as_if_contiguous(b)
        left, right = (b.t() if layout[1] == "T" else b), (a.t() if layout[0] == "T" else a)
        check(left.size(1) == right.size(0), f"inner dimensions {left.size(1)} and {right.size(0)}")
        shape = (left.size(0), right.size(1))
        if single_output:
            check(out[0].is_contiguous(), "a contiguous output")
            target = out[0].view(-1)[position : position + shape[0] * shape[1]].view(shape)
            position += shape[0] * shape[1]
        else:
            target = out[i]
        check(target.shape == shape, f"an output of {shape}, not {tuple(target.shape)}")
        check(a.dtype == b.dtype == target.dtype, "one dtype")
        if a.numel() == 0 or b.numel() == 0:
            if not accumulate:
                target.zero_()
            continue
        product = left.float() @ right.float()
        target.copy_(target + product if accumulate else product)


def as_if_contiguous(matrix: Tensor) -> Tensor:
    """What kernels see that are told where a matrix starts and its shape."""
    return matrix.as_strided(matrix.shape, (matrix.size(1), 1))


def check(condition: bool, what: str) -> None:
    if not condition:
        raise RuntimeError(f"TransformerEngine assertion failed: {what}")
