"""What the supervisor of a job says of it, and that in words."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from jobs.errors import ExitCode

EXITS = {
    int(ExitCode.OK): "done",
    int(ExitCode.PREEMPTED): "preempted, the same command resumes",
    int(ExitCode.CANCELLED): "cancelled",
}

T = TypeVar("T")


@dataclass(frozen=True)
class JobState:
    """A `job` frame: the supervisor's facts.

    `words` holds all of them, those of a newer supervisor too.
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
    def started(self) -> float | None:
        """By the box's clock."""
        return number_of(self.words.get("started", ""), None)

    @property
    def ended(self) -> float | None:
        """By the box's clock; the last heartbeat where nothing else is known."""
        return number_of(self.words.get("ended", self.words.get("heartbeat", "")), None)


def state_text(job: JobState) -> tuple[str, bool]:
    """In words, and whether nobody has to look after it."""
    if job.exit is not None:
        said = "cancelled" if job.cancelled else EXITS.get(job.exit, "failed")
        return f"ended with exit code {job.exit} ({said})", job.exit == 0 or job.cancelled
    if job.alive:
        return ("being cancelled" if job.cancelled else "running" if job.training else "starting"), True
    if job.training:
        return "the supervisor is gone; the job may still be running unattended", False
    return "lost: it stopped without a word, and the same command resumes", False


def number_of(text: str, otherwise: T) -> float | T:
    try:
        number = float(text)
    except ValueError:
        return otherwise
    return number if math.isfinite(number) else otherwise
