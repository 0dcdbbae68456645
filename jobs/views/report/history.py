"""Keep the events of a run: numbers as series in arrays, and whole the few that are shown whole."""

from __future__ import annotations

import inspect
import math
from array import array
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, fields
from pathlib import Path

from pydantic_core import from_json

from jobs.events import MetricFormat, Metrics, RawEvent, parsed, time_of, without_damage
from jobs.steps import STEPS

# Every metric, shown in the panel or not, with the format and the label of its field.
METRICS: dict[str, MetricFormat | None] = {
    each.name: each.metadata["shown"] for each in fields(Metrics) if each.name in inspect.get_annotations(Metrics)
}
MOST_LISTED = 200  # warnings and errors kept of a run; a run that writes thousands repeats itself


@dataclass
class StepHistory:
    """All that one step of a run has written and that still holds."""

    plan: RawEvent = field(default_factory=dict)
    updates: array[float] = field(default_factory=lambda: array("d"))  # of each line of metrics
    series: dict[str, array[float]] = field(default_factory=dict)  # by metric; NaN where a line lacks it
    planned_updates: int = 0
    elapsed_s: float = 0.0
    samples: list[RawEvent] = field(default_factory=list)
    saved: list[RawEvent] = field(default_factory=list)  # checkpoints: all best ones, and the last of the others
    end: RawEvent | None = None

    def add(self, event: RawEvent) -> None:
        """Take a line of metrics."""
        lines = len(self.updates)
        self.updates.append(_number(event.get("update", math.nan)))
        self.elapsed_s = _number(event.get("elapsed_s", 0.0))
        for name, value in event.items():
            if name in METRICS:
                values = self.series.get(name)
                if values is None:
                    values = self.series[name] = array("d")
                if len(values) < lines:
                    values.extend([math.nan] * (lines - len(values)))
                values.append(value if type(value) is float else _number(value))

    def curve(self, name: str) -> tuple[array[float], array[float]]:
        """Return updates and values of a metric, which has a value for each of these updates."""
        values = self.series.get(name, array("d"))
        return self.updates[: len(values)], values

    def save(self, event: RawEvent) -> None:
        """Take a checkpoint; of those to resume from, a step keeps the last one alone."""
        if "/checkpoints/" in str(event.get("path")):
            self.saved = [each for each in self.saved if "/checkpoints/" not in str(each.get("path"))]
        self.saved.append(event)

    @property
    def last_update(self) -> int:
        return int(self.updates[-1]) if self.updates and math.isfinite(self.updates[-1]) else 0

    def undo_after(self, update: int) -> None:
        """Drop what was written after `update`, since the step resumes there (0: from scratch)."""
        keep = bisect_right(self.updates, update) if update else 0
        del self.updates[keep:]
        for values in self.series.values():
            del values[keep:]
        self.end = None
        self.saved = [each for each in self.saved if update and int(each.get("update", 0)) <= update]
        self.samples = [
            sample
            for sample in self.samples
            if update and sample.get("when") != "after" and int(sample.get("update", -1)) < update
        ]


class RunHistory:
    """A run as its events tell it, fed in order."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.steps: dict[int, StepHistory] = {}
        self.notes: list[RawEvent] = []  # warnings, errors and resumes, in order
        self.left_out = 0  # notes that are not kept
        self.doing = ""
        self.last: RawEvent | None = None
        self.events = 0

    def feed(self, event: RawEvent) -> None:
        """Take one event; of a damaged one, with text for a number, what can be read."""
        with suppress(TypeError, ValueError, AttributeError, OverflowError):
            self._feed(event)

    def _feed(self, event: RawEvent) -> None:
        kind, number = event["kind"], event.get("step")
        self.last, self.events = event, self.events + 1
        if kind in ("warning", "error", "resumed"):
            self._note(event)
        if number not in STEPS:
            return
        step = self.steps.setdefault(number, StepHistory())
        if kind == "metrics":
            step.add(event)
            step.planned_updates = int(event.get("updates", 0))
        elif kind == "plan":
            step.plan, step.planned_updates = event, int(event.get("updates", 0))
        elif kind == "sample":
            step.samples.append(event)
        elif kind == "checkpoint":
            step.save(event)
        elif kind == "end":
            step.end, self.doing = event, ""
        elif kind == "progress":
            self.doing = str(event.get("doing", ""))
        elif kind == "resumed":
            step.undo_after(int(event.get("from_update", 0)))

    def _note(self, event: RawEvent) -> None:
        self.notes.append(event)
        if len(self.notes) > MOST_LISTED:  # the first ones tell how it began, the last ones how it ended
            del self.notes[MOST_LISTED // 2]
            self.left_out += 1

    def numbered_steps(self) -> Iterator[tuple[int, StepHistory]]:
        yield from sorted(self.steps.items())

    @property
    def last_time(self) -> float:
        """When the last event was written, in seconds since 1970; NaN if it is not known."""
        return time_of(self.last) if self.last else math.nan


class EventReader:
    """Read an event file that grows, line by line, so that a long one takes little memory."""

    def __init__(self, path: Path, offset: int = 0) -> None:
        self._path, self._offset = path, offset

    def new_events(self) -> Iterable[RawEvent]:
        """Yield the whole lines that were written since the last call."""
        if not self._path.exists():
            return
        with self._path.open("rb") as file:
            file.seek(self._offset)
            for line in file:
                if not line.endswith(b"\n"):
                    break
                self._offset += len(line)
                if (event := _event_of(line)) is not None:
                    yield event


def _event_of(line: bytes) -> RawEvent | None:
    """Parse one line as `parsed` does.

    A long run's file is nearly all metrics, and pydantic's parser takes 6 µs for such a line where
    json takes 15.
    """
    if b'"kind": "metrics"' in line:
        with suppress(ValueError):  # such as a lone surrogate, which only json reads
            event = from_json(line)
            is_one = isinstance(event, dict) and event.get("kind") == "metrics"
            return without_damage(event) if is_one else parsed(line)
    return parsed(line)


def _number(value: object) -> float:
    """Convert a value of an event, where nan and inf are words; NaN if it is no number."""
    try:
        return float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return math.nan
