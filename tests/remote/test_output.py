"""What is printed, where, and what never is."""

from __future__ import annotations

import base64
import io
import json
import shlex
import threading
import time
import urllib.parse
from collections.abc import Callable

import pytest

from jobs.errors import ToolkitError
from remote import output
from remote.output import HIDDEN, Sayer
from remote.scripts import dispatch_script

TOKEN = "hf_AbCdEf0123456789"
VALUES = [
    TOKEN,
    "pass word",
    'it\'s $(a) "b"',
    "back\\slash",
    "größe-中文-🔑",
    "a/b+c=d&e%20f",
    "tab\tand\nline and more",
]


def printed(value: str, text: str) -> str:
    err = io.StringIO()
    Sayer([value], err=err)(text)
    return err.getvalue()


def test_a_command_shows_our_long_script_by_its_name() -> None:
    err = io.StringIO()
    there = ["sh", "-c", dispatch_script(), "rlhf-box", "/a b", "--", "list"]
    Sayer(err=err).command("gpu-box", there)
    assert err.getvalue().splitlines() == [
        """gpu-box$ sh -c "$(cat remote/on_box/dispatch.sh)" rlhf-box '/a b' -- list""",
    ]


def test_streams_and_hosts() -> None:
    err, out = io.StringIO(), io.StringIO()
    say = Sayer([TOKEN], err=err, out=out)
    say("one")
    say.of("gpu-box")(f"two\nthree {TOKEN}")
    say.of("gpu-box").data(json.dumps({"token": TOKEN}))
    say.warning("four")
    say(ToolkitError("five", why="six", hint="seven"))
    assert (
        err.getvalue()
        == f"one\ngpu-box: two\ngpu-box: three {HIDDEN}\nwarning: four\nerror: five\n  why: six\n\nhint: seven\n"
    )
    assert out.getvalue() == f'{{"token": "{HIDDEN}"}}\n'


class Terminal(io.StringIO):
    encoding = "utf-8"  # type: ignore[assignment]

    def isatty(self) -> bool:
        return True


def test_what_is_of_the_moment_is_drawn_over_on_a_terminal_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "30")
    pipe, terminal = io.StringIO(), Terminal()
    for err in (pipe, terminal):
        say = Sayer([TOKEN], err=err, out=io.StringIO())
        say.now("")
        say.now(f"pip: {TOKEN}\x1b[2J")
        say.now("pip: a line that is longer than the terminal is wide")
        say("a line that stays")
        say.of("gpu-box").now("one of several")
    assert pipe.getvalue() == "a line that stays\n"
    drawn = terminal.getvalue().split("\r\x1b[2K")
    assert drawn == ["", f"pip: {HIDDEN}\\x1b[2J", "pip: a line that is longer …", "a line that stays\n"]
    monkeypatch.setenv("TERM", "dumb")
    Sayer(err=terminal).now("pip")
    assert terminal.getvalue().endswith("stays\n")


def test_in_a_pipe_what_is_of_the_moment_is_a_line_each_half_minute() -> None:
    """The clock starts again with each state, which an empty text ends."""
    pipe, times = io.StringIO(), iter([0, 29, 30, 59, 61, 62, 100, 129, 131])
    say = Sayer(err=pipe, host="gpu-box", clock=lambda: float(next(times)))
    for text in ("at 0", "at 29", "at 30", "at 59", "at 61"):
        say.now(text)
    say.now("")
    for text in ("at 100", "at 129", "at 131"):
        say.now(text)
    assert pipe.getvalue() == "gpu-box: at 30\ngpu-box: at 61\ngpu-box: at 131\n"


def test_what_takes_long_shows_a_clock_and_what_is_quick_shows_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(output, "EACH_S", 0.5)
    quick, shown, sizes = list[str](), list[str](), iter(["1 kB", "2 kB", ""])
    with output.ticking(quick.append, "probing"):
        pass
    with pytest.raises(KeyboardInterrupt), output.ticking(shown.append, "probing", lambda: next(sizes)):
        time.sleep(1.55)
        raise KeyboardInterrupt
    assert quick == [""]
    assert shown == ["probing (0s): 1 kB", "probing (1s): 2 kB", "probing (1s)", ""]


def test_a_command_is_shown_without_its_input() -> None:
    err = io.StringIO()
    Sayer(err=err).command("gpu-box", ["touch", "a b"], b"secret input")
    assert err.getvalue() == "gpu-box$ touch 'a b'  < 12 bytes\n"


@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize(
    "write",
    [
        str,
        shlex.quote,
        lambda value: shlex.quote(shlex.quote(value)),
        lambda value: shlex.join(["ssh", "h", shlex.join(["echo", f"--token={value}"])]),
        lambda value: str(shlex.split(shlex.quote(value))),
        lambda value: str(value.split()),
        repr,
        lambda value: repr(repr(value)),
        json.dumps,
        lambda value: json.dumps(json.dumps(value)),
        lambda value: json.dumps(value, ensure_ascii=False),
        urllib.parse.quote,
        lambda value: urllib.parse.quote(value, safe=""),
        urllib.parse.quote_plus,
        lambda value: base64.b64encode(value.encode()).decode(),
        lambda value: value.replace(" ", "\n"),
    ],
    ids=[
        "plain",
        "quoted",
        "twice",
        "ssh",
        "list",
        "split",
        "repr",
        "repr2",
        "json",
        "json2",
        "json-utf8",
        "url",
        "url-all",
        "form",
        "base64",
        "wrapped",
    ],
)
def test_a_value_is_not_shown(value: str, write: Callable[[str], str]) -> None:
    text = printed(value, f"before {write(value)} after")
    left = text.replace(HIDDEN, "").removeprefix("before ").removesuffix(" after\n")
    assert HIDDEN in text and text.startswith("before ") and text.endswith("after\n")
    for word in value.split():
        core = word.strip("'\"$()\\")
        assert len(core) < 3 or core not in left


def test_a_value_that_a_terminal_would_obey() -> None:
    assert printed("se\x1b[2Jcret", "x se\x1b[2Jcret y") == f"x {HIDDEN} y\n"
    assert printed("se\x1b[2Jcret", r"x se\x1b[2Jcret y") == f"x {HIDDEN} y\n"
    assert printed("", "\x1b[2J") == "\\x1b[2J\n"


def test_what_is_no_secret_stays() -> None:
    text = "step 12: 1 of 10, seed=1; abc"
    assert printed("1", text) == f"step 12: {HIDDEN} of 10, seed={HIDDEN}; abc\n"
    assert printed("", text) == printed("   ", text) == printed("'", text) == f"{text}\n"
    assert printed(TOKEN, TOKEN[:-1]) == f"{TOKEN[:-1]}\n"


def test_each_line_of_a_private_key() -> None:
    key = "-----BEGIN KEY-----\nAAAAbbbbCCCC\nddddEEEEffff\n-----END KEY-----"
    assert printed(key, "found AAAAbbbbCCCC in it") == f"found {HIDDEN} in it\n"
    assert printed(key, key) == f"{HIDDEN}\n"


def test_the_longer_of_two() -> None:
    err = io.StringIO()
    say = Sayer(["secret"], err=err)
    say.hide("secret-and-more")
    say("secret-and-more secret")
    assert err.getvalue() == f"{HIDDEN} {HIDDEN}\n"


def test_a_stream_that_cannot_say_all() -> None:
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="ascii")
    Sayer(err=stream)("größe \udce9")
    assert raw.getvalue() == b"gr\\xf6\\xdfe \\udce9\n"


def test_streams_that_are_closed_take_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Python has None for what the shell closed: `fab ps >&-`."""
    monkeypatch.setattr("sys.stdout", None)
    monkeypatch.setattr("sys.stderr", None)
    say = Sayer()
    say("one")
    say.now("two")
    say.data("three")


def test_lines_of_several_threads_stay_whole() -> None:
    err = io.StringIO()
    say = Sayer(err=err)
    threads = [threading.Thread(target=lambda name=name: [say.of(name)("a\nb") for _ in range(200)]) for name in "xyz"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    lines = err.getvalue().splitlines()
    assert all(lines[index + 1] == lines[index].replace("a", "b") for index in range(0, len(lines), 2))


def test_a_long_text_takes_no_time() -> None:
    started = time.monotonic()
    value = "a'b c " * 20
    printed(value, ("a'b " + "\\" * 5000 + "c ") * 40)
    printed(value, value[:-2] * 400)
    assert time.monotonic() - started < 5
