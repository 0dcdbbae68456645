"""A scene for faults is a tiny job with real ranks, trained by a launcher in this process.

A launcher in this process needs no start-up time of its own.
"""

from __future__ import annotations

import functools
import json
import os
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
import yaml

from jobs.events import effective, read_events
from jobs.run_dir import RunDir
from tests import launcher, tiny

PATIENCE_S = 90.0  # limit for what takes seconds; other work may share the machine
SHIM = Path(__file__).parent / "shim"

Fault = dict[str, Any]


def fault(what: str, kind: str = "training", *, rank: int = 0, first: int = 1, last: int = 10**9, **more: Any) -> Fault:
    """For shim/sitecustomize.py: from pass `first` to `last` of the rank's passes of this `kind`.

    what: "no memory" for more than `rows` concurrent rows, "nan", "stop" (SIGSTOP), or "wait" until
    `file` is there.
    kind: "training" (passes 1 and 2 are the trial updates), "generating" (tokens after the first),
    "judging" (whole sequences, not to train on them), "saving" (each file of a checkpoint), or
    "start" (to wait, before anything). saving_too=True: once it has been met, also at each file of
    a checkpoint.
    """
    return {"what": what, "kind": kind, "rank": rank, "first": first, "last": last, **more}


@dataclass(frozen=True)
class Scene:
    """A folder with the tiny job."""

    folder: Path

    @classmethod
    def made_in(cls, folder: Path) -> Scene:
        (folder / "job.yaml").write_text(yaml.safe_dump(tiny.job(tiny.write_rows(folder / "rows"))), encoding="utf-8")
        return cls(folder)

    @property
    def runs(self) -> Path:
        return self.folder / "runs"

    def run(self, name: str) -> RunDir:
        return RunDir(self.runs / name)

    def train(
        self, name: str, *settings: str, step: str = "1", met: Fault | None = None, more: tuple[str, ...] = ()
    ) -> int:
        """Run `rlhf-train` on the job, and return its exit code.

        met: the fault that its ranks meet.
        """
        words = ["--job", str(self.folder / "job.yaml"), "--output-dir", str(self.runs)]
        words += ["--run", name, "--step", *step.split(), *more]
        for setting in settings:
            words += ["--set", setting]
        variables = {} if met is None else variables_of(met, Path(_fault_folder().name, "fault.json"))
        return launcher.train(words, self.folder / "cache", variables)


@functools.cache
def _fault_folder() -> tempfile.TemporaryDirectory[str]:
    """Make the folder of the one file that the importers of this process know."""
    return tempfile.TemporaryDirectory()


def variables_of(met: Fault, file: Path) -> dict[str, str]:
    """Write the fault to `file`, and return the variables of ranks that meet it."""
    file.write_text(json.dumps(met), encoding="utf-8")
    return {"PYTHONPATH": str(SHIM), "FAULT": str(file)}


def events(run: RunDir, kind: str, step: int = 1) -> list[dict[str, Any]]:
    """All of a kind, also those that do not hold any more."""
    return [event for event in read_events(run.events)[0] if event["kind"] == kind and event.get("step") == step]


def warnings(run: RunDir, step: int = 1) -> list[str]:
    return [event["message"] for event in events(run, "warning", step)]


def curve(run: RunDir) -> dict[int, float]:
    """Step 1's losses by update, each once: what a resume has undone is left out."""
    found = [
        event for event in effective(read_events(run.events)[0]) if event["kind"] == "metrics" and event["step"] == 1
    ]
    losses = {event["update"]: event["loss"] for event in found}
    assert len(losses) == len(found)
    return losses


def ranks_here() -> list[psutil.Process]:
    """The ranks that a launcher in this process has started."""
    return ranks_of(os.getpid())


def ranks_of(launcher: int) -> list[psutil.Process]:
    """Those at work, and those that wait for the next step."""
    return [process for process in psutil.Process(launcher).children(recursive=True) if is_rank(process)]


def is_rank(process: psutil.Process) -> bool:
    try:
        return process.name().startswith("rank ") and "rlhf_train.worker" in process.cmdline()
    except psutil.Error:  # it has just ended
        return False


def when(condition: Callable[[], Any], act: Callable[[], Any]) -> threading.Thread:
    """Do `act` concurrently with the test, as soon as `condition` holds.

    It is done after PATIENCE_S in any case: the test would last forever without it.
    """

    def wait_and_act() -> None:
        deadline = time.monotonic() + PATIENCE_S
        while not condition() and time.monotonic() < deadline:
            time.sleep(0.02)
        act()

    thread = threading.Thread(target=wait_and_act, daemon=True)
    thread.start()
    return thread


def until(condition: Callable[[], Any]) -> Any:
    """Wait for it -> what it returns then."""
    deadline = time.monotonic() + PATIENCE_S
    while not (found := condition()):
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)
    return found


def error_of(output: str) -> str:
    """What the launcher told in the end."""
    return output[output.index("error: ") :]
