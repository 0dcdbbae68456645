"""Test how answers are folded and printed, by hand."""

from __future__ import annotations

import io
import os
import struct
import termios
from fcntl import ioctl

import pytest

from rlhf_train.after.screen import Folded, Screen

pytestmark = pytest.mark.pinned


def folded(text: str, width: int, size: int = 1) -> str:
    """Fold a text that comes in pieces of `size` characters."""
    fold = Folded(width)
    return "".join(fold.push(text[i : i + size]) for i in range(0, len(text), size)) + fold.flush()


@pytest.mark.parametrize("size", [1, 3, 100])
@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("the red cat runs", "the red\ncat runs"),
        ("the red\n\ncat", "the red\n\ncat"),
        ("exactly! 7", "exactly!\n7"),
        ("abcd efgh", "abcd\nefgh"),  # the space counts
        ("  in front", "  in\nfront"),
        ("a verylongword b", "a\nverylong\nword b"),  # longer than a line
        ("你好你好，你好", "你好你\n好，你好"),  # two columns each; a comma begins no line
        ("是🙂🙂🙂🙂", "是🙂🙂🙂\n🙂"),
        ("abcdefg 👩\u200d🚀", "abcdefg\n👩\u200d🚀"),  # one sign
        ("你好 ok!", "你好 ok!"),
    ],
)
def test_lines_are_folded_between_words(text: str, expected: str, size: int) -> None:
    assert folded(text, 8, size) == expected


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


@pytest.mark.parametrize(("columns", "expected"), [(99, False), (100, True)])
def test_two_answers_have_room_next_to_each_other_from_100_columns_on(columns: int, expected: bool) -> None:
    master, slave = os.openpty()
    ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    with os.fdopen(slave, "w") as out:
        assert Screen(out, Pipe()).has_room_for_two is expected
    os.close(master)
    assert not Screen(Pipe(), Pipe()).has_room_for_two


def test_what_is_shown_meanwhile_is_replaced() -> None:
    """On 80 columns it fills 79: in the last one a terminal would begin a new line."""
    out = Terminal()
    screen = Screen(out, Pipe())
    screen.meanwhile("answering ... 你" + "x" * 100)
    screen.meanwhile()
    assert out.getvalue() == "\ranswering ... 你" + "x" * 63 + "\r" + "\r" + " " * 79 + "\r"


def test_two_answers_stand_next_to_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    out = Terminal()
    screen = Screen(out, Pipe())
    monkeypatch.setattr(screen._console, "width", 40)
    monkeypatch.setattr(screen._console, "no_color", True)
    screen.next_to_each_other(["step 1", "step 3"], [" the red cat runs here", "no"])
    lines = [line.rstrip() for line in out.getvalue().replace("\x1b[1m", "").replace("\x1b[0m", "").splitlines()]
    assert lines == ["step 1              step 3", "the red cat runs    no", "here"]
