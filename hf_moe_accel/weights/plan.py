"""The key plan: how each tensor of a saved checkpoint is read out of the live model. Plain data, no module is held.

[Note: views]
A hub tensor holds the same numbers as the live parameter it comes from, in another order, so it is described the way
torch describes any view: an offset and (size, stride) pairs over the flat parameter, in elements. For a stacked
`gate_up_proj` [E, 2I, H]:

    hub tensor                              rows       offset      axes
    itself, renamed       [E, 2I, H]        0 .. E     0           ((E, 2I*H),)  ((2I, H),)  ((H, 1),)
    gate half, expert e   [I, H]            e .. e+1   e*2I*H      ((I, H),)     ((H, 1),)
    up half, expert e     [I, H]            e .. e+1   (e*2+1)*I*H ((I, H),)     ((H, 1),)
    transposed            [E, H, 2I]        0 .. E     0           ((E, 2I*H),)  ((H, 1),)   ((2I, H),)
    interleaved pairs     [E, 2I, H]        0 .. E     0           ((E, 2I*H),)  ((I, H), (2, I*H))  ((H, 1),)

An axis is a tuple of pairs, the outermost first: the last line walks through 2I as I pairs of one gate row and one up
row. Neighbouring pairs that walk like one may be written as one. "Rows" are those of dim 0, the dim that every way of
sharding used here cuts: a view's rows say whose shard it needs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

Axis = tuple[tuple[int, int], ...]  # (size, stride) pairs, outermost first; an axis of size 1 may be ()


@dataclass(frozen=True)
class View:
    """One source tensor's elements in another order; see [Note: views]."""

    source: str
    row: int  # elements in one row of the source
    offset: int  # elements before the first one of the view
    axes: tuple[Axis, ...]

    @classmethod
    def of(cls, source: str, shape: Sequence[int]) -> View:
        """The tensor `source` itself."""
        strides = [math.prod(shape[dim + 1 :]) for dim in range(len(shape))]
        return cls(source, math.prod(shape[1:]), 0, tuple(((n, s),) for n, s in zip(shape, strides, strict=True)))

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape that `read` returns."""
        return tuple(_size(axis) for axis in self.axes)

    @property
    def rows(self) -> tuple[int, int]:
        """The source's rows that the view reads from: first, and one after the last."""
        last = self.offset + sum((n - 1) * stride for axis in self.axes for n, stride in axis)
        return self.offset // self.row, last // self.row + 1

    def read(self, rows: Tensor) -> Tensor:
        """The view's values.

        Args:
            rows: exactly the rows `self.rows` of the source, in its dtype; [1] for a source without dims.

        Returns:
            A tensor of `self.shape`, which may share memory with `rows`.
        """
        rows = rows.contiguous()
        pairs = [pair for axis in self.axes for pair in axis]
        offset = rows.storage_offset() + self.offset - self.rows[0] * self.row
        return rows.as_strided([n for n, _ in pairs], [s for _, s in pairs], offset).reshape(self.shape)

    def permute(self, dims: Sequence[int]) -> View:
        """Like `torch.permute`."""
        return replace(self, axes=tuple(self.axes[dim] for dim in dims))

    def reshape(self, shape: Sequence[int]) -> View | None:
        """Like `torch.reshape`; None where no set of strides walks through the elements in that order."""
        pairs = _merge([pair for axis in self.axes for pair in axis])[::-1]
        axes = []
        for size in shape:
            axis = []
            while size > 1:
                n, stride = pairs.pop()
                if size % n == 0:
                    axis.append((n, stride))
                    size //= n
                elif n % size == 0:
                    pairs.append((n // size, stride))
                    axis.append((size, stride * (n // size)))
                    size = 1
                else:
                    return None
            axes.append(tuple(axis))
        return replace(self, axes=tuple(axes))

    def narrow(self, dim: int, start: int, length: int) -> View | None:
        """Like `torch.narrow` with a length of 1 or more; None where what is left is no regular walk."""
        offset, outer, pairs = self.offset, [], _merge(self.axes[dim])
        while pairs:
            (n, stride), *inner = pairs
            size = _size(inner)
            first, last = start // size, (start + length - 1) // size
            offset += first * stride
            if first != last:
                if start % size or length % size:
                    return None
                outer = [(length // size, stride), *inner]
                break
            start, pairs = start % size, inner
        return replace(self, offset=offset, axes=(*self.axes[:dim], tuple(outer), *self.axes[dim + 1 :]))


@dataclass(frozen=True)
class HubTensor:
    """One tensor of the checkpoint: views concatenated along `dim`."""

    key: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    views: tuple[View, ...]
    dim: int = 0

    @property
    def nbytes(self) -> int:
        """Its size in the file, in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize

    def parts(self, max_bytes: int) -> list[tuple[int, HubTensor]]:
        """The tensor cut along dim 0 into parts of at most `max_bytes`, with the first byte of each in its data.

        One part where it is small enough, or where a cut would not make less of the sources be read at a time.
        """
        whole = [(0, self)]
        if self.nbytes <= max_bytes or not self.views or (len(self.views) > 1 and self.dim != 0):
            return whole
        row = self.nbytes // self.shape[0]
        step = max(1, max_bytes // row)
        parts: list[tuple[int, HubTensor]] = []
        first = 0
        for view in self.views:
            for start in range(0, view.shape[0], step):
                cut = view.narrow(0, start, min(step, view.shape[0] - start))
                if cut is None or cut.rows == view.rows:
                    return whole
                parts.append((first * row, replace(self, shape=(cut.shape[0], *self.shape[1:]), views=(cut,))))
                first += cut.shape[0]
        return parts

    def build(self, rows: Sequence[Tensor]) -> Tensor:
        """The tensor, from the rows that each view reads; it may share memory with them."""
        parts = [view.read(part) for view, part in zip(self.views, rows, strict=True)]
        return parts[0] if len(parts) == 1 else torch.cat(parts, self.dim)


@dataclass(frozen=True)
class ConvertedGroup:
    """Hub tensors that are no views of live ones: one call of the model's own converter makes them from all `sources`.

    Their `HubTensor.views` are empty.
    """

    sources: tuple[str, ...]
    tensors: tuple[HubTensor, ...]


@dataclass(frozen=True)
class KeyPlan:
    """Everything that a checkpoint of one model holds."""

    tensors: tuple[HubTensor, ...]
    groups: tuple[ConvertedGroup, ...]
    num_parameters: int  # of the live model, for the index

    @property
    def all_tensors(self) -> tuple[HubTensor, ...]:
        """Every tensor of the checkpoint."""
        return (*self.tensors, *(tensor for group in self.groups for tensor in group.tensors))


def _size(axis: Sequence[tuple[int, int]]) -> int:
    return math.prod(n for n, _ in axis)


def _merge(pairs: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """The same walk in as few pairs as possible."""
    merged: list[tuple[int, int]] = []
    for n, stride in pairs:
        if n == 1:
            continue
        if merged and merged[-1][1] == n * stride:
            merged[-1] = (merged[-1][0] * n, stride)
        else:
            merged.append((n, stride))
    return merged
