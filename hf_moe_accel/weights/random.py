"""The random number generators of a rank, in a file that is read without running code."""

from __future__ import annotations

import hashlib
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save


def save_random_state(path: Path) -> None:
    """Write the state of Python's, NumPy's and torch's generators, the current accelerator's included."""
    version, words, gauss = random.getstate()
    kind, keys, place, has_gauss, cached = np.random.get_state()
    numbers = {"python": [version, gauss], "numpy": [kind, place, has_gauss, cached]}
    tensors = {
        "python": torch.tensor(words, dtype=torch.int64),
        "numpy": torch.from_numpy(np.asarray(keys, dtype=np.int64)),
        "torch": torch.get_rng_state(),
    }
    device = _device_module()
    if device is not None:
        tensors["device"] = device.get_rng_state()
    # `save_file` would make a file that others of the group cannot read.
    path.write_bytes(save(tensors, metadata={"numbers": json.dumps(numbers)}))


def load_random_state(path: Path) -> None:
    """Continue with the saved generators."""
    with safe_open(path, framework="pt") as file:
        numbers = json.loads(file.metadata()["numbers"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    (version, gauss), (kind, place, has_gauss, cached) = numbers["python"], numbers["numpy"]
    random.setstate((version, tuple(tensors["python"].tolist()), gauss))
    np.random.set_state((kind, tensors["numpy"].numpy().astype(np.uint32), place, has_gauss, cached))
    torch.set_rng_state(tensors["torch"])
    device = _device_module()
    if device is not None and "device" in tensors:
        device.set_rng_state(tensors["device"])


def derive_random_state(seed: int, rank: int, step: int) -> None:
    """Start the generators of a rank that has no saved ones, from numbers that no other rank and step have."""
    digest = hashlib.sha256(f"{seed} {rank} {step}".encode()).digest()
    derived = int.from_bytes(digest[:4], "little")
    random.seed(derived)
    np.random.seed(derived)
    torch.manual_seed(derived)  # all devices


def _device_module() -> Any:
    return torch.get_device_module() if torch.accelerator.is_available() else None
