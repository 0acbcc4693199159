"""Names to implementations, imported only when they are used."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from typing import Generic, TypeVar

T = TypeVar("T")


class Registry(Generic[T]):
    """Maps a name to `"module:attribute"`, so that a listed vendor costs nothing until it is chosen.

    Args:
        kind: what the entries are, as errors call them ("token dispatcher").
    """

    def __init__(self, kind: str) -> None:
        """Start empty."""
        self.kind = kind
        self._targets: dict[str, str] = {}

    def register(self, name: str, target: str) -> None:
        """Add `name`; `target` is "module:attribute".

        Raises:
            ValueError: the name is taken.
        """
        if name in self._targets:
            raise ValueError(f"{self.kind} {name!r} is taken already, by {self._targets[name]}; use another name.")
        self._targets[name] = target

    def check(self, name: str) -> None:
        """Raise if `name` is not registered.

        Raises:
            ValueError: unknown name; lists the valid ones.
        """
        if name not in self._targets:
            valid = ", ".join(repr(key) for key in ("auto", *self._targets))
            raise ValueError(f"{name!r} is no {self.kind}: use one of {valid}.")

    def load(self, name: str) -> T:
        """Import and return what `name` stands for."""
        self.check(name)
        module, _, attribute = self._targets[name].partition(":")
        loaded: T = getattr(import_module(module), attribute)
        return loaded

    def __iter__(self) -> Iterator[str]:
        """Names in the order of registration: the order of preference."""
        return iter(self._targets)
