"""Write `report.html` of a run folder, again and again while the run trains, or once."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from jobs.formatting import one_line
from jobs.run_dir import RunDir
from jobs.views.report.checkpoints import folders_here
from jobs.views.report.history import EventReader, RunHistory
from jobs.views.report.page import page
from jobs.views.report.run_page import RunPage, job_fields, state_of_history

LEAST_S = 10.0  # between two pages of a running job
MOST_BYTES = 100  # of the runs' names in a file's, which has 255 with what a partial file adds
MOST_SHARE = 0.01  # of one core's time that the pages take


def write_page(runs: Sequence[RunPage], path: Path) -> int:
    """Write the page of these runs as a whole, or leave the old one; return its size in bytes.

    It takes at most half of the free room: the rest is for the run that may write there.
    Raises OSError with `path`, whatever file next to it could not be written.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    content = page(runs).encode("utf-8", "backslashreplace")
    try:
        if len(content) > shutil.disk_usage(path.parent).free / 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        partial.write_bytes(content)
        partial.replace(path)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
    return len(content)


def file_of_several(names: Sequence[str]) -> str:
    """Return the name of a page of several runs: of long ones the beginning, and a hash of all."""
    joined = "-".join(names).replace("/", "-")
    data = joined.encode("utf-8", "surrogateescape")
    if len(data) > MOST_BYTES:
        joined = f"{data[:MOST_BYTES].decode('utf-8', 'ignore')}-{hashlib.sha256(data).hexdigest()[:8]}"
    return f"report-{joined}.html"


class ReportFile:
    """The page of a run that trains here.

    It never harms the run: what goes wrong is said once, by `warn`, and the page stays as it was.
    """

    def __init__(self, run: RunDir, warn: Callable[[str], object], clock: Callable[[], float] = time.monotonic) -> None:
        self._run, self._warn, self._clock = run, warn, clock
        self._events, self._history = EventReader(run.events), RunHistory(run.name)
        self._due_at = clock()
        self._has_warned = False

    def renew(self) -> None:
        """Write the page if it is due: at most every 10 s, and in at most 1 % of the time."""
        if self._clock() >= self._due_at:
            self._write(training=True, exit_code=None)

    def finish(self, exit_code: int) -> None:
        """Write the page of a run that has ended with this exit code."""
        self._write(training=False, exit_code=exit_code)

    def _write(self, *, training: bool, exit_code: int | None) -> None:
        begun = self._clock()
        try:
            for event in self._events.new_events():
                self._history.feed(event)
            cancelled = self._run.cancelled.exists()
            state = state_of_history(self._history, training=training, exit_code=exit_code, cancelled=cancelled)
            folders = folders_here(self._run)
            write_page([RunPage(self._history, job_fields(self._run), state, folders=folders)], self._run.report)
        except Exception as error:  # a full disk, a folder that is gone, an event that is damaged: only a view fails
            if not self._has_warned:
                self._warn(f"the report could not be written: {one_line(error)}")
            self._has_warned = True
        ended = self._clock()
        self._due_at = ended + max(LEAST_S, (ended - begun) / MOST_SHARE)
