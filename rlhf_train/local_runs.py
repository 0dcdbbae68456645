"""The verbs that look at the runs of this machine: `rlhf-train status` and `rlhf-train logs`."""

from __future__ import annotations

import argparse
import math
import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from jobs.errors import ExitCode, ToolkitError
from jobs.events import RawEvent, parsed, time_of
from jobs.formatting import duration, encodable, progress_text, visible
from jobs.run_dir import RunDir
from jobs.views import console
from jobs.views.panel import Live
from jobs.views.plain import Plain
from jobs.views.report.history import EventReader, RunHistory
from jobs.views.report.run_page import state_of_folder

POLL_S = 0.5  # between two looks at a run that is followed
NO_EVENT = "no event yet"
UNKNOWN = "-"
TAIL_BYTES = 2**18  # enough for the last events, however long the run


def runs_in(folder: Path) -> list[RunDir]:
    """Return the runs of a folder, the one that was written to last at the end.

    A run that was fetched from a box lies one level deeper, in BOX/RUN.
    """
    here = _folders_in(folder)
    fetched = [run for path in here if not _has_events(RunDir(path)) for run in _folders_in(path)]
    found = [RunDir(path) for path in (*here, *fetched)]
    return sorted((run for run in found if _has_events(run)), key=_written_at_s)


def _has_events(run: RunDir) -> bool:
    """Tell whether a folder is that of a run; of one that may not be looked into, say so."""
    try:
        return run.events.exists()
    except OSError:
        return True


def _written_at_s(run: RunDir) -> float:
    try:
        return run.events.stat().st_mtime
    except OSError:
        return 0.0


def _folders_in(folder: Path) -> list[Path]:
    try:
        return [path for path in folder.iterdir() if path.is_dir()]
    except OSError:  # none, or somebody else's
        return []


def name_in(folder: Path, run: RunDir) -> str:
    """Return the run's name: of one in `folder` its path from there, as in BOX/RUN."""
    return str(run.path.relative_to(folder)) if run.path.is_relative_to(folder) else run.name


def newest_of(runs: Sequence[RunDir], folder: Path) -> RunDir:
    """Return the run that was written to last; raise ToolkitError if there is none."""
    if not runs:
        raise ToolkitError(f"there is no run in {folder}", hint="`rlhf-train --job demo` makes one; see --output-dir")
    return runs[-1]


def run_at(name: str, folder: Path) -> RunDir:
    """Return a run by its name, BOX/RUN of one that was fetched, or its folder, with a slash.

    Raises ToolkitError if it is none.
    """
    places = [RunDir(Path(name)), RunDir(folder / name)] if "/" in name else [RunDir(folder / name)]
    run = next((each for each in places if _has_events(each)), places[0])
    if not _has_events(run):
        known = ", ".join(name_in(folder, run) for run in runs_in(folder)) or "none"
        raise ToolkitError(f"there is no run `{name}`", why=f"no {run.events}", hint=f"runs of {folder}: {known}")
    return run


def last_events(run: RunDir) -> list[RawEvent]:
    """Return the last whole events of a run."""
    with run.events.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(size - TAIL_BYTES, 0))
        lines = file.read().split(b"\n")
    # The first line may be torn, and what follows the last line break is.
    return [event for line in lines[bool(size > TAIL_BYTES) : -1] if (event := parsed(line)) is not None]


# --- status


def status(argv: Sequence[str], folder: Path) -> int:
    """Print a line for each run: its state, how far it is, and when it was last written to.

    folder: where run folders are, unless the words say otherwise.
    """
    p = argparse.ArgumentParser("rlhf-train status", description="List the runs of this machine.", allow_abbrev=False)
    p.add_argument("runs", nargs="*", metavar="RUN", help="runs by name, BOX/RUN or folder (default: all)")
    p.add_argument("--output-dir", type=Path, metavar="DIR", help="where run folders are kept (default: runs)")
    args = p.parse_args(argv)
    folder = args.output_dir or folder
    runs = [run_at(name, folder) for name in args.runs] or runs_in(folder)
    newest_of(runs, folder)
    screen = console.console_on(sys.stdout)
    for line in _table([_row(run, name_in(folder, run)) for run in runs]):
        screen.print(encodable(visible(line), screen.encoding))
    return ExitCode.OK


def _row(run: RunDir, name: str) -> tuple[str, ...]:
    try:
        events = last_events(run)
    except OSError:  # somebody else's, or no file: the other runs are shown all the same
        return name, "unreadable", "", UNKNOWN
    history = RunHistory(run.name)
    for event in events:
        history.feed(event)
    at_s = time_of(events[-1]) if events else math.nan
    ago = f"{duration(time.time() - at_s)} ago" if math.isfinite(at_s) else UNKNOWN if events else NO_EVENT
    state = state_of_folder(run, history)
    # Of a run that was fetched while it trained, its box knows the state.
    shown = "unknown" if state == "lost" and "/" in name else state
    return name, shown, progress_text(events[-1] if events else None), ago


def _table(rows: Sequence[tuple[str, ...]]) -> list[str]:
    table = [("run", "state", "progress", "last event"), *rows]
    widths = [max(len(row[column]) for row in table) for column in range(len(table[0]))]
    return ["  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in table]


# --- logs


def logs(argv: Sequence[str], folder: Path) -> int:
    """Show a run from its events, as the terminal that trains it does. folder: as for `status`."""
    p = argparse.ArgumentParser("rlhf-train logs", description="Show the events of a run.", allow_abbrev=False)
    p.add_argument("run", nargs="?", metavar="RUN", help="a run's name, BOX/RUN or folder (default: the newest)")
    p.add_argument("-f", "--follow", action="store_true", help="go on until the run ends; Ctrl-C leaves it alone")
    p.add_argument("--tail", type=int, metavar="N", help="only the last N events")
    p.add_argument("--output-dir", type=Path, metavar="DIR", help="where run folders are kept (default: runs)")
    args = p.parse_args(argv)
    if args.tail is not None and args.tail < 0:
        raise ToolkitError("--tail takes a number of events", hint="e.g. --tail 20")
    folder = args.output_dir or folder
    run = run_at(args.run, folder) if args.run else newest_of(runs_in(folder), folder)
    reader, history = EventReader(run.events), RunHistory(run.name)
    old = list(reader.new_events())
    for event in old:
        history.feed(event)
    if not old:
        print(NO_EVENT, file=sys.stderr)
    if not args.follow:
        with Plain(console.console_on(sys.stdout)) as lines:
            _feed(lines, old, args.tail)
        return ExitCode.OK
    with console.view(sys.stdout) as view:
        _feed(view, old, args.tail)
        for event in _until_it_ends(run, history, reader):
            view.feed(event)
    return ExitCode.OK


def _feed(view: Plain | Live, events: Sequence[RawEvent], tail: int | None) -> None:
    """Show events that were written before; of all but the last `tail`, only take note."""
    hidden = 0 if tail is None else max(len(events) - tail, 0)
    for place, event in enumerate(events):
        if isinstance(view, Live):
            view.feed(event, at=time.monotonic() - (time.time() - time_of(event)), quiet=place < hidden)
        else:
            view.feed(event, quiet=place < hidden)


def _until_it_ends(run: RunDir, history: RunHistory, reader: EventReader) -> Iterator[RawEvent]:
    """Yield the events that are written from now on, until nobody trains in the folder."""
    while True:
        is_running = state_of_folder(run, history) == "running"  # looked at first: the last events come before the end
        for event in reader.new_events():
            history.feed(event)
            yield event
        if not is_running:
            return
        time.sleep(POLL_S)
