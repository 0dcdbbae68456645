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
from collections.abc import Iterable, Iterator, Sequence
from typing import TextIO

from jobs.formatting import encodable, fold, one_line, visible
from remote.scripts import dispatch_script

ERASE = "\r\x1b[2K"  # erases a terminal's line
HIDDEN = "[hidden]"
# In characters. A shorter value is hidden only where it stands as a word: `1` is in everything.
SHORT = 6
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
    ) -> None:
        """Set where to print, and the secrets to hide.

        err, out: None for those of sys at the time of printing. host: printed before each line on
        standard error.
        """
        self.redacted = redacted or Redaction()
        self._err, self._out, self._host, self._lock = err, out, host, lock or threading.RLock()
        self._is_drawn = False
        self.hide(*secrets)

    def of(self, host: str) -> Sayer:
        """Return a Sayer that prints the box's name before each line, for several boxes."""
        return Sayer(err=self._err, out=self._out, host=host, redacted=self.redacted, lock=self._lock)

    def hide(self, *values: str) -> None:
        """Hide these values from now on."""
        if values:
            self.redacted.add(*values)

    def __call__(self, text: object) -> None:
        """Print one line or several, such as a ToolkitError, to standard error."""
        self._print(text, self._err or sys.stderr, f"{self._host}: " if self._host else "")

    def now(self, text: object) -> None:
        """Show a passing state: on a terminal a line that the next one replaces, elsewhere nothing.

        "": the state is over; its line is erased.
        """
        from jobs.views.console import console_on  # imports the panel, which most messages do not need

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
        """Show a command as it could be typed.

        Of its input only the size is shown. dispatch.sh is shown by its name, since its fifty lines
        would hide the rest.
        """
        shown = shlex.join(argv).replace(shlex.quote(dispatch_script()), '"$(cat remote/on_box/dispatch.sh)"')
        self(f"{where}$ {shown}" + (f"  < {len(stdin)} bytes" if stdin else ""))

    def data(self, text: object) -> None:
        """Print to standard output, where a program may read it."""
        self._print(text, self._out or sys.stdout, "")

    def _print(self, text: object, stream: TextIO, prefix: str) -> None:
        shown = encodable(visible(self.redacted(text)), getattr(stream, "encoding", None) or "utf-8")
        lines = "".join(f"{prefix}{line}\n" for line in shown.split("\n"))
        with self._lock:
            if self._is_drawn:
                self.now("")
            stream.write(lines)
            stream.flush()
