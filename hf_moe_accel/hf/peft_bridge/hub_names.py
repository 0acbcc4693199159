"""Where the matrices of the hub's checkpoint lie in the stacked parameters: of which expert, and which outputs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hf_moe_accel.weights.plan import View


class HubMatrix(NamedTuple):
    """A matrix that the hub stores: of one expert, or a plain weight.

    Attributes:
        name: the hub's, without `.weight`.
        parameter: the live one that it comes from.
        expert: which one, or None for a parameter that is a matrix itself.
        outputs: [n] int64, which of the expert's outputs its rows are, in order; None: all.
    """

    name: str
    parameter: str
    expert: int | None
    outputs: Tensor | None


def hub_matrices(plan: Any, state: Mapping[str, Tensor], is_transposed: Mapping[str, bool]) -> Iterator[HubMatrix]:
    """All matrices of a checkpoint that have one source.

    Args:
        plan: the model's key plan.
        state: the live tensors, for their shapes.
        is_transposed: the stacked parameters of experts: whether an expert's matrix is stored [in, out].

    Raises:
        ValueError: a matrix is stored turned round, so that its rows are no outputs.
    """
    for tensor in plan.tensors:
        if len(tensor.views) > 1 or len(tensor.shape) != 2:
            continue
        (view,) = tensor.views
        name = tensor.key.removesuffix(".weight")
        if view.source not in is_transposed:
            yield HubMatrix(name, view.source, None, None)
            continue
        expert, _ = view.rows
        _, rows, columns = state[view.source].shape
        outputs = _outputs(
            view.offset - expert * view.row, view.axes, view.row, rows, columns, is_transposed[view.source]
        )
        yield HubMatrix(name, view.source, expert, outputs)


@cache  # expert after expert looks alike
def _outputs(offset: int, axes: Any, row: int, rows: int, columns: int, is_transposed: bool) -> Tensor:
    """Which outputs of a projection a view of one expert's part shows, in order."""
    number = torch.arange(columns).expand(rows, columns) if is_transposed else torch.arange(rows)[:, None]
    shown = View("", row, offset, axes).read(number.expand(rows, columns)[None])
    if not (shown == shown[:, :1]).all():
        raise ValueError("the hub stores this projection turned round, and an adapter of it is not known to be read.")
    return shown[:, 0]
