"""Resume in front of damaged checkpoints, and saving to disks that are full or read-only: on two ranks."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch.distributed as dist
from transformers import TrainerCallback

from hf_moe_accel.weights import manifest
from hf_moe_accel.weights.export import _TensorFile
from hf_moe_accel.weights.manifest import MANIFEST_NAME, check_manifest
from hf_moe_accel.weights.ranks import AllRanksError, Ranks
from tests.helpers.grids import slow
from tests.helpers.ranks import run_ranks
from tests.helpers.resumable import Result, make_trainer, run, saved_in

STEPS = 6
WEIGHTS = "model-00001-of-00002.safetensors"
OPTIMIZER = "training_state/optimizer/shard-00002-model-00001-of-00001.safetensors"
STATE = "training_state/state.json"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Result]]:
    """The checkpoints of a run, and what came of it on each rank."""
    directory = tmp_path_factory.mktemp("whole") / "run"
    return directory, run_ranks(run, 2, str(directory), max_steps=STEPS, init=False)


@pytest.fixture
def died(whole: tuple[Path, list[Result]], tmp_path: Path) -> Path:
    """The same run, as if it had died after step 4."""
    directory = Path(shutil.copytree(whole[0], tmp_path / "run"))
    shutil.rmtree(directory / f"checkpoint-{STEPS}")
    return directory


def assert_goes_on(results: list[Result], whole: list[Result], step: int) -> None:
    for mine, theirs in zip(results, whole, strict=True):
        assert mine.from_step(step) == theirs.from_step(step)
        assert min(mine.ids) == step + 1


def contents(directory: Path) -> dict[str, tuple[str, int]]:
    """The files below a directory, by content and time of change."""
    return {
        str(path.relative_to(directory)): (
            hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "",
            path.stat().st_mtime_ns,
        )
        for path in sorted(directory.rglob("*"))
    }


def flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-10])


def remove(path: Path) -> None:
    path.unlink()


def lose_a_key(path: Path) -> None:
    path.write_text(path.read_text().replace('"global_step"', '"global_stop"'))


def refusals(run_dir: str, resumes: list[Any]) -> list[str]:
    """What resuming from each of these says."""
    said = []
    for resume in resumes:
        with pytest.raises(ValueError) as error:
            make_trainer(run_dir, max_steps=STEPS).train(resume_from_checkpoint=resume)
        said.append(str(error.value))
    return said


# --- Damage ---


@pytest.mark.parametrize(
    ("name", "damage", "says"),
    [
        (WEIGHTS, flip_a_byte, "is altered"),
        (OPTIMIZER, flip_a_byte, "is altered"),
        (OPTIMIZER, truncate, "is truncated: "),
        (WEIGHTS, remove, "is missing"),
        ("trainer_state.json", remove, "is missing"),
        (STATE, remove, "is missing"),
        (STATE, truncate, "is truncated: "),
        (STATE, lose_a_key, "is altered"),
        (MANIFEST_NAME, remove, "is missing"),
        (MANIFEST_NAME, truncate, "is damaged: "),
    ],
    ids=lambda value: value.__name__ if callable(value) else value.rpartition("/")[2],
)
def test_a_damaged_checkpoint_is_refused_and_the_one_before_offered(
    name: str,
    damage: Callable[[Path], None],
    says: str,
    died: Path,
    whole: tuple[Path, list[Result]],
) -> None:
    damaged, older = died / "checkpoint-4", died / "checkpoint-2"
    damage(damaged / name)
    before = contents(died)
    for by_rank in run_ranks(refusals, 2, str(died), [True, str(damaged)], init=False):
        for error in by_rank:
            assert error.startswith(f"{damaged} cannot be resumed from: {name} {says}")
            assert error.endswith(f"The newest intact checkpoint is {older}: resume_from_checkpoint='{older}'.")
            assert "\n" not in error
    assert contents(died) == before
    assert_goes_on(run_ranks(run, 2, str(died), str(older), max_steps=STEPS, init=False), whole[1], 2)


def test_without_an_intact_checkpoint_none_is_offered(died: Path) -> None:
    flip_a_byte(died / "checkpoint-4" / WEIGHTS)
    truncate(died / "checkpoint-2" / OPTIMIZER)
    for (error,) in run_ranks(refusals, 2, str(died), [True], init=False):
        assert error.endswith(f"There is no other intact checkpoint in {died}.")


def verdict_where_rank_1_differs(directory: str, other: str, unreadable: bool) -> tuple[str, ...]:
    failing = unreadable and dist.get_rank() == 1
    blocks = OSError(errno.EIO, os.strerror(errno.EIO)) if failing else manifest._blocks
    with mock.patch.object(manifest, "_blocks", side_effect=blocks):
        return check_manifest(Path(other if dist.get_rank() == 1 else directory), Ranks()).problems


def test_what_one_rank_cannot_read_all_ranks_say(died: Path) -> None:
    directory = str(died / "checkpoint-4")
    for problems in run_ranks(verdict_where_rank_1_differs, 2, directory, directory, True, timeout=30):
        assert len(problems) == 1 and problems[0].endswith("cannot be read: Input/output error")
    absent = str(died / "absent")  # as on a disk that is not shared
    for problems in run_ranks(verdict_where_rank_1_differs, 2, directory, absent, False, timeout=30):
        assert problems == (f"{absent} is no directory (on rank 1, not on all)",)


# --- What does no harm ---


def test_a_foreign_file_is_named_and_not_read(died: Path, whole: tuple[Path, list[Result]]) -> None:
    foreign = died / "checkpoint-4" / "model-00009-of-00009.safetensors"
    foreign.write_text("no tensors")
    captured = run_ranks(run, 2, str(died), True, max_steps=STEPS, init=False, capture=True)
    assert_goes_on([result for result, _ in captured], whole[1], 4)
    note = f"{foreign} was not saved with the checkpoint and is not read"
    assert [output.count(note) for _, output in captured] == [1, 0]


def test_a_half_written_checkpoint_is_named_and_gone_after_the_next_save(
    died: Path, whole: tuple[Path, list[Result]]
) -> None:
    half_written = died / "_partial" / "checkpoint-6"
    half_written.mkdir(parents=True)
    (half_written / WEIGHTS).write_text("half")
    captured = run_ranks(run, 2, str(died), True, max_steps=STEPS, init=False, capture=True)
    assert_goes_on([result for result, _ in captured], whole[1], 4)
    note = f"not resumed from: {half_written} is half-written"
    assert [output.count(note) for _, output in captured] == [1, 0]
    assert saved_in(died) == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]
    assert check_manifest(died / "checkpoint-6").problems == ()


def test_half_written_checkpoints_only(tmp_path: Path) -> None:
    half_written = tmp_path / "_partial" / "checkpoint-2"
    half_written.mkdir(parents=True)
    before = contents(tmp_path)
    for (error,) in run_ranks(refusals, 2, str(tmp_path), [True], init=False):
        assert f"there is no checkpoint in {tmp_path} to go on from" in error
        assert f"{half_written} is half-written" in error
    assert contents(tmp_path) == before


# --- Disks that are full or read-only ---

DISK_BYTES = 16 * 2**20
PAGE = 4096


@contextmanager
def small_disk(directory: Path) -> Iterator[Path]:
    """A file system of its own, which can be full and read-only for root as well."""
    directory.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", str(directory)]
    mounted = subprocess.run(command, capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"cannot mount a file system here: {mounted.stderr.strip()}")
    try:
        yield directory
    finally:
        # Lazily, so that a rank that was killed with a file open does not leave it mounted.
        subprocess.run(["umount", "--lazy", str(directory)], check=True)


def remount(directory: Path, mode: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{mode}", str(directory)], check=True)


class FillDisk(TrainerCallback):
    """Leaves this much space after the first save; a negative number counts from what the checkpoint has taken."""

    def __init__(self, free: int) -> None:
        self.free = free

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        run_dir = Path(args.output_dir)
        if state.global_step != 3 or not state.is_world_process_zero:
            return
        deadline = time.monotonic() + 30
        while (run_dir / "_partial").exists() and time.monotonic() < deadline:  # saved in the background
            time.sleep(0.01)
        files = (path for path in (run_dir / "checkpoint-2").rglob("*") if path.is_file())
        taken = sum(-(-path.stat().st_size // PAGE) * PAGE for path in files)
        left = self.free if self.free >= 0 else taken + self.free
        (run_dir.parent / "filler").write_bytes(bytes(shutil.disk_usage(run_dir).free - left))


def failed_save(
    run_dir: str, resume: Any = None, callbacks: list[TrainerCallback] | None = None, **settings: Any
) -> str:
    with pytest.raises(AllRanksError) as error:
        run(run_dir, resume, callbacks=callbacks, max_steps=STEPS, **settings)
    return str(error.value)


def assert_failed(errors: list[str], path: Path, reason: str) -> None:
    """The path is that of a checkpoint, in its run or where it is being written, or of the run."""
    for error in errors:
        assert str(path) in error or str(path.parent / "_partial" / path.name) in error, error
        assert reason in error, error
        assert "\n" not in error
    assert len(set(errors)) == 1


@pytest.mark.parametrize(
    ("free", "async_save"),
    [
        (80 * PAGE, False),
        (-PAGE, False),
        (200 * PAGE, True),
        *slow((0, False), (200 * PAGE, False), (0, True)),
    ],
    ids=["at the weights", "at the last file", "in the background", "at once", "at the optimizer", "at once, async"],
)
def test_a_full_disk(free: int, async_save: bool, tmp_path: Path, whole: tuple[Path, list[Result]]) -> None:
    with small_disk(tmp_path / "disk") as disk:
        run_dir = disk / "run"
        errors = run_ranks(failed_save, 2, str(run_dir), None, [FillDisk(free)], async_save=async_save, init=False)
        assert_failed(errors, run_dir / "checkpoint-4", "No space left on device")
        assert saved_in(run_dir) == ["checkpoint-2"]
        assert check_manifest(run_dir / "checkpoint-2").problems == ()
        (disk / "filler").unlink()
        results = run_ranks(run, 2, str(run_dir), True, async_save=async_save, max_steps=STEPS, init=False)
        assert_goes_on(results, whole[1], 2)


def failed_write_on_rank_1(run_dir: str, resume: str) -> str:
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with mock.patch.object(_TensorFile, "write", autospec=True, side_effect=_TensorFile.write) as write:
        if os.environ["RANK"] == "1":
            write.side_effect = full
        return failed_save(run_dir, resume)


def test_a_disk_that_is_full_for_one_rank(died: Path, whole: tuple[Path, list[Result]]) -> None:
    shutil.rmtree(died / "checkpoint-4")
    checkpoint = died / "checkpoint-2"
    errors = run_ranks(failed_write_on_rank_1, 2, str(died), str(checkpoint), init=False)
    assert_failed(errors, died / "checkpoint-4", "on rank 1: OSError: [Errno 28] No space left on device")
    assert saved_in(died) == ["checkpoint-2"]
    assert check_manifest(checkpoint).problems == ()


class MakeReadOnly(TrainerCallback):
    """Remounts the disk after step 3."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 3 and state.is_world_process_zero:
            remount(Path(args.output_dir).parent, "ro")


def test_a_read_only_disk(tmp_path: Path, died: Path, whole: tuple[Path, list[Result]]) -> None:
    with small_disk(tmp_path / "disk") as disk:
        run_dir = disk / "run"
        shutil.copytree(died / "checkpoint-2", run_dir / "checkpoint-2")
        before = contents(run_dir / "checkpoint-2")
        errors = run_ranks(failed_save, 2, str(run_dir), True, [MakeReadOnly()], init=False)
        assert_failed(errors, run_dir / "checkpoint-4", "Read-only file system")
        errors = run_ranks(failed_save, 2, str(run_dir), True, init=False)  # before it trains
        assert_failed(errors, run_dir, "Read-only file system")
        assert contents(run_dir / "checkpoint-2") == before
        remount(disk, "rw")
        assert_goes_on(run_ranks(run, 2, str(run_dir), True, max_steps=STEPS, init=False), whole[1], 2)
