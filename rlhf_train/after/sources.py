"""Find the model that a word names: a run and its step, a folder, or a model of the hub."""

from __future__ import annotations

import re
import shlex
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from jobs.errors import ToolkitError
from jobs.events import effective, read_events
from jobs.run_dir import RunDir
from jobs.spec import Job, load_job
from jobs.steps import STEPS
from rlhf_train.completion import is_complete
from rlhf_train.data import hub

ANSWERING = (3, 1)  # the steps whose models answer, the newer first; step 2 makes the reward model
STEP = re.compile(r"step([0-9]+)")


@dataclass(frozen=True)
class Source:
    """A model to talk to."""

    title: str
    model: str  # a folder, or a name of the hub
    run: RunDir | None = None  # that it belongs to


def find_source(word: str | None, runs: Path) -> Source:
    """Return the model that a word names; None: of the run whose model is the newest.

    Raises ToolkitError if there is no such run, folder or model.
    """
    if word is None:
        return newest_of(_newest_run(runs))
    if not word.strip():  # else it would be the working directory
        raise ToolkitError("the model has no name", hint="leave the word out for the newest model of your runs")
    for run in (RunDir(runs / word), RunDir(Path(word).expanduser())):
        if _is_run(run):
            return newest_of(run)
    folder = Path(word).expanduser()
    if hub.local(word) or word.count("/") == 1:
        return Source(word, word, _run_around(folder))
    if hub.folder_here(word) is not None:  # a name without owner, such as gpt2, that is in the cache
        return Source(word, word)
    names = ", ".join(str(run.path.relative_to(runs)) for run in _runs(runs)[:10]) or "none"
    raise ToolkitError(
        f"there is no run `{word}`",
        why=f"the runs in {runs}: {names}",
        hint="name a run, a model's folder, or a model of the hub with its owner, such as facebook/opt-350m",
    )


def find_sources(words: str, base: Source | None, runs: Path) -> list[Source]:
    """Return the two models of `--compare A,B`. A step (step1) is one of the run of `base`."""
    names = _names(words)
    if len(names) != 2:
        raise ToolkitError(f"two models can be compared, not {len(names)}", hint="e.g. --compare step1,step3")
    return [_step_of(name, base) if STEP.fullmatch(name) else find_source(name, runs) for name in names]


def names_a_step(words: str) -> bool:
    """Tell whether one of `A,B` is a step, which needs a run; a path may have `step3` within it."""
    return any(STEP.fullmatch(name) for name in _names(words))


def _names(words: str) -> list[str]:
    return [word.strip() for word in words.split(",") if word.strip()]


def newest_of(run: RunDir) -> Source:
    """Return the run's PPO model, else its SFT model.

    A step that still trains may have its best weights so far.
    """
    for step in ANSWERING:
        if source := _of_step(run, step):
            return source
    raise ToolkitError(
        f"run `{run.name}` has no model to talk to yet",
        why=_progress(run),
        hint=f"wait until step 1 is complete; `rlhf-train report {shlex.quote(str(run.path))}` says how far it is",
    )


def _step_of(word: str, base: Source | None) -> Source:
    step = int(word.removeprefix("step"))
    if base is None or base.run is None:
        raise ToolkitError(f"`{word}` of which run?", hint=f"rlhf-train chat RUN --compare {word},step3")
    if step not in ANSWERING:
        title = f"step {step} ({STEPS[step].title})" if step in STEPS else f"step {step}"
        raise ToolkitError(f"{title} makes no model that answers", hint="name step1 or step3")
    if source := _of_step(base.run, step):
        return source
    what = f"step {step} ({STEPS[step].title}) of run `{base.run.name}` has no model yet"
    raise ToolkitError(what, why=_progress(base.run), hint="wait for it, or compare other models")


def _of_step(run: RunDir, step: int) -> Source | None:
    title = f"{run.name}, step {step} ({STEPS[step].title})"
    if is_complete(run, step):
        return Source(title, str(run.step(step).model), run)
    if (run.step(step).best / "config.json").is_file():
        return Source(f"{title}, the best so far", str(run.step(step).best), run)
    job = job_of(run)
    if job is not None and step in job.own_models:
        return Source(f"{title}, taken from {job.own_models[step]}", job.own_models[step], run)
    return None


def job_of(run: RunDir) -> Job | None:
    with suppress(ToolkitError, OSError):
        return load_job(str(run.job_file), [])
    return None


def _progress(run: RunDir) -> str:
    """Say how far the run is, by its last events."""
    step, update, updates = 0, 0, {}
    for event in effective(read_events(run.events)[0]):
        if event["kind"] == "plan":
            updates[event.get("step")] = event.get("updates")
        if event["kind"] in ("plan", "metrics"):
            step, update = event.get("step", 0), event.get("update", 0)
    if step not in STEPS:
        return "none of its steps has begun"
    return f"step {step} ({STEPS[step].title}) is at update {update} of {updates.get(step, '?')}"


def _newest_run(runs: Path) -> RunDir:
    found = [run for run in _runs(runs) if any(_of_step(run, step) for step in ANSWERING)]
    if found:
        return max(found, key=_changed_at)
    raise ToolkitError(
        "there is no model to talk to",
        why=f"no run in {runs} has one yet",
        hint="`make demo` makes one in minutes; or name a folder or a model of the hub: "
        "rlhf-train chat facebook/opt-350m",
    )


def _changed_at(run: RunDir) -> float:
    files = [run.step(step).complete for step in ANSWERING] + [run.events]
    return max((file.stat().st_mtime for file in files if file.exists()), default=0.0)


def _runs(runs: Path) -> list[RunDir]:
    """List the runs of this machine and those fetched from a box, which lie in BOX/RUN."""
    children = [RunDir(path) for path in _folders(runs)]
    fetched = [RunDir(path) for child in children if not _is_run(child) for path in _folders(child.path)]
    return [run for run in [*children, *fetched] if _is_run(run)]


def _folders(folder: Path) -> list[Path]:
    with suppress(OSError):  # no folder, or not readable
        return sorted(path for path in folder.iterdir() if path.is_dir())
    return []


def _is_run(run: RunDir) -> bool:
    return run.events.is_file() or run.job_file.is_file()


def _run_around(folder: Path) -> RunDir | None:
    """Return the run that a folder such as runs/demo/step3/model belongs to."""
    parents = folder.absolute().parents
    if len(parents) > 1 and STEP.fullmatch(parents[0].name) and _is_run(RunDir(parents[1])):
        return RunDir(parents[1])
    return None
