"""The forms in which a watched run is shown: a panel, lines, JSON lines, or the raw log."""

from __future__ import annotations

import contextlib
import math
import re
import sys
import time
from codecs import getincrementaldecoder
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import datetime
from io import IncrementalNewlineDecoder
from types import TracebackType
from typing import TYPE_CHECKING, BinaryIO, Protocol, TextIO

from jobs.errors import ToolkitError
from jobs.events import RawEvent, parsed, time_of
from jobs.formatting import encodable, one_line, visible
from jobs.views import console
from jobs.views.gpus import GpuUsage
from jobs.views.panel import BoxView, Live
from jobs.views.plain import Plain
from remote.runs.frames import lines_of
from remote.runs.job_state import JobState, state_text

if TYPE_CHECKING:
    from typing_extensions import Self

SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


@dataclass(frozen=True)
class WatchedRun:
    """The run that is watched, as the user names it, and what its box costs."""

    host: str
    run: str
    price_per_hour: float | None = None
    currency: str = ""
    steps: tuple[int, ...] = ()  # what the job is to do; (): not known


def named(where: WatchedRun, job: JobState | None) -> WatchedRun:
    """Fill in the run's name from the job's state, if the user named none."""
    return replace(where, run=where.run or (job.words.get("run", "") if job else ""))


class View(Protocol):
    """One form of showing a run. `file`: which file of the run it shows."""

    file: str

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def data(self, data: bytes) -> None:
        """Take bytes of the file, in order; of the events, whole lines only."""

    def beat(self, epoch: float) -> None:
        """Take the time of the box's clock."""

    def job(self, job: JobState) -> None: ...

    def card(self, card: GpuUsage) -> None: ...

    def connection_lost(self, why: str, since: float) -> None:
        """Show that nothing comes from the box since a time of our clock.

        Called again if the reason changes.
        """

    def back(self) -> None: ...

    def note(self, text: str) -> None: ...


def note(text: str) -> None:
    screen = console.console_on(sys.stderr)
    screen.print(encodable(visible(text), screen.encoding))


def _away_text(why: str) -> str:
    return f"connection lost: {one_line(why)}; reconnecting"


class _Quiet:
    """A view that shows the file, and prints all else on standard error."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return

    def beat(self, epoch: float) -> None:
        return

    def job(self, job: JobState) -> None:
        return

    def card(self, card: GpuUsage) -> None:
        return

    def connection_lost(self, why: str, since: float) -> None:
        self.note(_away_text(why))

    def back(self) -> None:
        return

    def note(self, text: str) -> None:
        note(text)


class RawLog(_Quiet):
    """`--raw`: the bytes of train.log; on a terminal, its control characters are made visible."""

    def __init__(self, out: TextIO, file: str = "log") -> None:
        self._out, self.file = out, file
        utf8 = getincrementaldecoder("utf-8")("backslashreplace")
        self._decoder = IncrementalNewlineDecoder(utf8, translate=True)  # progress bars write a bare \r

    def data(self, data: bytes) -> None:
        if self._out.isatty():
            self._out.write(encodable(visible(self._decoder.decode(data)), self._out.encoding or "utf-8"))
            self._out.flush()
        else:
            _write(self._out.buffer, data)


class JsonLines(_Quiet):
    """`--json`: the event lines, byte for byte."""

    file = "events"

    def __init__(self, out: BinaryIO, since: Since | None = None) -> None:
        self._out, self._gate = out, Gate(since, holds=since is not None and since.is_relative)
        self._is_shown = True

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._show(self._gate.open())

    def data(self, data: bytes) -> None:
        self._show(self._gate.take(data))

    def beat(self, epoch: float) -> None:
        self._show(self._gate.beat(epoch))

    def _show(self, data: bytes) -> None:
        if self._gate.since is None:
            _write(self._out, data)
            return
        for line in lines_of(data):
            event = parsed(line)
            if event is not None:  # a damaged line has no time: it is shown if the line before it was
                self._is_shown = not self._gate.is_early(event)
            if self._is_shown:
                _write(self._out, line)


def _write(out: BinaryIO, data: bytes) -> None:
    if data:
        out.write(data)
        out.flush()


class Gate:
    """Tells which events are too early for `--since`, and holds lines back until that is known.

    Times are by the box's clock: `10m` is ten minutes before its `beat`.
    """

    def __init__(self, since: Since | None, *, holds: bool, wall: Callable[[], float] = time.time) -> None:
        self.since, self._wall = since, wall
        self._ahead_s = 0.0  # how far the box's clock is ahead of ours
        self._held: bytearray | None = bytearray() if holds else None
        self._first = -math.inf if since is None else since.first(wall())

    def viewer_time(self, epoch: float | None) -> float | None:
        """Convert a time of the box's clock to ours. A past event is never put into the future."""
        return None if epoch is None or not math.isfinite(epoch) else min(epoch - self._ahead_s, self._wall())

    def take(self, data: bytes) -> bytes:
        if self._held is None:
            return data
        self._held += data
        return b""

    def beat(self, epoch: float) -> bytes:
        self._ahead_s = epoch - self._wall()
        if self._held is not None and self.since is not None:
            self._first = self.since.first(epoch)
        return self.open()

    def open(self) -> bytes:
        data, self._held = bytes(self._held or b""), None
        return data

    def is_early(self, event: RawEvent) -> bool:
        return time_of(event) < self._first


class PanelView:
    """The live panel or plain lines: the views used on the box itself, fed over the connection."""

    file = "events"

    def __init__(self, view: Plain | Live, where: WatchedRun, since: Since | None = None) -> None:
        self._view, self._where = view, where
        self._gate = Gate(since, holds=isinstance(view, Live) or (since is not None and since.is_relative))
        self._box = BoxView(
            name=where.host, price_per_hour=where.price_per_hour, currency=where.currency, steps=where.steps
        )
        self._cards: dict[int, GpuUsage] = {}
        self._job: JobState | None = None
        self._first_event: float | None = None  # used if the box does not say when the job began
        self._is_worried = False

    def __enter__(self) -> Self:
        self._view.__enter__()
        self._show_box()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._show(self._gate.open())
        self._view.__exit__(kind, error, trace)

    def data(self, data: bytes) -> None:
        self._show(self._gate.take(data))

    def _show(self, data: bytes) -> None:
        for line in lines_of(data):
            event = parsed(line)
            if event is None:
                continue
            if self._first_event is None and math.isfinite(at := time_of(event)):
                self._first_event = at
            # An event that a view cannot take (text for a number) is skipped: the next ones matter
            # more.
            with contextlib.suppress(TypeError, ValueError, AttributeError):
                if isinstance(self._view, Live):
                    self._view.feed(event, at=self._gate.viewer_time(time_of(event)), quiet=self._gate.is_early(event))
                else:
                    self._view.feed(event, quiet=self._gate.is_early(event))

    def beat(self, epoch: float) -> None:
        self._show(self._gate.beat(epoch))
        self._set_times()
        self._show_box()

    def job(self, job: JobState) -> None:
        self._job = job
        text, is_good = state_text(job)
        self._where = named(self._where, job)
        self._box = replace(self._box, line=f"run {self._where.run}, {text}", is_good=is_good)
        self._set_times()
        self._show_box()
        if not isinstance(self._view, Live) and not is_good and not self._is_worried:
            self.note(f"run {self._where.run}: {text}")
        self._is_worried = not is_good

    def _set_times(self) -> None:
        """Set when the job began and ended, by our clock."""
        job = self._job or JobState({"alive": "1"})
        started = job.started or self._first_event
        ended = None if job.alive or job.training else job.ended
        self._box = replace(
            self._box, started_at=self._gate.viewer_time(started), ended_at=self._gate.viewer_time(ended)
        )

    def card(self, card: GpuUsage) -> None:
        self._cards[card.index] = card
        self._box = replace(self._box, cards=tuple(self._cards[index] for index in sorted(self._cards)))
        self._show_box()

    def connection_lost(self, why: str, since: float) -> None:
        if isinstance(self._view, Live):
            line = f"run {self._where.run}, connection lost"
            self._box = replace(self._box, line=line, away_at=since, away_why=one_line(why))
            self._show_box()
        else:
            self.note(_away_text(why))

    def back(self) -> None:
        text = state_text(self._job)[0] if self._job else "connected"
        self._box = replace(self._box, line=f"run {self._where.run}, {text}", away_at=None, away_why="")
        self._show_box()

    def note(self, text: str) -> None:
        if isinstance(self._view, Live):
            self._view.note(text)
        else:
            note(text)

    def _show_box(self) -> None:
        if isinstance(self._view, Live):
            self._view.feed_box(self._box)


@dataclass(frozen=True)
class Since:
    ago_s: float | None = None
    at: float | None = None

    @property
    def is_relative(self) -> bool:
        return self.ago_s is not None

    def first(self, now: float) -> float:
        return self.at if self.at is not None else now - (self.ago_s or 0.0)


def parse_since(text: str) -> Since:
    """Parse `90s`, `10m`, `2h`, `1d`, or an ISO 8601 time; without a zone, the laptop's.

    Raises ToolkitError for any other text.
    """
    text = text.strip()
    if match := re.fullmatch(r"(\d{1,9}(?:\.\d+)?)([smhd])", text, re.ASCII):
        return Since(ago_s=float(match[1]) * SECONDS[match[2]])
    with contextlib.suppress(ValueError, OverflowError, OSError):
        if re.match(r"\d{4}-\d\d-\d\d", text):
            return Since(at=datetime.fromisoformat(re.sub(r"[zZ]$", "+00:00", text)).timestamp())
    raise ToolkitError(
        f"cannot read the time {one_line(text)!r}",
        hint="`--since 90s`, `10m`, `2h`, `1d`, or a time such as `2025-01-05T12:00:00Z`",
    )


def view_of(
    where: WatchedRun,
    *,
    as_json: bool = False,
    raw: bool = False,
    live: bool = True,
    since: Since | None = None,
    out: TextIO | None = None,
) -> View:
    """Choose the view that was asked for, on standard output unless `out` is given.

    `live`: a panel, if the output is a terminal that can draw one.
    """
    out = out or sys.stdout
    if as_json and raw:
        raise ToolkitError("`--json` shows events, `--raw` shows the log", hint="leave out one of them")
    if raw:
        if since is not None:
            what = "`--since` needs the time of events; the log of `--raw` has none"
            raise ToolkitError(what, hint="leave out one of them")
        return RawLog(out)
    if as_json:
        return JsonLines(out.buffer, since)
    # The wall clock: the monotonic one stands still while a laptop sleeps, but the job keeps
    # running.
    return PanelView(console.view(out, time.time) if live else Plain(console.console_on(out)), where, since)
