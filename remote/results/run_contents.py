"""What the runs of a box hold, what was fetched, and what would be lost: for fetch, stop, purge."""

from __future__ import annotations

import json
import os
import re
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from jobs.errors import ExitCode, ToolkitError
from jobs.formatting import size
from jobs.steps import STEPS
from remote.scripts import script
from remote.ssh.commands import sh_script

if TYPE_CHECKING:
    from remote.ssh.connection import BoxConnection

SHA256 = re.compile(r"[0-9a-f]{64}")
RUN_ID = re.compile(r"[0-9A-Za-z-]{1,64}")
SCHEMA = 1
LOOK_S = 60.0  # the longest that `results.sh look` may take: it hashes small files only


def run_id(text: str) -> str:
    """Return the id that a run's file `id` holds; "" if it holds none."""
    word = text.strip()
    return word if RUN_ID.fullmatch(word) else ""


def is_run_name(name: str) -> bool:
    """Tell whether a run of this name can have a folder of its own in ROOT/runs."""
    return bool(name) and not name.startswith(".") and not re.search(r"[/\x00-\x1f\x7f\ufffd]", name)


# --- on the box -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class NewestCheckpoint:
    """A step's newest complete checkpoint."""

    update: int
    complete: str  # sha256 of its complete.json, which holds the hashes of all its files
    size_bytes: int


@dataclass(frozen=True)
class FinishedStep:
    """A step whose model is whole."""

    complete: str  # sha256 of its complete.json, which differs each time the step is trained
    size_bytes: int  # of its models


@dataclass(frozen=True)
class Run:
    name: str
    events_bytes: int = 0
    steps: Mapping[int, FinishedStep] = field(default_factory=dict)
    checkpoints: Mapping[int, NewestCheckpoint] = field(default_factory=dict)  # by step
    id: str = ""  # "": it was begun before there were ids


@dataclass(frozen=True)
class Results:
    """The results in our folder on one box."""

    root: str  # without links; "": there is no such folder
    marked: bool = False
    running: str | None = None  # the run whose job runs; "-": a job runs, of an unknown run
    runs: tuple[Run, ...] = ()
    elsewhere: str = ""  # the host that runs it, if another one shares our folder


def read_results(connection: BoxConnection, root: str) -> Results:
    """Ask the box for its results, in one round trip. Raises ToolkitError: no whole answer."""
    answer = connection.query(sh_script("look", root), stdin=script("results.sh"), timeout_s=LOOK_S)
    lines = answer.out.splitlines()
    if not lines or lines[-1] != "end":
        raise ToolkitError(
            f"cannot tell which results are on {connection.box.name}",
            why=f"the answer stopped after {len(lines)} lines",
            hint="try again",
            exit_code=ExitCode.UNREACHABLE,
        )
    return parse_look(answer.out)


def parse_look(text: str) -> Results:
    """Parse the lines of `results.sh look`.

    A line about a step belongs to the run named last. Unknown lines are ignored.
    """
    found, runs = Results(""), []
    for line in text.splitlines():
        word, _, rest = line.partition(" ")
        words = rest.split()
        if word == "root":
            found = replace(found, root=rest)
        elif word == "marked":
            found = replace(found, marked=True)
        elif word == "running" and rest:
            found = replace(found, running=rest.rpartition(" ")[0])
        elif word == "elsewhere":
            found = replace(found, elsewhere=rest)
        elif word == "run":
            runs.append(Run(rest))
        elif runs and word == "id":
            runs[-1] = replace(runs[-1], id=run_id(rest))
        elif runs and word in ("events", "step", "checkpoint"):
            runs[-1] = _with(runs[-1], word, words)
    return replace(found, runs=tuple(run for run in runs if is_run_name(run.name)))


def _with(run: Run, word: str, words: list[str]) -> Run:
    numbers = [int(each) for each in words if each.isascii() and each.isdigit() and len(each) < 16]
    hashes = [each for each in words if SHA256.fullmatch(each)]
    if word == "events" and len(numbers) == 1:
        return replace(run, events_bytes=numbers[0])
    if word == "step" and len(numbers) == 2 and hashes:
        return replace(run, steps={**run.steps, numbers[0]: FinishedStep(hashes[0], numbers[1])})
    if word == "checkpoint" and len(numbers) == 3 and hashes:
        return replace(
            run, checkpoints={**run.checkpoints, numbers[0]: NewestCheckpoint(numbers[1], hashes[0], numbers[2])}
        )
    return run


# --- on the laptop --------------------------------------------------------------------------------


@dataclass(frozen=True)
class FetchedStep:
    complete: str
    models: str  # over the names, sizes and hashes of all files of its models


@dataclass(frozen=True)
class FetchedCheckpoint:
    update: int
    complete: str


@dataclass(frozen=True)
class FetchedRun:
    """What the last fetch into a run folder here left there, every byte verified."""

    folder: str = ""  # the run folder here
    time: float = 0.0  # by the laptop's clock
    events_bytes: int = 0
    steps: Mapping[int, FetchedStep] = field(default_factory=dict)
    checkpoints: Mapping[int, FetchedCheckpoint] = field(default_factory=dict)
    id: str = ""  # the run's; "": it had none


def memory_file(state: Path, box: str) -> Path:
    return state / "fetched" / f"{quote(box, safe='')}.json"


def recall(state: Path, box: str) -> dict[str, FetchedRun]:
    """Return what was fetched from that box last, by run.

    Nothing if the memory file cannot be read.
    """
    return {name: copies[0] for name, copies in recall_copies(state, box).items()}


def recall_copies(state: Path, box: str) -> dict[str, list[FetchedRun]]:
    """Return what was fetched from that box, by run: one for each folder, the latest first."""
    try:
        tree = json.loads(memory_file(state, box).read_text(encoding="utf-8"))
        if tree["schema"] != SCHEMA:
            return {}
        earlier = tree.get("earlier", {})
        return {name: [*map(_fetched_run, [last, *earlier.get(name, [])])] for name, last in tree["runs"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def _fetched_run(fields: Mapping[str, Any]) -> FetchedRun:
    return FetchedRun(
        **{name: fields[name] for name in ("folder", "time", "events_bytes")},
        id=fields.get("id", ""),
        steps={int(step): FetchedStep(**each) for step, each in fields["steps"].items()},
        checkpoints={int(step): FetchedCheckpoint(**each) for step, each in fields["checkpoints"].items()},
    )


def remember(state: Path, box: str, run: str, fetched: FetchedRun) -> None:
    known = recall_copies(state, box)
    known[run] = [fetched, *(each for each in known.get(run, []) if each.folder != fetched.folder)]
    runs = {name: asdict(copies[0]) for name, copies in sorted(known.items())}
    earlier = {name: [*map(asdict, copies[1:])] for name, copies in sorted(known.items()) if copies[1:]}
    write_json(memory_file(state, box), {"schema": SCHEMA, "runs": runs, "earlier": earlier})


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file as a whole, or leave it as it was."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("w", encoding="utf-8") as file:
            file.write(json.dumps(value, indent=1, ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


# --- what would be lost ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Unfetched:
    """One result that is only on the box."""

    run: str
    what: str  # for a person
    size_bytes: int
    is_checkpoint: bool = False  # `fab fetch` takes it only when asked to

    def __str__(self) -> str:
        return f"run `{self.run}`: {self.what}, {size(self.size_bytes)}"


def unfetched(results: Results, fetched: Mapping[str, FetchedRun]) -> tuple[Unfetched, ...]:
    return tuple(found for run in results.runs for found in _unfetched(run, fetched.get(run.name, FetchedRun())))


def _unfetched(run: Run, fetched: FetchedRun) -> Iterator[Unfetched]:
    for step, finished in sorted(run.steps.items()):
        fetched_step = fetched.steps.get(step)
        if fetched_step is None or fetched_step.complete != finished.complete:
            title = STEPS[step].title if step in STEPS else "?"
            again = "" if fetched_step is None else ", trained again since it was fetched"
            yield Unfetched(run.name, f"the models of step {step} ({title}){again}", finished.size_bytes)
    for step, saved in sorted(run.checkpoints.items()):
        kept = fetched.checkpoints.get(step)
        if kept is None or kept.complete != saved.complete:
            older = "" if kept is None else f" (fetched: update {kept.update})"
            what = f"the checkpoint of step {step}, update {saved.update}{older}"
            yield Unfetched(run.name, what, saved.size_bytes, is_checkpoint=True)
    if run.events_bytes != fetched.events_bytes:  # fewer: the run was started again from scratch
        new = max(run.events_bytes - fetched.events_bytes, 0) or run.events_bytes
        what = "events written since the last fetch" if fetched.events_bytes else "its events and its log"
        yield Unfetched(run.name, what, new)


def how_to_fetch(host: str, lost: tuple[Unfetched, ...]) -> str:
    """Write the command that brings all of these results home."""
    runs = [*dict.fromkeys(each.run for each in lost)]
    flag = " --checkpoints" if any(each.is_checkpoint for each in lost) else ""
    which = f"--run {shlex.quote(runs[0])}" if len(runs) == 1 else "--all"
    return f"fab fetch --host {shlex.quote(host)} {which}{flag}"
