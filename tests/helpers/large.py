"""Parameters that count as large, for kernels that otherwise take those of 16 million elements and more."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

from hf_moe_accel import optim

LARGE = 4096


@contextmanager
def kernels() -> Iterator[list[str]]:
    """Kernels of ours take all that is large here, on any device. Gives the names of those that ran, in order."""
    from hf_moe_accel.ops.triton import elementwise

    ran: list[str] = []

    def counted(name: str) -> Any:
        kernel = getattr(elementwise, name)

        def call(*args: Any, **kwargs: Any) -> None:
            ran.append(name)
            kernel(*args, **kwargs)

        return mock.patch.object(elementwise, name, call)

    with (
        counted("adamw_"),
        counted("shrink_"),
        mock.patch.object(optim, "_LARGE", LARGE),
        mock.patch.object(optim.triton_ops, "why_not", lambda device: None),
    ):
        yield ran
