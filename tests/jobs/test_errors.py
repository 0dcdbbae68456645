from __future__ import annotations

import pytest

from jobs.errors import ExitCode, ToolkitError, error_of_text
from jobs.events import Error


def test_three_parts_as_they_are_printed() -> None:
    error = ToolkitError("cannot deploy", why="lin holds the lock", hint="wait", exit_code=ExitCode.BUSY)
    assert str(error) == "error: cannot deploy\n  why: lin holds the lock\n\nhint: wait"
    assert (error.what, error.why, error.hint, error.exit_code) == ("cannot deploy", "lin holds the lock", "wait", 5)


def test_more_lines_stand_under_the_first() -> None:
    assert str(ToolkitError("two mistakes", why="a: b\nc: d", hint="first\nthen")) == (
        "error: two mistakes\n"
        "  why: a: b\n"
        "       c: d\n"
        "\n"
        "hint: first\n"
        "      then"
    )  # fmt: skip


def test_parts_that_are_not_there_leave_no_trace() -> None:
    assert str(ToolkitError("only this")) == "error: only this"
    assert str(ToolkitError("this", hint="that")) == "error: this\n\nhint: that"
    assert str(ToolkitError("this", why=" \n\n", hint="\n")) == "error: this"
    assert ToolkitError("this").exit_code == ExitCode.USAGE


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("error: only this", ("only this", "", "")),
        ("before\nerror: this\n  why: a: b\n       c: d\n\nhint: e\n      then\n", ("this", "a: b\nc: d", "e\nthen")),
        ("error: this\n\nhint: that", ("this", "", "that")),
        ("error: this\n  why: error: deeper", ("this", "error: deeper", "")),
    ],
)  # fmt: skip
def test_an_error_is_read_back_from_its_text(text: str, parts: tuple[str, str, str]) -> None:
    error = error_of_text(text, ExitCode.UNFIT)
    assert error is not None and (error.what, error.why, error.hint, error.exit_code) == (*parts, 3)


def test_what_is_no_error_is_read_as_none() -> None:
    assert error_of_text("Traceback (most recent call last):\nKeyError: 1", ExitCode.INTERNAL) is None


def test_one_spelling_of_an_error() -> None:
    error = ToolkitError("cannot deploy", why="lin holds the lock", hint="wait", exit_code=ExitCode.BUSY)
    parts = {"what": "cannot deploy", "why": "lin holds the lock", "hint": "wait", "exit_code": 5}
    event = Error(rank=0, **parts)
    assert {name: getattr(error, name) for name in parts} == {name: getattr(event, name) for name in parts} == parts
    assert vars(error) == parts


def test_the_exit_codes_are_those_of_the_design() -> None:
    assert {code.name: code.value for code in ExitCode} == {
        "OK": 0, "INTERNAL": 1, "USAGE": 2, "UNFIT": 3, "TRAINING": 4, "BUSY": 5, "UNCERTAIN": 6, "LOST": 7,
        "UNREACHABLE": 8,
        "PREEMPTED": 75, "INTERRUPTED": 130, "CANCELLED": 143,
    }  # fmt: skip
