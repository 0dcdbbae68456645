"""Watching a run over a connection that may break.

`follow` reads the framed stream of `supervisor.sh follow` and feeds a view. After a break it
reconnects by itself and resumes at the exact byte. The job keeps running in any case, since it is
not a child of the connection.
"""

from __future__ import annotations

import contextlib
import math
import os
import select
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TextIO

from jobs.errors import ExitCode, ToolkitError
from jobs.events import RawEvent, parsed
from jobs.formatting import duration, plural, size, visible
from jobs.views.gpus import GpuUsage
from remote.runs.frames import ConnectionLost, FrameStream, Reread, StreamTimeouts, Tail, counts, lines_of
from remote.runs.job_state import JobState, number_of
from remote.runs.views import View, WatchedRun, named, note

# Run ("": the running one, else the last), file ("events", "log" or "output"), byte offset. An
# offset below 0 is so many lines from the end.
OpenStream = Callable[[str, str, int], "subprocess.Popen[bytes]"]
# Exit code and last words of the ssh process -> the error, if trying again is useless.
Refused = Callable[[int, str], "ToolkitError | None"]

LIMITS = StreamTimeouts()


@dataclass(frozen=True)
class Watched:
    """How watching ended. `done`: the job has ended, and all of the file was shown."""

    done: bool
    stopped: bool  # by Ctrl-C, or because nobody reads our output any more
    job: JobState | None  # None: nothing came from the box
    last: RawEvent | None  # the last event that was read
    offset: int  # the first byte that was not shown

    @property
    def exit(self) -> int | None:
        return self.job.exit if self.job else None


def follow(
    open_stream: OpenStream,
    view: View,
    where: WatchedRun,
    *,
    once: bool = False,
    refused: Refused = lambda code, last_words: None,
    limits: StreamTimeouts = LIMITS,
    offset: int = 0,
    lines: int = 0,
) -> Watched:
    """Show the run until it has ended or until Ctrl-C, reconnecting whenever the connection breaks.

    Ctrl-C ends only the watching. once: show only what the file holds now. refused: the error to
    raise when a connection ended for good (a changed host key, a refused login). lines: begin with
    that many last lines of the file, and not at `offset`. Raises ToolkitError: the box refuses us,
    or `limits.tries` are used up.
    """
    watch = _Watch(view, once, refused, limits, offset, where, lines)
    stopped = False
    with _one_interrupt() as interrupts:
        try:
            with view:
                try:
                    watch.through(open_stream)
                finally:
                    if interrupts and not _polled(sys.stdout, select.POLLOUT):
                        _hush(sys.stdout)  # nobody reads the rest of the output: `fab logs | less`
        except KeyboardInterrupt:
            stopped = True
        except (BrokenPipeError, SystemExit) as closed:  # `fab logs | head`; rich raises SystemExit for it
            if isinstance(closed, SystemExit) and not isinstance(closed.__context__, BrokenPipeError):
                raise
            stopped = True
            _hush(sys.stdout)
        if interrupts:
            note(_stopped_text(named(where, watch.job), watch.job))
    return Watched(watch.is_done, stopped, watch.job, watch.last, watch.tail.offset)


def _stopped_text(where: WatchedRun, job: JobState | None) -> str:
    if job is not None and not job.alive and not job.training:
        return "stopped watching; the job is not running"
    text = "stopped watching; the job keeps running" if job else "stopped watching; a job, if any, keeps running"
    target = f"--host {shlex.quote(where.host)}" + (f" --run {shlex.quote(where.run)}" if where.run else "")
    return f"{text}\nto watch it again: fab logs --follow {target}\nto cancel it: fab cancel {target}"


@contextlib.contextmanager
def _one_interrupt() -> Iterator[list[int]]:
    """Obey the first Ctrl-C and ignore later ones, which would break the clean-up.

    Yields a list that is not empty once Ctrl-C was pressed.
    """
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
    """Point a stream to /dev/null.

    Otherwise Python complains about the closed pipe again when it ends, or waits for it.
    """
    with contextlib.suppress(OSError, ValueError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)


def _polled(stream: TextIO, events: int) -> int:
    """Return the events that `poll` reports immediately; 0 for none."""
    with contextlib.suppress(OSError, ValueError):
        poll = select.poll()
        poll.register(stream.fileno(), events)
        return sum(mask for _, mask in poll.poll(0))
    return 0


class _Watch:
    """One `follow`, over all its connections."""

    def __init__(
        self,
        view: View,
        once: bool,
        refused: Refused,
        limits: StreamTimeouts,
        offset: int,
        where: WatchedRun,
        lines: int = 0,
    ) -> None:
        self._lines = lines  # from the end of the file, until the box has said where they begin
        self._view, self._once, self._refused, self._limits, self._where = view, once, refused, limits, where
        self.tail = Tail(by_lines=view.file == "events", offset=offset)
        self.job: JobState | None = None
        self.last: RawEvent | None = None
        self.is_done = False
        self._heard_at = time.time()  # not monotonic: that clock stands still while a laptop sleeps
        self._has_heard = False
        self._away_since: float | None = None
        self._away_why = ""
        self._back_at = 0.0
        self._missed = 0  # events, or bytes of the log

    def through(self, open_stream: OpenStream) -> None:
        failures, pause_s = 0, self._limits.first_pause_s
        while True:
            # By the name that the box told: another run may be the newest by now, but the offset
            # belongs to this one.
            run = named(self._where, self.job).run
            connection = FrameStream(open_stream(run, self._view.file, -self._lines or self.tail.offset), self._limits)
            try:
                self._read(connection)
                return
            except Reread:
                continue
            except ConnectionLost as broken:
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

    def _judge(self, connection: FrameStream, why: str, failures: int) -> None:
        """Raise ToolkitError if trying again is useless."""
        code = connection.code
        if code is not None and (error := self._refused(code, connection.last_words)):
            raise error
        # 255 is ssh itself, and 128 + n a signal: the connection broke. With any other code the box
        # answered, on purpose, without a stream.
        if code is not None and 0 < code < 128 and not connection.has_progress:
            raise ToolkitError(
                f"cannot watch run `{self._where.run}` on `{self._where.host}`: the box ended with exit code {code}",
                why=visible(connection.last_words),
            )
        if self.job is None and self._limits.first_tries is not None and failures >= self._limits.first_tries:
            hint = f"fab doctor --host {shlex.quote(self._where.host)} checks the connection"
            raise ToolkitError(
                f"cannot reach `{self._where.host}`", why=visible(why), hint=hint, exit_code=ExitCode.UNREACHABLE
            )
        tries = self._limits.tries
        if tries is not None and failures >= tries:
            what = f"the connection to `{self._where.host}` broke {plural(failures, 'times')} in a row"
            hint = "try again; the job is not affected"
            raise ToolkitError(what, why=visible(why), hint=hint, exit_code=ExitCode.UNREACHABLE)

    def _away(self, why: str) -> None:
        if self._away_since is None:
            self._away_since, self._missed = self._heard_at, 0
        if why != self._away_why:
            self._away_why = why
            self._view.connection_lost(why, self._away_since)

    def _read(self, connection: FrameStream) -> None:
        """Show frames until the job has ended, or with `once` until all of the file is shown."""
        is_new, has_data, beats = True, False, 0
        for frame in connection.frames():
            self._heard_at = time.time()
            if is_new:
                is_new, self._back_at, self._away_why = False, self._heard_at, ""
                self._view.back()
            if frame.word == "bytes":
                has_data = True
                self._bytes(int(frame.args[0]), frame.data)
            elif frame.word == "from":
                self.tail.offset, self._lines = *counts(frame.word, frame.args, 1), 0
            elif frame.word == "shrunk":
                self.tail.cut(*counts(frame.word, frame.args, 1))
            elif frame.word == "job":
                self.job = JobState.of(frame.args)
                self._view.job(self.job)
            elif frame.word == "gpu" and len(frame.args) >= 4 and frame.args[0].isdigit():
                self._view.card(GpuUsage(int(frame.args[0]), *(number_of(arg, math.nan) for arg in frame.args[1:4])))
            elif frame.word == "beat" and frame.args and (epoch := number_of(frame.args[0], None)) is not None:
                self._view.beat(epoch)
                self.tail.beat()
                beats += 1
                # The first beat may come before the supervisor has looked at the file. If no byte
                # came, only the second beat proves that there is none.
                if has_data or beats > 1:
                    self._caught_up()
                    if self._once:
                        return
                if _polled(sys.stdout, 0) & (select.POLLERR | select.POLLHUP):
                    raise BrokenPipeError  # a write would find out, but the next one may be an hour away
            elif frame.word == "done":
                self._caught_up()
                self.is_done = True
                return

    def _bytes(self, offset: int, data: bytes) -> None:
        if offset != self.tail.next:
            raise ConnectionLost(f"byte {offset} came instead of byte {self.tail.next}")
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
            missed = missed if self._missed else "nothing new"
            if self._has_heard:
                self._view.note(f"the connection was lost for {duration(away_s)}; {missed} meanwhile")
        self._has_heard = True
