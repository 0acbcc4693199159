"""Markers, time budgets and the environment of the tests."""

from __future__ import annotations

import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

# Before the helpers import torch and the Hugging Face libraries, which read it.
os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    # A rendezvous looks the name of 127.0.0.1 up for each connection: seconds, where no name server answers.
    "RES_OPTIONS": "timeout:1 attempts:1",
    "TOKENIZERS_PARALLELISM": "false",
    "WANDB_MODE": "offline",
}
if not Path("/dev/nvidiactl").exists():
    # Before triton is imported. With a GPU its kernels are compiled, and tests/gpu runs them.
    os.environ["TRITON_INTERPRET"] = "1"

# Seconds that the tests below tests/<directory> may take together.
BUDGETS = {"unit": 240, "distributed": 660, "checkpoints": 240, "trajectories": 90, "commands": 240}
# Directories whose time counts towards another one's budget.
SHARED_BUDGETS = {"examples": "commands", "integrations": "commands"}
DIRECTORY_MARKERS = {
    "checkpoints": "distributed",
    "distributed": "distributed",
    "gpu": "gpu",
    "trajectories": "trajectory",
}

_SPENT = pytest.StashKey[dict[str, float]]()
_BUDGETS_HOLD = pytest.StashKey[bool]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--run-slow", action="store_true", help="run the tests marked slow too, and hold no time budgets")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_SPENT] = defaultdict(float)
    config.stash[_BUDGETS_HOLD] = not config.getoption("--run-slow")
    if config.getoption("--run-slow"):
        os.environ["TESTS_RUN_SLOW"] = "1"  # tests/helpers/grids.py reads it, before there is a session


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if marker := DIRECTORY_MARKERS.get(_directory(item)):
            item.add_marker(marker)
    if not config.getoption("--run-slow"):
        slow = [item for item in items if item.get_closest_marker("slow")]
        items[:] = [item for item in items if not item.get_closest_marker("slow")]
        config.hook.pytest_deselected(items=slow)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu"):
        import torch

        if not torch.cuda.is_available():
            pytest.skip("needs a CUDA device, and torch finds none")
        item.config.stash[_BUDGETS_HOLD] = False


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    start = time.perf_counter()
    try:
        return (yield)
    finally:
        directory = _directory(item)
        item.config.stash[_SPENT][SHARED_BUDGETS.get(directory, directory)] += time.perf_counter() - start


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    if _exceeded(session.config) and session.exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    for name, spent in config.stash[_SPENT].items():
        if name in BUDGETS:
            terminalreporter.write_line(f"budget {name}: {spent:.1f} s of {BUDGETS[name]} s")
    for name in _exceeded(config):
        terminalreporter.write_line(f"budget {name} exceeded: make its tests faster, or mark some slow", red=True)


def _exceeded(config: pytest.Config) -> list[str]:
    spent = config.stash[_SPENT]
    return [name for name in BUDGETS if spent.get(name, 0.0) > BUDGETS[name]] if config.stash[_BUDGETS_HOLD] else []


def _directory(item: pytest.Item) -> str:
    tests = Path(__file__).parent
    return item.path.relative_to(tests).parts[0] if item.path.is_relative_to(tests) else ""


@pytest.fixture(scope="session")
def ranks() -> Callable[..., list[Any]]:
    """Runs a function on 1, 2 or 4 ranks: see `RanksPool.run`."""
    from tests.helpers.ranks import run_ranks

    return run_ranks
