"""Print answers as they come: folded between words on a terminal, as they are in a pipe."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TextIO

from rich.text import Text

from jobs.formatting import encodable, visible
from jobs.views import console
from rlhf_train.after.columns import Columns
from rlhf_train.after.folded import Folded

COLUMNS = 80  # of a terminal that does not say
SIDE_BY_SIDE = 80  # columns from which two answers stand next to each other


class Screen:
    """Where answers are shown. Notes go to `notes`, and all else to `out`."""

    def __init__(self, out: TextIO, notes: TextIO) -> None:
        self._out, self._console, self._notes = out, console.console_on(out), console.console_on(notes)
        self.is_terminal, self.is_dumb = out.isatty(), self._console.is_dumb_terminal
        self._folded = Folded(self.width)
        self._has_begun = False

    @property
    def width(self) -> int:
        try:
            return os.get_terminal_size(self._out.fileno()).columns or COLUMNS
        except (OSError, ValueError):
            return COLUMNS

    @property
    def has_room_for_two(self) -> bool:
        return self.is_terminal and not self.is_dumb and self.width >= SIDE_BY_SIDE

    def begin(self) -> None:
        """Begin an answer. White space in front of its first word is not shown."""
        self._folded, self._has_begun = Folded(self.width), False

    def piece(self, text: str) -> None:
        """Show more of the answer."""
        if not self._has_begun:
            text = text.lstrip()
            self._has_begun = bool(text)
        if self.is_terminal:
            text = self._folded.push(visible(text))
        self._write(text)

    def end(self) -> None:
        """End the answer, and its line."""
        self._write(self._folded.flush() + "\n")

    def _write(self, text: str) -> None:
        self._out.write(encodable(text, self._out.encoding))
        self._out.flush()

    def title(self, text: str) -> None:
        self._console.print(Text(self._shown(text), style="bold"), soft_wrap=False, overflow="fold")

    def line(self, text: str = "") -> None:
        self._console.print(self._shown(text), soft_wrap=False, overflow="fold")

    def next_to_each_other(self, titles: Sequence[str]) -> Columns:
        """Return columns that answers grow in."""
        return Columns(self._console, self.width, titles)

    def note(self, text: object) -> None:
        """Say something that is no answer."""
        if isinstance(text, Exception):
            console.print_error(text, self._notes)
        else:
            self._notes.print(encodable(visible(text), self._notes.encoding), soft_wrap=not self._notes.is_terminal)

    def _shown(self, text: str) -> str:
        return encodable(visible(text), self._console.encoding)
