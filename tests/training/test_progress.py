"""The time left is told from what this process has done."""

from typing import Any

import pytest

from circuits.progress import Estimate, words


class Clock:
    """A clock that is set by hand."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


def _left(steps: Any, total: int) -> list[float | None]:
    """Estimates after reports of (done, seconds since the last report)."""
    clock, found = Clock(), []
    estimate = Estimate(clock)
    for done, seconds in steps:
        clock.now += seconds
        found.append(estimate.report(done, total))
    return found


def test_steady_work_is_told_exactly() -> None:
    """From the second report on, however rare reports are; nothing is known before."""
    left = _left([(0, 9.0), (10, 20.0), (20, 20.0), (100, 160.0)], 100)
    assert left == [None, pytest.approx(180.0), pytest.approx(160.0), 0.0]


def test_a_resume_is_not_taken_for_speed() -> None:
    """9000 steps of a process that was stopped, and minutes of loading, count for nothing."""
    left = _left([(9000, 300.0), (9001, 2.0), (9002, 2.0)], 10_000)
    assert left == [None, pytest.approx(999 * 2.0), pytest.approx(998 * 2.0)]


def test_work_that_gets_slower_is_noticed() -> None:
    """Half of the weight is on the last half of the time: between the mean speed and the last."""
    left = _left([(0, 0.0)] + [(i, 1.0) for i in range(1, 101)] + [(i, 3.0) for i in range(101, 151)], 1000)
    assert left[100] == pytest.approx(900.0)
    assert 850 * 250 / 150 < left[-1] < 850 * 3.0  # type: ignore[operator]


def test_many_reports_cost_no_memory() -> None:
    clock = Clock()
    estimate = Estimate(clock)
    for step in range(20_001):
        clock.now += 0.5
        left = estimate.report(step, 40_000)
    assert left == pytest.approx(10_000.0 - 0.25, abs=0.5)
    assert len(estimate._reports) <= 512


def test_words() -> None:
    assert [words(s) for s in (None, 8.4, 95.0, 7512.0)] == ["", "8 s left", "1 min 35 s left", "2 h 05 min left"]
