"""Test the chat as people and scripts have it: --once, a pipe, commands, a real terminal."""

from __future__ import annotations

import fcntl
import io
import json
import os
import pty
import re
import select
import shutil
import signal
import struct
import sys
import termios
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from rich.cells import cell_len

from jobs.errors import ExitCode, ToolkitError
from jobs.run_dir import RunDir
from rlhf_train.after import chat, room
from rlhf_train.after.screen import Screen
from rlhf_train.after.session import Interrupt, Models, Session
from rlhf_train.after.sources import Source
from tests.rlhf_train.after import models
from tests.rlhf_train.after.played_terminal import PlayedTerminal

pytestmark = pytest.mark.pinned


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.save(tmp_path_factory.mktemp("chat") / "model")


def expected(folder: Path, text: str, limit: int = 12) -> str:
    words = models.tokenizer()
    made = models.greedy(folder, words(f"\n\nHuman: {text}\n\nAssistant:")["input_ids"], [2], limit)
    return str(words.decode([token for token in made if token != 2])).lstrip() + "\n"


def test_once_prints_the_answer_and_nothing_else(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert chat.chat([str(folder), "--once", "red 🙂"], folder.parent) == ExitCode.OK
    out, err = capsys.readouterr()
    assert out == expected(folder, "red 🙂")
    assert "error" not in err and "warning" not in err


def test_a_pipe_is_one_question(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("red\ncat\n"))
    assert chat.chat([str(folder), "--max-tokens", "5"], folder.parent) == ExitCode.OK
    assert capsys.readouterr().out == expected(folder, "red\ncat", 5)
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n"))
    with pytest.raises(ToolkitError, match="no question"):
        chat.chat([str(folder)], folder.parent)


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["--temperature", "hot"], "argument --temperature: `hot` is no number from 0 on"),
        (["--temperature", "-1"], "argument --temperature: `-1` is no number from 0 on"),
        (["--temperature", "inf"], "argument --temperature: `inf` is no number from 0 on"),
        (["--top-p", "0"], "argument --top-p: `0` is no number above 0 and up to 1"),
        (["--top-k", "x"], "argument --top-k: `x` is no whole number from 0 on"),
        (["--max-tokens", "0"], "argument --max-tokens: `0` is no whole number from 1 on"),
        (["--temp", "1"], "unrecognized arguments: --temp"),
    ],
)
def test_wrong_flags_are_refused(words: list[str], why: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        chat.parser().parse_args(words)
    assert why in capsys.readouterr().err


# --- commands ---


class Notes(io.StringIO):
    encoding = "utf-8"  # type: ignore[assignment]


@pytest.fixture
def talk(folder: Path) -> Iterator[tuple[Session, Notes, Notes]]:
    from rlhf_train.after.chat_model import Wishes

    out, notes = Notes(), Notes()
    screen = Screen(out, notes)
    loaded = chat.Loader([folder.parent], Wishes(), screen).load([Source("it", str(folder))])
    yield Session(loaded, screen, lambda words: loaded, interrupt=Interrupt(), runs=folder.parent), out, notes


def test_an_answer_knows_what_was_said_before(talk: tuple[Session, Notes, Notes], folder: Path) -> None:
    session, out, _ = talk
    session.line("red")
    first = out.getvalue()
    session.line("cat")
    [said] = session.record()
    answer = said["messages"][1]["content"]  # type: ignore[index]
    assert first == expected(folder, "red") == answer.lstrip() + "\n"
    assert out.getvalue() == first + expected(folder, f"red\n\nAssistant: {answer.strip()}\n\nHuman: cat")
    session.line("/reset")
    session.line("red")
    assert out.getvalue().endswith(first) and len(session.record()[0]["messages"]) == 2  # type: ignore[arg-type]


def test_an_answer_that_is_empty_says_why(talk: tuple[Session, Notes, Notes]) -> None:
    session, out, notes = talk
    [model] = [each.model for each in session._talks]
    model.stop_ids = {*range(len(model.tokenizer))}  # whatever comes first ends the answer
    session.line("red")
    assert out.getvalue() == "\n" and notes.getvalue() == "note: the model ended its answer immediately\n"
    session._interrupt.is_asked = True
    session._ask_one(session._talks[0], "red")  # Ctrl-C has ended it, and `ask` says so
    assert notes.getvalue().count("note:") == 1


def test_the_system_text_stands_first(talk: tuple[Session, Notes, Notes]) -> None:
    session, _, notes = talk
    session.line("/system Be small.")
    session.line("red")
    system = {"role": "system", "content": "Be small."}
    assert session.record()[0]["messages"][0] == system  # type: ignore[index]
    session.line("/system")
    assert session.record()[0]["messages"][0] != system  # type: ignore[index]
    session.line("/help")
    session.line("/nothing")
    assert "/compare A,B" in notes.getvalue() and "there is no /nothing" in notes.getvalue()


def test_a_conversation_is_saved_once(talk: tuple[Session, Notes, Notes], tmp_path: Path, folder: Path) -> None:
    session, _, notes = talk
    session.line("red")
    session.line(f"/save {tmp_path / 'talk.json'}")
    [said] = json.loads((tmp_path / "talk.json").read_text(encoding="utf-8"))
    assert said["model"] == str(folder) and said["messages"][0] == {"role": "user", "content": "red"}
    assert said["messages"][1]["content"].lstrip() + "\n" == expected(folder, "red")
    session.line(f"/save {tmp_path / 'talk.json'}")
    assert "cannot write" in notes.getvalue()


def test_a_relative_name_is_one_of_the_runs_folder(
    talk: tuple[Session, Notes, Notes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The working directory may not be written to, or be gone with its container."""
    session, _, notes = talk
    monkeypatch.chdir(tmp_path)
    session._runs = Path("others")
    session.line("/save talk.json")
    assert (tmp_path / "others" / "talk.json").is_file()
    assert notes.getvalue().endswith(f"saved in {tmp_path / 'others' / 'talk.json'}\n")
    run, [model] = RunDir(Path("runs/demo")), [each.model for each in session._talks]
    monkeypatch.setattr(model, "source", Source("it", "x", run))
    session.line("/save talk.json")
    session.line("/save")
    assert f"saved in {tmp_path / 'runs/demo/chats/talk.json'}\n" in notes.getvalue()
    assert len([*run.chats.glob("chat-*.json")]) == 1 and [*tmp_path.glob("*.json")] == []


def test_a_long_conversation_loses_its_oldest_turns_and_says_so(talk: tuple[Session, Notes, Notes]) -> None:
    """The model has 96 positions."""
    session, _, notes = talk
    for _ in range(5):
        session.line("red cat tall tree")
    assert "oldest turn no longer fit" in notes.getvalue() or "oldest turns no longer fit" in notes.getvalue()
    session.line("x" * 200)
    assert "the message is too long for the model" in notes.getvalue()
    before = len(session.record()[0]["messages"])  # type: ignore[arg-type]
    assert before == 10  # the refused one is no part of it


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    """A run whose steps are complete."""
    import torch
    from transformers import OPTConfig, OPTForSequenceClassification

    from tests import tiny

    run = RunDir(tmp_path_factory.mktemp("compared") / "runs" / "demo")
    for step in (1, 3):
        models.save(run.step(step).model)
        run.step(step).complete.write_text("{}")
    words, shape = models.tokenizer(), {key: value for key, value in tiny.OPT.items() if key != "model_type"}
    torch.manual_seed(5)
    config = OPTConfig(vocab_size=len(words), num_labels=1, dropout=0.0, pad_token_id=1, eos_token_id=2, **shape)
    OPTForSequenceClassification(config).save_pretrained(run.step(2).model)
    words.save_pretrained(run.step(2).model)
    run.step(2).complete.write_text("{}")
    run.step(2).reward_scale.write_text('{"shift": 0.5, "scale": 2.0}')
    run.events.touch()
    return run


def test_two_steps_are_compared_with_their_rewards(compared: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    """The rewards are those of plain transformers: (logit - shift) / scale after the answer."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    run, words = compared, models.tokenizer()
    assert chat.chat(["demo", "--compare", "step1,step3", "--once", "red"], run.path.parent) == ExitCode.OK
    out = capsys.readouterr().out
    tokens = models.greedy(run.step(1).model, words("\n\nHuman: red\n\nAssistant:")["input_ids"], [2], 12)
    ids = words("\n\nHuman: red\n\nAssistant:")["input_ids"] + tokens
    scorer = AutoModelForSequenceClassification.from_pretrained(run.step(2).model)
    logit = float(scorer(torch.tensor([ids])).logits)
    assert AutoTokenizer.from_pretrained(run.step(2).model).pad_token_id == 1
    block = f"{expected(run.step(1).model, 'red')}reward {(logit - 0.5) / 2:.2f}\n"
    assert out == f"demo, step 1 (supervised fine-tuning)\n{block}\ndemo, step 3 (PPO)\n{block}"


def test_a_question_that_one_of_two_refuses_is_put_to_none(
    compared: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rlhf_train.after.chat_model import Wishes

    monkeypatch.setenv("TERM", "xterm")
    out, notes = PlayedTerminal(), Notes()
    screen = Screen(out, notes)
    sources = [Source(f"step {step}", str(compared.step(step).model), compared) for step in (1, 3)]
    (one, two), judge = chat.Loader([tmp_path], Wishes(), screen).load(sources)
    session = Session(([one, two], judge), screen, lambda words: ([one], None), interrupt=Interrupt(), runs=tmp_path)
    two.positions = 8
    session.line("red")
    assert "the message is too long for the model" in notes.getvalue()
    assert [talk["messages"] for talk in session.record()] == [[], []] and out.shown == [""]
    two.positions = one.positions
    session.line("red")
    said = [talk["messages"][1]["content"] for talk in session.record()]  # type: ignore[index]
    assert [text.lstrip() + "\n" for text in said] == [expected(compared.step(1).model, "red")] * 2
    assert out.shown[0].split("  ") == ["step 1", *[""] * 16, " step 3"] and out.shown[-2].startswith("reward ")


def test_a_run_that_trains_next_to_the_models_run_keeps_its_memory(
    compared: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Chat needs 1 GiB and the tiny model, of 2 GiB that are free; the run may need 2."""
    for name, value in {"open_files": lambda end: [], "folders_of_this_machine": list,
                        "free_memory_bytes": lambda: 2 * 2**30}.items():  # fmt: skip
        monkeypatch.setattr(room, name, value)
    busy = RunDir(compared.path.parent / "busy")
    busy.lock.parent.mkdir(parents=True)
    try:
        with busy.lock.open("a") as held:
            fcntl.flock(held, fcntl.LOCK_EX)
            with pytest.raises(ToolkitError, match="while run `busy` trains here"):
                chat.chat([str(compared.step(1).model), "--once", "red"], tmp_path)
    finally:
        shutil.rmtree(busy.path)


def test_a_comparison_without_a_reward_says_why_once(
    compared: RunDir, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from rlhf_train.after.chat_model import Wishes

    monkeypatch.chdir(tmp_path)
    shutil.copytree(compared.step(1).path, "young/step1")
    shutil.copytree(compared.step(1).model, "other")
    RunDir(Path("young")).events.touch()
    first, other = "./young/step1/model", "./other"
    assert chat.chat(["--compare", f"{first},{other}", "--once", "red"], tmp_path / "no runs") == ExitCode.OK
    answer = expected(compared.step(1).model, "red")
    out, err = capsys.readouterr()
    assert out == f"{first}\n{answer}\n{other}\n{answer}"
    assert err.count("note: no reward") == 1
    assert f"note: no rewards for {first} and {other}: run `young` has no reward model\n" in err
    with pytest.raises(ToolkitError, match="there is no model to talk to"):  # a step by itself needs a run
        chat.chat(["--compare", f"{first},step3", "--once", "red"], tmp_path / "no runs")

    out, notes = Notes(), Notes()
    screen = Screen(out, notes)
    sources = [Source("first", str(compared.step(1).model), compared), Source("other", other, compared)]
    (one, two), judge = chat.Loader([tmp_path], Wishes(), screen).load(sources)
    two.tokenizer.add_tokens(["<new>"])
    assert judge is not None
    judge._positions = 12
    session = Session(([one, two], judge), screen, lambda words: ([one], None), interrupt=Interrupt(), runs=tmp_path)
    for _ in range(2):
        session.line("red")
    assert "reward" not in out.getvalue() and "\n\n\n" not in out.getvalue()
    assert notes.getvalue().splitlines() == [
        "note: no reward where conversation and answer outgrow the reward model's positions",
        "note: no rewards for other: the reward model reads other tokens",
    ]


def test_models_that_are_held_are_not_loaded_again(compared: RunDir) -> None:
    from rlhf_train.after.chat_model import Wishes

    first, last = (Source(str(step), str(compared.step(step).model), compared) for step in (1, 3))
    loader = chat.Loader([compared.path.parent], Wishes(), Screen(Notes(), Notes()))
    [alone], judge = loader.load([last])
    assert judge is None and loader.missing([first, last]) == [first]
    (one, two), judge = loader.load([first, last])
    assert two is alone and judge is not None
    again, same_judge = loader.load([last, first])
    assert again == [two, one] and same_judge is judge
    with pytest.raises(ToolkitError):
        loader.load([first, Source("gone", str(compared.path / "gone"))])
    assert loader.load([last, first])[0] == [two, one]
    assert loader.load([last]) == ([alone], None) and loader.missing([first]) == [first]  # its memory is free


def test_ctrl_c_while_models_are_loaded_goes_back_to_the_chat(talk: tuple[Session, Notes, Notes]) -> None:
    session, _, notes = talk
    session.line("red")
    before = session.record()

    def interrupted(words: str | None) -> Models:
        raise KeyboardInterrupt

    session._compare = interrupted
    session.line("/compare step1,step3")
    assert session.record() == before and "stopped by Ctrl-C: the conversation goes on" in notes.getvalue()


# --- a real terminal ---


class Terminal:
    def __init__(self, argv: list[str], runs: Path, columns: int = 80, **variables: str) -> None:
        self.process, self._fd = pty.fork()
        if self.process == 0:  # the chat, in a copy of this process, which has imported torch
            code = 99
            try:
                fcntl.ioctl(0, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
                os.environ.update(variables)
                sys.stdin, sys.stdout, sys.stderr = (os.fdopen(fd, mode) for fd, mode in ((0, "r"), (1, "w"), (2, "w")))
                sys.__stdin__, sys.__stdout__, sys.__stderr__ = sys.stdin, sys.stdout, sys.stderr
                signal.signal(signal.SIGINT, signal.default_int_handler)
                code = int(chat.chat(argv, runs))
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                os._exit(code)
        self.seen = ""

    def wait(self, pattern: str, seconds: float = 120.0) -> str:
        """Read until what is new on the terminal matches, and return it."""
        new, deadline = "", time.monotonic() + seconds
        while not re.search(pattern, plain(new)):
            assert time.monotonic() < deadline, f"{pattern!r} is not in {plain(new)!r}"
            if select.select([self._fd], [], [], 0.1)[0]:
                try:
                    data = os.read(self._fd, 65536).decode(errors="replace")
                except OSError:  # the other side is closed
                    data = ""
                assert data, f"it ended: {plain(self.seen)!r}"
                new, self.seen = new + data, self.seen + data
        return new

    def type(self, keys: str) -> None:
        os.write(self._fd, keys.encode())

    def left(self) -> int:
        """Type Ctrl-D until the chat ends, and return its exit code.

        A Ctrl-D may come before the terminal hands keys on, right after the prompt.
        """
        begun = time.monotonic()
        typed = 0.0
        while time.monotonic() < begun + 60:
            if time.monotonic() > typed + 3:
                self.type("\x04")
                typed = time.monotonic()
            process, status = os.waitpid(self.process, os.WNOHANG)
            if process:
                self.process = 0
                return os.waitstatus_to_exitcode(status)
            if select.select([self._fd], [], [], 0.1)[0]:
                with suppress(OSError):
                    self.seen += os.read(self._fd, 65536).decode(errors="replace")
        raise AssertionError(f"it does not end: {plain(self.seen)!r}")


def plain(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]|\x1b[=>]", "", text).replace("\r", "")


@contextmanager
def terminal(argv: list[str], runs: Path, columns: int = 80, **variables: str) -> Iterator[Terminal]:
    made = Terminal(argv, runs, columns, **variables)
    try:
        yield made
    finally:
        if made.process:
            os.kill(made.process, signal.SIGKILL)
            os.waitpid(made.process, 0)


PROMPT = r"you>\s*$"  # prompt_toolkit may move over the space instead of printing it


@pytest.fixture(scope="module")
def endless(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose answers take longer than anybody waits."""
    return models.save(
        tmp_path_factory.mktemp("endless") / "model", positions=20_000, ends=False, max_new_tokens=15_000
    )


def test_ctrl_c_stops_an_answer_and_ctrl_d_ends(endless: Path) -> None:
    with terminal(
        [str(endless), "--temperature", "1", "--top-k", "0", "--seed", "1"], endless.parent, TERM="xterm"
    ) as it:
        hello = plain(it.wait(PROMPT))
        assert "temperature 1" in hello and "Ctrl-D ends" in hello and "Human/Assistant" in hello
        it.type("red\r")
        it.wait(r"(\n[^\n]+){4}")  # some lines of the answer are there
        it.type("\x03")
        it.wait(r"stopped by Ctrl-C(.|\n)*" + PROMPT)
        it.type("half a line\x03")  # at the prompt it empties the line
        it.wait(r"\n" + PROMPT)
        it.type("/help\r")
        it.wait(r"/save \[FILE\](.|\n)*" + PROMPT)
        assert it.left() == 0
        answer = plain(it.seen).partition("you> red\n")[2].partition("\nstopped by")[0].replace("^C", "")
        assert max(map(cell_len, answer.split("\n"))) <= 80


def test_a_dumb_terminal_without_colour_sees_no_escape_sequence(folder: Path) -> None:
    with terminal([str(folder)], folder.parent, TERM="dumb", NO_COLOR="1") as it:
        it.wait("you> ")
        it.type("red\r")
        it.wait(re.escape(expected(folder, "red").split()[0]) + r"(.|\n)*you> ")
        assert it.left() == 0
        assert "\x1b" not in it.seen


def test_two_answers_next_to_each_other_and_then_the_runs_newest_model(compared: RunDir) -> None:
    """Both models have the same weights: both columns have the answer of plain transformers."""
    reward, end = r"reward -?[0-9]+\.[0-9]{2}", r"(.|\n)*\n" + PROMPT
    words = expected(compared.step(1).model, "red").split()
    answer = re.escape(words[0])
    with terminal(["demo", "--compare", "step1,step3"], compared.path.parent, columns=80, TERM="xterm") as it:
        it.wait(PROMPT)
        it.type("red\r")
        titles = r"demo, step 1 \(supervised fine-tuning\) +demo, step 3 \(PPO\)\n"
        seen = it.wait(rf"{titles}(.|\n)*\n{reward} +{reward}{end}")
        drawn = seen[seen.index("(PPO)") :].partition("reward")[0]
        assert drawn.count("\r\x1b") > len(words)  # it came in pieces
        screen = PlayedTerminal()
        screen.write(drawn)
        left, right = ("".join(line[place : place + 38] for line in screen.shown[1:]) for place in (0, 41))
        assert re.sub(r"\s", "", left) == "".join(words) == re.sub(r"\s", "", right)
        it.type("/compare off\r")
        it.wait(rf"a new conversation, with demo, step 3 \(PPO\)\n{end}")
        it.type("red\r")
        assert "reward" not in plain(it.wait(rf"\n{answer}{end}"))
        it.type("/compare\r")  # the two steps again
        titles = r"demo, step 1 \(supervised fine-tuning\) and demo, step 3\s+\(PPO\)\n"
        it.wait(rf"\nloading demo, step 1 \(supervised fine-tuning\) \.\.\.\na new conversation, with {titles}{end}")
        assert it.left() == 0
