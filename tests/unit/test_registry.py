"""Names to implementations."""

from __future__ import annotations

import subprocess
import sys

import pytest

from hf_moe_accel.dispatch import DISPATCHERS
from hf_moe_accel.dispatch.base import TokenDispatcher
from hf_moe_accel.experts import EXPERT_BACKENDS
from hf_moe_accel.experts.base import ExpertBackend
from hf_moe_accel.registry import Registry


@pytest.fixture
def registry() -> Registry[object]:
    registry: Registry[object] = Registry("kind of thing")
    registry.register("first", "json:loads")
    registry.register("second", "no_such_vendor:Thing")
    return registry


def test_load_imports_what_the_name_stands_for(registry: Registry[object]) -> None:
    import json

    assert registry.load("first") is json.loads


def test_a_listed_vendor_is_imported_only_when_it_is_chosen(registry: Registry[object]) -> None:
    registry.check("second")
    with pytest.raises(ModuleNotFoundError, match="no_such_vendor"):
        registry.load("second")


def test_names_come_in_the_order_of_preference(registry: Registry[object]) -> None:
    assert list(registry) == ["first", "second"]


@pytest.mark.parametrize("method", ["check", "load"])
def test_a_miss_lists_the_valid_names(registry: Registry[object], method: str) -> None:
    with pytest.raises(ValueError, match="'third' is no kind of thing: use one of 'auto', 'first', 'second'"):
        getattr(registry, method)("third")


def test_a_taken_name_is_refused(registry: Registry[object]) -> None:
    with pytest.raises(ValueError, match="kind of thing 'first' is taken already, by json:loads"):
        registry.register("first", "json:dumps")
    assert registry.load("first").__name__ == "loads"  # type: ignore[attr-defined]


@pytest.mark.parametrize(("entries", "base"), [(DISPATCHERS, TokenDispatcher), (EXPERT_BACKENDS, ExpertBackend)])
def test_every_entry_keeps_the_contract(entries: Registry[type], base: type) -> None:
    for name in entries:
        implementation = entries.load(name)
        assert issubclass(implementation, base)
        assert not implementation.__abstractmethods__  # type: ignore[attr-defined]


def test_listing_the_entries_imports_none() -> None:
    script = (
        "import sys\n"
        "from hf_moe_accel.dispatch import DISPATCHERS\n"
        "from hf_moe_accel.experts import EXPERT_BACKENDS\n"
        "targets = [*DISPATCHERS._targets.values(), *EXPERT_BACKENDS._targets.values()]\n"
        "print([target for target in targets if target.partition(':')[0] in sys.modules])\n"
    )
    # A fresh interpreter: this one has loaded them all.
    result = subprocess.run([sys.executable, "-c", script], check=True, stdout=subprocess.PIPE, text=True)
    assert result.stdout.strip() == "[]"
