"""Every optimizer of transformers on sharded experts: it steps as in one process, or it is refused by name."""

from __future__ import annotations

import re
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from importlib.util import find_spec
from typing import Any
from unittest import mock

import pytest
from transformers import Trainer
from transformers.training_args import OptimizerNames

from hf_moe_accel import AcceleratedMoETrainer
from hf_moe_accel.trainers import arguments
from tests.distributed.test_training_arguments import Run, documented, run
from tests.helpers.ranks import run_ranks
from tests.helpers.tolerances import assert_close

REFUSED = arguments.OPTIMIZERS

# These are not refused and need a package that development does not install; then transformers raises its own error.
PACKAGES = {
    OptimizerNames.ADAMW_TORCH_4BIT: "torchao",
    OptimizerNames.ADAMW_TORCH_8BIT: "torchao",
    OptimizerNames.GALORE_ADAMW: "galore_torch",
    OptimizerNames.LOMO: "lomo_optim",
    OptimizerNames.SCHEDULE_FREE_RADAM: "schedulefree",
    OptimizerNames.SCHEDULE_FREE_ADAMW: "schedulefree",
    OptimizerNames.SCHEDULE_FREE_SGD: "schedulefree",
    OptimizerNames.STABLE_ADAMW: "optimi",
    OptimizerNames.ADAMW_ANYPRECISION: "torchdistx",
    OptimizerNames.ADAMW_TORCH_XLA: "torch_xla",
    OptimizerNames.ADAMW_TORCH_NPU_FUSED: "torch_npu",
}
# Tried once by hand, with those packages installed.
TRIED = {"torchao": "0.18", "galore_torch": "1.0", "lomo_optim": "0.1.1", "schedulefree": "1.4.1", "optimi": "0.3.3"}
# Their states are kept in blocks of a few bits, and the blocks follow the shards.
LOSSY = (OptimizerNames.ADAMW_TORCH_4BIT, OptimizerNames.ADAMW_TORCH_8BIT)

NEEDED = {
    # At the first step nothing is left of a gradient but its sign, however small and inexact it is.
    OptimizerNames.ADAGRAD: {"optim_args": "eps=1e-3"},
    OptimizerNames.RMSPROP: {"optim_args": "eps=1e-3"},
    OptimizerNames.GALORE_ADAMW: {"optim_target_modules": "all-linear", "optim_args": "rank=4,update_proj_gap=2"},
    OptimizerNames.APOLLO_ADAMW: {"optim_target_modules": "all-linear", "optim_args": "rank=4,update_proj_gap=2"},
}


def run_all(
    trainer_class: type[Trainer], output_dir: str, names: list[OptimizerNames], refuse: bool
) -> dict[str, Any]:
    """By name, the run with each optimizer, or the error that it ended with."""
    with mock.patch.dict(REFUSED, clear=not refuse):
        return {name.value: _try(trainer_class, output_dir, name) for name in names}


def _try(trainer_class: type[Trainer], output_dir: str, name: OptimizerNames) -> Run | str:
    try:
        with _compile_cache(name):
            return run(trainer_class, output_dir, arguments={"optim": name.value} | NEEDED.get(name, {}))
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def _compile_cache(name: OptimizerNames) -> AbstractContextManager[None]:
    """Torchao compiles its step, and what was compiled for other shards is wrongly found again in the cache."""
    if name not in LOSSY or not find_spec("torchao"):
        return nullcontext()
    from torch._inductor.utils import fresh_cache

    return fresh_cache()


@cache
def results(kind: str, directory: str) -> list[dict[str, Any]]:
    if kind == "one process":
        return run_ranks(run_all, 1, Trainer, directory, list(OptimizerNames), True, timeout=600)
    if kind == "sharded":
        return run_ranks(run_all, 2, AcceleratedMoETrainer, directory, list(OptimizerNames), True, **LONG)
    plain = results("one process", directory)[0]
    names = [name for name in REFUSED if isinstance(plain[name.value], Run)]
    return run_ranks(run_all, 2, AcceleratedMoETrainer, directory, names, False, **LONG)


LONG: dict[str, Any] = {"init": False, "timeout": 600}


@pytest.fixture(scope="session")
def directory(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("optimizers"))


@pytest.mark.parametrize("name", OptimizerNames, ids=lambda name: name.value)
def test_optimizer(name: OptimizerNames, directory: str) -> None:
    (plain,) = (ranks[name.value] for ranks in results("one process", directory))
    ours = [ranks[name.value] for ranks in results("sharded", directory)]
    if name in REFUSED:
        assert all(error.startswith(f"ValueError: optim='{name.value}' is not supported on several") for error in ours)
        if isinstance(plain, Run):
            assert not all(same(rank[name.value], plain) for rank in results("not refused", directory))
    elif name in PACKAGES and not find_spec(PACKAGES[name]):
        # As stock: transformers' own error.
        assert ours == [plain, plain]
        assert re.search("install|failed to import", plain)
    else:
        for rank in ours:
            assert isinstance(rank, Run), rank
            if name in LOSSY:
                assert rank.losses == ours[0].losses == pytest.approx(plain.losses, rel=1e-2)
            else:
                assert_close(rank.log, plain.log, "training")
                assert_close(rank.weights, plain.weights, "training")


def same(ours: Run | str, plain: Run) -> bool:
    try:
        assert isinstance(ours, Run)
        assert_close(ours.weights, plain.weights, "training")
    except AssertionError:
        return False
    return True


def table() -> str:
    lines = ["| `optim` | | |", "|---|---|---|"]

    def add(names: list[OptimizerNames], verdict: str, note: str) -> None:
        lines.append(f"| {', '.join(f'`{name.value}`' for name in names)} | {verdict} | {note} |")

    tested = [name for name in OptimizerNames if name not in REFUSED and name not in PACKAGES]
    add(tested, "works", "Equal to one process.")
    for package in dict.fromkeys(PACKAGES.values()):
        names = [name for name in PACKAGES if PACKAGES[name] == package]
        if package not in TRIED:
            add(names, "not tried", f"Needs {package}.")
        else:
            close = "close to one process, given a fresh compile cache"
            result = close if names[0] in LOSSY else "equal to one process"
            saves = " Needs `save_only_model=True` to save." if names[0] in arguments.UNSAVED else ""
            add(names, "works", f"Tried by hand with {package} {TRIED[package]}: {result}.{saves}")
    for reason in dict.fromkeys(REFUSED.values()):
        names = [name for name in REFUSED if REFUSED[name] == reason]
        add(names, "refused", f"On several ranks: {reason}.")
    return "\n".join(lines)


def test_the_table_is_the_documented_one() -> None:
    assert documented("optimizers") == table()
