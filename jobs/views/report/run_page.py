"""Gather what the page shows of one run: its events, its job, its state, its price."""

from __future__ import annotations

import fcntl
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jobs.errors import ToolkitError
from jobs.formatting import one_line
from jobs.run_dir import RunDir
from jobs.state import State, state_of
from jobs.views.report.checkpoints import folders_here
from jobs.views.report.history import EventReader, RunHistory
from jobs.yaml12 import load_yaml


@dataclass(frozen=True)
class Price:
    """What the machine costs. `per_hour` None: not known."""

    per_hour: float | None = None
    currency: str = ""


@dataclass(frozen=True)
class RunPage:
    """One run as the page shows it."""

    history: RunHistory
    job: Mapping[str, str]  # dotted field -> value
    state: State
    price: Price = field(default_factory=Price)
    folders: frozenset[str] = frozenset()  # of weights, that are on disk: see `folders_here`


def names_of(runs: Sequence[RunDir]) -> list[str]:
    """Return the runs' names, with as much of their paths as tells equal names apart."""
    paths = [run.path.absolute().parts for run in runs]

    def name(parts: tuple[str, ...]) -> str:
        ends = (parts[-depth:] for depth in range(1, len(parts)))
        end = next((end for end in ends if sum(other[-len(end) :] == end for other in {*paths}) == 1), parts)
        return str(Path(*end))

    return [name(parts) for parts in paths]


def read_run(run: RunDir, *, name: str = "", state: State | None = None, price: Price = Price()) -> RunPage:
    """Read a run folder. name: on the page; state: if it is known better elsewhere.

    Raises ToolkitError if there are no events.
    """
    if not run.events.exists():
        what, hint = f"{run.path} holds no run", "name a folder with an events.jsonl, or a run of --output-dir"
        raise ToolkitError(what, why=f"there is no {run.events.name} in it", hint=hint)
    history = RunHistory(name or run.name)
    for event in EventReader(run.events).new_events():
        history.feed(event)
    return RunPage(history, job_fields(run), state or state_of_folder(run, history), price, folders_here(run))


def job_fields(run: RunDir) -> dict[str, str]:
    """Return the fields of the run's resolved job, flat; none if it cannot be read."""
    try:
        return dict(_flat(load_yaml(run.job_file.read_text(encoding="utf-8"), str(run.job_file))))
    except (OSError, ToolkitError, UnicodeDecodeError):
        return {}


def _flat(value: Any, path: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(value, dict) and value:
        for key, each in value.items():
            yield from _flat(each, f"{path}.{key}" if path else str(key))
    elif path:
        yield path, one_line(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))


def differences(jobs: list[Mapping[str, str]]) -> dict[str, list[str]]:
    """Return the fields in which the jobs differ, each with its value in each job; "" if absent."""
    names = dict.fromkeys(name for job in jobs for name in job)
    values = {name: [job.get(name, "") for job in jobs] for name in names}
    return {name: each for name, each in values.items() if len({*each}) > 1}


@dataclass(frozen=True)
class _FolderFacts:
    """The facts about a run that its folder holds, as `state_of` takes them."""

    words: Mapping[str, str]
    training: bool
    exit: int | None
    cancelled: bool
    alive: bool = False
    started: float | None = None


def state_of_history(history: RunHistory, *, training: bool, exit_code: int | None, cancelled: bool) -> State:
    """Return the state of a run; a step that nobody asked for is not missed."""
    steps = str(max(history.steps, default=0))
    return state_of(history.last, _FolderFacts({"steps": steps}, training, exit_code, cancelled))


def state_of_folder(run: RunDir, history: RunHistory) -> State:
    training = _is_locked(run)
    code = None if training else _exit_code(run)
    return state_of_history(history, training=training, exit_code=code, cancelled=run.cancelled.exists())


def _exit_code(run: RunDir) -> int | None:
    try:
        return int(run.exit.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _is_locked(run: RunDir) -> bool:
    """Tell whether a process trains in the folder, by a look at its lock, which stays free."""
    try:
        with run.lock.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False
