"""Fold growing text between words, for a terminal."""

from __future__ import annotations

from rich.cells import cell_len

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
