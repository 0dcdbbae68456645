import ast
import io
import os
import pty
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from jobs import formatting
from jobs.errors import ToolkitError
from jobs.views import console, panel, plain, report
from jobs.views.console import print_error, print_report, view
from jobs.views.panel import Live
from jobs.views.plain import Plain
from tests.raw_events import END_1, END_2, END_3, PLAN, ROLLOUTS, event


@pytest.fixture
def tty(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[int, io.TextIOWrapper]]:
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE", "COLORTERM", "COLUMNS", "LINES"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    master, slave = pty.openpty()
    with os.fdopen(slave, "w", encoding="utf-8") as stream:
        yield master, stream
    os.close(master)


def seen_on(master: int, stream: io.TextIOWrapper) -> str:
    with view(stream) as live:
        assert isinstance(live, Live)
        live.feed(END_2)
    said = b""
    while not said.endswith(b"\x1b[?25h"):  # the cursor is shown again
        said += os.read(master, 65536)
    return said.decode()


def test_a_terminal_gets_the_panel_in_colour(tty: tuple[int, io.TextIOWrapper]) -> None:
    assert "\x1b[32m✓" in seen_on(*tty)


def test_no_color_takes_the_colour_only(tty: tuple[int, io.TextIOWrapper], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    text = seen_on(*tty)
    assert "✓ " in text and "accuracy 87.4%" in text and not re.search(r"\x1b\[[\d;]*3\dm", text)


def test_a_terminal_folds_between_words(tty: tuple[int, io.TextIOWrapper], monkeypatch: pytest.MonkeyPatch) -> None:
    """A piped line stays one line; a path that is too long for the line is begun on the next."""
    monkeypatch.setenv("COLUMNS", "40")
    text = "the same command resumes in /runs/with/a/long/name from update 12 of step 3"
    console.console_on(tty[1]).print(text)
    tty[1].flush()
    shown = os.read(tty[0], 4096).decode().replace("\r", "").splitlines()
    assert [line.rstrip() for line in shown] == [
        "the same command resumes in",
        "/runs/with/a/long/name from update 12 of",
        "step 3",
    ]
    pipe = io.StringIO()
    console.console_on(pipe).print(text)
    assert pipe.getvalue() == f"{text}\n"


def test_quiet_shows_warnings_and_errors_alone(capsys: pytest.CaptureFixture[str]) -> None:
    with view(quiet=True) as quiet:
        for each in (PLAN, *ROLLOUTS, event("warning", 3, message="slow"), event("error", 3, what="no"), END_3):
            quiet.feed(each)
    assert capsys.readouterr().err.splitlines() == ["step 3  warning: slow", "error: step 3: no"]


def test_a_dumb_terminal_gets_lines(tty: tuple[int, io.TextIOWrapper], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    assert isinstance(view(tty[1]), Plain)


def test_a_terminal_without_the_characters_gets_lines(tty: tuple[int, io.TextIOWrapper]) -> None:
    with io.TextIOWrapper(os.fdopen(os.dup(tty[1].fileno()), "wb"), encoding="ascii") as stream:
        assert stream.isatty() and isinstance(view(stream), Plain)


def test_a_pipe_gets_lines_on_standard_error(capsys: pytest.CaptureFixture[str]) -> None:
    with view() as log:
        assert isinstance(log, Plain)
        log.feed(END_2)
    said = capsys.readouterr()
    assert said.out == "" and said.err.startswith("step 2  done in 38s")


def test_report_is_data_and_goes_to_standard_output(capsys: pytest.CaptureFixture[str]) -> None:
    print_report([END_1])
    said = capsys.readouterr()
    assert "perplexity" in said.out and said.err == ""


def test_an_error_goes_to_standard_error_as_it_stands(capsys: pytest.CaptureFixture[str]) -> None:
    print_error(ToolkitError("cannot find [/model] " + "x" * 100, why="it is\ngone \x1b[2J", hint="look :eyes:"))
    said = capsys.readouterr()
    assert said.out == ""
    assert (
        said.err
        == "error: cannot find [/model] " + "x" * 100 + "\n  why: it is\n       gone \\x1b[2J\n\nhint: look :eyes:\n"
    )


@pytest.mark.parametrize("module", [console, plain, panel, report, formatting])
def test_a_view_needs_no_training_code(module: ModuleType) -> None:
    tree = ast.parse(Path(str(module.__file__)).read_text(encoding="utf-8"))
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    names |= {str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert {name.split(".")[0] for name in names} & {
        "torch",
        "rlhf_train",
        "remote",
        "transformers",
        "deepspeed",
    } == set()
