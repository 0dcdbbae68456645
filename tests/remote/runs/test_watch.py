"""Watching over connections that break: what was shown is compared with the file.

The far end is a real process (far_end.py), which is killed, frozen and refused. Ctrl-C is a real
signal to a real process that runs `follow`.
"""

import contextlib
import fcntl
import io
import json
import math
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import IO, Any

import pytest
from rich.console import Console

from jobs.errors import ExitCode, ToolkitError
from jobs.views.console import console_on
from jobs.views.panel import Live
from jobs.views.plain import Plain
from remote.runs.frames import ConnectionLost, Frame, Framing, Reread, StreamTimeouts, Tail
from remote.runs.job_state import JobState, state_text
from remote.runs.views import JsonLines, PanelView, RawLog, Since, View, WatchedRun, named, parse_since, view_of
from remote.runs.watch import Watched, follow

FAR_END = Path(__file__).parents[1] / "far_end.py"
WHERE = WatchedRun("gpu-box", "demo")
LIMITS = StreamTimeouts(silence_s=0.5, connect_s=10.0, first_pause_s=0.01, longest_pause_s=0.05)
PATIENT = replace(LIMITS, silence_s=5.0)
RUNNING, ENDED = "run=demo alive=1 training=1", "run=demo alive=0 training=0 exit=0"


class Far:
    """A run on the other end of a line."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.processes: list[subprocess.Popen[bytes]] = []
        self.runs: list[str] = []  # asked for, by each connection
        self.say("job", RUNNING)

    def say(self, name: str, text: str) -> None:
        beside = self.folder / f"{name}.new"
        beside.write_text(text, encoding="utf-8")
        beside.replace(self.folder / name)

    def write(self, data: bytes, name: str = "events") -> None:
        with (self.folder / name).open("ab") as file:
            file.write(data)

    def data(self, name: str = "events") -> bytes:
        return (self.folder / name).read_bytes()

    def open(self, run: str, file: str, offset: int) -> "subprocess.Popen[bytes]":
        self.runs.append(run)
        argv = [sys.executable, "-S", "-E", str(FAR_END), str(self.folder), file, str(offset)]
        process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        self.processes.append(process)
        return process

    def asked(self) -> list[int]:
        """The offset of each connection."""
        return [int(line.split()[2]) for line in (self.folder / "lines").read_text().splitlines()]


@pytest.fixture(autouse=True)
def _no_test_waits_for_ever() -> Iterator[None]:
    def ring(number: int, frame: object) -> None:
        raise AssertionError("the watching hangs")

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(40)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture
def far(tmp_path: Path) -> Iterator[Far]:
    end = Far(tmp_path)
    yield end
    for process in end.processes:
        process.kill()
        process.wait()


def line(number: int, kind: str = "progress", at: float = 0.0, **fields: Any) -> bytes:
    when = datetime.fromtimestamp(at, timezone.utc).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    event = {
        "schema": 1,
        "seq": number,
        "time": when,
        "kind": kind,
        "step": 1,
        "doing": f"n {number} é\u2028",
        **fields,
    }
    return json.dumps(event, ensure_ascii=False).encode() + b"\n"


def until(what: Callable[[], bool], seconds: float = 15.0) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline, "it did not come"
        time.sleep(0.005)


def has_come(out: io.BytesIO, part: bytes) -> bool:
    return part in out.getvalue()


def has_size(path: Path, size: int) -> bool:
    return path.stat().st_size >= size


@contextlib.contextmanager
def meanwhile(action: Callable[[], None]) -> Iterator[None]:
    """What others do while we watch; its failure is the test's."""
    failures: list[BaseException] = []

    def run() -> None:
        try:
            action()
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    yield
    thread.join()
    assert not failures, failures


def log(path: Path) -> io.TextIOWrapper:
    return path.open("w+", encoding="utf-8")


# --- frames


STREAM = (
    b"Welcome to a box!\n\njob run=demo alive=1\nbytes 5 13\nline\nbytes 0 3gpu 0 1 2 3\nbytes 18 0\nbeat 1.5\ndone\n"
)


def joined(chunks: list[bytes]) -> list[Frame]:
    framing, frames = Framing(), list[Frame]()
    for chunk in chunks:
        for frame in framing.feed(chunk):
            if frame.word == "bytes" and frames and frames[-1].word == "bytes":
                assert int(frame.args[0]) == int(frames[-1].args[0]) + len(frames[-1].data)
                frames[-1] = Frame("bytes", frames[-1].args, frames[-1].data + frame.data)
            else:
                frames.append(frame)
    return frames


FRAMES = [
    Frame("Welcome", ("to", "a", "box!")),
    Frame("job", ("run=demo", "alive=1")),
    Frame("bytes", ("5",), b"line\nbytes 0 3"[:13]),
    Frame("3gpu", ("0", "1", "2", "3")),
    Frame("beat", ("1.5",)),
    Frame("done"),
]


def test_frames_are_the_same_wherever_the_stream_is_cut() -> None:
    assert joined([STREAM]) == joined([STREAM[i : i + 1] for i in range(len(STREAM))]) == FRAMES
    for i in range(len(STREAM)):
        assert joined([STREAM[:i], STREAM[i:]]) == FRAMES


@pytest.mark.parametrize(
    "damaged", [b"bytes 1\n", b"bytes -1 4\n", b"bytes 1 four\n", b"bytes \xd9\xa1 4\n", b"x" * 70_000]
)
def test_a_stream_that_is_none_breaks_the_line(damaged: bytes) -> None:
    with pytest.raises(ConnectionLost):
        list(Framing().feed(damaged))


# --- where we are in the file


def test_a_tail_by_lines_hands_on_whole_lines_and_knows_both_places() -> None:
    tail = Tail(by_lines=True, offset=100)
    assert (tail.take(b"ab"), tail.offset, tail.next) == (b"", 100, 102)
    assert (tail.take(b"c\nd\re\nf"), tail.offset, tail.next) == (b"abc\nd\re\n", 108, 109)
    tail.drop_begun()
    assert tail.next == 108


def test_a_line_that_a_beat_has_found_without_its_end_is_asked_for_again_once() -> None:
    tail = Tail(by_lines=True)
    tail.take(b"whole\ntor")
    tail.take(b"n")  # no beat between: it was on its way
    tail.beat()
    with pytest.raises(Reread):
        tail.take(b"rest\n")
    tail.drop_begun()
    tail.take(b"torn")
    tail.beat()
    assert tail.take(b"rest\n") == b"tornrest\n"


@pytest.mark.parametrize(("size", "offset", "after"), [(12, 6, 12), (8, 6, 8), (6, 6, 6), (3, 3, 3), (0, 0, 0)])
def test_a_file_that_was_cut(size: int, offset: int, after: int) -> None:
    tail = Tail(by_lines=True)
    tail.take(b"whole\nbegun")
    tail.cut(size)
    assert (tail.offset, tail.next) == (offset, min(after, 11))


# --- byte for byte


def watched(far: Far, view: View, limits: StreamTimeouts = LIMITS, **others: Any) -> Watched:
    return follow(far.open, view, WHERE, limits=limits, **others)


def test_events_come_byte_for_byte_through_kills_and_freezes(far: Far, capsys: pytest.CaptureFixture[str]) -> None:
    out = io.BytesIO()
    far.say("cut", "7")  # no frame holds a whole line

    def work() -> None:
        for i in range(40):
            if i == 20:
                far.write(b'{"schema": 1, "da\0ge\rd\n[1]\n\n')
            data = line(i)
            far.write(data[:31])
            time.sleep(0.005)
            far.write(data[31:])
            if i % 8 == 7:
                until(partial(has_come, out, f"n {i} ".encode()))
                far.processes[-1].send_signal(signal.SIGSTOP if i == 23 else signal.SIGKILL)
        far.say("job", ENDED)

    with meanwhile(work):
        end = watched(far, JsonLines(out))
    assert out.getvalue() == far.data() and end.offset == len(far.data())
    assert end.done and not end.stopped and end.exit == 0 and end.last is not None and end.last["seq"] == 39
    assert len(far.processes) >= 6 and all(process.poll() is not None for process in far.processes)
    said = capsys.readouterr().err
    assert "connection lost: nothing came for 0s; reconnecting" in said
    assert len(re.findall(r"the connection was lost for \d+s; (\d+ events?|nothing new) meanwhile", said)) >= 5


def test_a_log_comes_byte_for_byte_through_kills(far: Far, tmp_path: Path) -> None:
    far.say("cut", "1000")

    def work() -> None:
        for i in range(6):
            far.write(os.urandom(5000), "log")
            until(partial(has_size, tmp_path / "shown", 5000 * i + 2500))
            far.processes[-1].kill()
        far.say("job", ENDED)

    with log(tmp_path / "shown") as shown, meanwhile(work):
        assert watched(far, RawLog(shown)).done
    assert (tmp_path / "shown").read_bytes() == far.data("log") and max(far.asked()) >= 25_000


def test_a_line_that_a_kill_cut_off_is_shown_as_its_successor_wrote_it(far: Far) -> None:
    """Cut and written anew while nobody looked: the file only ever grew."""
    out = io.BytesIO()
    first, torn, new = line(0), line(1, at=1.0, doing="lost " * 9)[:60], line(1, "resumed", at=86_400.0, from_update=0)
    far.write(first + torn)

    def work() -> None:
        until(lambda: out.getvalue() == first)
        time.sleep(0.15)  # beats
        far.processes[-1].send_signal(signal.SIGSTOP)
        os.truncate(far.folder / "events", len(first))
        far.write(new)
        far.processes[-1].send_signal(signal.SIGCONT)
        until(lambda: new in out.getvalue())
        far.say("job", ENDED)

    with meanwhile(work):
        assert watched(far, JsonLines(out), PATIENT).done
    assert out.getvalue() == first + new and len(far.processes) == 2 and far.asked() == [0, len(first)]


def test_a_line_that_was_cut_off_before_our_eyes(far: Far) -> None:
    out = io.BytesIO()
    first, new = line(0), line(1, doing="new")
    far.write(first + line(1, doing="lost " * 50)[:200])

    def work() -> None:
        until(lambda: out.getvalue() == first)
        os.truncate(far.folder / "events", len(first))
        time.sleep(0.1)
        far.write(new)
        far.say("job", ENDED)

    with meanwhile(work):
        assert watched(far, JsonLines(out), PATIENT).done
    assert out.getvalue() == first + new and len(far.processes) == 1


def test_a_torn_last_line_of_a_job_that_ended_is_not_shown(far: Far) -> None:
    out = io.BytesIO()
    far.write(line(0) + line(1)[:20])
    far.say("job", ENDED.replace("exit=0", "exit=4"))
    end = watched(far, JsonLines(out))
    assert (out.getvalue(), end.done, end.exit, end.offset) == (line(0), True, 4, len(line(0)))


def test_a_gap_in_the_stream_is_not_shown() -> None:
    streams = [b"bytes 0 4\none\nbytes 9 5\nlate\n", b"bytes 4 5\ntwo..bytes 9 5\n\nend\njob exit=0\ndone\n"]
    asked, out = [], io.BytesIO()

    def open_stream(run: str, file: str, offset: int) -> "subprocess.Popen[bytes]":
        asked.append(offset)
        process = subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert process.stdin is not None
        process.stdin.write(streams[len(asked) - 1])
        process.stdin.close()
        return process

    assert follow(open_stream, JsonLines(out), WHERE, limits=PATIENT).done
    assert out.getvalue() == b"one\ntwo..\nend\n" and asked == [0, 4]


def test_watching_goes_on_where_another_left_off(far: Far) -> None:
    far.write(line(0) + line(1))
    far.say("job", ENDED)
    out = io.BytesIO()
    assert watched(far, JsonLines(out), offset=len(line(0))).done
    assert out.getvalue() == line(1) and far.asked() == [len(line(0))]


# --- once


@pytest.mark.parametrize("data", [line(0) + line(1), line(0) + line(1)[:30], b"", None])
def test_once_shows_what_is_there_and_ends(far: Far, data: bytes | None) -> None:
    if data is not None:
        far.write(data)
    out = io.BytesIO()
    end = watched(far, JsonLines(out), once=True)
    whole = (data or b"")[: (data or b"").rfind(b"\n") + 1]
    assert out.getvalue() == whole and not end.done and not end.stopped and end.job == JobState.of(RUNNING.split())


# --- a line that is no use


def test_a_box_that_refuses_is_not_asked_again(far: Far) -> None:
    far.say("refuse", "255 Host key verification failed.")

    def refused(code: int, said: str) -> ToolkitError | None:
        return (
            ToolkitError("the host key has changed") if (code, said) == (255, "Host key verification failed.") else None
        )

    with pytest.raises(ToolkitError, match="host key has changed"):
        watched(far, JsonLines(io.BytesIO()), refused=refused)
    assert len(far.processes) == 1


@pytest.mark.parametrize("first", ["", "echo job run=demo alive=0;", "echo Welcome;"])
def test_what_was_said_there_instead_of_a_stream_is_an_error(first: str) -> None:
    opened = []

    def open_stream(run: str, file: str, offset: int) -> "subprocess.Popen[bytes]":
        opened.append(offset)
        script = f"{first} printf 'no run\\n\\033[2Jdemo' >&2; exit 2"
        return subprocess.Popen(["sh", "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE)

    with pytest.raises(ToolkitError) as caught:
        follow(open_stream, JsonLines(io.BytesIO()), WHERE, limits=LIMITS)
    assert (
        str(caught.value) == "error: cannot watch run `demo` on `gpu-box`: the box ended with exit code 2\n"
        "  why: no run\n       \\x1b[2Jdemo"
    )
    assert opened == [0]


def test_a_line_that_stays_away_is_told_once_and_given_up_after_so_many_tries(
    far: Far, capsys: pytest.CaptureFixture[str]
) -> None:
    far.say("refuse", "255 ssh: connect to host gpu-box: \x1b[2JNo route")
    with pytest.raises(ToolkitError) as caught:
        watched(far, JsonLines(io.BytesIO()), StreamTimeouts(first_pause_s=0.01, longest_pause_s=0.02, tries=4))
    assert caught.value.exit_code == ExitCode.UNREACHABLE and "broke 4 times in a row" in str(caught.value)
    assert len(far.processes) == 4
    assert capsys.readouterr().err == "connection lost: ssh: connect to host gpu-box: \\x1b[2JNo route; reconnecting\n"


def test_a_box_that_never_spoke_is_given_up_and_one_that_did_is_not(
    far: Far, capsys: pytest.CaptureFixture[str]
) -> None:
    far.say("refuse", "255 ssh: connect to host gpu-box: No route")
    limits = StreamTimeouts(silence_s=5, connect_s=10, first_pause_s=0.01, longest_pause_s=0.02, first_tries=2)
    with pytest.raises(ToolkitError, match="cannot reach `gpu-box`") as caught:
        watched(far, JsonLines(io.BytesIO()), limits)
    assert caught.value.exit_code == ExitCode.UNREACHABLE and len(far.processes) == 2
    (far.folder / "refuse").unlink()
    out = io.BytesIO()

    def work() -> None:
        far.write(line(0))
        until(partial(has_come, out, line(0)))
        far.say("refuse", "255 ssh: connect to host gpu-box: No route")
        far.processes[-1].kill()
        until(lambda: len(far.processes) > 8)
        (far.folder / "refuse").unlink()
        far.say("job", ENDED)

    with meanwhile(work):
        assert watched(far, JsonLines(out), limits).done


def test_a_run_without_a_name_stays_the_same_one_over_a_break(far: Far) -> None:
    """By then another may be the newest."""
    out = io.BytesIO()
    where = WatchedRun("gpu-box", "")

    def work() -> None:
        far.write(line(0))
        until(partial(has_come, out, line(0)))
        far.processes[-1].kill()
        until(lambda: len(far.processes) > 1)
        far.say("job", ENDED)

    with meanwhile(work):
        assert follow(far.open, JsonLines(out), where, limits=PATIENT).done
    assert far.runs == ["", "demo"]


def test_one_tick_of_life_starts_the_count_of_tries_anew(far: Far) -> None:
    out = io.BytesIO()

    def work() -> None:
        for i in range(5):
            far.write(line(i))
            until(partial(has_come, out, line(i)))
            far.processes[-1].kill()
        far.say("job", ENDED)

    with meanwhile(work):
        assert watched(far, JsonLines(out), StreamTimeouts(silence_s=5, connect_s=10, first_pause_s=0.01, tries=2)).done


# --- forms


def shown(far: Far, **form: Any) -> bytes:
    """What a pipe gets."""
    raw = io.BytesIO()
    with io.TextIOWrapper(raw, encoding="utf-8", write_through=True) as out:
        view = view_of(WHERE, out=out, **form)
        watched(far, view)
        out.flush()
        return raw.getvalue()


def test_plain_lines_on_a_pipe(far: Far) -> None:
    far.write(
        line(0, doing="loading")
        + b"damaged\n"
        + line(1, "metrics", update=[], loss={})
        + line(2, doing="\x1b[2J saving")
    )
    far.say("job", ENDED)
    text = shown(far).decode()
    assert text.startswith("step 1  loading\n") and text.endswith("step 1  \\x1b[2J saving\n")


@pytest.mark.parametrize("ahead_s", [0.0, 7200.0, -7200.0])
@pytest.mark.parametrize("as_json", [True, False])
def test_since_goes_by_the_clock_of_the_box(far: Far, ahead_s: float, as_json: bool) -> None:
    there = time.time() + ahead_s
    far.say("ahead", str(ahead_s))
    late = line(2, at=there - 30, doing="late")
    far.write(line(0, at=there - 90, doing="early") + line(1, at=there - 80, doing="early") + late)
    if as_json:
        assert shown_once(far, as_json=True, since=parse_since("1m")) == late
    else:
        assert shown_once(far, since=parse_since("1m")) == b"step 1  late\n"


def shown_once(far: Far, **form: Any) -> bytes:
    raw = io.BytesIO()
    with io.TextIOWrapper(raw, encoding="utf-8", write_through=True) as out:
        watched(far, view_of(WHERE, out=out, **form), once=True)
        out.flush()
        return raw.getvalue()


def test_since_a_time_keeps_a_damaged_line_with_the_one_before(far: Far) -> None:
    far.write(line(0, at=100) + b"early\n" + line(1, at=300) + b"late\n")
    assert shown_once(far, as_json=True, since=Since(at=200)) == line(1, at=300) + b"late\n"


@pytest.mark.parametrize(
    ("text", "since"),
    [
        ("90s", Since(ago_s=90)),
        (" 1.5h ", Since(ago_s=5400)),
        ("2d", Since(ago_s=172_800)),
        ("2025-01-05T12:00:00Z", Since(at=1_736_078_400)),
        ("2025-01-05T13:00:00+01:00", Since(at=1_736_078_400)),
    ],
)
def test_parse_since(text: str, since: Since) -> None:
    assert parse_since(text) == since


@pytest.mark.parametrize("text", ["", "10", "-5m", "1e3s", "yesterday", "2025-13-01", "\u0661m", "nan", "1m\x1b[2J"])
def test_a_time_that_is_none(text: str) -> None:
    with pytest.raises(ToolkitError, match="cannot read the time") as caught:
        parse_since(text)
    assert "\x1b" not in str(caught.value)


def test_forms_that_exclude_each_other() -> None:
    with pytest.raises(ToolkitError, match="`--json` shows events, `--raw` shows the log"):
        view_of(WHERE, as_json=True, raw=True)
    with pytest.raises(ToolkitError, match="the log of `--raw` has none"):
        view_of(WHERE, raw=True, since=Since(ago_s=1))


@pytest.mark.parametrize(
    ("words", "said", "is_good"),
    [
        ("alive=1 training=1", "running", True),
        ("alive=1 cancelled=1", "being cancelled", True),
        ("alive=0 training=1", "the supervisor is gone; the job may still be running unattended", False),
        ("alive=0 training=0", "lost: the job stopped without an exit code; the same command resumes it", False),
        ("alive=0 exit=0", "ended with exit code 0 (done)", True),
        ("alive=0 exit=4", "ended with exit code 4 (failed)", False),
        ("exit=75", "ended with exit code 75 (preempted; the same command resumes it)", False),
        ("exit=143 cancelled=1", "ended with exit code 143 (cancelled)", True),
        ("exit=137 cancelled=1 mood=odd", "ended with exit code 137 (cancelled)", True),
        ("exit=-9", "ended with exit code -9 (failed)", False),
        ("exit=much alive=1", "starting", True),
    ],
)
def test_state_in_words(words: str, said: str, is_good: bool) -> None:
    assert state_text(JobState.of(words.split())) == (said, is_good)


# --- the panel


def drawn(where: WatchedRun, clock: Callable[[], float] = time.time) -> tuple[Console, PanelView]:
    screen = Console(
        file=io.StringIO(), force_terminal=True, width=100, height=40, color_system=None, markup=False, highlight=False,
        emoji=False,
        legacy_windows=False, _environ={"TERM": "xterm"},
    )  # fmt: skip
    return screen, PanelView(Live(screen, clock), where)


def lines_on(screen: Console) -> list[str]:
    assert isinstance(screen.file, io.StringIO)
    return re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", screen.file.getvalue()).replace("\r", "\n").split("\n")


def has(screen: Console, pattern: str) -> bool:
    return any(re.search(pattern, text) for text in lines_on(screen))


def test_the_panel_over_a_line_that_breaks(far: Far) -> None:
    screen, view = drawn(WatchedRun("gpu-box", "demo", price_per_hour=3600.0, currency="¥"))
    now = time.time() + 7200  # a clock that is off
    far.say("ahead", "7200")
    far.say("gpu", "0 1024 81920 50\n1 [N/A] 81920 [N/A]\n")
    far.say("job", f"{RUNNING} started={now - 100:.3f}")
    numbers = {"updates": 40, "learning_rate": 1e-5, "tokens_per_s": 100.0, "grad_norm": 1.0, "loss": 2.0}
    far.write(
        line(0, "metrics", at=now - 20, update=10, elapsed_s=50.0, **numbers)
        + line(1, "warning", message="hot", at=now)
    )

    def work() -> None:
        until(lambda: has(screen, "cost"))
        far.say("refuse", "255 no route")
        far.processes[-1].kill()
        until(lambda: has(screen, "connection lost .* no route"))
        (far.folder / "refuse").unlink()
        until(lambda: has(screen, "the connection was lost"))
        far.say("job", f"run=demo alive=0 exit=75 started={now - 100:.3f} ended={now:.3f}")

    with meanwhile(work):
        end = watched(far, view, StreamTimeouts(silence_s=5, connect_s=10, first_pause_s=0.6, longest_pause_s=0.6))
    assert end.done and end.exit == 75
    # Updated 20 s ago after 50 s; 30 updates to go at 5 s each, less the 20 s.
    assert has(screen, r"step 1 .* 10 of 40 +25% +1m1\ds +eta 2m(10|0\d)s")
    assert has(screen, r"2 gpus +50% busy, 1.0 of 80.0 GiB   \?% busy, \? of 80.0 GiB")
    assert has(screen, r"cost +¥10\d\.\d\d so far, about ¥2\d\d\.\d\d after step 1, at ¥3600.00/h")
    assert has(screen, r"○ gpu-box +run demo, connection lost for \ds, reconnecting: no route")
    assert has(screen, r"the connection was lost for \ds; nothing new meanwhile") and has(screen, "warning: hot")
    last = [text.rstrip() for text in lines_on(screen) if text.strip()][-1]
    assert last == "  ○ gpu-box       run demo, ended with exit code 75 (preempted; the same command resumes it)"
    assert has(screen, "¥100.00 for this job, ¥3600.00/h until the box is stopped")


def test_last_words_name_the_run_that_the_box_chose() -> None:
    from remote.runs.watch import _stopped_text

    running, unnamed = JobState.of(RUNNING.split()), WatchedRun("gpu-box", "")
    assert "--run demo\n" in _stopped_text(named(unnamed, running), running)
    assert "--run" not in _stopped_text(unnamed, None)


def test_plain_lines_tell_of_a_job_that_needs_somebody(far: Far, capsys: pytest.CaptureFixture[str]) -> None:
    def work() -> None:
        until(lambda: bool(far.processes))
        far.say("job", "run=demo alive=0 training=1")
        time.sleep(0.3)
        far.say("job", "run=demo alive=0 training=1 heartbeat=7")
        time.sleep(0.1)
        far.say("job", ENDED)

    with meanwhile(work):
        assert watched(far, PanelView(Plain(console_on(io.StringIO())), WHERE)).done
    assert capsys.readouterr().err == "run demo: the supervisor is gone; the job may still be running unattended\n"


# --- Ctrl-C, and readers that go away: a process of its own

WATCHER = """
import fcntl, subprocess, sys, termios
from remote.runs.frames import StreamTimeouts
from remote.runs.views import WatchedRun, view_of
from remote.runs.watch import follow
if sys.argv[3] == "tty":
    fcntl.ioctl(1, termios.TIOCSCTTY, 0)
def opened(run, file, offset):
    return subprocess.Popen([sys.executable, "-S", "-E", sys.argv[1], sys.argv[2], file, str(offset)],
                            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
where = WatchedRun("gpu box", "demo")
limits = StreamTimeouts(silence_s=60, connect_s=60, first_pause_s=60)
end = follow(opened, view_of(where, raw=sys.argv[3] == "raw"), where, limits=limits)
print("watched", end.done, end.stopped, file=sys.stderr)
"""
STOPPED = (
    "stopped watching; the job keeps running\n"
    "to watch it again: fab logs --follow --host 'gpu box' --run demo\n"
    "to cancel it: fab cancel --host 'gpu box' --run demo\n"
)


def watcher(far: Far, form: str, stdout: int = subprocess.PIPE) -> "subprocess.Popen[bytes]":
    argv = [sys.executable, "-c", WATCHER, str(FAR_END), str(far.folder), form]
    env = {**os.environ, "PYTHONPATH": str(FAR_END.parents[2]), "TERM": "xterm-256color", "LANG": "C.UTF-8"}
    process = subprocess.Popen(argv, stdout=stdout, stderr=subprocess.PIPE, env=env, start_new_session=True)
    far.processes.append(process)
    return process


def far_pid(far: Far) -> int:
    until(lambda: (far.folder / "lines").exists() and (far.folder / "lines").read_text().endswith("\n"))
    return int((far.folder / "lines").read_text().split()[0])


def gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def ended_within(process: "subprocess.Popen[bytes]", began: float, seconds: float = 1.0) -> str:
    """Wait for the process, check how long that took, and return its standard error.

    0.3 s is what is promised, and what it takes on an idle machine. This one may have other work.
    """
    process.wait(20)
    took = time.monotonic() - began
    assert took < seconds, f"{took:.2f} s"
    assert process.stderr is not None
    return process.stderr.read().decode()


@pytest.mark.parametrize("line_is", ["there", "frozen", "away"])
def test_ctrl_c_ends_the_watching_and_says_that_the_job_goes_on(far: Far, line_is: str) -> None:
    far.write(line(0))
    process = watcher(far, "plain")
    assert process.stdout is not None and process.stdout.readline() == "step 1  n 0 é\\u2028\n".encode()
    pid = far_pid(far)
    if line_is != "there":
        os.kill(pid, signal.SIGSTOP if line_is == "frozen" else signal.SIGKILL)
        time.sleep(0.2)
    began = time.monotonic()
    process.send_signal(signal.SIGINT)
    if line_is == "frozen":  # it takes 0.1 s to see that
        time.sleep(0.03)
        process.send_signal(signal.SIGINT)  # somebody impatient
    said = ended_within(process, began)
    assert said.endswith(f"{STOPPED}watched False True\n") and process.returncode == 0
    assert "Traceback" not in said and gone(pid)


def test_ctrl_c_in_a_terminal_leaves_a_whole_panel_and_the_cursor(far: Far) -> None:
    far.write(line(0))
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    process = watcher(far, "tty", slave)
    os.close(slave)
    text = b""
    while b"run demo, running" not in text:
        text += os.read(master, 65536)
    began = time.monotonic()
    os.write(master, b"\x03")  # to the whole group: the far end, too
    with contextlib.suppress(OSError):  # EIO: nobody holds the terminal
        while data := os.read(master, 65536):
            text += data
    said = ended_within(process, began)
    os.close(master)
    assert said == f"{STOPPED}watched False True\n" and b"\x1b[?25h" in text
    assert gone(far_pid(far))


@pytest.mark.parametrize("form", ["raw", "plain"])
def test_ctrl_c_while_nobody_takes_what_is_shown(far: Far, form: str) -> None:
    """As in `fab logs | less`: the pipe is full."""
    far.write(b"x" * 2_000_000, "log")
    held = [line(i, "metrics", update=i, updates=9, at=float(i)) for i in (1, 2)]
    far.write(b"".join(held) + line(3) * 20_000)
    process = watcher(far, form)
    far_pid(far)
    assert process.stdout is not None
    until(lambda: queued(process.stdout) >= 60_000)
    time.sleep(0.1)
    began = time.monotonic()
    process.send_signal(signal.SIGINT)
    assert ended_within(process, began) == f"{STOPPED}watched False True\n"


def queued(pipe: IO[bytes] | None) -> int:
    """Bytes that wait in it."""
    assert pipe is not None
    (count,) = struct.unpack("i", fcntl.ioctl(pipe.fileno(), termios.FIONREAD, b"\0" * 4))
    return int(count)


def test_a_reader_that_goes_away_ends_the_watching_even_if_nothing_new_comes(far: Far) -> None:
    """As in `fab logs | head -1`."""
    far.write(line(0))
    process = watcher(far, "plain")
    assert process.stdout is not None and process.stdout.readline()
    pid = far_pid(far)
    began = time.monotonic()
    process.stdout.close()
    assert ended_within(process, began) == "watched False True\n" and gone(pid)


def test_a_reader_that_goes_away_at_ctrl_c_hides_no_word(far: Far) -> None:
    """As in `fab logs | cat`: it ends by the same Ctrl-C."""
    far.write(line(0, "metrics", update=1, updates=9) + line(1, "metrics", update=2, updates=9))  # the second waits
    process = watcher(far, "plain")
    assert process.stdout is not None and process.stdout.readline()
    os.kill(far_pid(far), signal.SIGSTOP)  # no beat that would look at the pipe
    time.sleep(0.2)
    process.stdout.close()
    process.send_signal(signal.SIGINT)
    assert ended_within(process, time.monotonic()) == f"{STOPPED}watched False True\n"


def test_a_panel_goes_by_the_wall_clock() -> None:
    """The monotonic one stands still while a laptop sleeps."""
    master, slave = pty.openpty()
    try:
        with os.fdopen(slave, "w", encoding="utf-8") as out, pytest.MonkeyPatch.context() as patch:
            patch.setenv("TERM", "xterm-256color")
            patch.delenv("TTY_COMPATIBLE", raising=False)
            view = view_of(WHERE, out=out)
            assert (
                isinstance(view, PanelView)
                and isinstance(view._view, Live)
                and abs(view._view._clock() - time.time()) < 60
            )
    finally:
        os.close(master)
    assert not math.isclose(time.time(), time.monotonic(), abs_tol=60)
