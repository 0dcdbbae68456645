"""Show answers next to each other on a terminal while they grow.

A line that all of them have passed is printed for good; only those below it are drawn again. So
long answers scroll as any text does.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest
from types import TracebackType

from rich.cells import cell_len
from rich.console import Console
from rich.control import Control
from rich.segment import ControlType
from rich.text import Text

from jobs.formatting import encodable, visible
from rlhf_train.after.folded import Folded

GAP = 3  # columns of the terminal between two answers


class Column:
    """The folded lines of one growing text. White space around it is not shown."""

    def __init__(self, width: int) -> None:
        self._folded, self._space, self._has_begun = Folded(width), "", False
        self.lines, self.is_whole = [""], False

    def push(self, text: str) -> None:
        text = self._space + text if self._has_begun else text.lstrip()
        body = text.rstrip()
        self._space = text[len(body) :]
        self._has_begun = self._has_begun or bool(body)
        self._add(self._folded.push(visible(body)))

    def finish(self) -> None:
        self._add(self._folded.flush())
        self.is_whole = True

    @property
    def certain(self) -> int:
        """The number of lines that no longer grow."""
        return len(self.lines) - (not self.is_whole)

    def _add(self, text: str) -> None:
        first, *more = text.split("\n")
        self.lines[-1] += first
        self.lines += more


class Columns:
    """Answers on a terminal, under their titles. Use it in a `with`; at its end all is printed."""

    def __init__(self, console: Console, width: int, titles: Sequence[str]) -> None:
        self._console, self._titles = console, titles
        # The last place of a line stays empty: there terminals differ in where the cursor is.
        self._width = (width - 1 - GAP * (len(titles) - 1)) // len(titles)
        self._columns = [Column(self._width) for _ in titles]
        self._turns = list(self._columns)  # the one that has not grown for longest is the first
        self._printed, self._drawn = 0, 0  # lines: for good, and those that are drawn again, the cursor on the last

    def __enter__(self) -> Columns:
        self.row(self._titles, style="bold")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        for place in range(len(self._columns)):
            self.finish(place)

    def next_to_grow(self) -> int | None:
        """Return the answer with the fewest lines, in turn; None: all are whole.

        So no answer gets far ahead of the others, and what is drawn again stays small.
        """
        growing = [column for column in self._turns if not column.is_whole]
        return self._columns.index(min(growing, key=lambda column: len(column.lines))) if growing else None

    def push(self, place: int, text: str) -> None:
        """Show more of an answer."""
        column = self._columns[place]
        column.push(text)
        self._turns.remove(column)
        self._turns.append(column)
        self._draw()

    def finish(self, place: int) -> None:
        self._columns[place].finish()
        self._draw()

    def row(self, texts: Sequence[str], style: str = "") -> None:
        """Print whole texts next to each other."""
        columns = [Column(self._width) for _ in texts]
        for column, text in zip(columns, texts, strict=True):
            column.push(text)
            column.finish()
        self._print([*self._lines(columns), ""], style)

    def _draw(self) -> None:
        lines = self._lines(self._columns)
        certain = min((column.certain for column in self._columns if not column.is_whole), default=len(lines))
        if self._printed == len(lines):  # all is printed
            return
        growing = lines[certain:][: self._console.height - 1] or [""]  # what is above the screen cannot be drawn again
        # No line becomes shorter, so writing over it is enough. The last one may have the ^C of
        # somebody's Ctrl-C.
        up: list[tuple[ControlType, int | str]] = [(ControlType.CURSOR_UP, self._drawn - 1)] if self._drawn > 1 else []
        self._console.control(Control((ControlType.ERASE_IN_LINE, 2), ControlType.CARRIAGE_RETURN, *up))
        self._print(lines[self._printed : certain] + growing)
        self._printed, self._drawn = certain, len(growing)

    def _print(self, lines: Sequence[str], style: str = "") -> None:
        """Print lines, and leave the cursor on the last."""
        text = Text("\n".join(lines), style=style)
        self._console.print(text, no_wrap=True, overflow="ignore", crop=False, end="")

    def _lines(self, columns: Sequence[Column]) -> list[str]:
        rows = zip_longest(*(column.lines for column in columns), fillvalue="")
        return [(" " * GAP).join(map(self._padded, row)).rstrip() for row in rows]

    def _padded(self, text: str) -> str:
        text = encodable(text, self._console.encoding)
        return text + " " * (self._width - cell_len(text))
