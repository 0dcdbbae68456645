"""The state of a run, as a pure function of its last event and its supervisor's facts."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime, timezone
from typing import Literal, Protocol

from jobs.errors import ExitCode
from jobs.events import RawEvent

State = Literal["queued", "running", "done", "failed", "cancelled", "preempted", "lost"]

# Exit codes of a cancelled job: its own codes, or 137 for SIGKILL when the grace was over.
ENDED_BY_CANCEL = {int(ExitCode.CANCELLED), int(ExitCode.PREEMPTED), int(ExitCode.INTERRUPTED), 137}
CAN_RESUME = {int(ExitCode.PREEMPTED), int(ExitCode.INTERRUPTED)}


class JobFacts(Protocol):
    """The facts of a `job` frame or of a `run` line; remote.runs.job_state.JobState has them."""

    @property
    def words(self) -> Mapping[str, str]:
        """All words. `steps` (`1,3`): the steps that the job was asked for."""

    @property
    def alive(self) -> bool:
        """Tell whether the supervisor runs."""

    @property
    def training(self) -> bool:
        """Tell whether processes of the job run."""

    @property
    def exit(self) -> int | None: ...

    @property
    def cancelled(self) -> bool: ...

    @property
    def started(self) -> float | None:
        """When the job started, in seconds since 1970; None: no supervisor has started it.

        By the same clock as the times of events.
        """


def state_of(last_event: RawEvent | None, facts: JobFacts) -> State:
    """Return the state of a run.

    last_event: the last whole line of events.jsonl; None if there is none.

    An exit code decides. Without one, a job with processes is `running`. A job without processes
    was cancelled, has written its end as an event, or is `lost`: its supervisor was killed, or the
    box went down.
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
    return "preempted" if code in CAN_RESUME else "failed"


def _last_step(words: Mapping[str, str]) -> int:
    return max((int(step) for step in words.get("steps", "").split(",") if step in ("1", "2", "3")), default=3)


def _is_of_this_job(event: RawEvent, started: float | None) -> bool:
    """Tell whether the event is of this job, and not of an earlier call with the same run.

    An event without a readable time counts as one of this job.
    """
    if started is None:
        return True
    try:
        time = datetime.fromisoformat(str(event.get("time")).replace("Z", "+00:00"))
    except ValueError:
        return True
    return (time if time.tzinfo else time.replace(tzinfo=timezone.utc)).timestamp() >= int(started)
