"""Test how growing text is folded, by hand."""

from __future__ import annotations

import pytest

from rlhf_train.after.folded import Folded

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
