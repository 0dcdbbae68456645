"""The time left: of the step that runs, and of all steps of the run, as far as updates have shown.

Pure: from events alone, so every viewer says the same, here and over SSH.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jobs.events import RawEvent

LEAST_UPDATES = 5  # before these the pace is that of the first updates, which are slow


class Pace:
    """The time left of the current step, from the updates that this process has seen."""

    def __init__(self) -> None:
        self._step: object = None
        self._start: tuple[int, float] | None = None  # update, elapsed_s
        self._latest: tuple[int, float] = (0, 0.0)
        self._updates = 0

    def feed(self, event: RawEvent) -> None:
        step = event.get("step")
        if event["kind"] == "resumed":
            # After a resume, elapsed_s may continue or begin at 0 again. So measure from the first
            # update that follows.
            self._step, self._latest = step, (event.get("from_update", 0), 0.0)
            self._start = None if self._latest[0] else (0, 0.0)
        elif event["kind"] == "metrics":
            now = (int(event.get("update", 0)), float(event.get("elapsed_s", math.nan)))
            updates = int(event.get("updates", 0))
            if step != self._step or now[0] < self._latest[0]:
                self._step, self._start = step, (0, 0.0)
            self._start, self._latest, self._updates = self._start or now, now, updates

    @property
    def measured(self) -> tuple[int, float]:
        """Return the updates that were seen, and their seconds."""
        if self._start is None:
            return 0, 0.0
        seconds = self._latest[1] - self._start[1]
        return (self._latest[0] - self._start[0], seconds) if math.isfinite(seconds) else (0, 0.0)

    @property
    def eta_s(self) -> float | None:
        updates, seconds = self.measured
        if updates <= 0 or self._latest[0] >= self._updates:
            return None
        return seconds / updates * (self._updates - self._latest[0])


@dataclass(frozen=True)
class Expected:
    """What was estimated of a step before it ran: its events' `expected`."""

    updates: int
    update_s: float
    fixed_s: float  # its start, measuring, saving

    @classmethod
    def parsed(cls, numbers: Any) -> Expected | None:
        """Return what a plan's line says of a step; None if it is damaged."""
        try:
            updates, update_s, fixed_s = (float(numbers[name]) for name in ("updates", "update_s", "fixed_s"))
        except (TypeError, KeyError, ValueError, OverflowError):
            return None
        are_sound = math.isfinite(updates + update_s + fixed_s) and updates >= 1 and update_s > 0 and fixed_s >= 0
        return cls(int(updates), update_s, fixed_s) if are_sound else None


def job_left_s(
    expected: Mapping[int, Expected], measured: Mapping[int, tuple[int, float]], step: int, done: int
) -> float | None:
    """Return the seconds until the last step has ended; None before the pace is known.

    measured: updates and seconds that were seen of each step. done: updates that `step`, which
    runs, has made. The pace is the time that the seen updates took, in times of what was estimated
    of them; what was estimated of the rest is scaled by it. The running step's own updates count
    alone for its rest, as soon as there are enough.
    """
    seen = {number: pair for number, pair in measured.items() if number in expected}
    if step not in expected or sum(updates for updates, _ in seen.values()) < LEAST_UPDATES:
        return None
    estimated = sum(updates * expected[number].update_s for number, (updates, _) in seen.items())
    pace = sum(seconds for _, seconds in seen.values()) / estimated
    now = expected[step]
    own_updates, own_s = seen.get(step, (0, 0.0))
    update_s = own_s / own_updates if own_updates >= LEAST_UPDATES else now.update_s * pace
    left = max(now.updates - done, 0) * update_s + now.fixed_s / 2 * pace
    later = [each for number, each in expected.items() if number > step]
    return left + pace * sum(each.fixed_s + each.updates * each.update_s for each in later)


class JobPace:
    """The time left of all steps of a run, from its events."""

    def __init__(self) -> None:
        self._pace = Pace()
        self._expected: dict[int, Expected] = {}
        self._measured: dict[int, tuple[int, float]] = {}
        self._step, self._done = 0, 0

    def feed(self, event: RawEvent) -> None:
        step, kind = event.get("step"), event["kind"]
        if not isinstance(step, int):
            return
        if kind == "plan":
            self._step, self._done = step, 0
            self._take(event.get("expected"), step)
        elif kind == "resumed":
            self._step, self._done = step, int(event.get("from_update", 0))
            self._measured.pop(step, None)
            self._pace.feed(event)
        elif kind == "metrics":
            self._pace.feed(event)
            self._step, self._done = step, int(event.get("update", 0))
            self._measured[step] = self._pace.measured

    def _take(self, expected: Any, step: int) -> None:
        """Take a plan's estimates: of its step and of those after it, and of no others to come."""
        self._expected = {number: each for number, each in self._expected.items() if number < step}
        for number, numbers in expected.items() if isinstance(expected, dict) else ():
            if str(number).isdecimal() and (found := Expected.parsed(numbers)):
                self._expected[int(number)] = found

    @property
    def left_s(self) -> float | None:
        """Return the seconds of all steps to come; None if not known, or if this is the last."""
        if not any(number > self._step for number in self._expected):
            return None
        return job_left_s(self._expected, self._measured, self._step, self._done)
