"""Watching a run over a line that breaks: `follow` reads the framed stream of `supervisor.sh follow`, feeds a view, and goes on
at the exact byte by itself. What is watched goes on in any case: the job is nobody's child.

A frame is a line of words; `bytes OFFSET LENGTH` is followed by that many raw bytes of the file. A `beat` says that all that the
file held by then was sent.
"""

from __future__ import annotations

import contextlib
import math
import os
import re
import select
import selectors
import shlex
import signal
import subprocess
import sys
import threading
import time
from codecs import getincrementaldecoder
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from io import IncrementalNewlineDecoder
from types import TracebackType
from typing import IO, TYPE_CHECKING, BinaryIO, Protocol, TextIO, TypeVar

from jobs import console
from jobs.errors import ExitCode, ToolkitError
from jobs.events import RawEvent, parsed
from jobs.lines import Plain, time_of
from jobs.panel import BoxView, Card, Live
from jobs.words import duration, encodable, one_line, plural, size, visible

if TYPE_CHECKING:
    from typing_extensions import Self

LONGEST_FRAME_LINE = 64 * 1024
PROGRESS = {"bytes", "beat", "done"}  # `job` is said before anything is read
EXITS = {int(ExitCode.OK): "done", int(ExitCode.PREEMPTED): "preempted, the same command goes on", int(ExitCode.CANCELLED): "cancelled"}
SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}

# Run ("": the one that runs, else the last), file ("events", "log" or "output"), byte offset.
OpenStream = Callable[[str, str, int], "subprocess.Popen[bytes]"]
Refused = Callable[[int, str], "ToolkitError | None"]  # exit code and last words of the ssh process: is there no use in trying again?
T = TypeVar("T")


@dataclass(frozen=True)
class Limits:
    silence_s: float = 10.0  # `beat` comes each second
    connect_s: float = 30.0  # until the first byte of a connection: jump hosts and far lines take their time
    first_pause_s: float = 0.1  # a line that broke most often comes back at once
    longest_pause_s: float = 15.0
    tries: int | None = None  # connections in a row that brought nothing; None: for ever
    first_tries: int | None = None  # the same until the box has once spoken


LIMITS = Limits()


@dataclass(frozen=True)
class Where:
    """The run that is watched, as the user names it, and what its box costs."""

    host: str
    run: str
    price_per_hour: float | None = None
    currency: str = ""
    steps: tuple[int, ...] = ()  # what the job is to do; (): not known


@dataclass(frozen=True)
class Job:
    """A `job` frame: the supervisor's facts. `words` holds all of them, those of a newer supervisor too."""

    words: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, words: Sequence[str]) -> Job:
        return cls(dict(word.split("=", 1) for word in words if "=" in word))

    @property
    def alive(self) -> bool:
        return self.words.get("alive") == "1"

    @property
    def training(self) -> bool:
        return self.words.get("training") == "1"

    @property
    def exit(self) -> int | None:
        return int(self.words["exit"]) if re.fullmatch(r"-?\d{1,9}", self.words.get("exit", "")) else None

    @property
    def cancelled(self) -> bool:
        return self.words.get("cancelled") == "1"

    @property
    def started(self) -> float | None:
        """By the box's clock."""
        return _number(self.words.get("started", ""), None)

    @property
    def ended(self) -> float | None:
        """By the box's clock; the last heartbeat where nothing else is known."""
        return _number(self.words.get("ended", self.words.get("heartbeat", "")), None)


@dataclass(frozen=True)
class Watched:
    """How watching ended. `done`: the job has ended, and all of the file was shown."""

    done: bool
    stopped: bool  # by Ctrl-C, or nobody reads any more
    job: Job | None  # None: the box has said nothing
    last: RawEvent | None  # of the events that were read
    offset: int  # the first byte that was not shown

    @property
    def exit(self) -> int | None:
        return self.job.exit if self.job else None


# --- frames


@dataclass(frozen=True)
class Frame:
    word: str
    args: tuple[str, ...] = ()
    data: bytes = b""  # of `bytes`: as much as has come; its offset is the first of `args`


class Framing:
    """Frames out of bytes that are cut anywhere. Of a `bytes` frame, what has come is handed on at once: it is what stands in the file."""

    def __init__(self) -> None:
        self._line = bytearray()
        self._offset = self._left = 0

    def feed(self, data: bytes) -> Iterator[Frame]:
        while data:
            if self._left:
                chunk, data = data[: self._left], data[self._left :]
                frame = Frame("bytes", (str(self._offset),), chunk)
                self._offset, self._left = self._offset + len(chunk), self._left - len(chunk)
                yield frame
                continue
            line, newline, data = data.partition(b"\n")
            self._line += line
            if len(self._line) > LONGEST_FRAME_LINE:
                raise BrokenLine("what came is not the stream of a supervisor")
            if newline:
                words = self._line.decode("utf-8", "replace").split()
                self._line.clear()
                yield from self._frame(words)

    def _frame(self, words: list[str]) -> Iterator[Frame]:
        if not words:
            return
        word, args = words[0], tuple(words[1:])
        if word == "bytes":
            self._offset, self._left = _counts(word, args, 2)
        else:
            yield Frame(word, args)


def _counts(word: str, args: Sequence[str], count: int) -> list[int]:
    if len(args) < count or not all(arg.isascii() and arg.isdigit() for arg in args[:count]):
        raise BrokenLine(f"a damaged frame: {one_line(' '.join([word, *args]))[:80]}")
    return [int(arg) for arg in args[:count]]


def _number(text: str, otherwise: T) -> float | T:
    try:
        number = float(text)
    except ValueError:
        return otherwise
    return number if math.isfinite(number) else otherwise


class BrokenLine(Exception):
    """This connection is of no more use."""


class Reread(Exception):
    """A line of the file must be asked for again."""


@dataclass
class Tail:
    """Where we are in the file: `offset` is its first byte that was not handed on."""

    by_lines: bool  # only whole ones are handed on
    offset: int = 0
    _begun: bytearray = field(default_factory=bytearray)  # of a line without its end
    _is_torn: bool = False  # and that was all of the file
    _reread: int = -1  # the last offset that was asked for again

    @property
    def next(self) -> int:
        return self.offset + len(self._begun)

    def take(self, data: bytes) -> bytes:
        """What can be handed on now. Raises Reread: whoever wrote the line that has begun may be dead, cut off, and the rest a successor's."""
        if self._is_torn and self._reread != self.offset:
            self._reread = self.offset
            raise Reread
        if self.by_lines:
            whole, newline, rest = data.rpartition(b"\n")
            data = bytes(self._begun) + whole + newline if newline else b""
            self._begun = bytearray(rest) if newline else self._begun + rest
        self.offset += len(data)
        return data

    def beat(self) -> None:
        """All of the file was sent. Lines are written whole, so what has no end now was torn off."""
        self._is_torn = bool(self._begun)

    def drop_begun(self) -> None:
        """A new connection asks for it again."""
        self._begun.clear()
        self._is_torn = False

    def cut(self, size_bytes: int) -> None:
        """The file was made shorter."""
        del self._begun[max(size_bytes - self.offset, 0) :]
        self._is_torn = self._is_torn and bool(self._begun)
        self.offset = min(size_bytes, self.offset)


def lines_of(data: bytes) -> list[bytes]:
    """Whole lines with their ends. Not `splitlines`: it also cuts at a carriage return, which a damaged line may hold."""
    return [line + b"\n" for line in data.split(b"\n")[:-1]]


# --- one connection


class Connection:
    """The frames of one process, until it ends (`code` is set) or falls silent."""

    def __init__(self, process: subprocess.Popen[bytes], limits: Limits) -> None:
        self._process, self._limits = process, limits
        self.code: int | None = None
        self.has_progress = False
        self._said = b""

    @property
    def said(self) -> str:
        return self._said.decode("utf-8", "replace").strip()

    def frames(self) -> Iterator[Frame]:
        stdout, framing = self._process.stdout, Framing()
        assert stdout is not None
        with selectors.DefaultSelector() as selector:
            selector.register(stdout, selectors.EVENT_READ)
            if self._process.stderr is not None:
                selector.register(self._process.stderr, selectors.EVENT_READ)
            limit_s = self._limits.connect_s
            deadline = time.monotonic() + limit_s
            while True:
                ready = [key.fileobj for key, _ in selector.select(max(deadline - time.monotonic(), 0.0))]
                if self._process.stderr in ready and self._process.stderr is not None and not self._listen(self._process.stderr):
                    selector.unregister(self._process.stderr)
                if stdout in ready:
                    data = os.read(stdout.fileno(), 1 << 16)
                    if not data:
                        selector.unregister(stdout)
                        self._reap(selector)
                        raise BrokenLine(one_line(self.said)[-200:] or ("the stream ended" if self.code is None else f"ssh ended with {self.code}"))
                    for frame in framing.feed(data):
                        self.has_progress |= frame.word in PROGRESS
                        yield frame
                    # From here on: who reads us may have held us up for long.
                    limit_s = self._limits.silence_s
                    deadline = time.monotonic() + limit_s
                elif time.monotonic() >= deadline:
                    raise BrokenLine(f"nothing came for {duration(limit_s)}")

    def _listen(self, stderr: IO[bytes]) -> bool:
        data = os.read(stderr.fileno(), 1 << 16)
        self._said = (self._said + data)[-4096:]
        return bool(data)

    def _reap(self, selector: selectors.BaseSelector) -> None:
        """Its exit code and last words, as long as they do not keep us waiting."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.code = self._process.wait(1.0)
        while selector.get_map() and selector.select(0.05) and self._process.stderr is not None and self._listen(self._process.stderr):
            pass

    def close(self) -> None:
        """TERM, then KILL for one that is frozen; well within the 0.3 s in which Ctrl-C is to end."""
        if self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(0.1)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout, self._process.stderr):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()


# --- views


class View(Protocol):
    """What a person, or a program, gets to see. `file`: which file of the run it shows."""

    file: str

    def __enter__(self) -> Self: ...

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None: ...

    def data(self, data: bytes) -> None:
        """Bytes of the file, in order; of the events, whole lines only."""

    def beat(self, epoch: float) -> None:
        """The box's clock."""

    def job(self, job: Job) -> None: ...

    def card(self, card: Card) -> None: ...

    def away(self, why: str, since: float) -> None:
        """Nothing comes from the box, since a time of our clock. Again, if there is another reason."""

    def back(self) -> None: ...

    def note(self, text: str) -> None: ...


def _note(text: str) -> None:
    screen = console.console_on(sys.stderr)
    screen.print(encodable(visible(text), screen.encoding))


def _away_text(why: str) -> str:
    return f"the line is away: {one_line(why)}; trying again"


class _Quiet:
    """A view that shows the file and says the rest on standard error."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        return

    def beat(self, epoch: float) -> None:
        return

    def job(self, job: Job) -> None:
        return

    def card(self, card: Card) -> None:
        return

    def away(self, why: str, since: float) -> None:
        self.note(_away_text(why))

    def back(self) -> None:
        return

    def note(self, text: str) -> None:
        _note(text)


class RawLog(_Quiet):
    """`--raw`: the bytes of train.log as they are; on a terminal, what it would obey is spelt out."""

    def __init__(self, out: TextIO, file: str = "log") -> None:
        self._out, self.file = out, file
        self._decoder = IncrementalNewlineDecoder(getincrementaldecoder("utf-8")("backslashreplace"), translate=True)  # bare \r: progress bars

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

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
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
            if event is not None:  # a damaged line has no time: it belongs to the one before
                self._is_shown = not self._gate.is_early(event)
            if self._is_shown:
                _write(self._out, line)


def _write(out: BinaryIO, data: bytes) -> None:
    if data:
        out.write(data)
        out.flush()


class Gate:
    """Which events are early, by the box's clock: `10m` ago is ten minutes before its `beat`. Until that is known, lines wait."""

    def __init__(self, since: Since | None, *, holds: bool, wall: Callable[[], float] = time.time) -> None:
        self.since, self._wall = since, wall
        self._ahead_s = 0.0  # the box's clock, against ours
        self._held: bytearray | None = bytearray() if holds else None
        self._first = -math.inf if since is None else since.first(wall())

    def ours(self, epoch: float | None) -> float | None:
        """From the box's clock to ours. What has been is never in the future."""
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


class Drawn:
    """The live panel, or plain lines: the same views as on the box itself, fed over the line."""

    file = "events"

    def __init__(self, view: Plain | Live, where: Where, since: Since | None = None) -> None:
        self._view, self._where = view, where
        self._gate = Gate(since, holds=isinstance(view, Live) or (since is not None and since.is_relative))
        self._box = BoxView(name=where.host, price_per_hour=where.price_per_hour, currency=where.currency, steps=where.steps)
        self._cards: dict[int, Card] = {}
        self._job: Job | None = None
        self._first_event: float | None = None  # for the box that does not say when the job has begun
        self._is_worried = False

    def __enter__(self) -> Self:
        self._view.__enter__()
        self._show_box()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
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
            # What a view cannot take (text for a number) says less than the next event: watching goes on.
            with contextlib.suppress(TypeError, ValueError, AttributeError):
                if isinstance(self._view, Live):
                    self._view.feed(event, at=self._gate.ours(time_of(event)), quiet=self._gate.is_early(event))
                else:
                    self._view.feed(event, quiet=self._gate.is_early(event))

    def beat(self, epoch: float) -> None:
        self._show(self._gate.beat(epoch))
        self._set_times()
        self._show_box()

    def job(self, job: Job) -> None:
        self._job = job
        said, is_good = state_text(job)
        self._where = _named(self._where, job)
        self._box = replace(self._box, line=f"run {self._where.run}, {said}", is_good=is_good)
        self._set_times()
        self._show_box()
        if not isinstance(self._view, Live) and not is_good and not self._is_worried:
            self.note(f"run {self._where.run}: {said}")
        self._is_worried = not is_good

    def _set_times(self) -> None:
        """When the job began and ended, by our clock."""
        job = self._job or Job({"alive": "1"})
        started = job.started or self._first_event
        ended = None if job.alive or job.training else job.ended
        self._box = replace(self._box, started_at=self._gate.ours(started), ended_at=self._gate.ours(ended))

    def card(self, card: Card) -> None:
        self._cards[card.index] = card
        self._box = replace(self._box, cards=tuple(self._cards[index] for index in sorted(self._cards)))
        self._show_box()

    def away(self, why: str, since: float) -> None:
        if isinstance(self._view, Live):
            self._box = replace(self._box, line=f"run {self._where.run}, line away", away_at=since, away_why=one_line(why))
            self._show_box()
        else:
            self.note(_away_text(why))

    def back(self) -> None:
        said = state_text(self._job)[0] if self._job else "connected"
        self._box = replace(self._box, line=f"run {self._where.run}, {said}", away_at=None, away_why="")
        self._show_box()

    def note(self, text: str) -> None:
        if isinstance(self._view, Live):
            self._view.note(text)
        else:
            _note(text)

    def _show_box(self) -> None:
        if isinstance(self._view, Live):
            self._view.feed_box(self._box)


def state_text(job: Job) -> tuple[str, bool]:
    """In words, and whether nobody has to look after it."""
    if job.exit is not None:
        said = "cancelled" if job.cancelled else EXITS.get(job.exit, "failed")
        return f"ended with exit code {job.exit} ({said})", job.exit == 0 or job.cancelled
    if job.alive:
        return ("being cancelled" if job.cancelled else "running" if job.training else "starting"), True
    if job.training:
        return "nobody looks after this job: its supervisor is gone", False
    return "lost: it stopped without a word, and the same command goes on", False


# --- forms and --since


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
    """`90s`, `10m`, `2h`, `1d`, or a time as ISO 8601 writes it; without a zone, the laptop's. Raises ToolkitError."""
    text = text.strip()
    if match := re.fullmatch(r"(\d{1,9}(?:\.\d+)?)([smhd])", text, re.ASCII):
        return Since(ago_s=float(match[1]) * SECONDS[match[2]])
    with contextlib.suppress(ValueError, OverflowError, OSError):
        if re.match(r"\d{4}-\d\d-\d\d", text):
            return Since(at=datetime.fromisoformat(re.sub(r"[zZ]$", "+00:00", text)).timestamp())
    raise ToolkitError(f"cannot read the time {one_line(text)!r}", hint="`--since 90s`, `10m`, `2h`, `1d`, or a time such as `2025-01-05T12:00:00Z`")


def view_of(
    where: Where, *, as_json: bool = False, raw: bool = False, live: bool = True, since: Since | None = None, out: TextIO | None = None
) -> View:
    """The form that was asked for, on standard output unless `out` is given. `live`: a panel if it is a terminal that can draw one."""
    out = out or sys.stdout
    if as_json and raw:
        raise ToolkitError("`--json` and `--raw` are two forms: events, or the log", hint="ask for one of them")
    if raw:
        if since is not None:
            raise ToolkitError("`--since` goes by the time of events; the log of `--raw` has none", hint="leave out one of them")
        return RawLog(out)
    if as_json:
        return JsonLines(out.buffer, since)
    # The wall clock: the monotonic one stands still while a laptop sleeps, and the job goes on.
    return Drawn(console.view(out, time.time) if live else Plain(console.console_on(out)), where, since)


# --- watching


def follow(
    open_stream: OpenStream,
    view: View,
    where: Where,
    *,
    once: bool = False,
    refused: Refused = lambda code, said: None,
    limits: Limits = LIMITS,
    offset: int = 0,
) -> Watched:
    """Show the run until it has ended, through every break of the line, or until Ctrl-C, which ends nothing but this.

    once: only what is there now. refused: whether a connection that ended is the last (a changed host key, a refused login).
    Raises ToolkitError: the box refuses us, or `limits.tries` are used up.
    """
    watch = _Watch(view, once, refused, limits, offset, where)
    stopped = False
    with _one_interrupt() as interrupts:
        try:
            with view:
                try:
                    watch.through(open_stream)
                finally:
                    if interrupts and not _polled(sys.stdout, select.POLLOUT):
                        _hush(sys.stdout)  # nobody takes what is left to say: `fab logs | less`
        except KeyboardInterrupt:
            stopped = True
        except (BrokenPipeError, SystemExit) as closed:  # `fab logs | head`; rich makes a SystemExit of it
            if isinstance(closed, SystemExit) and not isinstance(closed.__context__, BrokenPipeError):
                raise
            stopped = True
            _hush(sys.stdout)
        if interrupts:
            _note(_stopped_text(_named(where, watch.job), watch.job))
    return Watched(watch.is_done, stopped, watch.job, watch.last, watch.tail.offset)


def _named(where: Where, job: Job | None) -> Where:
    """With the run's name as the box has it, where none was asked for."""
    return replace(where, run=where.run or (job.words.get("run", "") if job else ""))


def _stopped_text(where: Where, job: Job | None) -> str:
    if job is not None and not job.alive and not job.training:
        return "stopped watching; the job is not running"
    said = "stopped watching; the job goes on" if job else "stopped watching; a job would not notice"
    target = f"--host {shlex.quote(where.host)}" + (f" --run {shlex.quote(where.run)}" if where.run else "")
    return f"{said}: fab logs --follow {target}\nto cancel it: fab cancel {target}"


@contextlib.contextmanager
def _one_interrupt() -> Iterator[list[int]]:
    """One Ctrl-C is enough: those that follow would break what it has begun. Gives a list that is not empty once it has come."""
    before, interrupts = signal.getsignal(signal.SIGINT), list[int]()
    if threading.current_thread() is not threading.main_thread() or before is signal.SIG_IGN or before is None:
        yield interrupts
        return

    def interrupt(number: int, frame: object) -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        interrupts.append(number)
        raise KeyboardInterrupt

    signal.signal(signal.SIGINT, interrupt)
    try:
        yield interrupts
    finally:
        signal.signal(signal.SIGINT, before)


def _hush(stream: TextIO) -> None:
    """Else Python complains about the closed pipe once more when it ends, or waits for it."""
    with contextlib.suppress(OSError, ValueError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)


def _polled(stream: TextIO, events: int) -> int:
    """What `poll` says of it at once: 0 for nothing."""
    with contextlib.suppress(OSError, ValueError):
        poll = select.poll()
        poll.register(stream.fileno(), events)
        return sum(mask for _, mask in poll.poll(0))
    return 0


class _Watch:
    """One `follow`, over all its connections."""

    def __init__(self, view: View, once: bool, refused: Refused, limits: Limits, offset: int, where: Where) -> None:
        self._view, self._once, self._refused, self._limits, self._where = view, once, refused, limits, where
        self.tail = Tail(by_lines=view.file == "events", offset=offset)
        self.job: Job | None = None
        self.last: RawEvent | None = None
        self.is_done = False
        self._heard_at = time.time()  # the monotonic clock stands still while a laptop sleeps
        self._has_heard = False
        self._away_since: float | None = None
        self._away_why = ""
        self._back_at = 0.0
        self._missed = 0  # events, or bytes of the log

    def through(self, open_stream: OpenStream) -> None:
        failures, pause_s = 0, self._limits.first_pause_s
        while True:
            # By the name that was heard: another run may be the newest by now, and the offset is this one's.
            run = _named(self._where, self.job).run
            connection = Connection(open_stream(run, self._view.file, self.tail.offset), self._limits)
            try:
                self._read(connection)
                return
            except Reread:
                continue
            except BrokenLine as broken:
                why = str(broken)
            finally:
                connection.close()
                self.tail.drop_begun()
            if connection.has_progress:
                failures, pause_s = 0, self._limits.first_pause_s
            self._judge(connection, why, failures := failures + 1)
            self._away(why)
            time.sleep(pause_s)
            pause_s = min(pause_s * 2, self._limits.longest_pause_s)

    def _judge(self, connection: Connection, why: str, failures: int) -> None:
        """Raises ToolkitError if there is no use in trying again."""
        code = connection.code
        if code is not None and (error := self._refused(code, connection.said)):
            raise error
        # 255 is ssh itself, and 128 + n a signal: lines. Anything else was said there, on purpose, instead of a stream.
        if code is not None and 0 < code < 128 and not connection.has_progress:
            raise ToolkitError(f"cannot watch run `{self._where.run}` on `{self._where.host}`: exit code {code} there", why=visible(connection.said))
        if self.job is None and self._limits.first_tries is not None and failures >= self._limits.first_tries:
            hint = f"fab doctor --host {shlex.quote(self._where.host)} looks at the line by itself"
            raise ToolkitError(f"cannot reach `{self._where.host}`", why=visible(why), hint=hint, code=ExitCode.UNREACHABLE)
        tries = self._limits.tries
        if tries is not None and failures >= tries:
            what = f"the line to `{self._where.host}` broke {plural(failures, 'times')} in a row"
            raise ToolkitError(what, why=visible(why), hint="the job is not touched by it; try again", code=ExitCode.UNREACHABLE)

    def _away(self, why: str) -> None:
        if self._away_since is None:
            self._away_since, self._missed = self._heard_at, 0
        if why != self._away_why:
            self._away_why = why
            self._view.away(why, self._away_since)

    def _read(self, connection: Connection) -> None:
        """Until the job has ended and all is shown; `once`: until what is there now is shown."""
        is_new, has_data, beats = True, False, 0
        for frame in connection.frames():
            self._heard_at = time.time()
            if is_new:
                is_new, self._back_at, self._away_why = False, self._heard_at, ""
                self._view.back()
            if frame.word == "bytes":
                has_data = True
                self._bytes(int(frame.args[0]), frame.data)
            elif frame.word == "shrunk":
                self.tail.cut(*_counts(frame.word, frame.args, 1))
            elif frame.word == "job":
                self.job = Job.of(frame.args)
                self._view.job(self.job)
            elif frame.word == "gpu" and len(frame.args) >= 4 and frame.args[0].isdigit():
                self._view.card(Card(int(frame.args[0]), *(_number(arg, math.nan) for arg in frame.args[1:4])))
            elif frame.word == "beat" and frame.args and (epoch := _number(frame.args[0], None)) is not None:
                self._view.beat(epoch)
                self.tail.beat()
                beats += 1
                # The first beat may come before the file was looked at: without a byte for us, the second one tells.
                if has_data or beats > 1:
                    self._caught_up()
                    if self._once:
                        return
                if _polled(sys.stdout, 0) & (select.POLLERR | select.POLLHUP):
                    raise BrokenPipeError  # a write would tell, but the next one may be an hour away
            elif frame.word == "done":
                self._caught_up()
                self.is_done = True
                return

    def _bytes(self, offset: int, data: bytes) -> None:
        if offset != self.tail.next:
            raise BrokenLine(f"byte {offset} came, byte {self.tail.next} was due")
        data = self.tail.take(data)
        if not data:
            return
        if self.tail.by_lines:
            lines = lines_of(data)
            self._missed += len(lines)
            self.last = next((event for line in reversed(lines) if (event := parsed(line))), self.last)
        else:
            self._missed += len(data)
        self._view.data(data)

    def _caught_up(self) -> None:
        if self._away_since is not None:
            away_s, self._away_since = max(self._back_at - self._away_since, 0.0), None
            missed = plural(self._missed, "events") if self.tail.by_lines else size(self._missed)
            if self._has_heard:
                self._view.note(f"the line was away for {duration(away_s)}; {missed if self._missed else 'nothing new'} meanwhile")
        self._has_heard = True
