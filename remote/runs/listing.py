"""The runs of a box, as `supervisor.sh list` reports them, for ps, status and the stop card."""

from __future__ import annotations

import math
import shutil
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.cells import cell_len

from env.settings import Provider
from jobs.events import RawEvent, parsed, time_of
from jobs.formatting import duration, fold, money, one_line, own_models, progress_text, size
from jobs.state import State, state_of
from jobs.steps import STEPS
from jobs.views.gpus import GpuUsage, cards_text
from remote.runs.deployed import check, dispatch
from remote.runs.job_state import JobState
from remote.ssh.connection import BoxConnection


@dataclass(frozen=True)
class RemoteRun:
    """One run folder of a box."""

    name: str
    job: JobState  # what the supervisor knows
    last: RawEvent | None = None
    size_bytes: int | None = None
    complete: tuple[int, ...] = ()  # steps whose model is whole
    checkpoint: tuple[int, int] | None = None  # step and update of the newest complete one

    @property
    def state(self) -> State:
        return state_of(self.last, self.job)

    @property
    def is_orphan(self) -> bool:
        """Tell whether the job runs without its supervisor, so its exit code will be lost."""
        return self.job.training and not self.job.alive and self.job.exit is None

    def seconds(self, now: float) -> float | None:
        """Return how long the job has run, by the box's clock; None if that is not known."""
        started = self.job.started
        if started is None:
            return None
        running = self.job.alive or self.job.training
        ended = now if running else self.job.ended
        return None if ended is None else max(ended - started, 0.0)

    def progress(self) -> str:
        """Return the run's progress in words: `step 3, update 12/400`."""
        return progress_text(self.last)


@dataclass(frozen=True)
class Listing:
    runs: tuple[RemoteRun, ...] = ()
    cards: tuple[GpuUsage, ...] = ()
    slot: str = ""  # the run that holds the box
    disk_free_bytes: int | None = None
    clock: float | None = None  # the box's

    def run(self, name: str) -> RemoteRun | None:
        return next((run for run in self.runs if run.name == name), None)

    @property
    def running(self) -> RemoteRun | None:
        """The run that is being trained; on this box, if several boxes share the folder."""
        running = [run for run in self.runs if run.job.alive or run.job.training]
        return min(running, key=lambda run: bool(run.job.host), default=None)

    def newest(self) -> RemoteRun | None:
        """Return the running run, else the one that was started last."""
        return self.running or max(self.runs, key=lambda run: (run.job.started or -math.inf, run.name), default=None)


def read_listing(connection: BoxConnection, providers: Mapping[str, Provider]) -> Listing:
    """Ask the box for its runs. Raises ToolkitError: nothing is deployed there."""
    answer = connection.query(dispatch(connection.box, providers, "list"), check=False)
    check(connection.box, answer)
    return parse(answer.out)


def parse(text: str) -> Listing:
    """Parse the lines of `supervisor.sh list`; a torn or unknown line is ignored."""
    runs: dict[str, dict[str, str]] = {}
    last: dict[str, RawEvent] = {}
    cards, slot, disk, clock = [], "", None, None
    for line in text.splitlines():
        word, _, rest = line.partition(" ")
        words = rest.split()
        if word == "run" and words:
            runs[words[0]] = dict(each.split("=", 1) for each in words[1:] if "=" in each)
        elif word == "last" and words:
            event = parsed(rest.partition(" ")[2].encode())
            if event is not None:
                last[words[0]] = event
        elif word == "gpu" and len(words) >= 4 and words[0].isdigit():
            cards.append(GpuUsage(int(words[0]), *(_number(each) for each in words[1:4])))
        elif word == "slot" and words:
            slot = words[0]
        elif word == "disk" and words and words[0].isdigit():
            disk = int(words[0]) * 1024
        elif word == "beat" and words:
            clock = _number(words[0])
    remote_runs = tuple(_run(name, facts, last.get(name)) for name, facts in sorted(runs.items()))
    clock = clock if clock is not None and math.isfinite(clock) else None
    return Listing(remote_runs, tuple(cards), slot, disk, clock)


def _run(name: str, facts: dict[str, str], last: RawEvent | None) -> RemoteRun:
    saved = [each.partition(":") for each in facts.get("checkpoint", "").split(",")]  # STEP:UPDATE[,STEP:UPDATE...]
    checkpoints = [(int(step), int(update)) for step, _, update in saved if step.isdigit() and update.isdigit()]
    return RemoteRun(
        name,
        JobState(facts),
        last,
        int(facts["size_kb"]) * 1024 if facts.get("size_kb", "").isdigit() else None,
        tuple(int(each) for each in facts.get("complete", "").split(",") if each.isdigit()),
        max(checkpoints, default=None),
    )


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


def spent(run: RemoteRun, now: float, price_per_hour: float | None) -> float | None:
    seconds = run.seconds(now)
    return None if seconds is None or price_per_hour is None else price_per_hour * seconds / 3600


def as_json(host: str, listing: Listing, now: float, price_per_hour: float | None, currency: str) -> dict[str, Any]:
    return {
        "host": host,
        "running": listing.running.name if listing.running else None,
        "disk_free_bytes": listing.disk_free_bytes,
        "gpus": [
            {"index": card.index} | {name: _finite(getattr(card, name)) for name in ("used_mib", "total_mib", "use")}
            for card in listing.cards
        ],
        "runs": [
            {
                "name": run.name,
                "state": run.state,
                "exit": run.job.exit,
                "supervised": not run.is_orphan,
                "host": run.job.host or None,
                "seconds": run.seconds(now),
                "spent": spent(run, now, price_per_hour),
                "currency": currency or None,
                "steps_complete": list(run.complete),
                "checkpoint": {"step": run.checkpoint[0], "update": run.checkpoint[1]} if run.checkpoint else None,
                "size_bytes": run.size_bytes,
                "last_event": run.last,
            }
            for run in listing.runs
        ],
    }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


LONGEST_WORD = 40  # cells; a longer one, as a path may be, is broken
HEAD = ("box", "run", "state", "now at", "steps done", "time", "spent", "size")


def rows(host: str, listing: Listing, now: float, price_per_hour: float | None, currency: str) -> list[tuple[str, ...]]:
    return [
        (
            host,
            run.name,
            run.state + _remark(run),
            run.progress(),
            ",".join(map(str, run.complete)),
            duration(seconds) if (seconds := run.seconds(now)) is not None else "",
            money(paid, currency) if (paid := spent(run, now, price_per_hour)) is not None else "",
            size(run.size_bytes) if run.size_bytes is not None else "",
        )
        for run in listing.runs
    ]


def _remark(run: RemoteRun) -> str:
    if run.is_orphan:
        return ", unattended"
    if run.job.host and run.state in ("running", "queued", "lost"):
        return f" on {run.job.host}"
    return f" ({run.job.exit})" if run.state == "failed" and run.job.exit is not None else ""


GAP = 2  # between columns
UNBROKEN = ("box", "run")  # columns whose words can be copied whole


def columns(table: Sequence[Sequence[str]], width: int | None = None) -> Iterator[str]:
    """Lay out a table in columns, and leave out columns that are empty below their head.

    width: of the screen, 80 where there is none. What is wider is folded within its column, at
    spaces; a box or a run whose name is too long for that gets a line of its own.
    """
    width = width or shutil.get_terminal_size((80, 24)).columns
    head, *body = table
    kept = [index for index in range(len(head)) if not body or any(row[index] for row in body)]
    long = {
        row[index] for row in body for index in kept if head[index] in UNBROKEN and cell_len(row[index]) > width // 3
    }
    widths = {index: max(cell_len(row[index]) for row in table if row[index] not in long) for index in kept}
    while sum(widths.values()) + GAP * (len(kept) - 1) > width:
        foldable = [index for index in kept if widths[index] > _narrowest(table, index, long)]
        if not foldable:
            break
        widths[max(foldable, key=widths.__getitem__)] -= 1
    for row in table:
        alone = [row[index] for index in kept if row[index] in long]
        if alone:
            yield "  ".join(alone)
        cells = {index: [""] if row[index] in long else _folded(row[index], widths[index]) for index in kept}
        for number in range(max(map(len, cells.values()))):
            line = {index: [*cells[index], *[""] * number][number] for index in kept}
            padded = (text + " " * (widths[index] - cell_len(text)) for index, text in line.items())
            yield (" " * GAP).join(padded).rstrip()


def _narrowest(table: Sequence[Sequence[str]], index: int, long: Collection[str]) -> int:
    words = (word for row in table if row[index] not in long for word in row[index].split(" "))
    return max(min(max(map(cell_len, words)), LONGEST_WORD), 1)


def _folded(text: str, cells: int) -> list[str]:
    return [line for part in text.split("\n") for line in fold(part, max(cells, 1), len(part) + 1)]


def box_facts(listing: Listing) -> list[tuple[str, str]]:
    """Describe GPUs and disk; each line is a label and a text."""
    is_only = len(listing.cards) == 1
    rows = [("gpu" if is_only else f"gpu {card.index}", cards_text([card], 60)) for card in listing.cards]
    if listing.disk_free_bytes is not None:
        rows.append(("disk", f"{size(listing.disk_free_bytes)} free"))
    return rows


def card(run: RemoteRun, now: float, price_per_hour: float | None, currency: str) -> list[tuple[str, str]]:
    """Describe one run in full; each line is a label and a text."""
    exit_code = f", exit code {run.job.exit}" if run.job.exit is not None else ""
    facts = [("run", run.name), ("state", run.state + exit_code)]
    if run.job.host and run.job.exit is None:
        facts.append(("on", f"{run.job.host}, which shares this folder"))
    if run.is_orphan:
        unattended = (
            "the supervisor is gone; the job may still be running unattended: "
            "its events show its end, and `fab cancel` ends it"
        )
        facts.append(("", unattended))
    if run.progress():
        facts.append(("now at", run.progress()))
    if run.last is not None and math.isfinite(at := time_of(run.last)):
        facts.append(("last event", f"{run.last['kind']}, {duration(max(now - at, 0.0))} ago"))
    if (seconds := run.seconds(now)) is not None:
        facts.append(("time", duration(seconds)))
    if (paid := spent(run, now, price_per_hour)) is not None:
        facts.append(("spent", f"{money(paid, currency)} ({money(price_per_hour or 0.0, currency)}/h)"))
    steps_done = ", ".join(f"{step} ({STEPS[step].title})" for step in run.complete if step in STEPS)
    facts.append(("steps done", steps_done or "none"))
    if run.last is not None and (own := own_models(run.last)):
        facts.append(("started from", own))
    if run.checkpoint:
        facts.append(("checkpoint", f"step {run.checkpoint[0]}, update {run.checkpoint[1]}"))
    if run.size_bytes is not None:
        facts.append(("size", size(run.size_bytes)))
    if run.last is not None and run.last["kind"] == "error":
        facts += [("error", one_line(run.last.get("what"))), ("why", one_line(run.last.get("why") or ""))]
    return [(label, text) for label, text in facts if text]
