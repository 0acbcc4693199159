"""What doubles of vendors' packages, and the tests of what is said without the package, share."""

from __future__ import annotations

import types
from importlib.machinery import ModuleSpec
from importlib.metadata import PackageNotFoundError
from importlib.util import find_spec
from typing import Any
from unittest import mock

import pytest
import torch

needs_quack = pytest.mark.skipif(find_spec("quack") is None, reason="quack-kernels is not installed")


def empty_modules(*names: str) -> dict[str, Any]:
    """By name, for `sys.modules`; `find_spec` finds them."""
    modules: dict[str, Any] = {name: types.ModuleType(name) for name in names}
    for name, module in modules.items():
        module.__spec__ = ModuleSpec(name, None)
    return modules


def why_not_without_it(library: Any, double: Any) -> str:
    """What the importer of a vendor's package says on a device that would do, where the package is not installed."""
    double.forget()
    try:
        with (
            mock.patch.object(library, "why_not_device", lambda device: None),
            mock.patch.object(library, "version", side_effect=PackageNotFoundError),
        ):
            return str(library.why_not(torch.bfloat16, torch.device("cpu")))
    finally:
        double.forget()
