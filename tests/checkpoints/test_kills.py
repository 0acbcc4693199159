"""Ranks die at random points of training and saving; the run goes on from what is whole, as if nothing had been."""

from __future__ import annotations

import os
import random
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_moe_accel.weights.checkpoint import PARTIAL, REPLACED, saved_runs
from hf_moe_accel.weights.export import _TensorFile
from hf_moe_accel.weights.manifest import check_manifest
from tests.helpers.grids import slow
from tests.helpers.kills import Events, counted
from tests.helpers.ranks import RanksError, run_ranks
from tests.helpers.resumable import Result, dropping_model, run

LAYOUTS: list[tuple[int, dict[str, Any]]] = [
    (2, {}),
    (4, {"ep_size": 2}),
    (2, {"async_save": True}),
    (2, {"ep_size": 1}),
]
SETTINGS: dict[str, Any] = {"model": dropping_model, "max_steps": 5, "save_steps": 1, "save_total_limit": 2}


def run_until(output_dir: str, victims: tuple[int, ...], kill_at: int, delay: float, **settings: Any) -> Any:
    """Trains, from the newest whole checkpoint if there is one, until a victim comes to its event."""
    mine = int(os.environ.get("RANK", "0")) in victims
    events = Events(output_dir, kill_at if mine else 0, delay)
    resume = True if saved_runs(Path(output_dir)) else None
    with counted(events):
        result = run(output_dir, resume, callbacks=[events], **settings)
    return result, events.names


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> list[list[tuple[Result, list[str]]]]:
    """For each layout what every rank logs and trains, and the events on its way."""
    return [
        run_ranks(run_until, ranks, str(tmp_path_factory.mktemp("whole")), (), 0, 0.0, **SETTINGS, **more, init=False)
        for ranks, more in LAYOUTS
    ]


SEEDS = [0, *slow(*range(1, 40))]


@pytest.mark.parametrize("seed", SEEDS)
def test_killed_run_goes_on(seed: int, undisturbed: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    draw = random.Random(seed)
    layout = seed % len(LAYOUTS)
    num_ranks, more = LAYOUTS[layout]
    whole = undisturbed[layout]
    for _ in range(draw.choice([1, 1, 2])):  # some runs die again
        victims = tuple(range(num_ranks)) if draw.random() < 0.3 else (draw.randrange(num_ranks),)
        names = whole[victims[0]][1]
        kill_at = draw.randrange(1, len(names) + 1)
        delay = draw.choice([0.0, draw.random() * 0.02])
        case = (str(tmp_path), victims, kill_at, delay)
        try:
            run_ranks(run_until, num_ranks, *case, **SETTINGS, **more, init=False)
            ended = "ended before"
        except RanksError as error:
            assert "SIGKILL" in str(error), error
            ended = "died"
        found = saved_runs(tmp_path)
        assert all(not check_manifest(each.directory).problems for each in found)
        with capsys.disabled():
            print(
                f"\nseed {seed}: {num_ranks} ranks {more or ''}, rank {victims} at event {kill_at} of {len(names)}, "
                f"{names[kill_at - 1]!r} + {delay * 1000:.0f} ms: {ended}; whole: "
                f"{[each.directory.name for each in found]}",
                end="",
            )
    resumed = run_ranks(run_until, num_ranks, str(tmp_path), (), 0, 0.0, **SETTINGS, **more, init=False)
    for (mine, _), (theirs, _) in zip(resumed, whole, strict=True):
        assert mine.log == theirs.log
        assert all(torch.equal(value, theirs.weights[name]) for name, value in mine.weights.items())
        assert mine.ids == {step: theirs.ids[step] for step in mine.ids}
    assert not (tmp_path / PARTIAL).exists() and not (tmp_path / REPLACED).exists()
    assert not check_manifest(tmp_path / "checkpoint-5").problems


def die_while_writing(output_dir: str, at: int) -> None:
    write, calls = _TensorFile.write, []

    def write_or_die(self: Any, *arguments: Any) -> None:
        calls.append(arguments)
        if os.environ["RANK"] == "1" and len(calls) == at:
            os.kill(os.getpid(), signal.SIGKILL)
        write(self, *arguments)

    _TensorFile.write = write_or_die  # type: ignore[method-assign]
    run(output_dir, save_steps=2)


def test_the_survivors_say_what_could_not_be_saved(tmp_path: Path) -> None:
    def files(directory: Path) -> dict[str, bytes]:
        return {str(path): path.read_bytes() for path in sorted(directory.rglob("*")) if path.is_file()}

    run_ranks(run, 2, str(tmp_path), max_steps=2, init=False)
    before = files(tmp_path / "checkpoint-2")
    with pytest.raises(RanksError) as error:
        run_ranks(die_while_writing, 2, str(tmp_path), 30, init=False)
    assert "was killed by SIGKILL" in str(error.value)
    assert "AllRanksError: Saving weights to" in str(error.value)
    assert "which can no longer reach the others (has a rank died?)" in str(error.value)
    assert files(tmp_path / "checkpoint-2") == before
    # The run began anew, and had got as far as its first checkpoint.
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]
