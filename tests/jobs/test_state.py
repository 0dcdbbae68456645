"""Every state, by hand: what a person would call it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pytest

from jobs.state import State, state_of

# 2025-01-05T12:00:00Z
NOON = "started=1736078400"


@dataclass(frozen=True)
class Known:
    """The facts that a supervisor knows.

    remote.runs.job_state.JobState reads the same words, but it is not in the image, where this is
    tested, too.
    """

    words: Mapping[str, str]

    @property
    def alive(self) -> bool:
        return self.words.get("alive") == "1"

    @property
    def training(self) -> bool:
        return self.words.get("training") == "1"

    @property
    def exit(self) -> int | None:
        return int(self.words["exit"]) if "exit" in self.words else None

    @property
    def cancelled(self) -> bool:
        return self.words.get("cancelled") == "1"

    @property
    def started(self) -> float | None:
        return float(self.words["started"]) if "started" in self.words else None


def facts(words: str) -> Known:
    return Known(dict(word.split("=", 1) for word in words.split()))


def event(kind: str, time: str = "2025-01-05T12:00:03.250Z", **more: Any) -> dict[str, Any]:
    return {"schema": 1, "seq": 7, "time": time, "kind": kind, **more}


@pytest.mark.parametrize(
    ("words", "state"),
    [
        ("alive=1 training=0", "queued"),
        ("alive=1 training=1", "running"),
        ("alive=1 training=1 cancelled=1", "running"),  # being cancelled
        ("alive=0 training=1", "running"),  # nobody looks after it
        ("alive=0 training=0", "queued"),  # never begun
        ("alive=0 training=0 exit=0", "done"),
        ("alive=1 training=0 exit=0", "done"),  # the supervisor is just about to leave
        ("alive=0 training=0 exit=0 cancelled=1", "done"),  # it was quicker
        ("alive=0 training=0 exit=143 cancelled=1", "cancelled"),
        ("alive=0 training=0 exit=143", "cancelled"),
        ("alive=0 training=0 exit=137 cancelled=1", "cancelled"),  # the grace was over
        ("alive=0 training=0 exit=75 cancelled=1", "cancelled"),
        ("alive=0 training=0 exit=137", "failed"),  # out of memory, as a rule
        ("alive=0 training=0 exit=75", "preempted"),
        ("alive=0 training=0 exit=130", "preempted"),
        ("alive=0 training=0 exit=4", "failed"),
        ("alive=0 training=0 exit=4 cancelled=1", "failed"),
        ("alive=0 training=0 exit=2", "failed"),
        (f"alive=0 training=0 {NOON}", "lost"),
        (f"alive=0 training=0 cancelled=1 {NOON}", "cancelled"),  # by who killed all of it, without a supervisor
        ("", "queued"),
    ],
)
def test_without_events(words: str, state: State) -> None:
    assert state_of(None, facts(words)) == state


@pytest.mark.parametrize(
    ("last", "words", "state"),
    [
        (event("metrics", step=1), "", "lost"),
        (event("error", exit_code=4), "", "failed"),
        (event("end", step=3), "", "done"),
        (event("end", step=3), "steps=1,2,3", "done"),
        (event("end", step=1), "steps=1", "done"),
        (event("end", step=2), "steps=2,1", "done"),
        (event("end", step=1), "steps=1,2,3", "lost"),  # between two steps
        (event("end", step=1), "", "lost"),  # of all three, as far as is known
        (event("end", step=3, time="2025-01-05T11:59:59.9Z"), "", "lost"),  # of an earlier call
        (event("error", time="2025-01-05T11:00:00Z"), "", "lost"),
        (event("end", step=3, time="2025-01-05T12:00:00.100Z"), "", "done"),  # `started` has no fractions
        (event("end", step=3, time="2025-01-05T12:00:03"), "", "done"),  # UTC
        (event("end", step=3, time="soon"), "", "done"),
    ],
)
def test_lost_or_what_it_has_said_itself(last: dict[str, Any], words: str, state: State) -> None:
    assert state_of(last, facts(f"alive=0 training=0 {NOON} {words}")) == state


def test_what_was_trained_by_hand_is_told_by_its_events() -> None:
    assert state_of(event("end", step=3), facts("alive=0 training=0")) == "done"
    assert state_of(event("metrics", step=3), facts("alive=0 training=0")) == "lost"


def test_an_exit_code_and_running_processes_count_more_than_events() -> None:
    assert state_of(event("end", step=3), facts(f"alive=1 training=1 {NOON}")) == "running"
    assert state_of(event("error"), facts(f"alive=0 training=0 exit=75 {NOON}")) == "preempted"
