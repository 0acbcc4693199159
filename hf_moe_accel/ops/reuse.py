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
        self._pieces: list[tuple[Any, weakref.ref[Any]]] = []  # arrays of bytes, and who has them

    def empty_like(self, like: Tensor) -> Tensor:
        """`torch.empty_like` of a tensor on a CPU; small ones, and such as are not contiguous, are that."""
        size = like.numel() * like.element_size()
        if size < _LARGE or not like.is_contiguous():
            return torch.empty_like(like)
        for which, (piece, lent) in enumerate(self._pieces):
            if lent() is None and piece.nbytes == size:
                del self._pieces[which]
                break
        else:
            piece = torch.empty(size, dtype=torch.uint8).numpy()
        # The storage of the tensor holds this view, whatever shares it, and nothing else does.
        view = piece[:]
        self._pieces.append((piece, weakref.ref(view)))
        return torch.frombuffer(view, dtype=like.dtype).view(like.shape)
