"""What an import of the package may cost, and what its public names promise."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import hf_moe_accel

ROOT = Path(__file__).resolve().parents[2]
HEAVY = ["accelerate", "datasets", "peft", "transformers", "trl", "wandb"]


@pytest.mark.parametrize("module", ["hf_moe_accel", "hf_moe_accel.moe.forward"])
def test_import_leaves_the_hugging_face_libraries_alone(module: str) -> None:
    script = f"import sys, {module}; print(*sorted(set({HEAVY!r}) & sys.modules.keys()))"
    # A fresh interpreter: this one has imported all of them for other tests.
    result = subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
    assert result.stdout.split() == []


def test_public_names_resolve_and_are_listed() -> None:
    assert len(set(hf_moe_accel.__all__)) == len(hf_moe_accel.__all__)
    for name in hf_moe_accel.__all__:
        assert getattr(hf_moe_accel, name) is not None
    assert set(hf_moe_accel.__all__) <= set(dir(hf_moe_accel))


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no_such_name"):
        hf_moe_accel.no_such_name  # noqa: B018


@pytest.mark.parametrize("name", [name for name in hf_moe_accel.__all__ if not name.startswith("__")])
def test_readme_mentions_every_public_name(name: str) -> None:
    assert re.search(rf"\b{name}\b", (ROOT / "README.md").read_text(encoding="utf-8"))
