"""Turn the tokens of an answer into text while they come, a piece at a time.

What may still change is held back: bytes of a character that is not whole, and what may become a
stop text such as the next `Human:`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

UNFINISHED = "\ufffd"  # what a decoder writes for a character whose bytes are not all there


class AnswerText:
    """The text of one answer, which grows."""

    def __init__(
        self, decode: Callable[[list[int]], str], context: Sequence[int] = (), stop_texts: Sequence[str] = ()
    ) -> None:
        """context: the last tokens before the answer.

        Some tokenizers drop the first space of a text; behind other tokens they keep it.
        """
        self._decode, self._context, self._stop_texts = decode, list(context), tuple(stop_texts)
        self._before = len(decode(self._context))
        self._tokens: list[int] = []
        self._given = 0  # characters that were returned
        self.is_stopped = False  # by one of `stop_texts`

    def push(self, token: int) -> str:
        """Return the text that is certain now and was not before."""
        self._tokens.append(token)
        text = self._text()
        if (end := self._stop(text)) is not None:
            self.is_stopped = True
            return self._give(text[:end])
        text = text.rstrip(UNFINISHED)
        return self._give(text[: len(text) - self._maybe_stop(text)])

    def finish(self) -> str:
        """Return what was held back, since no more tokens come."""
        return "" if self.is_stopped else self._give(self._text())

    @property
    def text(self) -> str:
        """The whole answer so far, what is held back included."""
        text = self._text()
        return text[: self._stop(text)]

    @property
    def tokens(self) -> list[int]:
        """The tokens of `text`: without those that made the stop text."""
        kept, wanted = len(self._tokens), len(self.text)
        while kept and len(self._text(kept - 1)) >= wanted:
            kept -= 1
        return self._tokens[:kept]

    def _text(self, count: int | None = None) -> str:
        return self._decode(self._context + self._tokens[:count])[self._before :]

    def _give(self, text: str) -> str:
        new, self._given = text[self._given :], max(self._given, len(text))
        return new

    def _stop(self, text: str) -> int | None:
        """Return where the first stop text begins; None: nowhere."""
        return min((place for stop in self._stop_texts if (place := text.find(stop)) >= 0), default=None)

    def _maybe_stop(self, text: str) -> int:
        """Count the characters at the end that may be the beginning of a stop text."""
        return max(
            (size for stop in self._stop_texts for size in range(1, len(stop)) if text.endswith(stop[:size])),
            default=0,
        )
