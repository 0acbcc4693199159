"""The tolerances of all comparisons, in one table, and the comparison that uses them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch


class Tolerance(NamedTuple):
    """Close means `|actual - expected| <= atol + rtol * |expected|` at every element."""

    rtol: float
    atol: float


# For values of the order of one, as the tiny models have. bf16 keeps 8 bits: one rounding is 4e-3 of the value.
TOLERANCES: dict[str, dict[torch.dtype, Tolerance]] = {
    # Saved and exported weights; dispatch and combine where every sum is exact.
    "exact": {torch.float32: Tolerance(0.0, 0.0), torch.bfloat16: Tolerance(0.0, 0.0)},
    # Rows that went to their experts and came back, weighted: the order of one short sum.
    "dispatch": {torch.float32: Tolerance(1e-6, 1e-6), torch.bfloat16: Tolerance(1.6e-2, 1e-2)},
    # An expert backend against the eager one, forward and backward. In bf16 the bias gradients of either differ by
    # 0.06 at values up to 9, since each adds its rows up in bf16. fp16 keeps 11 bits.
    "backend": {
        torch.float32: Tolerance(1e-5, 1e-5),
        torch.bfloat16: Tolerance(1.6e-2, 5e-2),
        torch.float16: Tolerance(2e-3, 6e-3),
    },
    # Losses, gradient norms and weights of a run against those of another way to run it.
    "training": {torch.float32: Tolerance(1e-5, 1e-5), torch.bfloat16: Tolerance(1e-2, 1e-2)},
}


def assert_close(actual: Any, expected: Any, kind: str, name: str = "") -> None:
    """Asserts that two results agree within the tolerance of their kind and dtype.

    Floats count as fp32; integers and booleans must be equal. Mappings must have the same keys and sequences the same
    length; their items are compared one by one, and all that differ are listed.

    Args:
        actual: A tensor, a number, or a mapping or sequence of such.
        expected: The same in shape and dtype.
        kind: A key of `TOLERANCES`.
        name: Shown in the error.

    Raises:
        AssertionError: With the largest absolute and relative difference of everything that is not close.
    """
    __tracebackhide__ = True
    if problems := _differences(actual, expected, TOLERANCES[kind], name):
        raise AssertionError(f"not close ({kind}):\n" + "\n".join(problems))


def _differences(actual: Any, expected: Any, tolerances: dict[torch.dtype, Tolerance], name: str) -> list[str]:
    label = name or "value"
    if isinstance(expected, Mapping):
        if actual.keys() != expected.keys():
            missing, extra = expected.keys() - actual.keys(), actual.keys() - expected.keys()
            return [f"{label}: missing keys {sorted(missing)}, unexpected keys {sorted(extra)}"]
        pairs = [(f"{name}[{key!r}]", actual[key], expected[key]) for key in expected]
    elif isinstance(expected, Sequence):
        if len(actual) != len(expected):
            return [f"{label}: {len(actual)} items instead of {len(expected)}"]
        pairs = [(f"{name}[{i}]", *pair) for i, pair in enumerate(zip(actual, expected, strict=True))]
    else:
        return _tensor_difference(_tensor(actual), _tensor(expected), tolerances, label)
    return [problem for label, left, right in pairs for problem in _differences(left, right, tolerances, label)]


def _tensor(value: Any) -> torch.Tensor:
    return value.detach() if isinstance(value, torch.Tensor) else torch.tensor(value)


def _tensor_difference(
    actual: torch.Tensor, expected: torch.Tensor, tolerances: dict[torch.dtype, Tolerance], label: str
) -> list[str]:
    if actual.shape != expected.shape or actual.dtype != expected.dtype:
        got, wanted = (f"{tuple(tensor.shape)} {tensor.dtype}" for tensor in (actual, expected))
        return [f"{label}: {got} instead of {wanted}"]
    tolerance = tolerances[expected.dtype] if expected.is_floating_point() else Tolerance(0.0, 0.0)
    left, right = actual.double(), expected.to(actual.device).double()
    close = torch.isclose(left, right, rtol=tolerance.rtol, atol=tolerance.atol)
    if close.all():
        return []
    difference = (left - right).abs()
    relative = difference / right.abs().clamp_min(torch.finfo(torch.float64).tiny)
    worst = tuple(index.item() for index in torch.unravel_index(difference.nan_to_num(torch.inf).argmax(), left.shape))
    return [
        f"{label} {tuple(left.shape)} {expected.dtype}: {int((~close).sum())} of {close.numel()} elements differ;"
        f" largest absolute difference {difference.max():.3e} at {worst}: {left[worst]:.9g} instead of"
        f" {right[worst]:.9g}; largest relative difference {relative.max():.3e}; allowed rtol {tolerance.rtol:g},"
        f" atol {tolerance.atol:g}"
    ]
