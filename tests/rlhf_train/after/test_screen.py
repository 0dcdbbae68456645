"""Test how answers are printed, by hand."""

from __future__ import annotations

import io
import os
import struct
import termios
from fcntl import ioctl

import pytest

from rlhf_train.after.screen import Screen

pytestmark = pytest.mark.pinned


class Pipe(io.StringIO):
    encoding = "utf-8"  # type: ignore[assignment]


class Terminal(Pipe):
    def isatty(self) -> bool:
        return True


def shown(pieces: list[str], out: io.StringIO) -> str:
    screen = Screen(out, Pipe())
    screen.begin()
    for piece in pieces:
        screen.piece(piece)
    screen.end()
    return out.getvalue()


def test_a_pipe_gets_the_text_as_it_is() -> None:
    text = "  word " * 30 + "\x1b[31m"
    assert shown([text[:50], text[50:]], Pipe()) == text.lstrip() + "\n"


def test_a_terminal_obeys_nothing_that_a_model_says() -> None:
    assert shown([" ", "\n a\x1b[2J", "b"], Terminal()) == "a\\x1b[2Jb\n"


@pytest.mark.parametrize(
    ("columns", "term", "expected"), [(79, "xterm", False), (80, "xterm", True), (120, "dumb", False)]
)
def test_two_answers_have_room_next_to_each_other_from_80_columns_on(
    columns: int, term: str, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", term)
    master, slave = os.openpty()
    ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    with os.fdopen(slave, "w") as out:
        assert Screen(out, Pipe()).has_room_for_two is expected
    os.close(master)
    assert not Screen(Pipe(), Pipe()).has_room_for_two
