"""Completion decides which steps to do: it resumes, refuses changed fields, and redoes."""

from __future__ import annotations

import hashlib
import os
import secrets
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from jobs.errors import ToolkitError
from jobs.events import End, EventWriter, effective, parse, read_events
from jobs.run_dir import FORMAT, RunDir
from jobs.spec import Job, difference
from jobs.steps import STEPS
from rlhf_train.disk import read_json, write_json, write_line


def needed_by(job: Job, step: int) -> list[int]:
    """List the steps whose model `step` starts from. A model of one's own needs no step."""
    return [n for n in job.starts_from(step) if n not in job.own_models]


def own_steps(models: Mapping[int, str], wanted: Sequence[int], runs: Sequence[RunDir]) -> list[int]:
    """Return the steps whose places `models` take: those not done in this call, nor before.

    models: of --actor-model and --reward-model, by step. A step that one of `runs` began with the
    same model is named again, as in DeepSpeed-Chat, where each call has both flags.
    """
    fields = {1: "actor.model", 2: "critic.model"}
    return [
        step
        for step, model in models.items()
        if step not in wanted
        and any(step < other for other in wanted)
        and model != "actor"
        and not any((read_json(run.step(step).fields) or {}).get(fields[step]) == model for run in runs)
    ]


def is_too_new(run: RunDir) -> bool:
    """Return whether a newer version has written this run folder, in a format unknown here."""
    found = read_json(run.format)
    return found is not None and found not in range(1, FORMAT + 1)


def _begun(run: RunDir) -> list[int]:
    return [step for step in STEPS if run.step(step).path.exists()]


def _too_new(run: RunDir, hint: str) -> ToolkitError:
    return ToolkitError(
        f"run `{run.name}` was written by a newer version",
        why=f"{run.format} says format {read_json(run.format)}; this version knows formats up to {FORMAT}",
        hint=hint,
    )


# Fields that older runs did not have, with the value that they stand for there.
UNKNOWN_TO_OLDER = {
    "sft.eps": 1e-8,
    "reward.eps": 1e-8,
    "ppo.eps": 1e-8,
    "ppo.critic_warmup_updates": 0,
    "ppo.advantage": "gae",
    "ppo.samples_per_prompt": 1,
    "ppo.loss_mean": "token",
}


def _half_done_by_format_1(run: RunDir, steps: Sequence[int]) -> list[int]:
    """List those of `steps` that an older version began, and that would end otherwise here."""
    if run.format.exists() and read_json(run.format) != 1:
        return []
    return [step for step in steps if not is_complete(run, step) and update_to_resume_from(run, step)]


def begin_run(run: RunDir) -> None:
    """Give the run its id and format number, and remove what a newer version has left.

    All of that is done again: see `steps_to_do`. A run keeps its id as long as its folder lives,
    also with `--redo`.
    """
    if is_too_new(run):
        for folder in (*(run.step(step).path for step in _begun(run)), run.tokenizer):
            shutil.rmtree(folder, ignore_errors=True)
        for file in (run.fitted, run.redo):
            file.unlink(missing_ok=True)
    if not run.id.exists():
        write_line(run.id, secrets.token_hex(8))
    if read_json(run.format) != FORMAT:
        write_json(run.format, FORMAT)


def is_complete(run: RunDir, step: int) -> bool:
    return read_json(run.step(step).complete) is not None and run.step(step).model.is_dir()


def steps_to_do(job: Job, run: RunDir, wanted: Sequence[int], *, redo: bool, taken: Sequence[int] = ()) -> list[int]:
    """Return the `wanted` steps that are not complete.

    redo: all wanted steps, or those that were left when an earlier call of the same was stopped.
    taken: steps that will be taken over from another run first, and so be complete.
    Raises ToolkitError if the steps cannot be done.
    """

    def complete(step: int) -> bool:
        return step in taken or is_complete(run, step)

    is_new = is_too_new(run)
    if is_new and not (redo and set(_begun(run)) <= {*wanted}):
        steps = ",".join(map(str, sorted({*_begun(run), *wanted})))
        ways = f"`--run NEW` for a run of its own;\nor `--redo --step {steps}` to do all of it again here"
        raise _too_new(run, f"use that version; or {ways}")
    left = read_json(run.redo) if redo and not is_new else None
    to_redo = left if left is not None and set(left) <= {*wanted} else list(wanted)
    todo = [step for step in wanted if not complete(step) or (redo and step in to_redo)]
    for step in todo:
        if not job.data.split[step - 1]:
            shares = ", ".join(f"{share:g}" for share in job.data.split)
            raise ToolkitError(
                f"step {step} ({STEPS[step].title}) has no data",
                why=f"data.split is {shares}",
                hint="give it a share, or leave the step out",
            )
    half_done = [] if is_new else [n for n in _half_done_by_format_1(run, todo) if not redo]
    if half_done:
        steps = ",".join(map(str, half_done))
        raise ToolkitError(
            f"run `{run.name}` began step {half_done[0]} with an older version, which learned otherwise",
            why=f"{run.format} is of format 1: rows of steps 1 and 2 came in another order, "
            "and step 3 kept less of a rollout",
            hint=f"resume with that version; or `--redo --step {steps}` to do it again here;\n"
            "or `--run NEW` for a run of its own",
        )
    changed = {
        step: lines
        for step in sorted({*wanted, *(n for s in todo for n in needed_by(job, s))})
        if not is_new
        and (lines := _changed(job, run, step, as_input=step not in wanted))
        and not (redo and step in todo)
    }
    if changed:
        step, lines = next(iter(changed.items()))
        source = f" --from {run.name}" if any(is_complete(run, n) for n in (1, 2, 3)) else ""
        raise ToolkitError(
            f"run `{run.name}` did step {step} with other settings",
            why="\n".join(lines),
            hint=f"resume with the old settings; or `--run NEW{source}` for a run of its own;\n"
            f"or `--redo --step {','.join(map(str, changed))}` to do it again here",
        )
    for step in todo:
        missing = [n for n in needed_by(job, step) if n not in todo and not complete(n)]
        if missing:
            names = " and ".join(f"step {n} ({STEPS[n].title})" for n in missing)
            raise ToolkitError(
                f"step {step} ({STEPS[step].title}) needs the model of {names}",
                why="\n".join(f"{run.step(n).model} is not there" for n in missing),
                hint=f"run `--step {' '.join(map(str, [*missing, step]))}` (or `--step all`),\n"
                "or take them over from another run with `--run NEW --from RUN`,\n"
                "or start from models of your own: actor.sft_model, critic.reward_model",
            )
    return todo


def _changed(job: Job, run: RunDir, step: int, *, as_input: bool = False) -> list[str]:
    """List the fields that differ from those that the step was started with.

    as_input: only the step's result is wanted. It counts too if the job, which now names a model of
    one's own for a step before, had none then.
    """
    started_with = read_json(run.step(step).fields)
    if started_with is None:
        return [f"{run.step(step).fields} cannot be read"] if is_complete(run, step) else []
    if as_input and not _difference(started_with, job.without_own_models().fields_of_step(step)):
        return []
    return _difference(started_with, job.fields_of_step(step))


def _difference(started_with: dict[str, Any], fields: dict[str, Any]) -> list[str]:
    known = {name: value for name, value in UNKNOWN_TO_OLDER.items() if name in fields}
    return difference(known | started_with, fields)


def begin_step(job: Job, run: RunDir, step: int) -> bool:
    """Return whether `step` was stopped and resumes; else prepare its folder for a new start.

    A new start removes an earlier result and records the fields that the step now depends on.
    """
    folder = run.step(step)
    if not is_complete(run, step) and read_json(folder.fields) is not None and not _changed(job, run, step):
        return True
    shutil.rmtree(folder.path, ignore_errors=True)
    if step == 1:  # the tokenizer is trained on the job's rows, which may have changed
        shutil.rmtree(run.tokenizer, ignore_errors=True)
    folder.path.mkdir(parents=True)
    write_json(folder.fields, job.fields_of_step(step))
    return False


def complete_step(run: RunDir, step: int, end: dict[str, Any]) -> None:
    """Mark `step` as complete, since its model is saved, and remove its checkpoints."""
    left = [n for n in left_to_redo(run) if n != step]
    # First: if it is killed between the two, a redo finds the step not complete, and completes it.
    if left:
        write_json(run.redo, left)
    write_json(run.step(step).complete, end)
    if not left:
        run.redo.unlink(missing_ok=True)
    shutil.rmtree(run.step(step).checkpoints, ignore_errors=True)


def leftovers(run: RunDir) -> list[Path]:
    """List what a process that was killed at the wrong moment has left in complete steps."""
    steps = [run.step(step) for step in (1, 2, 3) if is_complete(run, step)]
    return [folder for step in steps for folder in (step.checkpoints, *step.path.glob("*.partial")) if folder.exists()]


def inputs_of(job: Job, run: RunDir, step: int) -> dict[str, str]:
    """Return a hash of each step's result that `step` starts from, by step.

    A step does not resume from a checkpoint that was made from other results.
    """
    return {str(n): hashlib.sha256(run.step(n).complete.read_bytes()).hexdigest() for n in needed_by(job, step)}


def update_to_resume_from(run: RunDir, step: int) -> int:
    """Return the update of the step's newest checkpoint, without checks; 0: start from scratch."""
    names = [
        folder.name.removeprefix("update-")
        for folder in run.step(step).checkpoints.glob("update-*")
        if (folder / "complete.json").exists()
    ]
    return max((int(name) for name in names if name.isdecimal()), default=0)


def begin_redo(run: RunDir, steps: Sequence[int]) -> None:
    """Record which steps the same command still has to do if it is called again."""
    run.redo.parent.mkdir(parents=True, exist_ok=True)
    write_json(run.redo, list(steps))


def left_to_redo(run: RunDir) -> list[int]:
    return read_json(run.redo) or []


def steps_to_take_over(job: Job, source: RunDir, run: RunDir) -> list[int]:
    """List the complete steps of `source` with this job's settings that `run` has not begun.

    Raises ToolkitError if there is nothing to take over.
    """
    if not source.path.is_dir():
        raise ToolkitError(
            f"there is no run `{source.name}`",
            why=f"{source.path} does not exist",
            hint="`--from` names a run folder next to this one",
        )
    if is_too_new(source):
        raise _too_new(source, "use that version; or start without --from")
    taken = [
        n
        for n in (1, 2, 3)
        if n not in job.own_models
        and is_complete(source, n)
        and not _changed(job, source, n, as_input=n == 2)
        and not run.step(n).path.exists()
    ]
    if not taken and not any(is_complete(run, n) for n in (1, 2, 3)):
        raise ToolkitError(
            f"nothing of run `{source.name}` can be taken over",
            why="no step is complete there with this job's settings",
            hint="start without --from",
        )
    return taken


def take_over(source: RunDir, run: RunDir, steps: Sequence[int]) -> None:
    """Make complete steps of `source` steps of `run`, as hard links, with their last events."""
    if steps and source.tokenizer.is_dir() and not run.tokenizer.exists():
        _take_folder(source.tokenizer, run.tokenizer)
    for step in steps:
        _take_folder(source.step(step).path, run.step(step).path)
        ended = read_json(run.step(step).complete)
        complete_step(run, step, ended | {"model": str(run.step(step).model)})
    write = EventWriter(run.events)
    for line in effective(read_events(source.events)[0]):
        if line.get("step") in steps and line["kind"] in ("end", "sample"):
            with suppress(TypeError):  # a damaged line lacks fields
                event = parse(line)
                write(replace(event, model=str(run.step(event.step).model)) if isinstance(event, End) else event)


def _take_folder(source: Path, target: Path) -> None:
    """Copy a folder whole or not at all: a copy that is cut short leaves no `target`."""
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
