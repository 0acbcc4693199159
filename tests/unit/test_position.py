"""Where a run is in its data, on other sizes."""

from __future__ import annotations

from dataclasses import replace

import pytest

from hf_moe_accel.trainers.position import Position

# 96 rows, 12 steps of 8 an epoch.
SAVED = Position(global_step=29, per_device_batch=2, accumulation=2, num_ranks=2, steps_per_epoch=12)


@pytest.mark.parametrize(
    ("sizes", "steps_per_epoch", "expected"),
    [
        # The same global batch: the same step, whatever makes it up.
        ((2, 2, 2), 12, (29, 2, 10)),
        ((1, 2, 4), 12, (29, 2, 10)),
        ((8, 1, 1), 12, (29, 2, 5)),
        ((2, 4, 1), 12, (29, 2, 20)),
        # Another one: after the same 2 epochs and 40 rows, rounded down to a step.
        ((2, 1, 2), 24, (58, 2, 10)),
        ((4, 2, 2), 6, (14, 2, 4)),
        ((96, 1, 1), 1, (2, 2, 0)),
    ],
    ids=str,
)
def test_position(sizes: tuple[int, int, int], steps_per_epoch: int, expected: tuple[int, int, int]) -> None:
    there = Position(0, *sizes, steps_per_epoch).after(SAVED)
    assert (there.global_step, there.epoch, there.batches_in_epoch) == expected


def test_streams_are_counted_in_batches() -> None:
    saved = replace(SAVED, steps_per_epoch=None, epoch=1, batches_in_epoch=10)
    for sizes, expected in (((2, 2, 2), (29, 1, 10)), ((1, 2, 4), (29, 1, 10)), ((2, 1, 1), (116, 1, 20))):
        there = Position(0, *sizes, None).after(saved)
        assert (there.global_step, there.epoch, there.batches_in_epoch) == expected


def test_json_and_words() -> None:
    assert Position.from_json(SAVED.to_json()) == SAVED
    assert SAVED.to_json()["global_batch"] == 8
    assert SAVED.describe_batch() == "8 (2 a rank x 2 accumulated x 2 ranks)"
    read = SAVED.begin_epoch(2, 10).read(2)
    assert (read.epoch, read.batches_in_epoch) == (2, 12)
