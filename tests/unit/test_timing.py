"""Timing the parts of a step."""

from __future__ import annotations

import time

import pytest

from hf_moe_accel.moe.timing import PartTimer


def test_parts_add_up_and_lie_within_stretches() -> None:
    timer = PartTimer()
    timer.active = True
    timer.switch("forward")
    for _ in range(2):
        with timer.part("experts"):
            time.sleep(0.02)
    timer.switch("backward")
    time.sleep(0.03)
    timer.switch(None)
    time.sleep(0.05)
    seconds = timer.take()
    assert set(seconds) == {"forward", "backward", "experts"}
    assert 0.04 <= seconds["experts"] <= seconds["forward"]
    assert 0.03 <= seconds["backward"] < seconds["backward"] + 0.05
    assert timer.take() == {}


def test_nothing_is_measured_unless_asked_for() -> None:
    timer = PartTimer()
    with timer.part("experts"):
        pass
    timer.switch(None)
    assert timer.take() == {}


def test_cleared_parts_are_gone() -> None:
    timer = PartTimer()
    timer.active = True
    with timer.part("experts"):
        pass
    timer.clear()
    assert timer.take() == {}


def test_a_part_that_raises_is_not_counted() -> None:
    timer = PartTimer()
    timer.active = True
    with pytest.raises(ZeroDivisionError), timer.part("experts"):
        1 / 0  # noqa: B018
    assert timer.take() == {}
