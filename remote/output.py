"""The one place that prints what the verbs say: to standard error, or data to standard output, and
never a secret's value.

A value is found by itself, not by its name, also where it was quoted, escaped or split: what
surrounds it is often somebody else's text.
"""

from __future__ import annotations

import base64
import re
import shlex
import sys
import threading
from collections.abc import Iterable, Iterator, Sequence
from typing import TextIO

from jobs.formatting import encodable, fold, one_line, visible
from remote.scripts import dispatch_script

ERASE = "\r\x1b[2K"  # the line of a terminal
HIDDEN = "[hidden]"
SHORT = 6  # characters; a shorter value is hidden only where it stands as a word: `1` is in everything
# What shlex, repr, JSON, YAML and URLs put between two characters of a quoted value; and what may
# stand for its white space, also `', '`, where the value was split into words.
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
        self._pattern = (
            re.compile("|".join(_loose(form) for form in sorted(forms, key=lambda form: (-len(form), form))))
            if forms
            else None
        )

    def __call__(self, text: object) -> str:
        return self._pattern.sub(HIDDEN, str(text)) if self._pattern else str(text)


def _forms(value: str) -> Iterator[str]:
    """The value, the long lines of one that has several (a private key), and what HTTP's basic
    authentication makes of it.
    """
    yield value
    yield from (line.strip() for line in value.splitlines() if len(line.strip()) > SHORT)
    if len(value) >= SHORT:
        yield base64.b64encode(value.encode("utf-8", "surrogateescape")).decode().rstrip("=")


def _loose(value: str) -> str:
    """A pattern for the value as it stands, as shlex, repr, JSON and URLs write it, however often,
    and split at its white space.
    """
    words = [_QUOTES.join(map(_character, re.sub(r"""['"\\]""", "", word))) for word in value.split()]
    pattern = _GAP.join(word for word in words if word)
    if not pattern:
        return re.escape(value)
    return rf"(?<!\w){pattern}(?!\w)" if len(value) < SHORT else pattern


def _character(char: str) -> str:
    if _SAFE.fullmatch(char):
        return char if char.isalnum() else re.escape(char)
    units = re.findall("....", char.encode("utf-16-be", "surrogatepass").hex())  # JSON writes two for what is rare
    written = {
        re.escape(char),
        re.escape(char.encode("unicode_escape", "backslashreplace").decode()),
        "".join(f"%(?i:{byte:02x})" for byte in char.encode("utf-8", "surrogateescape")),
        "".join(rf"\\+u(?i:{unit})" for unit in units),
    }
    return f"(?:{'|'.join(sorted(written))})"


class Sayer:
    """Lines for a person, each in one piece, also out of several threads.

    Called with a text, it says it.
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
    ) -> None:
        """err, out: None for those of sys at the time of speaking. host: stands before each line on
        standard error.
        """
        self.redacted = redacted or Redaction()
        self._err, self._out, self._host, self._lock = err, out, host, lock or threading.RLock()
        self._is_drawn = False
        self.hide(*secrets)

    def of(self, host: str) -> Sayer:
        """The same, with the box's name before each line: for several boxes at once."""
        return Sayer(err=self._err, out=self._out, host=host, redacted=self.redacted, lock=self._lock)

    def hide(self, *values: str) -> None:
        """From now on these are not shown."""
        if values:
            self.redacted.add(*values)

    def __call__(self, text: object) -> None:
        """To standard error: a line, or several, such as a ToolkitError."""
        self._print(text, self._err or sys.stderr, f"{self._host}: " if self._host else "")

    def now(self, text: object) -> None:
        """What is only of the moment: on a terminal a line that the next one takes the place of,
        elsewhere nothing. "": it is over.
        """
        from jobs.views.console import console_on  # with the panel and all; most of what is said needs none of it

        stream = self._err or sys.stderr
        console = console_on(stream)
        if self._host or not console.is_terminal or console.is_dumb_terminal:
            return
        line = fold(one_line(self.redacted(text)), console.width - 1, 1)[0]
        with self._lock:
            if line or self._is_drawn:
                stream.write(f"{ERASE}{encodable(line, console.encoding)}")
                stream.flush()
            self._is_drawn = bool(line)

    def warning(self, text: object) -> None:
        self(f"warning: {text}")

    def command(self, where: str, argv: Sequence[str], stdin: bytes = b"") -> None:
        """A command as it could be typed; of its input the size alone, and dispatch.sh by its name:
        fifty lines would hide the rest.
        """
        shown, script = shlex.join(argv), shlex.quote(dispatch_script())
        for quoted in (script, shlex.join([script])[1:-1]):  # as it stands, and inside of what an ssh here is given
            shown = shown.replace(quoted, '"$(cat remote/on_box/dispatch.sh)"')
        self(f"{where}$ {shown}" + (f"  < {len(stdin)} bytes" if stdin else ""))

    def data(self, text: object) -> None:
        """To standard output: what a program may read."""
        self._print(text, self._out or sys.stdout, "")

    def _print(self, text: object, stream: TextIO, prefix: str) -> None:
        shown = encodable(visible(self.redacted(text)), getattr(stream, "encoding", None) or "utf-8")
        whole = "".join(f"{prefix}{line}\n" for line in shown.split("\n"))
        with self._lock:
            if self._is_drawn:
                self.now("")
            stream.write(whole)
            stream.flush()
