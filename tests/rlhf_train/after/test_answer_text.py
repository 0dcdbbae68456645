"""Test the text of a growing answer: characters of several tokens, stop texts, first spaces."""

from __future__ import annotations

import pytest

from rlhf_train.after.answer_text import AnswerText

pytestmark = pytest.mark.pinned


def by_bytes(tokens: list[int]) -> str:
    """A tokenizer whose tokens are bytes."""
    return bytes(tokens).decode("utf-8", errors="replace")


def pieces(text: bytes, stops: tuple[str, ...] = ()) -> list[str]:
    answer = AnswerText(by_bytes, (), stops)
    given = []
    for byte in text:
        given.append(answer.push(byte))
        if answer.is_stopped:
            break
    return [*given, answer.finish()]


def test_half_a_character_is_held_back() -> None:
    """An emoji has four bytes, a Chinese sign three, and each comes with its last one."""
    assert pieces("a🙂你!".encode()) == ["a", "", "", "", "🙂", "", "", "你", "!", ""]


def test_bytes_that_never_become_a_character_are_given_at_the_end() -> None:
    assert pieces(b"a\xf0\x9f") == ["a", "", "", "\ufffd"]
    assert "".join(pieces(b"\xf0b\xffc")) == "\ufffdb\ufffdc"


def test_what_may_become_a_stop_text_is_held_back() -> None:
    assert pieces(b"a\n\nHu", ("\n\nHuman:",)) == ["a", "", "", "", "", "\n\nHu"]
    assert pieces(b"a\nb", ("\n\nHuman:",)) == ["a", "", "\nb", ""]


def test_a_stop_text_ends_the_answer_and_is_no_part_of_it() -> None:
    assert "".join(pieces(b"a.\n\nHuman: b", ("\n\nHuman:",))) == "a."
    answer = AnswerText(by_bytes, (), ("STOP",))
    for byte in b"okSTOP":
        answer.push(byte)
    assert answer.is_stopped and answer.text == "ok" and bytes(answer.tokens) == b"ok"


def test_the_first_space_is_kept() -> None:
    """As a LLaMA 2 tokenizer decodes: the first space of a text is dropped."""

    def decode(tokens: list[int]) -> str:
        return by_bytes(tokens).removeprefix(" ")

    assert AnswerText(decode, ()).push(ord(" ")) == ""
    behind = AnswerText(decode, b":")
    assert behind.push(ord(" ")) + behind.push(ord("a")) == " a"
