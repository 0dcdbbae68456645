"""What of a box's results is at home at this moment, whatever was fetched once.

A fetched folder may have been removed, changed or moved since, so the files themselves are looked
at. One whose size and time are unchanged is not hashed again.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from remote.results.local_run import LocalRun
from remote.results.manifest import TEXTS, models_digest
from remote.results.run_contents import FetchedRun, Results, Run


def at_home(results: Results, copies: Mapping[str, Sequence[FetchedRun]]) -> dict[str, FetchedRun]:
    """Return what is at home now of each run of a box.

    copies: what was fetched from the box, by run: one for each folder.
    """
    return {run.name: _merged(run, map(still_there, copies.get(run.name, ()))) for run in results.runs}


def still_there(fetched: FetchedRun) -> FetchedRun:
    """Return the part of what was fetched that still lies in its folder, unchanged."""
    here = LocalRun(Path(fetched.folder))
    if fetched.id and here.id != fetched.id:
        return replace(fetched, events_bytes=0, steps={}, checkpoints={})
    return replace(
        fetched,
        events_bytes=_events_bytes(here, fetched.events_bytes),
        steps={step: each for step, each in fetched.steps.items() if _digest(here, step) == each.models},
        checkpoints={
            step: each
            for step, each in fetched.checkpoints.items()
            if _has_checkpoint(here, f"step{step}/checkpoints/update-{each.update}", each.complete)
        },
    )


def _events_bytes(here: LocalRun, fetched: int) -> int:
    """Return how many bytes of events are here; 0 also if the log or the job file was changed."""
    events = here.target / "events.jsonl"
    if not events.is_file() or any(here.was_changed(name) for name in TEXTS):
        return 0
    return min(fetched, events.stat().st_size)


def _digest(here: LocalRun, step: int) -> str:
    files = [path for path in here.names_of_step(step) if (here.target / path).is_file()]
    return models_digest((path, (here.target / path).stat().st_size, here.sha256(path)) for path in files)


def _has_checkpoint(here: LocalRun, folder: str, complete: str) -> bool:
    if here.sha256(f"{folder}/complete.json") != complete:
        return False
    files = json.loads((here.target / folder / "complete.json").read_text(encoding="utf-8"))["files"]
    return all(here.sha256(f"{folder}/{name}") == mark["sha256"] for name, mark in files.items())


def _merged(run: Run, copies: Iterable[FetchedRun]) -> FetchedRun:
    """Join the copies of one run; a copy of another run of the same name does not count."""
    merged = FetchedRun(id=run.id)
    for copy in copies:
        if run.id and copy.id and run.id != copy.id:
            continue
        merged = replace(
            merged,
            folder=merged.folder or copy.folder,
            time=max(merged.time, copy.time),
            events_bytes=max(merged.events_bytes, copy.events_bytes),
            steps={
                **copy.steps,
                **merged.steps,
                **{
                    n: each
                    for n, each in copy.steps.items()
                    if n in run.steps and each.complete == run.steps[n].complete
                },
            },
            checkpoints={
                **copy.checkpoints,
                **merged.checkpoints,
                **{
                    n: each
                    for n, each in copy.checkpoints.items()
                    if n in run.checkpoints and each.complete == run.checkpoints[n].complete
                },
            },
        )
    return merged
