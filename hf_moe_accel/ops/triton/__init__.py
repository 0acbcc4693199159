"""Our kernels in Triton, the only importer of triton."""

from __future__ import annotations

from importlib.util import find_spec

import torch


def why_not(device: torch.device) -> str | None:
    """Why the kernels cannot run on a device, as one sentence; None if they can. Does not import triton.

    On a CPU they run in Triton's interpreter (TRITON_INTERPRET=1, set before triton is imported): thousands of times
    slower, to test them.
    """
    if find_spec("triton") is None:
        return "its kernels need triton, which is not installed (torch's wheels for CUDA bring it)"
    if device.type != "cuda":
        return f"its Triton kernels need a CUDA device, and this is {device.type}"
    return None
