"""Print answers as they come: folded between words on a terminal, as they are in a pipe."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TextIO

from rich.cells import cell_len, set_cell_size
from rich.table import Table
from rich.text import Text

from jobs.formatting import encodable, visible
from jobs.views import console

COLUMNS = 80  # of a terminal that does not say
SIDE_BY_SIDE = 100  # columns from which two answers stand next to each other
JOINER = "\u200d"  # makes one sign of several emoji
CLINGS = "，。！？、；：）」』》】…"  # full-width signs that do not begin a line


class Folded:
    """Folds growing text at a width, between words.

    Wide signs (Chinese, emoji) are words of their own.
    """

    def __init__(self, width: int) -> None:
        self._width, self._column, self._gap, self._word = width, 0, "", ""

    def push(self, text: str) -> str:
        """Return what can be printed now. The last word may grow, and waits."""
        out = ""
        for char in text:
            if char == "\n":
                out += self.flush() + "\n"
                self._column, self._gap = 0, ""
            elif char.isspace() and char != "\u00a0":
                out += self.flush()
                self._gap += " " if char == "\t" else char
            else:
                if self._word and self._begins_word(char):
                    out += self.flush()
                self._word += char
                if cell_len(self._word) >= self._width:  # no word; it is folded where the line ends
                    out += self.flush()
        return out

    def flush(self) -> str:
        """Return the word that waits."""
        word, self._word = self._word, ""
        if not word:
            return ""
        gap, self._gap = self._gap, ""
        size = cell_len(word)
        if self._column and self._column + cell_len(gap) + size > self._width:
            self._column = size
            return "\n" + word
        self._column += cell_len(gap) + size
        return gap + word

    def _begins_word(self, char: str) -> bool:
        is_wide, was_wide = cell_len(char) == 2, cell_len(self._word[-1]) == 2
        joined = self._word[-1] == JOINER or char in CLINGS or cell_len(char) == 0
        return (is_wide or (was_wide and char.isalnum())) and not joined


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
        return self.is_terminal and self.width >= SIDE_BY_SIDE

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

    def meanwhile(self, text: str = "") -> None:
        """Show a text in place of an answer that is not there yet; "": take it away again.

        The next text on the screen replaces it.
        """
        self._write("\r" + set_cell_size(self._shown(text), self.width - 1) + "\r")

    def next_to_each_other(self, titles: Sequence[str], answers: Sequence[str]) -> None:
        table = Table.grid(padding=(0, 4, 0, 0), expand=True)
        for _ in titles:
            table.add_column(ratio=1, overflow="fold")
        table.add_row(*(Text(self._shown(title), style="bold") for title in titles))
        table.add_row(*(Text(self._shown(answer.strip())) for answer in answers))
        self._console.print(table)

    def note(self, text: object) -> None:
        """Say something that is no answer."""
        if isinstance(text, Exception):
            console.print_error(text, self._notes)
        else:
            self._notes.print(encodable(visible(text), self._notes.encoding), soft_wrap=not self._notes.is_terminal)

    def _shown(self, text: str) -> str:
        return encodable(visible(text), self._console.encoding)
