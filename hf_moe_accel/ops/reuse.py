"""Memory on a CPU that is handed out again when nothing uses it any more.

Gradients of the experts are most of what a backward pass makes, and are gone after each step. What the C library gives
back to the system then, the system clears page by page for the next step: of a full fine-tuning step on two cores that
was up to a fifth.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor

# Bytes. The C library keeps smaller pieces by itself.
_LARGE = 2**20


class ReusedMemory:
    """Of as many tensors as were in use at one time, for as long as this lives."""

    def __init__(self) -> None:
        self._pieces: list[Any] = []  # arrays of bytes
        self._lent: list[weakref.ref[Any]] = []

    def empty_like(self, like: Tensor) -> Tensor:
        """`torch.empty_like` of a tensor on a CPU; small ones, and such as are not contiguous, are that."""
        size = like.numel() * like.element_size()
        if size < _LARGE or not like.is_contiguous():
            return torch.empty_like(like)
        free = (i for i, lent in enumerate(self._lent) if lent() is None and self._pieces[i].nbytes == size)
        which = next(free, len(self._pieces))
        if which == len(self._pieces):
            self._pieces.append(torch.empty(size, dtype=torch.uint8).numpy())
            self._lent.append(weakref.ref(self._pieces[which]))
        # The storage of the tensor holds this view, whatever shares it, and nothing else does.
        view = self._pieces[which][:]
        self._lent[which] = weakref.ref(view)
        return torch.frombuffer(view, dtype=like.dtype).view(like.shape)
