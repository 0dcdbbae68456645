"""The state of a job as its supervisor reports it, and that state in words."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from jobs.errors import ExitCode

EXITS = {
    int(ExitCode.OK): "done",
    int(ExitCode.PREEMPTED): "preempted; the same command resumes it",
    int(ExitCode.CANCELLED): "cancelled",
}

T = TypeVar("T")


@dataclass(frozen=True)
class JobState:
    """A `job` frame: the supervisor's facts.

    `words` holds all of them, also those that only a newer supervisor knows.
    """

    words: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, words: Sequence[str]) -> JobState:
        return cls(dict(word.split("=", 1) for word in words if "=" in word))

    @property
    def alive(self) -> bool:
        return self.words.get("alive") == "1"

    @property
    def training(self) -> bool:
        return self.words.get("training") == "1"

    @property
    def exit(self) -> int | None:
        return int(self.words["exit"]) if re.fullmatch(r"-?\d{1,9}", self.words.get("exit", "")) else None

    @property
    def cancelled(self) -> bool:
        return self.words.get("cancelled") == "1"

    @property
    def host(self) -> str:
        """Return the other host that runs the job, or has run it; "": it is this box's."""
        return self.words.get("host", "")

    @property
    def started(self) -> float | None:
        """Return when the job started, by the box's clock."""
        return number_of(self.words.get("started", ""), None)

    @property
    def ended(self) -> float | None:
        """Return when the job ended, by the box's clock; without that, the last heartbeat."""
        return number_of(self.words.get("ended", self.words.get("heartbeat", "")), None)


def state_text(job: JobState) -> tuple[str, bool]:
    """Return the job's state in words, and whether it needs no attention."""
    if job.exit is not None:
        meaning = "cancelled" if job.cancelled else EXITS.get(job.exit, "failed")
        return f"ended with exit code {job.exit} ({meaning})", job.exit == 0 or job.cancelled
    if job.alive:
        state = "being cancelled" if job.cancelled else "running" if job.training else "starting"
        return state + (f" on {job.host}, which shares this folder" if job.host else ""), True
    if job.training:
        return "the supervisor is gone; the job may still be running unattended", False
    if job.host:
        return f"not heard of: it ran on {job.host}, which shares this folder", False
    return "lost: the job stopped without an exit code; the same command resumes it", False


def number_of(text: str, otherwise: T) -> float | T:
    try:
        number = float(text)
    except ValueError:
        return otherwise
    return number if math.isfinite(number) else otherwise
