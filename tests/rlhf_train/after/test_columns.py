"""Test answers that grow next to each other, by hand."""

from __future__ import annotations

import pytest
from rich.console import Console

from rlhf_train.after.columns import Columns
from tests.rlhf_train.after.played_terminal import PlayedTerminal

pytestmark = pytest.mark.pinned


def columns_on(out: PlayedTerminal, titles: list[str], width: int) -> Columns:
    return Columns(Console(file=out, width=width, height=out.height, color_system=None), width, titles)


def test_both_grow_and_the_last_word_of_each_waits() -> None:
    """24 columns: 10 for each, 3 between them, and the last one empty."""
    out = PlayedTerminal()
    with columns_on(out, ["one", "the second one"], 24) as columns:
        columns.push(0, " \n the red")
        columns.push(1, "no ")
        assert out.shown == ["one          the second", "             one", "the"]
        columns.push(0, " cat runs")
        columns.push(1, "你好\x1b[2Jx\n\n")
        assert out.shown[2:] == ["the red      no 你", "cat          好\\x1b[2Jx"]
        columns.finish(1)
        columns.push(0, " 🙂\nand\n\nso on ")
        assert out.shown[2:] == ["the red      no 你", "cat runs     好\\x1b[2Jx", "🙂", "and", "", "so"]
    columns.row(["reward 1.00", ""])
    assert out.shown[6:] == ["", "so on", "reward", "1.00", ""]


def test_what_outgrows_the_screen_is_whole_at_the_end() -> None:
    """The second answer gets far ahead in one piece."""
    out = PlayedTerminal(height=5)
    numbers = [str(number) for number in range(20)]
    with columns_on(out, ["a", "b"], 24) as columns:
        columns.push(1, "\n".join(numbers))
        assert out.shown == ["a            b", *[" " * 13 + number for number in numbers[:4]]]
        for number in numbers[:12]:
            columns.push(0, f"x{number}\n")
    pairs = [f"x{number}".ljust(13) + number if int(number) < 12 else " " * 13 + number for number in numbers]
    assert out.shown == ["a            b", *pairs, ""]


def test_the_shorter_one_grows_next_and_equal_ones_in_turn() -> None:
    with columns_on(PlayedTerminal(), ["a", "b"], 24) as columns:
        turns = []
        for piece in ("a ", "b ", "a ", "b\nb ", "a ", "a\na\na ", "b "):
            turns.append(columns.next_to_grow())
            columns.push("ab".index(piece[0]), piece)
        assert turns == [0, 1, 0, 1, 0, 0, 1]
        columns.finish(1)
        assert columns.next_to_grow() == 0
        columns.finish(0)
        assert columns.next_to_grow() is None
