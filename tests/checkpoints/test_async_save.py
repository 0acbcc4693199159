"""With async_save training goes on while a checkpoint is written; one at a time, and no error is lost."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from transformers import TrainerCallback

from hf_moe_accel.weights import checkpoint
from hf_moe_accel.weights.export import _TensorFile
from hf_moe_accel.weights.manifest import check_manifest
from hf_moe_accel.weights.ranks import AllRanksError
from tests.helpers.ranks import run_ranks
from tests.helpers.resumable import make_trainer, run, saved_in


class Steps(TrainerCallback):
    """Lets others wait for the end of a step."""

    def __init__(self, step: int) -> None:
        self._step = step
        self.reached = threading.Event()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self._step:
            self.reached.set()


def save_slowly(output_dir: str) -> list[str]:
    """The save of step 2 ends only once step 3 has: with a synchronous save that would be never."""
    steps, events = Steps(3), []
    seal = checkpoint.write_manifest

    def slow_seal(directory: Path, ranks: Any) -> None:
        events.append(f"seals {directory.name}")
        assert steps.reached.wait(60)
        time.sleep(0.3)  # the next save comes meanwhile, and waits
        seal(directory, ranks)
        events.append(f"sealed {directory.name}")

    with mock.patch.object(checkpoint, "write_manifest", slow_seal):
        run(output_dir, callbacks=[steps], async_save=True, max_steps=6)
    return events


def test_training_goes_on_and_saves_follow_each_other(tmp_path: Path) -> None:
    names = [f"checkpoint-{step}" for step in (2, 4, 6)]
    for events in run_ranks(save_slowly, 2, str(tmp_path), init=False):
        assert events == [f"{verb} {name}" for name in names for verb in ("seals", "sealed")]
    assert all(not check_manifest(tmp_path / name).problems for name in names)


def save_with_a_full_disk(output_dir: str, failing_rank: int, from_step: int) -> tuple[str, int]:
    trainer = make_trainer(output_dir, async_save=True, max_steps=8)
    write = _TensorFile.write

    def full(self: Any, *arguments: Any) -> None:
        if trainer.args.process_index == failing_rank and f"checkpoint-{from_step}/" in str(self._file.name):
            raise OSError(28, "No space left on device")
        write(self, *arguments)

    with mock.patch.object(_TensorFile, "write", full), pytest.raises(AllRanksError) as error:
        trainer.train()
    return str(error.value), trainer.state.global_step


@pytest.mark.parametrize(("from_step", "raised_at"), [(4, 6), (8, 8)], ids=["at the next save", "at the end"])
def test_an_error_in_the_background_is_raised(from_step: int, raised_at: int, tmp_path: Path) -> None:
    results = run_ranks(save_with_a_full_disk, 2, str(tmp_path), 1, from_step, init=False, capture=True)
    for rank, ((error, step), output) in enumerate(results):
        assert "failed on rank 1: OSError: [Errno 28] No space left on device" in error
        assert step == raised_at
        assert (f"checkpoint-{from_step} could not be saved" in output) == (rank == 0)
    left = saved_in(tmp_path)
    assert left == [f"checkpoint-{step}" for step in range(2, from_step, 2)]
    assert all(not check_manifest(tmp_path / name).problems for name in left)
