"""List the folders of weights that a run saved: the best, the last checkpoint, the models."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from jobs.events import RawEvent
from jobs.formatting import number
from jobs.run_dir import RunDir
from jobs.steps import STEPS, label_of, spec_of
from jobs.views.report.history import RunHistory


@dataclass(frozen=True)
class SavedWeights:
    """A folder of weights that a step saved. `is_here`: whether it was there at the last look."""

    step: int
    folder: str  # from the run's folder on
    what: str
    update: int
    size_bytes: int | None
    is_here: bool


def folders_here(run: RunDir) -> frozenset[str]:
    """Return the folders of weights that are whole on disk, from the run's folder on."""
    found = set()
    for number_ in STEPS:
        step = run.step(number_)
        found |= {each for each in (step.best, step.model, step.model_ema) if (each / "config.json").exists()}
        found |= {mark.parent for mark in step.checkpoints.glob("update-*/complete.json")}
    return frozenset(str(each.relative_to(run.path)) for each in found)


def saved_weights(history: RunHistory, here: frozenset[str]) -> list[SavedWeights]:
    """Return the newest folder of each kind that each step saved, the best first."""
    return [
        SavedWeights(
            step=step,
            folder=folder_of(event),
            what=what,
            update=int(event.get("update", 0)),
            size_bytes=event.get("size_bytes"),
            is_here=folder_of(event) in here,
        )
        for step, each in history.numbered_steps()
        for what, event in _newest(each.saved)
    ]


def folder_of(event: RawEvent) -> str:
    """Return the folder of a `checkpoint` event from the run's folder on, wherever that was."""
    parts = str(event.get("path", "")).split("/")
    step = f"step{event.get('step')}"
    start = len(parts) - 1 - parts[::-1].index(step) if step in parts else len(parts) - 1
    return "/".join(parts[start:])


def _newest(saved: Sequence[RawEvent]) -> Iterator[tuple[str, RawEvent]]:
    kinds = {_kind(event): event for event in saved}  # later ones replace
    for kind, what in (
        ("best", "the best so far, by {metric}"),
        ("checkpoint", "the last checkpoint, to resume from"),
        ("model", "the step's model"),
        ("model_ema", "the moving average of the step's model"),
    ):
        if event := kinds.get(kind):
            metric = str(event.get("metric"))
            value = number(event.get("value"), spec_of(metric))
            yield what.format(metric=f"{label_of(metric)} {value}"), event


def _kind(event: RawEvent) -> str:
    name = folder_of(event).rsplit("/", 1)[-1]
    return "checkpoint" if name.startswith("update-") else name
