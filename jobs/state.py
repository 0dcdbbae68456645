"""The state of a run: one pure function of its last event and of what its supervisor knows."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime, timezone
from typing import Literal, Protocol

from jobs.errors import ExitCode
from jobs.events import RawEvent

State = Literal["queued", "running", "done", "failed", "cancelled", "preempted", "lost"]

# How a job ends that was asked to: by its own code, before it could answer, or by SIGKILL when the
# grace was over.
ENDED_BY_CANCEL = {int(ExitCode.CANCELLED), int(ExitCode.PREEMPTED), int(ExitCode.INTERRUPTED), 137}
GOES_ON = {int(ExitCode.PREEMPTED), int(ExitCode.INTERRUPTED)}


class JobFacts(Protocol):
    """The words of a `job` frame or of a `run` line; remote.runs.job_state.Job is one."""

    @property
    def words(self) -> Mapping[str, str]:
        """All of them. `steps` (`1,3`): those that the job was asked for."""

    @property
    def alive(self) -> bool:
        """Its supervisor is."""

    @property
    def training(self) -> bool:
        """Processes of the job are there."""

    @property
    def exit(self) -> int | None: ...

    @property
    def cancelled(self) -> bool: ...

    @property
    def started(self) -> float | None:
        """Seconds since 1970, by the clock that the events' times are of; None: no supervisor has
        started it.
        """


def state_of(last_event: RawEvent | None, facts: JobFacts) -> State:
    """last_event: the last line of events.jsonl that is whole; None where there is none.

    An exit code decides. Without one, what runs is running, and what does not has been cancelled,
    has said its end itself, or is lost: its supervisor was killed, or the box with it.
    """
    if facts.exit is not None:
        return _ended(facts.exit, facts.cancelled)
    if facts.training:
        return "running"
    if facts.alive:
        return "queued"
    if facts.cancelled:
        return "cancelled"
    if last_event is None:
        return "queued" if facts.started is None else "lost"
    if _is_of_this_job(last_event, facts.started):
        if last_event["kind"] == "error":
            return "failed"
        if last_event["kind"] == "end" and last_event.get("step") == _last_step(facts.words):
            return "done"
    return "lost"


def _ended(code: int, cancelled: bool) -> State:
    if code == ExitCode.OK:
        return "done"
    if code == ExitCode.CANCELLED or (cancelled and code in ENDED_BY_CANCEL):
        return "cancelled"
    return "preempted" if code in GOES_ON else "failed"


def _last_step(words: Mapping[str, str]) -> int:
    return max((int(step) for step in words.get("steps", "").split(",") if step in ("1", "2", "3")), default=3)


def _is_of_this_job(event: RawEvent, started: float | None) -> bool:
    """Not of an earlier call with the same run.

    An event without a time that can be read is taken for one of this.
    """
    if started is None:
        return True
    try:
        time = datetime.fromisoformat(str(event.get("time")).replace("Z", "+00:00"))
    except ValueError:
        return True
    return (time if time.tzinfo else time.replace(tzinfo=timezone.utc)).timestamp() >= int(started)
