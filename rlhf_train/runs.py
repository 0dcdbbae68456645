"""Which steps of a run are to be done: the same command goes on, a changed field is refused, a redo starts anew."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from jobs.errors import ToolkitError
from jobs.events import End, EventWriter, effective, parse, read_events
from jobs.run_dir import RunDir
from jobs.spec import Job, difference
from jobs.words import STEPS


def needed_by(job: Job, step: int) -> list[int]:
    """Steps whose model `step` starts from."""
    return {1: [], 2: [1] if job.critic.model == "actor" else [], 3: [1, 2]}[step]


def is_complete(run: RunDir, step: int) -> bool:
    return _read_json(run.step(step).complete) is not None and run.step(step).model.is_dir()


def steps_to_do(job: Job, run: RunDir, wanted: Sequence[int], *, redo: bool, taken: Sequence[int] = ()) -> list[int]:
    """`wanted` without those that are complete (with `redo`: all of them). Raises ToolkitError on what stands in the way.

    `taken`: steps that will be taken over from another run first, and so be complete.
    """

    def complete(step: int) -> bool:
        return step in taken or is_complete(run, step)

    todo = [step for step in wanted if redo or not complete(step)]
    for step in todo:
        if not job.data.split[step - 1]:
            shares = ", ".join(f"{share:g}" for share in job.data.split)
            raise ToolkitError(
                f"step {step} ({STEPS[step]}) has no data", why=f"data.split is {shares}", hint="give it a share, or leave the step out"
            )
    changed = {
        step: lines
        for step in sorted({*wanted, *(n for s in todo for n in needed_by(job, s))})
        if (lines := _changed(job, run, step)) and not (redo and step in todo)
    }
    if changed:
        step, lines = next(iter(changed.items()))
        source = f" --from {run.name}" if any(is_complete(run, n) for n in (1, 2, 3)) else ""
        raise ToolkitError(
            f"run `{run.name}` did step {step} with other settings",
            why="\n".join(lines),
            hint=f"go on with the old settings; or `--run NEW{source}` for a run of its own;\n"
            f"or `--redo --step {','.join(map(str, changed))}` to do it again here",
        )
    for step in todo:
        missing = [n for n in needed_by(job, step) if n not in todo and not complete(n)]
        if missing:
            names = " and ".join(f"step {n} ({STEPS[n]})" for n in missing)
            raise ToolkitError(
                f"step {step} ({STEPS[step]}) needs the model of {names}",
                why="\n".join(f"{run.step(n).model} is not there" for n in missing),
                hint=f"run `--step {' '.join(map(str, [*missing, step]))}` (or `--step all`),\n"
                "or take them over from another run with `--run NEW --from RUN`",
            )
    return todo


def _changed(job: Job, run: RunDir, step: int) -> list[str]:
    """Fields that differ from those the step was started with."""
    started_with = _read_json(run.step(step).fields)
    if started_with is None:
        return [f"{run.step(step).fields} cannot be read"] if is_complete(run, step) else []
    return difference(started_with, job.fields_of_step(step))


def begin_step(job: Job, run: RunDir, step: int) -> None:
    """Forget an earlier result of `step` and record the fields that it now depends on."""
    folder = run.step(step)
    shutil.rmtree(folder.path, ignore_errors=True)
    if step == 1:  # trained on the job's rows, which may be others now
        shutil.rmtree(run.tokenizer, ignore_errors=True)
    folder.path.mkdir(parents=True)
    write_json(folder.fields, job.fields_of_step(step))


def complete_step(run: RunDir, step: int, end: dict[str, Any]) -> None:
    write_json(run.step(step).complete, end)


def write_json(path: Path, value: Any) -> None:
    """Written beside and renamed: never torn, and a link shared with another run is left to that run."""
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    partial.replace(path)


def _read_json(path: Path) -> Any:
    """None: it is not there, or torn (a machine that lost its power leaves an empty file)."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None


def steps_to_take_over(job: Job, source: RunDir, run: RunDir) -> list[int]:
    """The complete steps of `source` whose settings are this job's, and that `run` has not begun. Raises ToolkitError."""
    if not source.path.is_dir():
        raise ToolkitError(
            f"there is no run `{source.name}`", why=f"{source.path} does not exist", hint="`--from` names a run folder beside this one"
        )
    taken = [n for n in (1, 2, 3) if is_complete(source, n) and not _changed(job, source, n) and not run.step(n).path.exists()]
    if not taken and not any(is_complete(run, n) for n in (1, 2, 3)):
        raise ToolkitError(
            f"nothing of run `{source.name}` can be taken over",
            why="no step is complete there with this job's settings",
            hint="start without --from",
        )
    return taken


def take_over(source: RunDir, run: RunDir, steps: Sequence[int]) -> None:
    """Complete steps of `source` become steps of `run`, as links, with their last events."""
    if steps and source.tokenizer.is_dir() and not run.tokenizer.exists():
        _take_folder(source.tokenizer, run.tokenizer)
    for step in steps:
        _take_folder(source.step(step).path, run.step(step).path)
        ended = _read_json(run.step(step).complete)
        complete_step(run, step, ended | {"model": str(run.step(step).model)})
    write = EventWriter(run.events)
    for line in effective(read_events(source.events)[0]):
        if line.get("step") in steps and line["kind"] in ("end", "sample"):
            event = parse(line)
            write(replace(event, model=str(run.step(event.step).model)) if isinstance(event, End) else event)


def _take_folder(source: Path, target: Path) -> None:
    """Whole or not at all: what stops in the middle of a copy leaves no `target`."""
    partial = target.with_name(f"{target.name}.partial")
    for stale in (partial, target):
        shutil.rmtree(stale, ignore_errors=True)
    shutil.copytree(source, partial, copy_function=_link_or_copy)
    partial.replace(target)


def _link_or_copy(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system
        shutil.copy2(source, target)
