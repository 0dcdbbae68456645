"""The one place that prints for the verbs, and never a secret's value.

Messages go to standard error, data to standard output. A secret is found by its value, not by its
name, also where it was quoted, escaped or split: the text around it often comes from another
program.
"""

from __future__ import annotations

import base64
import re
import shlex
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import TextIO

from jobs.formatting import duration, encodable, fold, one_line, visible
from remote.scripts import dispatch_script

ERASE = "\r\x1b[2K"  # erases a terminal's line
HIDDEN = "[hidden]"
# In characters. A shorter value is hidden only where it stands as a word: `1` is in everything.
SHORT = 6
# A passing state is drawn after FIRST_S, then each second. Where it cannot be drawn over, a line
# stays every RARELY_S.
FIRST_S, EACH_S, RARELY_S = 0.3, 1.0, 30.0
# _QUOTES: what shlex, repr, JSON, YAML and URLs put between two characters of a quoted value. _GAP:
# what may stand for its white space, also `', '` where the value was split into words.
_QUOTES = r"""(?:['"\\]|%(?i:22|27|5c))*"""
_GAP = r"""(?:[\s'"\\,+]|(?<=\\)[nrt]|%(?i:22|27|5c|20|09|0a|0d))*"""
_SAFE = re.compile(r"[A-Za-z0-9_.-]")


class Redaction:
    """The values that are never shown."""

    def __init__(self) -> None:
        self._values: set[str] = set()
        self._pattern: re.Pattern[str] | None = None

    def add(self, *values: str) -> None:
        self._values |= {value.strip() for value in values if value.strip()}
        forms = {form for value in self._values for form in _forms(value)}
        longest_first = sorted(forms, key=lambda form: (-len(form), form))
        self._pattern = re.compile("|".join(map(_loose, longest_first))) if forms else None

    def __call__(self, text: object) -> str:
        return self._pattern.sub(HIDDEN, str(text)) if self._pattern else str(text)


def _forms(value: str) -> Iterator[str]:
    """Yield the texts in which a value may be printed.

    The value, the long lines of a value that has several (a private key), and the base64 form of
    HTTP's basic authentication.
    """
    yield value
    yield from (line.strip() for line in value.splitlines() if len(line.strip()) > SHORT)
    if len(value) >= SHORT:
        yield base64.b64encode(value.encode("utf-8", "surrogateescape")).decode().rstrip("=")


def _loose(value: str) -> str:
    """Return a pattern that finds a value in any quoting, or split at its white space.

    Any quoting: as it stands, or as shlex, repr, JSON and URLs write it, also several times over.
    """
    words = [_QUOTES.join(map(_character, re.sub(r"""['"\\]""", "", word))) for word in value.split()]
    pattern = _GAP.join(word for word in words if word)
    if not pattern:
        return re.escape(value)
    return rf"(?<!\w){pattern}(?!\w)" if len(value) < SHORT else pattern


def _character(char: str) -> str:
    if _SAFE.fullmatch(char):
        return char if char.isalnum() else re.escape(char)
    units = re.findall("....", char.encode("utf-16-be", "surrogatepass").hex())  # JSON writes two for a rare character
    written = {
        re.escape(char),
        re.escape(char.encode("unicode_escape", "backslashreplace").decode()),
        "".join(f"%(?i:{byte:02x})" for byte in char.encode("utf-8", "surrogateescape")),
        "".join(rf"\\+u(?i:{unit})" for unit in units),
    }
    return f"(?:{'|'.join(sorted(written))})"


class Sayer:
    """Prints lines for a person, each in one piece, also from several threads.

    A call prints its text to standard error.
    """

    def __init__(
        self,
        secrets: Iterable[str] = (),
        *,
        err: TextIO | None = None,
        out: TextIO | None = None,
        host: str = "",
        redacted: Redaction | None = None,
        lock: threading.RLock | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Set where to print, and the secrets to hide.

        err, out: None for those of sys at the time of printing. host: printed before each line on
        standard error.
        """
        self.redacted = redacted or Redaction()
        self._err, self._out, self._host, self._lock = err, out, host, lock or threading.RLock()
        self._clock = clock
        self._is_drawn = False
        self._told_at: float | None = None  # when a passing state began, or was last told in a line that stays
        self.hide(*secrets)

    def of(self, host: str) -> Sayer:
        """Return a Sayer that prints the box's name before each line, for several boxes."""
        return Sayer(
            err=self._err, out=self._out, host=host, redacted=self.redacted, lock=self._lock, clock=self._clock
        )

    def hide(self, *values: str) -> None:
        """Hide these values from now on."""
        if values:
            self.redacted.add(*values)

    def __call__(self, text: object) -> None:
        """Print one line or several, such as a ToolkitError, to standard error."""
        self._print(text, self._err or sys.stderr, f"{self._host}: " if self._host else "")

    def now(self, text: object) -> None:
        """Show a passing state: on a terminal, a line that the next one replaces.

        Elsewhere, and for one of several boxes, it is a plain line, and rarely. "": the state is
        over; its line is erased.
        """
        from jobs.views.console import console_on  # imports the panel, which most messages do not need

        stream = self._err or sys.stderr
        if stream is None:
            return
        console = console_on(stream)
        if self._host or not console.is_terminal or console.is_dumb_terminal:
            self._now_and_then(text)
            return
        line = fold(one_line(self.redacted(text)), console.width - 1, 1)[0]
        with self._lock:
            if line or self._is_drawn:
                stream.write(f"{ERASE}{encodable(line, console.encoding)}")
                stream.flush()
            self._is_drawn = bool(line)

    def _now_and_then(self, text: object) -> None:
        now = self._clock()
        if not text:
            self._told_at = None
        elif self._told_at is None:
            self._told_at = now
        elif now - self._told_at >= RARELY_S:
            self._told_at = now
            self(text)

    def warning(self, text: object) -> None:
        self(f"warning: {text}")

    def command(self, where: str, argv: Sequence[str], stdin: bytes = b"", file: str = "") -> None:
        """Show a command as it could be typed.

        Of its input only the size is shown, or the file's name. dispatch.sh is shown by its name,
        since its fifty lines would hide the rest.
        """
        shown = shlex.join(argv).replace(shlex.quote(dispatch_script()), '"$(cat remote/on_box/dispatch.sh)"')
        given = file or (f"{len(stdin)} bytes" if stdin else "")
        self(f"{where}$ {shown}" + (f"  < {given}" if given else ""))

    def data(self, text: object) -> None:
        """Print to standard output, where a program may read it."""
        self._print(text, self._out or sys.stdout, "")

    def _print(self, text: object, stream: TextIO | None, prefix: str) -> None:
        if stream is None:  # as Python has it where it was closed before: `>&-`
            return
        shown = encodable(visible(self.redacted(text)), getattr(stream, "encoding", None) or "utf-8")
        lines = "".join(f"{prefix}{line}\n" for line in shown.split("\n"))
        with self._lock:
            if self._is_drawn:
                self.now("")
            stream.write(lines)
            stream.flush()


def waiting(what: str, seconds: float, progress: str = "") -> str:
    """Say what is waited for, and for how long: `PyTorch (1m15s): 1.5 GB of 2.3 GB`."""
    return f"{what} ({duration(seconds)})" + (f": {progress}" if progress else "")


@contextmanager
def ticking(now: Callable[[str], None], what: str, progress: Callable[[], str] = lambda: "") -> Iterator[None]:
    """Show each second that something is waited for, until it is over.

    now: as `Sayer.now`. progress: what there is to say of it, such as bytes.
    """
    began, is_over = time.monotonic(), threading.Event()

    def tick() -> None:
        pause_s = FIRST_S
        while not is_over.wait(pause_s):
            pause_s = EACH_S
            with suppress(OSError, ValueError):  # the terminal is gone, or a file was closed just now
                now(waiting(what, time.monotonic() - began, progress()))

    thread = threading.Thread(target=tick, daemon=True)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()
        now("")
