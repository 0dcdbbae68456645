"""The time left of a step and of a run, by hand."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import pytest

from jobs.events import RawEvent
from jobs.pace import Expected, JobPace, Pace, job_left_s
from tests.raw_events import event


def eta(events: Iterable[RawEvent]) -> float | None:
    pace = Pace()
    for each in events:
        pace.feed(each)
    return pace.eta_s


def metrics(update: int, elapsed_s: float, step: int = 3) -> RawEvent:
    return event("metrics", step, update=update, updates=480, elapsed_s=elapsed_s)


@pytest.mark.parametrize(
    ("events", "seconds"),
    [
        ([], None),
        ([metrics(12, 96.0)], 3744.0),  # 8 s an update, 468 to go
        ([metrics(12, 96.0), metrics(24, 240.0)], 4560.0),  # 10 s an update, 456 to go
        ([metrics(480, 96.0)], None),
        ([metrics(12, math.nan)], None),
        ([metrics(400, 900.0, step=2), metrics(12, 96.0)], 3744.0),  # another step's pace says nothing
        # After a resume the clock may begin at 0 or continue: 5 s an update, 440 or 430 to go.
        ([metrics(100, 96.0), event("resumed", 3, from_update=40), metrics(40, 7.0)], None),
        ([metrics(100, 96.0), event("resumed", 3, from_update=39), metrics(40, 7.0), metrics(50, 57.0)], 2150.0),
        ([metrics(100, 96.0), event("resumed", 3, from_update=39), metrics(40, 97.0), metrics(50, 147.0)], 2150.0),
        ([metrics(100, 96.0), event("resumed", 3, from_update=0), metrics(40, 200.0)], 2200.0),
    ],
)
def test_eta(events: list[RawEvent], seconds: float | None) -> None:
    assert eta(events) == seconds


TIMES = {1: Expected(100, 1.0, 10.0), 2: Expected(50, 2.0, 20.0), 3: Expected(10, 30.0, 40.0)}
# Of step 2 and 3 to come: 20 + 50 * 2 and 40 + 10 * 30 seconds.
LATER = 120 + 340


@pytest.mark.parametrize(
    ("measured", "step", "done", "seconds"),
    [
        ({}, 1, 0, None),
        ({1: (4, 40.0)}, 1, 4, None),  # too few updates
        # As estimated: 95 updates to go, half of what is besides them, and the steps to come.
        ({1: (5, 5.0)}, 1, 5, 95 + 5 + LATER),
        # Three times as slow, and so is all that was estimated.
        ({1: (20, 60.0)}, 1, 20, 3 * (80 + 5 + LATER)),
        # Step 2 has made no update: the pace of step 1 holds for it.
        ({1: (100, 50.0)}, 2, 0, 0.5 * (100 + 10 + 340)),
        # Its own 5 updates took 4 s each, and count alone for its rest; the pace is 120 / 110.
        ({1: (100, 100.0), 2: (5, 20.0)}, 2, 5, 45 * 4.0 + 120 / 110 * (10 + 340)),
        ({7: (100, 50.0)}, 1, 5, None),  # nothing was estimated of that one
        ({1: (100, 50.0)}, 7, 5, None),
        ({1: (100, 100.0), 2: (60, 120.0)}, 2, 60, 10 + 340),  # more updates than were estimated
    ],
)
def test_the_time_left_of_a_job(
    measured: dict[int, tuple[int, float]], step: int, done: int, seconds: float | None
) -> None:
    found = job_left_s(TIMES, measured, step, done)
    assert found is None if seconds is None else found == pytest.approx(seconds)


def plan(step: int, expected: Any) -> RawEvent:
    return event("plan", step, expected=expected)


def numbers(*steps: int) -> dict[str, dict[str, float]]:
    return {str(step): vars(TIMES[step]) for step in steps}


def left(*events: RawEvent) -> float | None:
    pace = JobPace()
    for each in events:
        pace.feed(each)
    return pace.left_s


@pytest.mark.parametrize(
    ("events", "seconds"),
    [
        ([plan(1, numbers(1, 2, 3))], None),  # nothing is measured yet
        ([plan(1, numbers(1, 2, 3)), metrics(4, 4.0, step=1)], None),
        ([plan(1, numbers(1, 2, 3)), metrics(5, 10.0, step=1)], 2 * (95 + 5 + LATER)),
        ([plan(1, numbers(1)), metrics(5, 10.0, step=1)], None),  # the only step: its own time left says it
        # The next step has its plan, and no update.
        ([plan(1, numbers(1, 2, 3)), metrics(100, 200.0, step=1), plan(2, numbers(2, 3))], 2 * (100 + 10 + 340)),
        # The last step says it by itself.
        ([plan(1, numbers(1, 2, 3)), metrics(100, 200.0, step=1), plan(3, numbers(3))], None),
        # After a resume in another process: 10 updates in 30 s were seen, 50 to go.
        (
            [
                plan(1, numbers(1, 2, 3)),
                event("resumed", 1, from_update=39),
                metrics(40, 7.0, step=1),
                metrics(50, 37.0, step=1),
            ],
            50 * 3.0 + 3 * (5 + LATER),
        ),
        # Lines of another version, or damaged ones.
        ([plan(1, None), metrics(5, 10.0, step=1)], None),
        ([plan(1, {"1": {"updates": 5}, "x": 3, "2": "nan"}), metrics(5, 10.0, step=1)], None),
        ([plan(1, numbers(1, 2)), metrics(5, math.nan, step=1)], None),
    ],
)
def test_the_time_left_by_events(events: list[RawEvent], seconds: float | None) -> None:
    found = left(*events)
    assert found is None if seconds is None else found == pytest.approx(seconds)
