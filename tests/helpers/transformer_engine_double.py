"""TransformerEngine's grouped product without its kernels: a module `transformer_engine`, on any device.

Written from the Python of TransformerEngine 2.20.2 (`general_grouped_gemm`, `GroupedLinear`, the quantizers) and from
what it did on an H100. What it refuses raises here too, and what it does not check goes as wrong as there. A matrix is
read from where its memory starts as if it were contiguous; one output for all takes the products one after the other,
whatever `m_splits` says; a product without rows is skipped, and its output zeroed. fp32 is exact here and TF32 there;
FP8 is exact, too, and keeps all other rules: sizes, which way a matrix may be read, which formats go together.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from enum import IntEnum
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor

from hf_moe_accel.ops import transformer_engine as library
from tests.helpers.vendors import empty_modules

VERSION = "2.20.2"
MULTIPLE = 16  # of all sizes in FP8
PACKAGE = "transformer_engine"


class Call(NamedTuple):
    """A grouped product: its layout, the memory of its first matrix and of its output, the formats of its operands."""

    layout: str
    first: int
    out: int
    formats: tuple[Any, Any]
    split_accumulator: bool


class DType(IntEnum):
    kFloat8E4M3 = 1
    kFloat8E5M2 = 2


class Format(NamedTuple):
    """Of FP8. block: the dimensions of a block of 128 that has a scale of its own; None: a matrix has one scale."""

    dtype: DType
    block: int | None


class Quantizer:
    """Either of the vendor's, which take the format by other arguments."""

    internal = False

    def __init__(self, made: Format, rowwise: bool, columnwise: bool) -> None:
        check(made.block is not None or rowwise, "of one scale, the transpose is made with the matrix")
        self.format, self.rowwise, self.columnwise = made, rowwise, columnwise

    @classmethod
    def current(cls, fp8_dtype: DType, device: torch.device, *, rowwise: bool, columnwise: bool) -> Quantizer:
        return cls(Format(DType(fp8_dtype), None), rowwise, columnwise)

    @classmethod
    def blocks(cls, *, fp8_dtype: DType, block_scaling_dim: int, rowwise: bool, columnwise: bool) -> Quantizer:
        return cls(Format(DType(fp8_dtype), block_scaling_dim), rowwise, columnwise)


class Quantized(NamedTuple):
    """A matrix in FP8, its values kept as they were."""

    values: Tensor
    quantizer: Quantizer

    def data_ptr(self) -> int:
        return self.values.data_ptr()


def split_quantize(rows: Tensor, sizes: list[int], quantizers: list[Quantizer]) -> list[Quantized]:
    check(rows.is_contiguous() and rows.size(0) == sum(sizes), "rows in contiguous memory, all of them")
    check(len(sizes) == len(quantizers), "a quantizer for each matrix")
    return [Quantized(*pair) for pair in zip(rows.split(sizes), quantizers, strict=True)]


@contextmanager
def installed(found: str = VERSION, fp8: tuple[bool, str] = (True, "")) -> Iterator[list[Call]]:
    """`import transformer_engine` gives the double, and the library takes any device for one that it runs on.

    Gives the calls of grouped products, in their order.
    """
    calls: list[Call] = []
    names = [PACKAGE, f"{PACKAGE}.pytorch", f"{PACKAGE}.pytorch.cpp_extensions", f"{PACKAGE}_torch"]
    modules = empty_modules(*names)

    def general_grouped_gemm(
        A: Sequence[Tensor],
        B: Sequence[Tensor],
        out: Sequence[Tensor],
        quantization_params: Sequence[Any],
        out_dtype: torch.dtype,
        **options: Any,
    ) -> None:
        formats = tuple(matrix.quantizer.format if isinstance(matrix, Quantized) else None for matrix in (A[0], B[0]))
        split = options["use_split_accumulator"]
        calls.append(Call(options.get("layout", "TN"), A[0].data_ptr(), out[0].data_ptr(), formats, split))
        grouped_gemm(A, B, out, quantization_params, out_dtype, **options)

    package, pytorch, extensions, compiled = (modules[name] for name in names)
    package.pytorch, pytorch.cpp_extensions = pytorch, extensions
    extensions.general_grouped_gemm = general_grouped_gemm
    pytorch.Float8CurrentScalingQuantizer, pytorch.Float8BlockQuantizer = Quantizer.current, Quantizer.blocks
    pytorch.is_fp8_available = pytorch.is_fp8_block_scaling_available = lambda return_reason: fp8
    compiled.DType, compiled.split_quantize = DType, split_quantize
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
    for remembered in (library._pytorch, library._quantizers, library._why_not_installed):
        remembered.cache_clear()


def grouped_gemm(
    A: Sequence[Tensor | Quantized],
    B: Sequence[Tensor | Quantized],
    out: Sequence[Tensor],
    quantization_params: Sequence[Any],
    out_dtype: torch.dtype,
    *,
    layout: str = "TN",
    m_splits: Sequence[int] | None = None,
    accumulate: bool = False,
    single_output: bool = False,
    use_split_accumulator: bool = False,
) -> None:
    """`out[i] = op(B[i]) @ op(A[i])`: "TN" is `B @ A.T`, "NN" `B @ A`, "NT" `B.T @ A`."""
    assert layout in ("TN", "NN", "NT")
    check(len(A) == len(B) == len(quantization_params), "as many matrices on either side as quantizers")
    check(all(quantizer is None for quantizer in quantization_params), "results in FP8 are not for grouped products")
    check(m_splits is None or all(isinstance(size, int) for size in m_splits), "numbers of rows on the host")
    check(len(out) == (1 if single_output else len(A)), "one output, or one each")
    position = 0
    for i, (a, b) in enumerate(zip(A, B, strict=True)):
        check(isinstance(a, Quantized) == isinstance(b, Quantized), "both operands in FP8, or none")
        if isinstance(a, Quantized):
            check_formats(a.quantizer.format, b.quantizer.format)
            a, b = read(a, along_rows=layout[0] == "T"), read(b, along_rows=layout[1] == "N")
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


def check_formats(*formats: Format) -> None:
    check({made.dtype for made in formats} != {DType.kFloat8E5M2}, "E5M2 times E5M2")
    check(len({made.block is None for made in formats}) == 1, "one kind of scaling")
    check({made.block for made in formats} != {2}, "2D by 2D block gemm not supported")


def read(matrix: Quantized, *, along_rows: bool) -> Tensor:
    """For a product that sums along its rows, or over them."""
    quantizer = matrix.quantizer
    check(quantizer.rowwise if along_rows else quantizer.columnwise, "GEMM requested what is unavailable")
    check(all(size % MULTIPLE == 0 for size in matrix.values.shape), f"sizes of {tuple(matrix.values.shape)} in FP8")
    return matrix.values


def as_if_contiguous(matrix: Tensor) -> Tensor:
    """What kernels see that are told where a matrix starts and its shape."""
    return matrix.as_strided(matrix.shape, (matrix.size(1), 1))


def check(condition: bool, what: str) -> None:
    if not condition:
        raise RuntimeError(f"TransformerEngine assertion failed: {what}")
