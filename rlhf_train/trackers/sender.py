"""Send a run's numbers to one tracker: `python -m rlhf_train.trackers.sender NAME RUN OFFSET`.

It reads the run's event file from OFFSET on, until standard input ends, and then what is left of
it. The first line on standard output says what went wrong, for a person. All else that is printed
goes to standard error, which is the run's log.

A tracker takes no point back: of an update that a resume makes again, both points stay.
"""

from __future__ import annotations

import os
import select
import signal
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, Protocol

from jobs.events import RawEvent
from jobs.formatting import one_line
from jobs.run_dir import RunDir
from jobs.spec import load_job
from jobs.steps import STEPS
from jobs.views.report.history import METRICS, EventReader

PROJECT = "rlhf-box"
READ_S = 1.0  # between two looks at the events
LAST_S = 60  # for what is left when standard input ends, also where the launcher was killed
Tell = Callable[[str], object]


class Tracker(Protocol):
    def send(self, step: int, update: int, numbers: Mapping[str, float]) -> None: ...

    def finish(self) -> None: ...


class Wandb:
    """A run of Weights & Biases, with the run folder's id. Each step has an x axis of its own."""

    def __init__(self, run: RunDir, config: Mapping[str, Any], tell: Tell) -> None:
        import wandb

        self._wandb = wandb
        word = run.id.read_text(encoding="utf-8").strip()

        def start(mode: Any = None) -> Any:  # what is not said here, the environment says
            return wandb.init(id=word, name=run.name, resume="allow", config=dict(config), mode=mode)

        try:
            self._run = start()
        except Exception as error:  # no network, no key, a wrong one
            traceback.print_exc()
            wandb.teardown()  # else the id is taken
            self._run = start("offline")
            why = one_line(error).rstrip(".")
            tell(f"wandb: {why}; its numbers are kept in {run.wandb}, and `wandb sync` sends them")
        for step in STEPS:
            self._run.define_metric(f"step{step}/update", hidden=True)
            self._run.define_metric(f"step{step}/*", step_metric=f"step{step}/update")

    def send(self, step: int, update: int, numbers: Mapping[str, float]) -> None:
        self._run.log({f"step{step}/{name}": value for name, value in {"update": update, **numbers}.items()})

    def finish(self) -> None:
        self._run.finish()
        self._wandb.teardown()  # waits for wandb's own process, which writes the last numbers to its file


class Trackio:
    """A run of trackio. It resumes by name, so the name has a part of the run folder's id."""

    def __init__(self, run: RunDir, config: Mapping[str, Any], _tell: Tell) -> None:
        import trackio

        name = f"{run.name}-{run.id.read_text(encoding='utf-8')[:8]}"
        self._run = trackio.init(
            PROJECT, name=name, resume="allow", config=dict(config), embed=False, auto_log_gpu=False, auto_log_cpu=False
        )

    def send(self, step: int, update: int, numbers: Mapping[str, float]) -> None:
        self._run.log({f"step{step}/{name}": value for name, value in numbers.items()}, step=update)

    def finish(self) -> None:
        self._run.finish()


KINDS: dict[str, Callable[[RunDir, Mapping[str, Any], Tell], Tracker]] = {"wandb": Wandb, "trackio": Trackio}


def send_all(name: str, run: RunDir, offset: int, *, has_ended: Callable[[], bool], tell: Tell) -> None:
    """Send the metrics from `offset` of the event file on, until the run has ended."""
    tracker = KINDS[name](run, load_job(str(run.job_file)).dump(), tell)
    reader = EventReader(run.events, offset)
    ended = False
    while not ended:
        ended = has_ended()  # asked first: what was written before the end is read
        for event in reader.new_events():
            if event["kind"] == "metrics":
                try:
                    _send(tracker, event)
                except Exception as error:  # such as an event that is damaged
                    tell(f"{name}: an update could not be sent: {one_line(error)}")
    tracker.finish()


def _send(tracker: Tracker, event: RawEvent) -> None:
    numbers = {metric: float(event[metric]) for metric in METRICS if metric in event}
    tracker.send(int(event["step"]), int(event["update"]), numbers)


def _ends_within(file: IO[Any], seconds: float) -> bool:
    """Wait for the end of a pipe into which nobody writes; return whether it has come."""
    ended = bool(select.select([file], [], [], seconds)[0])
    if ended:
        signal.alarm(LAST_S)  # it ends this process
    return ended


def main(argv: Sequence[str]) -> int:
    name, run, offset = argv[0], RunDir(Path(argv[1])), int(argv[2])
    os.nice(5)  # training comes first
    words = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # the tracker's own words, and those of its processes

    def tell(text: str) -> None:
        print(text, file=words, flush=True)

    try:
        send_all(name, run, offset, has_ended=lambda: _ends_within(sys.stdin, READ_S), tell=tell)
    except Exception as error:
        traceback.print_exc()
        tell(f"{name}: {one_line(error)}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
