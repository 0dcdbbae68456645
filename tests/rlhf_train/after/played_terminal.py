"""A terminal played by a few lines: it knows the codes with which answers are drawn again."""

from __future__ import annotations

import io
import re

from rich.cells import cell_len


class PlayedTerminal(io.StringIO):
    """What a terminal of some lines shows, and what has scrolled away above it."""

    encoding = "utf-8"  # type: ignore[assignment]

    def __init__(self, height: int = 24) -> None:
        super().__init__()
        self.height, self.row, self.column = height, 0, 0
        self.cells: list[dict[int, str]] = [{}]

    def isatty(self) -> bool:
        return True

    def write(self, text: str) -> int:
        for count, code, char in re.findall(r"\x1b\[([?0-9;]*)([A-Za-z])|([^\x1b])", text):
            if code == "A":
                self.row = max(self.row - int(count), len(self.cells) - self.height, 0)
            elif code == "K":
                self.cells[self.row] = {}
            elif char == "\n":
                self.row, self.column = self.row + 1, 0
                self.cells += [{}] * (self.row == len(self.cells))
            elif char == "\r":
                self.column = 0
            elif char:
                self.cells[self.row][self.column] = char
                self.column += cell_len(char)
        return len(text)

    @property
    def shown(self) -> list[str]:
        rows = []
        for cells in self.cells:
            row = ""
            for column in sorted(cells):
                row += " " * (column - cell_len(row)) + cells[column]
            rows.append(row.rstrip())
        return rows
