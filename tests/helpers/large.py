"""Parameters that count as large, for kernels that otherwise take those of 16 million elements and more."""

from __future__ import annotations

from typing import Any
from unittest import mock

from hf_moe_accel import optim

LARGE = 4096


class Kernels:
    """Counts the parameters and gradients that kernels of ours take while this is entered."""

    def __init__(self) -> None:
        self.ran: list[str] = []

    def __enter__(self) -> list[str]:
        from hf_moe_accel.ops.triton import elementwise

        def counted(name: str) -> Any:
            kernel = getattr(elementwise, name)

            def call(*args: Any, **kwargs: Any) -> None:
                self.ran.append(name)
                kernel(*args, **kwargs)

            return mock.patch.object(elementwise, name, call)

        self.patches = [
            counted("adamw_"),
            counted("shrink_"),
            mock.patch.object(optim, "_LARGE", LARGE),
            mock.patch.object(optim.triton_ops, "why_not", lambda device: None),
        ]
        for patch in self.patches:
            patch.start()
        return self.ran

    def __exit__(self, *_: object) -> None:
        for patch in self.patches:
            patch.stop()
