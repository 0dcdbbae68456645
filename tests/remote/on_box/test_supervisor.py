"""The real supervisor.sh under the shells that boxes have, with real processes.

A script stands for the training, and for Docker's client, since there is no engine here. One job is
a real one.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil  # type: ignore[import-untyped]
import pytest
import yaml

from jobs.events import read_events
from jobs.run_dir import RunDir
from jobs.state import state_of
from jobs.views.gpus import GpuUsage
from remote.results.run_contents import parse_look
from remote.runs.frames import Framing, StreamTimeouts
from remote.runs.job_state import JobState
from remote.runs.views import View, WatchedRun
from remote.runs.watch import Watched, follow
from remote.scripts import script

CHECKOUT = Path(__file__).parents[3]
FP, KEY = "0123456789abcdef", "fedcba9876543210"
JOB = b"name: run-1\n"
SHELLS = [shell for shell in ("dash", "bash", "busybox") if shutil.which(shell)] or ["sh"]
PATIENCE_S = 20.0
HOSTILE = ["a b", "it's", '"', "$(touch pwned)", "`touch pwned`", "line\nbreak", "-n", "--", "", "*", "\\", "ü"]

STANDIN = """#!/bin/sh
# stands for `python -m rlhf_train`
run=$RLHF_RUNS/$6
. "$RLHF_RUNS/../scenario.sh"
"""
TRAINS = "trap 'echo stopped; exit 143' TERM; echo begun; while :; do sleep 0.05; done\n"
DEAF = (
    "trap '' TERM; setsid sh -c 'while :; do sleep 0.1; done' rank-of-its-own & echo begun; while :; do sleep "
    "0.1; done\n"
)


class Box:
    """A box in a folder: ROOT as a deploy leaves it."""

    def __init__(self, folder: Path, shell: str = SHELLS[0]) -> None:
        self.root, self.shell, self.bin = folder / "the root", shell, folder / "bin"
        self.bin.mkdir(parents=True)
        if shell == "busybox":  # all its tools, not its shell alone
            subprocess.run(["busybox", "--install", "-s", str(self.bin)], check=True)
        else:
            (self.bin / "sh").symlink_to(shutil.which(shell) or "/bin/sh")
        self.code = self.root / "code" / FP
        for part in ("env", "remote", "jobs", "docker"):
            shutil.copytree(CHECKOUT / part, self.code / part, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(CHECKOUT / "docker-compose.yml", self.code)
        self.python = self.root / "env" / KEY / "bin" / "python"
        self.python.parent.mkdir(parents=True)
        self.command("python", STANDIN, self.python)
        (self.root / ".rlhf-box").touch()
        self.deployed()
        self.scenario("echo begun; exit 0")
        self.environ = {"PATH": f"{self.bin}:/usr/local/bin:/usr/bin:/bin", "HOME": str(folder), "USER": "tester"}

    def command(self, name: str, text: str, path: Path | None = None) -> None:
        path = path or self.bin / name
        path.unlink(missing_ok=True)
        path.write_text(text, encoding="utf-8")
        path.chmod(0o755)

    def deployed(self, *more: str, **changed: str) -> None:
        lines = {
            "code": FP,
            "runtime": "bare",
            "environment": KEY,
            "python": str(self.python),
            "route": "direct",
            "mirror": "default",
            "p2p": "0",
        }
        text = [f"{key} {value}" for key, value in (lines | changed).items()]
        (self.root / "deployed").write_text("\n".join([*text, *more, ""]), encoding="utf-8")

    def scenario(self, text: str) -> None:
        (self.root / "scenario.sh").write_text(text, encoding="utf-8")

    def argv(self, *words: str) -> list[str]:
        return ["sh", str(self.code / "remote/on_box/supervisor.sh"), words[0], str(self.root), *words[1:]]

    def ask(self, *words: str, stdin: bytes = b"", code: int = 0, timeout_s: float = 60) -> list[str]:
        argv = self.argv(*words)
        argv[0] = str(self.bin / "sh")
        done = subprocess.run(argv, input=stdin, env=self.environ, capture_output=True, timeout=timeout_s, check=False)
        assert done.returncode == code, (done.stdout, done.stderr)
        return done.stdout.decode().splitlines() if code == 0 else done.stderr.decode().splitlines()

    def start(
        self, run: str = "run-1", request: str = "req-1", *args: str, stdin: bytes | None = None, fp: str = FP
    ) -> str:
        (line,) = self.ask("start", run, request, fp, "60", "--", *args, stdin=sent() if stdin is None else stdin)
        return line

    def started(self, run: str = "run-1", request: str = "req-1", *args: str, stdin: bytes | None = None) -> int:
        """Return the supervisor's pid, when the job says that it has begun."""
        word, of, pid = self.start(run, request, *args, stdin=stdin).split()
        assert (word, of) == ("started", request)
        until(lambda: "begun" in self.output(run))
        return int(pid)

    def run(self, run: str = "run-1") -> RunDir:
        return RunDir(self.root / "runs" / run)

    def output(self, run: str = "run-1") -> str:
        path = self.run(run).output
        return path.read_text(errors="replace") if path.exists() else ""

    def job(self, run: str = "run-1") -> JobState:
        """As `list` tells it."""
        return next(JobState.of(line.split()[2:]) for line in self.ask("list") if line.startswith(f"run {run} "))

    def ended(self, run: str = "run-1") -> JobState:
        until(lambda: self.run(run).exit.exists() and not (self.root / "slot").exists() and not self.job(run).alive)
        return self.job(run)

    def members(self, request: str = "req-1") -> list[psutil.Process]:
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get("RLHF_REQUEST") == request and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except psutil.Error:
                pass
        return found

    def watch(self, file: str, offset: int = 0, **more: Any) -> tuple[Watched, Seen]:
        view = Seen(file)
        return follow(
            self.stream,
            view,
            WatchedRun("box", "run-1"),
            limits=StreamTimeouts(silence_s=5, first_pause_s=0.05),
            offset=offset,
            **more,
        ), view

    def stream(self, run: str, file: str, offset: int) -> subprocess.Popen[bytes]:
        argv = self.argv("follow", run, file, str(offset))
        return subprocess.Popen(
            [str(self.bin / "sh"), *argv[1:]], env=self.environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )

    def everything(self) -> list[psutil.Process]:
        """What was started here: our folder of commands is in its PATH."""
        return [process for process in psutil.process_iter() if str(self.bin) in _environ(process).get("PATH", "")]


def sent(*secrets: str, job: bytes = JOB) -> bytes:
    lines = [f"secrets {len(secrets)}", *secrets, f"job {hashlib.sha256(job).hexdigest()[:16]}", ""]
    return "\n".join(lines).encode() + job


def until(condition: Callable[[], Any]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, "it did not come to that"
        time.sleep(0.01)


class Seen:
    """What a view is given."""

    def __init__(self, file: str) -> None:
        self.file, self.bytes, self.jobs, self.notes = file, bytearray(), list[JobState](), list[str]()
        self.cards, self.beats, self.aways = list[GpuUsage](), list[float](), 0
        self.at = list[float]()  # when data came

    def __enter__(self) -> Seen:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return

    def data(self, data: bytes) -> None:
        self.bytes += data
        self.at.append(time.monotonic())

    def beat(self, epoch: float) -> None:
        self.beats.append(epoch)

    def job(self, job: JobState) -> None:
        self.jobs.append(job)

    def card(self, card: GpuUsage) -> None:
        self.cards.append(card)

    def connection_lost(self, why: str, since: float) -> None:
        self.aways += 1

    def back(self) -> None:
        return

    def note(self, text: str) -> None:
        self.notes.append(text)


def _is_a_view(seen: Seen) -> View:
    return seen


@pytest.fixture
def made(tmp_path: Path) -> Iterator[Callable[[str], Box]]:
    boxes: list[Box] = []

    def make(shell: str) -> Box:
        boxes.append(Box(tmp_path / f"box{len(boxes)}", shell))
        return boxes[-1]

    yield make
    for box in boxes:
        for _ in range(3):
            for process in box.everything():
                with contextlib.suppress(psutil.Error):
                    process.kill()
            time.sleep(0.02)


@pytest.fixture
def box(made: Callable[[str], Box]) -> Box:
    return made(SHELLS[0])


every_shell = pytest.mark.parametrize("shell", SHELLS)


# --- a job's life ---------------------------------------------------------------------------------


@every_shell
def test_a_job_from_its_start_to_its_end(made: Callable[[str], Box], shell: str) -> None:
    box = made(shell)
    box.scenario(
        'printf "%s\\n" begun >&2; echo one >"$run/events.jsonl"; sleep 0.5; echo two >>"$run/events.jsonl"; printf '
        "last; exit 75"
    )
    pid = box.started("run-1", "req-1", "--step", "1", "2")
    assert psutil.Process(pid).ppid() != os.getpid() and os.getsid(pid) == pid
    running = box.job()
    assert (running.alive, running.training, running.exit, running.cancelled) == (True, True, None, False)
    assert (running.words["request"], running.words["grace"], running.words["steps"]) == ("req-1", "60", "1,2")
    assert running.started is not None and abs(running.started - time.time()) < 5
    assert "slot run-1 req-1" in box.ask("list")

    watched, seen = box.watch("log")
    assert watched.done and watched.exit == 75 and seen.aways == 0
    _, seen = box.watch("output")
    assert bytes(seen.bytes) == b"begun\nlast" == box.run().output.read_bytes()
    assert read_events(box.run().events)[1] == 8

    ended = box.ended()
    assert (ended.alive, ended.training, ended.exit) == (False, False, 75) and state_of(None, ended) == "preempted"
    assert ended.ended is not None and running.started <= ended.ended <= time.time() + 1
    assert {path.name for path in (box.run().path / "job").iterdir()} == {
        "request", "pid", "start", "boot", "started", "heartbeat", "grace", "steps", "process", "output", "ended",
        "exit",
    }  # fmt: skip
    assert box.run().exit.read_text() == "75\n" and not any(line.startswith("slot") for line in box.ask("list"))
    assert list((box.root / "secrets").iterdir()) == [] and not (box.root / "slot").exists()


@pytest.mark.parametrize("code", [0, 2, 4, 127, 143])
def test_the_exit_code_is_the_jobs(box: Box, code: int) -> None:
    box.scenario(f"exit {code}")
    assert box.start().startswith("started req-1 ")
    assert box.ended().exit == code


def test_a_job_ended_by_a_signal_has_its_number(box: Box) -> None:
    box.scenario("kill -KILL $$")
    box.start()
    assert box.ended().exit == 137


def test_the_heartbeat_beats_and_the_cards_are_asked(box: Box) -> None:
    box.command("nvidia-smi", "#!/bin/sh\necho '0, 1024, 24564, 98'\necho '1, 0, 24564, [N/A]'\n")
    box.scenario(TRAINS)
    box.started()
    first = box.job().words["heartbeat"]
    until(lambda: int(box.job().words["heartbeat"]) >= int(first) + 2)
    view = Seen("output")
    follow(box.stream, view, WatchedRun("box", "run-1"), once=True)
    assert [(card.index, card.used_mib, card.total_mib) for card in view.cards] == [(0, 1024, 24564), (1, 0, 24564)]
    assert "gpu 0 1024 24564 98" in box.ask("list")


def test_nvidia_smi_that_hangs_holds_nothing_up(box: Box) -> None:
    box.command("nvidia-smi", "#!/bin/sh\nexec sleep 30\n")
    box.scenario("echo begun; sleep 1.5; exit 0")
    box.started()
    first = box.run().heartbeat.read_text()
    until(lambda: box.run().exit.exists())
    assert box.run().heartbeat.read_text() > first
    began = time.monotonic()
    assert box.job().exit == 0 and time.monotonic() - began < 5


# --- its environment ------------------------------------------------------------------------------


def test_the_environment_is_a_clean_one(box: Box) -> None:
    box.environ |= {
        "EVIL": "1",
        "PYTHONHOME": "/nowhere",
        "https_proxy": "http://127.0.0.1:9",
        "HF_ENDPOINT": "http://other",
        "LC_ALL": "C",
    }
    box.scenario("env; echo begun")
    box.started()
    lines = dict(line.split("=", 1) for line in box.output().splitlines() if "=" in line)
    cache = box.root / "cache"
    expected = {
        "HF_HOME": f"{cache}/huggingface", "RLHF_CACHE": f"{cache}/rlhf-box", "XDG_CACHE_HOME": str(cache),
        "TMPDIR": f"{cache}/tmp",
        "RLHF_RUNS": f"{box.root}/runs", "PYTHONPATH": str(box.code), "RLHF_REQUEST": "req-1",
        "HOME": box.environ["HOME"], "USER": "tester",
        "HF_ENDPOINT": "https://huggingface.co", "LANG": "C.UTF-8", "PWD": str(box.code),
    }  # fmt: skip
    assert {name: lines.get(name) for name in expected} == expected
    assert lines["PATH"].startswith(f"{box.python.parent}:")
    assert not {"EVIL", "PYTHONHOME", "https_proxy", "LC_ALL", "NCCL_P2P_DISABLE"} & set(lines)
    assert (cache / "tmp").is_dir()


def test_route_peer_access_and_the_providers_files(box: Box, tmp_path: Path) -> None:
    (tmp_path / "rp").write_text('export GIVEN="a b"\nPATH=/given:$PATH\nHF_HOME=/given\n')
    (tmp_path / "broken").write_text("if [ ; then (\n")
    (tmp_path / "turbo").write_text("export http_proxy=http://proxy:1 https_proxy=http://proxy:1\n")
    box.scenario(
        'echo "$GIVEN|$HF_ENDPOINT|$HF_HUB_DISABLE_XET|$https_proxy|$NCCL_P2P_DISABLE|$HF_HOME|$PATH|$RLHF_FLAVOUR"; '
        "echo begun"
    )
    files = [f"env_file {tmp_path / name}" for name in ("gone", "broken", "rp")]
    said = {}
    for route in ("direct", "mirror", "proxy"):
        box.deployed(*files, f"proxy_file {tmp_path}/turbo", route=route, mirror="cn", p2p="1", flavour="cu130")
        box.started("run-1", route)
        said[route] = box.output().splitlines()[0].split("|")
        box.ended()
    assert {(words[5], words[0], words[4]) for words in said.values()} == {
        (f"{box.root}/cache/huggingface", "a b", "1")
    }
    assert said["direct"][1:4] == ["https://huggingface.co", "", ""]
    assert said["mirror"][1:4] == ["https://hf-mirror.com", "1", ""]
    assert said["proxy"][1:4] == ["https://huggingface.co", "", "http://proxy:1"]
    assert "/given:" in said["direct"][6] and said["direct"][7] == "cu130"


@every_shell
def test_hostile_arguments_come_through_unchanged(made: Callable[[str], Box], shell: str) -> None:
    box = made(shell)
    box.scenario('for word; do printf "%s\\0" "$word"; done >"$run/words"; echo begun')
    box.started("run-1", "req-1", *HOSTILE)
    job = box.root / "inputs" / hashlib.sha256(JOB).hexdigest()[:16] / "job.yaml"
    words = (box.run().path / "words").read_bytes().decode().split("\0")[:-1]
    assert words == ["-m", "rlhf_train", "--job", str(job), "--run", "run-1", *HOSTILE]
    assert job.read_bytes() == JOB and not list(box.root.rglob("pwned"))


@pytest.mark.parametrize("name", [*(word for word in HOSTILE), "../up", "a/b", ".hidden", "x" * 65])
def test_hostile_names_are_refused(box: Box, name: str) -> None:
    assert box.start(name).startswith("refused this cannot name a run")
    assert box.start("run-1", name).startswith("refused this cannot name a request")
    assert box.start(fp=name).startswith("refused ")
    assert box.ask("follow", name, "events", "0", code=2) == ["error: this cannot name a run"]
    assert box.ask("cancel", name, "1", code=2) == ["error: this cannot name a run"]
    assert box.ask("withdraw", name, code=2) == ["error: this cannot name a request"]
    assert (
        not (box.root / "runs").exists() and not (box.root / "requests").exists() and not list(box.root.rglob("pwned"))
    )


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["follow", "run-1", "../../etc/passwd", "0"], "error: events, log or output can be followed"),
        (["follow", "run-1", "events", "one"], "error: the offset is not a number"),
        (
            ["follow", "run-1", "events", "0", "more"],
            "error: the call is `follow ROOT RUN events|log|output OFFSET|-LINES`",
        ),
        (["cancel", "run-1", "soon"], "error: the grace is not a number of seconds"),
        (["destroy"], "error: there is no verb destroy"),
    ],
)
def test_a_wrong_call_is_told(box: Box, words: Sequence[str], said: str) -> None:
    box.run().path.mkdir(parents=True)
    assert box.ask(*words, code=2) == [said]


def test_an_unknown_run_is_told(box: Box) -> None:
    assert box.ask("follow", "none", "events", "0", code=2) == [f"error: there is no run none in {box.root}/runs"]
    assert box.ask("cancel", "none", "0", code=2) == [f"error: there is no run none in {box.root}/runs"]


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda box: (box.root / ".rlhf-box").unlink(), "nothing is deployed in"),
        (lambda box: (box.root / "deployed").unlink(), "nothing is deployed in"),
        (lambda box: box.deployed(code="ffff"), f"the code {FP} is not deployed here; deployed: ffff"),
        (lambda box: box.deployed(python="/no/python"), "there is no Python at /no/python: deploy again"),
        (lambda box: box.deployed(route="mirror", mirror="nope"), "there is no mirror nope in env/mirrors"),
        (lambda box: box.deployed(runtime="odd"), "the runtime odd is not known"),
    ],
)
def test_what_is_not_deployed_is_refused(box: Box, spoil: Callable[[Box], None], said: str) -> None:
    spoil(box)
    assert box.start().startswith(f"refused {said}")
    assert (
        not (box.root / "runs").exists()
        and not (box.root / "requests").exists()
        and not list((box.root / "inputs").iterdir())
    )


# --- secrets --------------------------------------------------------------------------------------


@every_shell
def test_secrets_are_in_the_jobs_environment_and_nowhere_else(made: Callable[[str], Box], shell: str) -> None:
    box = made(shell)
    value = "hf_'a b$(touch pwned)\"\\n=#"
    box.scenario(
        '[ "$HF_TOKEN" = "$(cat "$RLHF_RUNS/../expected")" ] && echo right; cd "${RLHF_RUNS%/runs}/secrets/req-1"; '
        'stat -c "%a %n" *; ' + TRAINS
    )
    (box.root / "expected").write_text(value)
    pid = box.started(stdin=sent(f"HF_TOKEN={value}", "OTHER_KEY=two"))
    (box.root / "expected").unlink()
    folder = box.root / "secrets" / "req-1"
    assert box.output().splitlines()[:3] == ["right", "600 HF_TOKEN", "600 OTHER_KEY"]
    assert folder.stat().st_mode & 0o777 == 0o700
    holders = {
        _environ(process).get("RLHF_REQUEST") for process in psutil.process_iter() if "HF_TOKEN" in _environ(process)
    }
    assert holders == {"req-1"}
    for process in psutil.process_iter():
        assert "hf_'a" not in " ".join(_cmdline(process))
    assert "HF_TOKEN" not in _environ(psutil.Process(pid))
    files = [path for path in box.root.rglob("*") if path.is_file() and folder not in path.parents]
    assert len(files) > 20 and not any(b"hf_'a" in path.read_bytes() for path in files)
    assert "\n".join(box.ask("list")).count("hf_") == 0
    assert box.ask("cancel", "run-1", "5")[-1] == "free"
    assert not folder.exists() and not list(box.root.rglob("pwned"))


def _environ(process: psutil.Process) -> dict[str, str]:
    try:
        return process.environ()
    except psutil.Error:
        return {}


def _cmdline(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


@pytest.mark.parametrize(
    ("stdin", "said"),
    [
        (b"", "the connection broke before all of the job was here"),
        (b"secrets 2\nHF_TOKEN=x\n", "the connection broke before all of the job was here"),
        (b"secrets 1\nHF_TOKEN=x", "the connection broke before all of the job was here"),
        (sent("HF_TOKEN=x")[:-1], "the connection broke before all of the job was here"),
        (sent() + b"more", "the connection broke before all of the job was here"),
        (b"job 123\n", "the input is not a job"),
        (sent("hf_token=x"), "secret 1 does not name a variable"),
        (sent("HF_TOKEN"), "secret 1 has no value"),
        (b"secrets 0\njob 12\n", "the hash of the job file is not one"),
        (b"secrets 0\njob ../../../../../../etc/x\n", "the hash of the job file is not one"),
    ],
)
def test_what_did_not_come_whole_starts_nothing(box: Box, stdin: bytes, said: str) -> None:
    assert box.start(stdin=stdin).startswith(f"refused {said}")
    assert {path.name for path in box.root.iterdir()} <= {
        ".rlhf-box",
        "deployed",
        "code",
        "env",
        "scenario.sh",
        "inputs",
    }
    assert not (box.root / "inputs").exists() or list((box.root / "inputs").iterdir()) == []


def test_a_job_file_of_any_bytes_comes_whole(box: Box) -> None:
    job = bytes(range(256)) * 1000
    box.started(stdin=sent("A=", job=job))
    assert (box.root / "inputs" / hashlib.sha256(job).hexdigest()[:16] / "job.yaml").read_bytes() == job


# --- started once, or not at all ------------------------------------------------------------------


@every_shell
def test_one_request_starts_once(made: Callable[[str], Box], shell: str) -> None:
    box = made(shell)
    box.scenario('echo x >>"$RLHF_RUNS/../starts"; ' + TRAINS)
    box.started()
    assert box.start() == "already req-1"
    assert box.start("run-2") == "already req-1"
    assert box.start("run-2", "req-2") == "busy run-1 req-1"
    assert box.ask("withdraw", "req-1") == ["started req-1"]
    box.ask("cancel", "run-1", "5")
    assert box.start() == "already req-1"
    assert (box.root / "starts").read_text() == "x\n" and not (box.root / "slot").exists()
    assert not (box.root / "runs/run-2").exists() and list((box.root / "secrets").iterdir()) == []


def test_many_at_once_start_one(box: Box) -> None:
    """Three of each of three requests."""
    box.scenario('echo x >>"$RLHF_RUNS/../starts"; ' + TRAINS)
    calls = []
    for number in range(9):
        request = f"req-{number % 3}"
        argv = [str(box.bin / "sh"), *box.argv("start", f"run-{number % 3}", request, FP, "60", "--")[1:]]
        calls.append((request, subprocess.Popen(argv, env=box.environ, stdin=subprocess.PIPE, stdout=subprocess.PIPE)))
    said = {}
    for number, (request, call) in enumerate(calls):
        assert call.stdin
        call.stdin.write(sent(f"SECRET={request}"))
        call.stdin.close()
        said[number] = (request, call)
    answers = []
    for request, call in said.values():
        if call.stdin and call.stdout:
            output = call.stdout.read() if call.stdin.closed else call.communicate()[0]
            answers.append((request, output.decode().split()))
    (winner,) = {request for request, words in answers if words[0] == "started"}
    assert sorted(words[0] for _, words in answers) == ["already"] * 2 + ["busy"] * 6 + ["started"]
    assert all(words == ["already", winner] for request, words in answers if words[0] == "already")
    assert all(words[2] == winner for _, words in answers if words[0] == "busy")
    until(lambda: (box.root / "starts").exists())
    assert (box.root / "starts").read_text() == "x\n"
    assert [path.name for path in (box.root / "secrets").iterdir()] == [winner]


@every_shell
def test_withdrawn_before_the_start(made: Callable[[str], Box], shell: str) -> None:
    box = made(shell)
    assert box.ask("withdraw", "req-1") == ["not_run req-1"]
    assert box.ask("withdraw", "req-1") == ["not_run req-1"]
    assert box.start(stdin=sent("HF_TOKEN=x")) == "withdrawn req-1"
    assert not (box.root / "runs").exists() and not (box.root / "secrets").exists() and not (box.root / "slot").exists()
    assert box.start("run-1", "req-2").startswith("started req-2")


def test_a_refused_or_busy_request_may_come_again_or_be_withdrawn(box: Box) -> None:
    box.scenario(TRAINS)
    box.started("run-1", "req-1")
    assert box.start("run-2", "req-2") == "busy run-1 req-1"
    box.ask("cancel", "run-1", "5")
    assert box.start("run-2", "req-2").startswith("started req-2")
    assert box.ask("withdraw", "req-3") == ["not_run req-3"]


def test_start_and_withdraw_at_once_agree(box: Box) -> None:
    box.scenario('echo "$RLHF_REQUEST" >>"$RLHF_RUNS/../starts"')
    seen, delay_s = list[bool](), 0.0
    while len(seen) < 12 or set(seen) != {
        True,
        False,
    }:  # a start takes some hundredths of a second, on a busy machine more
        request = f"req-{len(seen)}"
        call = subprocess.Popen(
            [str(box.bin / "sh"), *box.argv("start", "run-1", request, FP, "60", "--")[1:]],
            env=box.environ, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip
        assert call.stdin and call.stdout
        call.stdin.write(sent())
        call.stdin.close()
        time.sleep(delay_s)
        (withdrawn,) = box.ask("withdraw", request)
        said = call.stdout.read().decode().split()
        call.wait()
        until(lambda: not (box.root / "slot").exists())
        ran = (box.root / "starts").exists() and request in (box.root / "starts").read_text().split()
        assert (withdrawn, said[0], ran) in {
            (f"not_run {request}", "withdrawn", False),
            (f"started {request}", "started", True),
        }
        seen.append(ran)
        delay_s = 1.3 * delay_s + 0.006
        assert delay_s < 20, f"it always ended alike: {seen}"


def test_the_line_that_breaks_in_the_middle_of_stdin_starts_nothing(box: Box) -> None:
    argv = [str(box.bin / "sh"), *box.argv("start", "run-1", "req-1", FP, "60", "--")[1:]]
    call = subprocess.Popen(
        argv, env=box.environ, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
    )
    assert call.stdin and call.stdout
    call.stdin.write(sent("HF_TOKEN=hf_x")[:-4])
    call.stdin.flush()
    until(lambda: list((box.root / "inputs").glob(".incoming.*")))
    os.killpg(call.pid, signal.SIGKILL)
    call.stdin.close()
    until(lambda: not box.everything())
    assert (
        list((box.root / "inputs").iterdir()) == []
        and not (box.root / "runs").exists()
        and not (box.root / "secrets").exists()
    )
    assert box.ask("withdraw", "req-1") == ["not_run req-1"]


def test_a_job_survives_its_starter_whose_answer_nobody_reads(box: Box) -> None:
    box.scenario(TRAINS)
    argv = [str(box.bin / "sh"), *box.argv("start", "run-1", "req-1", FP, "60", "--")[1:]]
    call = subprocess.Popen(
        argv, env=box.environ, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
    )
    assert call.stdin and call.stdout
    call.stdout.close()
    call.stdin.write(sent())
    call.stdin.flush()
    until(lambda: list((box.root / "inputs").glob(".incoming.*")))
    os.killpg(call.pid, signal.SIGKILL)
    call.stdin.close()
    until(lambda: "begun" in box.output())
    assert box.ask("withdraw", "req-1") == ["started req-1"]
    assert box.job().alive and box.job().training


# --- following ------------------------------------------------------------------------------------


@every_shell
def test_every_byte_comes_once_and_in_order(made: Callable[[str], Box], shell: str) -> None:
    """Bytes of all sorts, written while they are read, in pieces that end anywhere."""
    box = made(shell)
    (box.root / "bytes").write_bytes(os.urandom(700_000) + b"\n\0bytes 3 4\n" * 100)
    box.scenario(
        'echo begun; for i in 1 2 3; do cat "$RLHF_RUNS/../bytes"; sleep 0.3; done >"$run/train.log"; printf end '
        '>>"$run/train.log"'
    )
    box.started()
    watched, seen = box.watch("log")
    assert watched.done and watched.exit == 0 and seen.aways == 0
    assert bytes(seen.bytes) == box.run().log.read_bytes() == (box.root / "bytes").read_bytes() * 3 + b"end"
    _, rest = box.watch("log", offset=100_003)
    assert bytes(rest.bytes) == bytes(seen.bytes)[100_003:]
    _, rest = box.watch("log", offset=len(seen.bytes))
    assert bytes(rest.bytes) == b""


def test_standard_output_may_be_a_socket(box: Box) -> None:
    """As sshd gives it, where it has no pipes."""
    box.run().path.mkdir(parents=True)
    box.run().log.write_bytes(b"one\ntwo")
    ours, theirs = socket.socketpair()
    with ours, theirs:
        argv = [str(box.bin / "sh"), *box.argv("follow", "run-1", "log", "0")[1:]]
        subprocess.run(
            argv,
            env=box.environ,
            stdin=theirs.fileno(),
            stdout=theirs.fileno(),
            stderr=subprocess.DEVNULL,
            check=True,
            timeout=20,
        )
        theirs.shutdown(socket.SHUT_WR)
        with ours.makefile("rb") as file:
            assert b"\nbytes 0 7\none\ntwobeat " in file.read()


def test_following_begins_at_once_and_new_bytes_come_soon(box: Box) -> None:
    box.scenario(
        'printf "one\\n" >"$run/train.log"; echo begun; while [ ! -e "$run/go" ]; do sleep 0.02; done; echo two '
        '>>"$run/train.log"; ' + TRAINS
    )
    box.started()
    process = box.stream("run-1", "log", 0)
    began = time.monotonic()
    frames = _frames(process)
    words = [next(frames) for _ in range(3)]
    assert [frame.word for frame in words] == ["job", "bytes", "beat"] and words[1].data == b"one\n"
    assert time.monotonic() - began < 1  # a process's start on a busy machine
    (box.run().path / "go").touch()
    written = time.monotonic()
    assert next(frame for frame in frames if frame.word == "bytes").data == b"two\n" and time.monotonic() - written < 1
    beats = [
        int(frame.args[0])
        for frame, _ in zip((frame for frame in frames if frame.word == "beat"), range(2), strict=False)
    ]
    assert beats == sorted(set(beats)) and abs(beats[-1] - time.time()) < 5
    assert process.stdout
    process.stdout.close()  # ssh is gone
    assert process.wait(5) is not None


def _frames(process: subprocess.Popen[bytes]) -> Iterator[Any]:
    framing = Framing()
    assert process.stdout
    while data := os.read(process.stdout.fileno(), 1 << 16):
        yield from framing.feed(data)


def test_a_file_that_was_cut_is_told(box: Box) -> None:
    box.scenario(
        'echo 0123456789 >"$run/train.log"; echo begun; while [ ! -e "$run/go" ]; do sleep 0.02; done; printf new '
        '>"$run/train.log"; sleep 0.5'
    )
    box.started()
    frames = _frames(box.stream("run-1", "log", 0))
    until(lambda: next(frames).word == "beat")
    (box.run().path / "go").touch()
    rest = [(frame.word, *frame.args) for frame in frames if frame.word in ("shrunk", "bytes", "done")]
    assert rest in ([("shrunk", "3"), ("done",)], [("shrunk", "0"), ("bytes", "0"), ("done",)])
    frames = _frames(box.stream("run-1", "log", 50))
    assert [(frame.word, *frame.args) for frame in frames if frame.word == "shrunk"] == [("shrunk", "3")]


def test_a_torn_event_is_read_whole_over_a_line_that_breaks(box: Box) -> None:
    """Each connection is killed after some bytes, and a resume cuts a torn line off the file."""
    lines = [
        b'{"kind": "progress", "seq": %d, "doing": "%s"}\n' % (number, b"x" * (number * 37 % 400))
        for number in range(300)
    ]
    box.run().path.mkdir(parents=True)
    box.run().events.write_bytes(b"".join(lines[:150]) + lines[150][:20])
    box.scenario(TRAINS)
    box.started()
    count = 0

    def opened(run: str, file: str, offset: int) -> subprocess.Popen[bytes]:
        nonlocal count
        count += 1
        process = box.stream(run, file, offset)
        if count == 2:
            box.run().events.write_bytes(b"".join(lines))
        if count > 4:
            box.ask("cancel", "run-1", "5")
            return process
        cut = subprocess.Popen(
            ["head", "-c", str(9000 * count)], stdin=process.stdout, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        assert process.stdout
        process.stdout.close()
        return cut

    seen = Seen("events")
    watched = follow(opened, seen, WatchedRun("box", "run-1"), limits=StreamTimeouts(silence_s=3, first_pause_s=0.02))
    assert watched.done and bytes(seen.bytes) == b"".join(lines) and count > 4


def test_following_a_run_that_was_trained_by_hand(box: Box) -> None:
    box.run().path.mkdir(parents=True)
    box.run().events.write_text('{"kind": "end", "step": 3}\n')
    watched, _ = box.watch("events")
    assert watched.done and watched.job is not None and state_of(watched.last, watched.job) == "done"


def test_list_says_what_is_there(box: Box) -> None:
    run = box.run()
    for step, update in ((1, 7), (2, 20), (2, 40)):
        run.step(step).checkpoint(update).mkdir(parents=True)
        (run.step(step).checkpoint(update) / "complete.json").touch()
    run.step(3).checkpoint(5).mkdir(parents=True)  # not whole
    for step in (1, 2):
        run.step(step).complete.touch()
    run.events.write_bytes(b'{"a": 1}\n{"kind": "b c"}\n{"torn')
    (box.root / "runs" / "not a run").mkdir()
    lines = box.ask("list")
    words = next(line for line in lines if line.startswith("run run-1 ")).split()
    assert {"alive=0", "training=0", "complete=1,2", "checkpoint=1:7,2:20,2:40"} <= set(
        words
    ) and 'last run-1 {"kind": "b c"}' in lines
    assert sum(line.startswith("run ") for line in lines) == 1
    (disk,) = (int(line.split()[1]) for line in lines if line.startswith("disk "))
    assert abs(disk * 1024 - shutil.disk_usage(box.root).free) < 1e9
    assert lines[-1].startswith("beat ")


# --- cancel ---------------------------------------------------------------------------------------


@every_shell
def test_cancel_asks_first(made: Callable[[str], Box], shell: str) -> None:
    box = made(shell)
    box.scenario(
        'trap \'[ -e "$run/job/cancelled" ] && echo "seen"; exit 143\' TERM; echo begun; while :; do sleep 0.05; done'
    )
    box.started()
    began = time.monotonic()
    assert box.ask("cancel", "run-1", "30") == ["term", "ended 143", "free"]
    assert time.monotonic() - began < 10 and "seen" in box.output()
    job = box.job()
    assert (job.exit, job.cancelled, state_of(None, job)) == (143, True, "cancelled")
    assert box.ask("cancel", "run-1", "30") == ["not_running"]
    box.scenario("exit 0")
    assert box.start("run-1", "req-2").startswith("started")
    assert not box.ended().cancelled  # of the earlier call


@every_shell
def test_the_whole_tree_is_killed_when_the_grace_is_over(made: Callable[[str], Box], shell: str) -> None:
    box = made(shell)
    box.scenario(DEAF)
    box.started()
    until(
        lambda: any(
            os.getsid(process.pid) == process.pid and "rank-of-its-own" in process.cmdline()
            for process in box.members()
        )
    )
    bystander = subprocess.Popen(["sleep", "60"], env={**os.environ, "RLHF_REQUEST": "req-11"})
    try:
        assert box.ask("cancel", "run-1", "1") == ["term", "kill", "ended 137", "free"]
        assert box.members() == [] and bystander.poll() is None
    finally:
        bystander.kill()
        bystander.wait()
    assert state_of(None, box.job()) == "cancelled" and not (box.root / "slot").exists()


def test_a_grep_without_z_finds_them_too(box: Box) -> None:
    """As older busybox have it, whose plain grep sees the first variable alone."""
    box.command("grep", f'#!/bin/sh\ncase "$*" in *z*F*) exit 2 ;; esac\nexec {shutil.which("grep")} "$@"\n')
    box.scenario(DEAF)
    box.started()
    assert box.ask("cancel", "run-1", "0") == ["term", "kill", "ended 137", "free"] and box.members() == []


def test_ranks_that_outlive_the_job_are_ended_with_it(box: Box) -> None:
    box.scenario("setsid sleep 300 & echo begun; exit 4")
    box.started()
    assert box.ended().exit == 4 and box.members() == []
    assert "left processes, which are ended now" in box.output()


def test_cancel_names_who_holds_a_card(box: Box) -> None:
    holder = subprocess.Popen(["sleep", "61"])
    box.command(
        "nvidia-smi",
        f"#!/bin/sh\ncase $1 in *compute-apps*) echo 'GPU-aa, {holder.pid}, 512'; echo 'GPU-bb, 4194999, [N/A]' ;; "
        f"esac\n",
    )
    box.scenario(TRAINS)
    box.started()
    try:
        assert box.ask("cancel", "run-1", "5")[-3:] == [
            "ended 143",
            f"gpu_held GPU-aa {holder.pid} 512 sleep 61 ",
            "gpu_held GPU-bb 4194999 - ",
        ]
    finally:
        holder.kill()
        holder.wait()


# --- supervisors, boxes and numbers that are gone -------------------------------------------------


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
    until(lambda: not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE)


@every_shell
def test_the_job_goes_on_without_its_supervisor(made: Callable[[str], Box], shell: str) -> None:
    box = made(shell)
    box.scenario(
        'echo begun; while [ ! -e "$run/go" ]; do sleep 0.05; done; echo \'{"kind": "end", "step": 1}\' '
        '>"$run/events.jsonl"; exit 0'
    )
    pid = box.started("run-1", "req-1", "--step", "1", stdin=sent("HF_TOKEN=x"))
    kill(pid)
    job = box.job()
    assert (job.alive, job.training, job.exit, state_of(None, job)) == (False, True, None, "running")
    assert box.start("run-2", "req-2") == "busy run-1 req-1"
    stream = box.stream("run-1", "events", 0)
    (box.run().path / "go").touch()
    frames = list(_frames(stream))
    assert b"".join(frame.data for frame in frames) == b'{"kind": "end", "step": 1}\n' and frames[-1].word == "done"
    job = box.job()
    assert (job.alive, job.training, job.exit) == (False, False, None)
    assert state_of(read_events(box.run().events)[0][-1], job) == "done" and state_of(None, job) == "lost"
    assert not (box.root / "secrets/req-1").exists()
    box.scenario("echo begun")
    assert box.start("run-2", "req-2").startswith("started")


def test_cancel_without_a_supervisor(box: Box) -> None:
    box.scenario(DEAF)
    kill(box.started(stdin=sent("HF_TOKEN=x")))
    assert box.ask("cancel", "run-1", "1") == ["term", "kill", "ended -", "free"]
    assert box.members() == [] and state_of(None, box.job()) == "cancelled"
    assert not (box.root / "slot").exists() and not (box.root / "secrets/req-1").exists()


def test_ranks_alone_are_training_and_can_be_cancelled(box: Box) -> None:
    box.scenario("setsid sleep 300 & " + TRAINS)
    kill(box.started())
    kill(int(box.run().process.read_text().split()[0]))
    assert box.job().training and box.start("run-2", "req-2") == "busy run-1 req-1"
    assert box.ask("cancel", "run-1", "5") == ["term", "ended -", "free"]


@every_shell
def test_the_last_lines_alone(made: Callable[[str], Box], shell: str) -> None:
    box = made(shell)
    lines = [b"line %d\n" % number for number in range(1000)]
    run = box.run()
    run.path.mkdir(parents=True)
    run.log.write_bytes(b"".join(lines))
    for count, expected in ((3, lines[-3:]), (5000, lines)):
        watched, seen = box.watch("log", lines=count, once=True)
        assert bytes(seen.bytes) == b"".join(expected) and watched.offset == run.log.stat().st_size
    run.log.write_bytes(b"".join(lines) + b"half")
    assert bytes(box.watch("log", lines=2, once=True)[1].bytes) == lines[-1] + b"half"
    run.log.unlink()
    assert bytes(box.watch("log", lines=2, once=True)[1].bytes) == b""


@pytest.mark.parametrize("what", ["boot", "start"])
def test_after_a_boot_or_with_the_number_of_another_process_it_is_lost(box: Box, what: str) -> None:
    """The supervisor's number is this test's own process."""
    box.scenario(TRAINS)
    supervisor = box.started(stdin=sent("HF_TOKEN=x"))
    leader = int(box.run().process.read_text().split()[0])
    for process in (supervisor, leader):
        kill(process)
    until(lambda: not box.members())
    for folder in (box.root / "slot", box.run().supervisor.parent):
        (folder / "pid").write_text(f"{os.getpid()}\n")
        (folder / "start").write_text(f"{Path('/proc/self/stat').read_text().rsplit(') ', 1)[1].split()[19]}\n")
        (folder / what).write_text("11111111-other\n" if what == "boot" else "1\n")
    job = box.job()
    assert (job.alive, job.training, state_of(None, job)) == (False, False, "lost")
    watched, _ = box.watch("output")
    assert watched.done and watched.exit is None
    assert not (box.root / "secrets/req-1").exists() and not (box.root / "slot").exists()
    (box.root / "secrets/req-0").mkdir()  # of one that nobody has looked at since
    box.scenario("echo begun")
    box.started("run-1", "req-2")
    assert box.ended().exit == 0
    assert sorted(path.name for path in box.root.iterdir() if path.name.startswith("slot")) == []
    assert list((box.root / "secrets").iterdir()) == []


# --- a folder that several boxes share ------------------------------------------------------------

BOOT = Path("/proc/sys/kernel/random/boot_id").read_text().strip() if Path("/proc").is_dir() else ""
OTHER_BOOT = "22222222-2222-2222-2222-222222222222"


def namespace() -> str:
    return str(Path("/proc/self/ns/pid").readlink()).strip("pid:[]")


def seen_from_elsewhere(box: Box, boot: str) -> None:
    """Let the job be one of another box, as its records in the shared folder would say."""
    for folder in (box.root / "slot", box.run().supervisor.parent):
        (folder / "boot").write_text(f"{boot}\n")


def records(box: Box) -> dict[str, str]:
    """All that the job's owner has written, but for what beats."""
    folders = (box.root / "slot", box.run().supervisor.parent, box.root / "secrets" / "req-1")
    files = (path for folder in folders for path in folder.iterdir() if not path.name.startswith("heartbeat"))
    return {str(path): path.read_text() for path in files}


@pytest.mark.parametrize(
    ("boot", "host"),
    [
        (f"{OTHER_BOOT} 4026531836 host-2", "host-2"),  # another machine
        (f"{BOOT} 1 host-2", "host-2"),  # another container of this machine, whose numbers mean other processes
        (f"{OTHER_BOOT} 4026531836 {socket.gethostname()}", socket.gethostname()),  # it has the same name
    ],
    ids=["machine", "container", "namesake"],
)
def test_a_job_of_another_box_is_running_and_left_alone(box: Box, boot: str, host: str) -> None:
    box.scenario(TRAINS)
    box.started(stdin=sent("HF_TOKEN=x"))
    seen_from_elsewhere(box, boot)
    before = records(box)
    job = box.job()
    assert (job.alive, job.training, job.host, state_of(None, job)) == (True, True, host, "running")
    for run in ("run-1", "run-2"):
        assert box.start(run, f"req-{run}") == f"busy run-1 req-1 {host}"
    assert box.ask("cancel", "run-1", "1") == [f"elsewhere {host}"]
    found = parse_look(looked(box))
    assert (found.running, found.elsewhere) == ("run-1", host)
    assert records(box) == before and len(box.members()) >= 1


def looked(box: Box) -> str:
    argv = [str(box.bin / "sh"), "-s", "--", "look", str(box.root)]
    return subprocess.run(
        argv, input=script("results.sh"), env=box.environ, capture_output=True, check=True
    ).stdout.decode()


def test_containers_that_share_process_numbers_and_not_the_hosts_name_see_each_other(box: Box) -> None:
    box.scenario(TRAINS)
    supervisor = box.started()
    seen_from_elsewhere(box, f"{BOOT} {namespace()} host-2")
    job = box.job()
    assert (job.alive, job.training, job.host) == (True, True, "")
    assert box.start("run-2", "req-2") == "busy run-1 req-1"
    assert parse_look(looked(box)).running == "run-1"
    kill(supervisor)  # it is known at once, since its number is
    assert (box.job().alive, box.job().training) == (False, True)
    assert box.ask("cancel", "run-1", "5") == ["term", "ended -", "free"]


def test_a_box_that_comes_back_leaves_the_records_of_the_one_that_resumed_its_run(box: Box) -> None:
    waits = 'until [ -e "$RLHF_RUNS/go" ]; do sleep 0.1; done; exit 7'
    box.scenario(f'echo begun; [ "$RLHF_REQUEST" = req-2 ] || {{ {waits}; }}\n{TRAINS}')
    first = box.started(stdin=sent("HF_TOKEN=x"))
    os.killpg(first, signal.SIGSTOP)  # frozen, with what beats for it
    seen_from_elsewhere(box, f"{OTHER_BOOT} 4026531836 host-2")
    box.run().heartbeat.write_text(f"{int(time.time()) - 3600}\n")
    second = box.started("run-1", "req-2", stdin=sent("HF_TOKEN=x"))
    os.killpg(second, signal.SIGSTOP)  # so that nobody but the first could write now
    until(lambda: box.run().process.exists() and not list(box.run().supervisor.parent.glob("heartbeat.*")))
    box.run().heartbeat.write_text("1\n")
    before = box.run().heartbeat.read_text(), {path.name for path in box.run().supervisor.parent.iterdir()}
    os.killpg(first, signal.SIGCONT)
    (box.root / "runs/go").touch()
    until(lambda: not psutil.pid_exists(first) or psutil.Process(first).status() == psutil.STATUS_ZOMBIE)
    assert (box.run().heartbeat.read_text(), {path.name for path in box.run().supervisor.parent.iterdir()}) == before
    assert (box.root / "slot/request").read_text() == "req-2\n" and len(box.members("req-2")) >= 1
    assert [path.name for path in (box.root / "secrets").iterdir()] == ["req-2"]
    os.killpg(second, signal.SIGCONT)
    assert box.ask("cancel", "run-1", "30")[:2] == ["term", "ended 143"]


def test_a_system_that_tells_no_namespace_knows_its_own_jobs(box: Box) -> None:
    box.command("readlink", "#!/bin/sh\nexit 1\n")
    box.scenario(TRAINS)
    box.started()
    host = re.sub("[^A-Za-z0-9._-]", "_", socket.gethostname())
    assert (box.root / "slot/boot").read_text() == f"{BOOT} {host} {host}\n"
    assert (box.job().alive, box.job().host, parse_look(looked(box)).running) == (True, "", "run-1")
    seen_from_elsewhere(box, f"{BOOT} host-2 host-2")  # which tells none, either
    assert box.ask("cancel", "run-1", "1") == ["elsewhere host-2"]
    seen_from_elsewhere(box, f"{BOOT} {host} {host}")
    assert box.ask("cancel", "run-1", "30")[:2] == ["term", "ended 143"]


def test_another_box_that_is_silent_is_not_tidied_but_its_slot_can_be_had(box: Box) -> None:
    box.scenario(TRAINS)
    supervisor = box.started(stdin=sent("HF_TOKEN=x"))
    until(lambda: box.run().process.exists())
    for process in (supervisor, int(box.run().process.read_text().split()[0])):
        kill(process)
    until(lambda: not box.members())
    seen_from_elsewhere(box, f"{OTHER_BOOT} 4026531836 host-2")
    assert box.start("run-2", "req-2") == "busy run-1 req-1 host-2"  # it was heard of a moment ago
    silent_since = int(time.time()) - 3600
    box.run().heartbeat.write_text(f"{silent_since}\n")
    before = records(box)
    job = box.job()
    assert (job.alive, job.host, state_of(None, job)) == (False, "host-2", "lost")
    assert box.ask("cancel", "run-1", "1") == [f"unheard host-2 {silent_since}"]
    assert records(box) == before and parse_look(looked(box)).running is None
    box.scenario("echo begun")
    assert box.start("run-2", "req-2").startswith("started")


@every_shell
def test_a_follower_gives_a_silent_box_as_long_as_a_start_does(made: Callable[[str], Box], shell: str) -> None:
    """Seconds of silence, and whether the job lives; a namesake of this host was restarted."""
    box = made(shell)
    box.command("date", f'#!/bin/sh\ncat "{box.root}/now"\n')
    (box.root / "beat").write_text("1000\n")
    text = "for at in 1000 1009 1018 1019 1059 1060; do echo $at >now; hears beat && echo yes || echo no; done"
    shutil.copy(CHECKOUT / "remote/on_box/lib.sh", box.root)
    found = {}
    for where in ("away", "before"):  # the heartbeat that the second is listened for comes, and is its last
        call = f". ./lib.sh; sleep() {{ echo 1001 >beat; }}; where={where}; {text}"
        argv = [str(box.bin / "sh"), "-c", call]
        done = subprocess.run(argv, cwd=box.root, env=box.environ, capture_output=True, text=True, check=True)
        found[where] = done.stdout.split()
    assert found == {"away": ["yes"] * 5 + ["no"], "before": ["yes"] * 3 + ["no"] * 3}


def test_a_clock_that_is_wrong_on_another_box_does_not_silence_it(box: Box) -> None:
    """It beats, whatever time it writes."""
    box.scenario(TRAINS)
    kill(box.started())
    seen_from_elsewhere(box, f"{OTHER_BOOT} 4026531836 host-2")
    beats = subprocess.Popen(
        [
            "sh",
            "-c",
            'n=1000; while :; do n=$((n + 1)); echo $n >"$1"; sleep 0.5; done',
            "sh",
            str(box.run().heartbeat),
        ],
        env=box.environ,
    )
    try:
        until(lambda: box.run().heartbeat.read_text().startswith("10"))
        assert box.job().alive and box.start("run-2", "req-2") == "busy run-1 req-1 host-2"
    finally:
        beats.kill()
        beats.wait()


def test_a_slot_of_a_start_that_died_is_taken_over(box: Box) -> None:
    """Before anything was in it, and before its job began."""
    slot = box.root / "slot"
    slot.mkdir()
    (slot / "run").write_text("run-9\n")
    assert box.start("run-1", "req-1").startswith("started req-1")  # after the time that a living one would have
    box.ended()
    slot.mkdir()
    for name, text in {
        "run": "run-9",
        "request": "req-9",
        "pid": str(os.getpid()),
        "start": "1",
        "boot": Path("/proc/sys/kernel/random/boot_id").read_text(),
    }.items():
        (slot / name).write_text(text.strip() + "\n")
    (slot / "taken").mkdir()
    (slot / "taken/by").write_text("999999999 1\n")  # who wanted to take it over died, too
    assert box.start("run-1", "req-2").startswith("started req-2")


def test_a_slot_that_another_takes_over_is_left_to_it(box: Box) -> None:
    slot = box.root / "slot"
    (slot / "taken").mkdir(parents=True)
    own_start = Path("/proc/self/stat").read_text().rsplit(") ", 1)[1].split()[19]
    for name, text in {
        "run": "run-9",
        "request": "req-9",
        "pid": "1",
        "start": "1",
        "taken/by": f"{os.getpid()} {own_start}",
    }.items():
        (slot / name).write_text(f"{text}\n")
    assert box.start() == "refused another start is taking over the slot of run run-9, and does not end"
    assert (slot / "taken/by").exists() and not (box.root / "requests").exists()


def test_many_take_over_one_slot_at_once(box: Box) -> None:
    box.scenario('echo x >>"$RLHF_RUNS/../starts"; ' + TRAINS)
    supervisor = box.started()
    kill(supervisor)
    kill(int(box.run().process.read_text().split()[0]))
    calls = []
    for number in range(6):
        argv = [str(box.bin / "sh"), *box.argv("start", "run-1", f"next-{number}", FP, "60", "--")[1:]]
        calls.append(subprocess.Popen(argv, env=box.environ, stdin=subprocess.PIPE, stdout=subprocess.PIPE))
    for call in calls:
        assert call.stdin
        call.stdin.write(sent())
        call.stdin.flush()
    answers = [call.communicate()[0].decode().split() for call in calls]
    assert sorted(words[0] for words in answers) == ["busy"] * 5 + ["started"]
    until(lambda: len((box.root / "starts").read_text().split()) == 2)


def test_a_box_that_is_shut_down_preempts_the_job(box: Box) -> None:
    """TERM to all: the supervisor lives until the code is written."""
    box.scenario("trap 'sleep 0.3; exit 75' TERM; echo begun; while :; do sleep 0.05; done")
    pid = box.started()
    os.kill(pid, signal.SIGTERM)
    job = box.ended()
    assert (job.exit, state_of(None, job)) == (75, "preempted")


# --- full disks -----------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    place = tmp_path / "small"
    place.mkdir()
    if (
        os.getuid() != 0
        or subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=4m", "small", str(place)], capture_output=True, check=False
        ).returncode
    ):
        pytest.skip("needs the right to mount a file system")
    try:
        yield place
    finally:
        subprocess.run(["umount", "--lazy", str(place)], check=True)


def fill(folder: Path) -> None:
    with (folder / "filling").open("wb") as file:
        try:
            while True:
                os.write(file.fileno(), b"x" * 4096)
        except OSError:
            pass


def test_a_full_disk_is_a_clear_answer_and_loses_no_exit_code(box: Box, small_disk: Path) -> None:
    shutil.copytree(box.root, small_disk / "the root", symlinks=True)
    old, box.root = box.root, small_disk / "the root"
    box.code, box.python = box.root / "code" / FP, box.root / "env" / KEY / "bin" / "python"
    box.deployed()
    fill(small_disk)
    assert box.start().startswith(f"refused cannot write in {box.root}: 0 KB are free there")
    assert not (box.root / "slot").exists() and not list(
        (box.root / "runs").glob("*/job/new.*") if (box.root / "runs").exists() else []
    )
    (small_disk / "filling").unlink()
    box.scenario(f'echo begun; dd if=/dev/zero of="{small_disk}/filling" bs=4096 2>/dev/null; exit 3')
    box.started("run-1", "req-2", stdin=sent("HF_TOKEN=x"))
    job = box.ended()
    assert (job.exit, job.alive) == (3, False) and shutil.disk_usage(small_disk).free < 100_000
    assert old.exists()


def test_a_full_disk_does_not_silence_a_job(box: Box, small_disk: Path) -> None:
    shutil.copytree(box.root, small_disk / "the root", symlinks=True)
    box.root = small_disk / "the root"
    box.code, box.python = box.root / "code" / FP, box.root / "env" / KEY / "bin" / "python"
    box.deployed()
    box.scenario(TRAINS)
    box.started()
    fill(small_disk)
    full_at = int(time.time())
    until(lambda: int(box.run().heartbeat.read_text()) > full_at + 1)
    assert shutil.disk_usage(small_disk).free == 0 and box.ask("cancel", "run-1", "30")[:2] == ["term", "ended 143"]


# --- a download next to it ------------------------------------------------------------------------

SAYS_ALL = """
echo "downloading some/model: half"
[ "$HF_TOKEN" = "$(cat "$EXPECTED")" ] && echo "right secret"
echo "$RLHF_RUNS"; for word; do printf "<%s>" "$word"; done; echo
[ -t 0 ] || read -r line || echo "nothing to read"
echo oops >&2
exit 3
"""


@every_shell
def test_a_download_is_no_job_and_runs_next_to_one(made: Callable[[str], Box], shell: str) -> None:
    box = made(shell)
    value = "hf_'a b$(touch pwned)\"\\n=#"
    expected = box.root.parent / "expected"
    expected.write_text(value)
    box.scenario(f"EXPECTED={expected}\ncase $3 in --download) {SAYS_ALL} ;; esac\n{TRAINS}")
    box.started()
    listed = [line.split()[:2] for line in box.ask("list") if line.startswith(("run", "slot"))]
    runs = sorted((box.root / "runs").iterdir())
    before = {path for path in box.root.rglob("*") if path.is_file()}
    said = box.ask("download", "load-1", FP, "--", "--step", "1", stdin=sent(f"HF_TOKEN={value}", job=b"name: other\n"))
    other = box.root / "inputs" / hashlib.sha256(b"name: other\n").hexdigest()[:16] / "job.yaml"
    assert [line for line in said if line != "beat"] == [
        "begun",
        "downloading some/model: half",
        "right secret",
        f"{box.root}/runs",
        f"<-m><rlhf_train><--download><--job><{other}><--step><1>",
        "nothing to read",
        "oops",
        "ended 3",
    ]
    assert other.read_bytes() == b"name: other\n"
    new = {path for path in box.root.rglob("*") if path.is_file()} - before
    assert {path.name for path in new} <= {
        "job.yaml",
        "heartbeat",
        *(path.name for path in new if "heartbeat." in path.name),
    }
    assert not any(b"hf_'a" in path.read_bytes() for path in new) and not list(box.root.rglob("pwned"))
    assert sorted((box.root / "runs").iterdir()) == runs and box.job().training
    assert [line.split()[:2] for line in box.ask("list") if line.startswith(("run", "slot"))] == listed
    assert box.ask("cancel", "run-1", "5")[-1] == "free"


@pytest.mark.parametrize("end", ["hang up", "TERM"])
@every_shell
def test_a_download_ends_with_its_caller(made: Callable[[str], Box], shell: str, end: str) -> None:
    box = made(shell)
    # Its shell would write `Terminated` where nobody reads any more, and end of that.
    box.scenario("exec 2>/dev/null; " + TRAINS.replace("echo stopped", 'echo stopped >"$RLHF_RUNS/../told"'))
    argv = box.argv("download", "load-1", FP, "--")
    argv[0] = str(box.bin / "sh")
    process = subprocess.Popen(argv, env=box.environ, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdin and process.stdout
    with process.stdin as stdin:
        stdin.write(sent("HF_TOKEN=hf_secret"))
    assert [process.stdout.readline() for _ in range(2)] == [b"begun\n", b"begun\n"]
    for each in psutil.process_iter():
        assert "hf_secret" not in " ".join(_cmdline(each))
    if end == "TERM":
        process.terminate()
    process.stdout.close()
    assert process.wait(20) == 143
    until(lambda: (box.root / "told").exists())
    until(lambda: not box.everything())


@pytest.mark.parametrize(
    ("stdin", "said"),
    [
        (b"", "refused the connection broke before all of the job was here"),
        (sent("hf_token=x"), "refused secret 1 does not name a variable"),
        (sent()[:-1], "refused the connection broke before all of the job was here"),
    ],
)
def test_a_download_that_did_not_come_whole_begins_nothing(box: Box, stdin: bytes, said: str) -> None:
    assert box.ask("download", "load-1", FP, "--", stdin=stdin) == [said]
    assert not list((box.root / "inputs").iterdir()) if (box.root / "inputs").exists() else True


def test_a_download_needs_what_is_deployed(box: Box) -> None:
    (said,) = box.ask("download", "load-1", "f" * 16, "--", stdin=sent())
    assert said == f"refused the code {'f' * 16} is not deployed here; deployed: {FP}"


# --- Docker, whose client a script stands for -----------------------------------------------------

DOCKER = r"""#!/bin/sh
# A container is a process; its files are in $STANDIN.
printf '%s\n' "$*" >>"$STANDIN/calls"
for name; do :; done # the last word
at=$STANDIN/$name
case "$1 $2" in
    'image inspect') [ ! -e "$STANDIN/no-image" ] ;;
    'compose --project-directory')
        env | grep -E '^(RLHF_|MIRROR|NCCL_P2P|http)' >"$STANDIN/env"
        [ ! -e "$STANDIN/broken" ] || { echo 'could not select device driver' >&2; exit 1; }
        case " $* " in
            *' --entrypoint sh '*) # in the foreground: what is called in the container, with a script for the training
                while [ "$1" != -c ]; do shift; done
                inside=$(printf %s "$2" | sed "s|/opt/entrypoint python -m rlhf_train|sh '$STANDIN/scenario.sh'|")
                shift 2
                exec sh -c "$inside" "$@" ;;
        esac
        while [ "$1" != --name ]; do shift; done
        at=$STANDIN/$2
        shift 3
        (setsid env RLHF_REQUEST="$RLHF_REQUEST" RLHF_RUNS="$RLHF_RUNS" sh "$STANDIN/scenario.sh" "$@" >"$at.log" 2>&1 &
         echo $! >"$at.pid"; wait $!; echo $? >"$at.code") >/dev/null 2>&1 &
        while [ ! -s "$at.pid" ]; do sleep 0.01; done
        echo 0123456789ab ;;
    'logs -f') exec tail -n +1 -s 0.05 -f --pid "$(cat "$at.pid")" "$at.log" ;;
    'wait '*)
        [ ! -e "$STANDIN/away" ] || exit 1
        while [ -e "$at.pid" ] && [ ! -e "$at.code" ]; do sleep 0.05; done
        cat "$at.code" ;;
    'kill -s') [ -e "$at.pid" ] && kill -TERM "$(cat "$at.pid")" ;;
    'stop -t') [ -e "$at.pid" ] && kill -KILL -"$(cat "$at.pid")" ;;
    'inspect --format')
        [ -e "$at.pid" ] && [ ! -e "$STANDIN/away" ] || exit 1
        case $3 in
            *Running*) [ -e "$at.code" ] && echo false || echo true ;;
            *) [ -e "$at.code" ] && echo "exited $(cat "$at.code")" || echo 'running 0' ;;
        esac ;;
    'rm -f') rm -f "$at.pid" "$at.code" "$at.log" ;;
    'version ') [ ! -e "$STANDIN/away" ] ;;
esac
"""


@pytest.fixture
def docked(box: Box, tmp_path: Path) -> Box:
    box.command("docker", DOCKER)
    box.environ["STANDIN"] = str(tmp_path / "engine")
    (tmp_path / "engine").mkdir()
    (box.code / "data").mkdir()
    box.deployed(runtime="docker", image=f"rlhf-box:{KEY}", python="", p2p="1")
    return box


def engine(box: Box) -> Path:
    return Path(box.environ["STANDIN"])


def contained(box: Box, scenario: str) -> None:
    (engine(box) / "scenario.sh").write_text(scenario)


def test_docker_starts_by_name_and_takes_the_code_from_wait(docked: Box) -> None:
    contained(
        docked,
        'for word; do printf "<%s>" "$word"; done; echo; echo begun; echo lines >&2; sleep 0.3; printf last; exit 75',
    )
    docked.environ["HTTPS_PROXY"] = "http://never"
    docked.started("run-1", "req-1", "--step", "1", "a b'c", stdin=sent("HF_TOKEN=hf_x"))
    job = docked.job()
    assert job.alive and job.training and docked.run().container.read_text() == "rlhf-box-req-1\n"
    root, code = docked.root, docked.code
    secrets = root / "secrets/req-1"
    assert (secrets / "HF_TOKEN").read_text() == "hf_x\n"
    if os.getuid() == 0:  # the container does not run as root
        owned = (
            secrets,
            secrets / "HF_TOKEN",
            root / "runs/run-1",
            root / "runs/run-1/job",
            root / "cache/tmp",
            root / "inputs" / _hash(),
        )
        assert {path.stat().st_uid for path in owned} == {1000} and secrets.stat().st_mode & 0o777 == 0o700
    docked.ended()
    job_file = root / "inputs" / _hash() / "job.yaml"
    assert (
        docked.output() == f"<--job><{job_file}><--run><run-1><--step><1><a b'c>\nbegun\nlines\nlast"
        and docked.job().exit == 75
    )
    calls = (engine(docked) / "calls").read_text().splitlines()
    (compose,) = (call for call in calls if call.startswith("compose"))
    assert compose == (
        f"compose --project-directory {code} --env-file /dev/null -f {code}/docker-compose.yml -f "
        f"{code}/docker/compose.cpu.yml "
        f"-f {code}/docker/compose.box.yml run -d -T --no-deps --name rlhf-box-req-1 train --job {job_file} --run "
        f"run-1 --step 1 a b'c"
    )
    assert (
        "wait rlhf-box-req-1" in calls
        and calls[-1] == "rm -f rlhf-box-req-1"
        and not any("hf_x" in call for call in calls)
    )
    variables = dict(line.split("=", 1) for line in (engine(docked) / "env").read_text().splitlines())
    uid = 1000 if os.getuid() == 0 else os.getuid()
    expected = {
        "RLHF_TAG": KEY, "RLHF_UID": str(uid), "RLHF_RUNS": f"{root}/runs", "RLHF_CACHE": f"{root}/cache",
        "RLHF_SECRETS": str(secrets),
        "RLHF_INPUTS": f"{root}/inputs", "RLHF_REQUEST": "req-1", "RLHF_GRACE": "60", "MIRROR": "default",
        "NCCL_P2P_DISABLE": "1",
    }  # fmt: skip
    assert expected.items() <= variables.items() and "HTTPS_PROXY" not in variables
    assert not secrets.exists()


def test_chat_runs_in_the_image_that_was_deployed(docked: Box) -> None:
    """By a name of its own, and without any run's secrets."""
    contained(docked, ":")
    docked.ask("chat", "demo", "--compare", "step1,step3")
    (call,) = (engine(docked) / "calls").read_text().splitlines()
    where, _, what = call.partition(" run ")
    assert where.endswith(f"-f {docked.code}/docker/compose.box.yml")
    name = re.fullmatch(r"--rm --no-deps -T --name (rlhf-box-chat-\d+) train chat demo --compare step1,step3", what)
    assert name is not None, what
    variables = dict(line.split("=", 1) for line in (engine(docked) / "env").read_text().splitlines())
    secrets = docked.root / "secrets/none"
    expected = {"RLHF_TAG": KEY, "RLHF_RUNS": f"{docked.root}/runs", "RLHF_SECRETS": str(secrets), "RLHF_REQUEST": ""}
    assert expected.items() <= variables.items() and list(secrets.iterdir()) == []


def test_chat_runs_in_the_environment_that_was_deployed(box: Box) -> None:
    box.command("python", '#!/bin/sh\nprintf "<%s>" "$@" "$PWD" "$PYTHONPATH" "$RLHF_RUNS"\nexit 5\n', box.python)
    argv = box.argv("chat", "a b'c")
    done = subprocess.run(argv, env=box.environ, capture_output=True, text=True, check=False, timeout=60)
    words = ["-m", "rlhf_train", "chat", "a b'c", box.code, box.code, box.root / "runs"]
    assert (done.returncode, done.stdout) == (5, "".join(f"<{word}>" for word in words))
    (box.root / "deployed").unlink()
    assert box.ask("chat", code=3) == [f"error: nothing is deployed in {box.root}"]


def test_docker_downloads_without_a_gpu(docked: Box) -> None:
    docked.command("nvidia-smi", "#!/bin/sh\n")  # a box with a GPU
    contained(
        docked, '[ "$HF_TOKEN" = "hf_x y" ] && echo right; for word; do printf "<%s>" "$word"; done; echo; exit 3'
    )
    said = docked.ask("download", "load-1", FP, "--", "--step", "a b", stdin=sent("HF_TOKEN=hf_x y"))
    job_file, code = docked.root / "inputs" / _hash() / "job.yaml", docked.code
    assert [line for line in said if line != "beat"] == [
        "begun",
        "right",
        f"<--download><--job><{job_file}><--step><a b>",
        "ended 3",
    ]
    calls = (engine(docked) / "calls").read_text()
    files = ("docker-compose.yml", "docker/compose.cpu.yml", "docker/compose.box.yml")
    name = "rlhf-box-download-load-1"
    assert (
        f"compose --project-directory {code} --env-file /dev/null {' '.join(f'-f {code}/{file}' for file in files)} "
        f"run --rm -T --no-deps --name {name} --entrypoint sh train -c "
    ) in calls
    assert calls.splitlines()[-1] == f"rm -f {name}" and "hf_x" not in calls
    variables = (engine(docked) / "env").read_text()
    assert "RLHF_REQUEST=" not in variables and "RLHF_SECRETS=" not in variables and "hf_x" not in variables
    if os.getuid() == 0:  # the container does not run as root, and may write there
        owned = (docked.root / "runs", docked.root / "cache/huggingface", job_file)
        assert {path.stat().st_uid for path in owned} == {1000}
    assert docked.ask("list")[0].startswith("disk ")  # no run


def _hash() -> str:
    return hashlib.sha256(JOB).hexdigest()[:16]


def test_docker_is_cancelled_by_the_containers_name(docked: Box) -> None:
    contained(docked, TRAINS)
    docked.started()
    assert docked.ask("cancel", "run-1", "20") == ["term", "ended 143", "free"]
    calls = (engine(docked) / "calls").read_text().splitlines()
    assert "kill -s TERM rlhf-box-req-1" in calls and not any(call.startswith("stop") for call in calls)


def test_docker_is_stopped_when_the_grace_is_over(docked: Box) -> None:
    contained(docked, DEAF)
    docked.started()
    assert docked.ask("cancel", "run-1", "1") == ["term", "kill", "ended 137", "free"]
    assert "stop -t 0 rlhf-box-req-1" in (engine(docked) / "calls").read_text().splitlines()


def test_docker_that_cannot_start_says_why(docked: Box) -> None:
    (engine(docked) / "broken").touch()
    docked.start()
    assert docked.ended().exit == 3 and "could not select device driver" in docked.output()


def test_docker_without_the_image_is_refused(docked: Box) -> None:
    (engine(docked) / "no-image").touch()
    assert docked.start().startswith(f"refused the image rlhf-box:{KEY} is not here")


def test_a_container_goes_on_without_its_supervisor(docked: Box) -> None:
    contained(docked, TRAINS)
    kill(docked.started())
    assert docked.job().training and docked.start("run-2", "req-2") == "busy run-1 req-1"
    assert docked.ask("cancel", "run-1", "5") == ["term", "ended -", "free"]
    assert not (docked.root / "slot").exists() and not (docked.root / "secrets/req-1").exists()


def test_a_daemon_that_is_away_for_a_while_loses_no_code(docked: Box) -> None:
    contained(docked, 'echo begun; while [ ! -e "$RLHF_RUNS/go" ]; do sleep 0.05; done; exit 4')
    (engine(docked) / "away").touch()
    docked.started()
    (docked.root / "runs/go").touch()
    time.sleep(1.5)
    assert docked.job().alive and docked.job().exit is None
    (engine(docked) / "away").unlink()
    assert docked.ended().exit == 4


def test_a_container_that_somebody_removed_is_lost(docked: Box) -> None:
    contained(docked, 'echo begun; sleep 0.3; kill -KILL $PPID; rm "$STANDIN"/rlhf-box-req-1.*; exit 5')
    docked.started()
    until(lambda: not (docked.root / "slot").exists() and not docked.job().alive)
    job = docked.job()
    assert (job.alive, job.training, job.exit, state_of(None, job)) == (False, False, None, "lost")


def test_a_container_that_is_gone_marks_no_slot_of_another_box(docked: Box) -> None:
    waits = 'until [ -e "$RLHF_RUNS/go" ]; do sleep 0.1; done'
    contained(docked, f'echo begun; {waits}; kill -KILL $PPID; rm "$STANDIN"/rlhf-box-req-1.*')
    supervisor = docked.started()
    shutil.rmtree(docked.root / "slot")
    (docked.root / "slot").mkdir()
    (docked.root / "slot/request").write_text("req-2\n")
    (docked.root / "runs/go").touch()
    until(lambda: not psutil.pid_exists(supervisor))
    assert [path.name for path in (docked.root / "slot").iterdir()] == ["request"]
    assert (docked.run().supervisor.parent / "ended").exists() and docked.job().exit is None


def test_compose_takes_the_boxs_file(tmp_path: Path) -> None:
    """As the real client resolves it; it asks no daemon for that."""
    if (
        not shutil.which("docker")
        or subprocess.run(["docker", "compose", "version"], capture_output=True, check=False).returncode
    ):
        pytest.skip("needs Docker's client with Compose")
    files = [
        word
        for name in ("docker-compose.yml", "docker/compose.cpu.yml", "docker/compose.box.yml")
        for word in ("-f", str(CHECKOUT / name))
    ]
    variables = {
        "RLHF_UID": "1000",
        "RLHF_GID": "1000",
        "RLHF_INPUTS": "/data/box/inputs",
        "RLHF_TAG": KEY,
        "RLHF_REQUEST": "req-1",
        "RLHF_GRACE": "90",
        "RLHF_RUNS": "/data/box/runs",
    }
    said = subprocess.run(
        ["docker", "compose", "--project-directory", str(CHECKOUT), "--env-file", "/dev/null", *files, "config"],
        env={"PATH": os.environ["PATH"], **variables}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    train = yaml.safe_load(io.StringIO(said.stdout))["services"]["train"]
    assert (train["image"], train["pull_policy"], train["stop_grace_period"]) == (f"rlhf-box:{KEY}", "never", "1m30s")
    assert train["environment"]["RLHF_REQUEST"] == "req-1"
    mounts = {mount["target"]: (mount["source"], mount.get("read_only", False)) for mount in train["volumes"]}
    for part in ("env", "jobs", "rlhf_train"):
        assert mounts[f"/app/{part}"] == (str(CHECKOUT / part), True)
    assert mounts["/data/box/inputs"] == ("/data/box/inputs", True) and mounts["/app/runs"] == ("/data/box/runs", False)
    assert "ports" not in train


# --- the real thing -------------------------------------------------------------------------------


def test_a_real_job_trains_and_goes_on_after_a_cancel(box: Box, tmp_path: Path) -> None:
    tiny = pytest.importorskip("tests.tiny")
    box.command("python", f'#!/bin/sh\nexec "{sys.executable}" "$@"\n', box.python)
    (box.code / "rlhf_train").symlink_to(CHECKOUT / "rlhf_train")
    fields = tiny.job(tiny.write_rows(tmp_path / "rows"))
    fields["sft"] |= {"max_updates": 300, "epochs": 300}  # some seconds: it is cancelled amid
    job = yaml.safe_dump(fields).encode()
    assert box.start("tiny", "req-1", "--step", "1", stdin=sent(job=job)).startswith("started")
    run = box.run("tiny")
    until_trains = time.monotonic() + 90
    while not run.events.exists() and time.monotonic() < until_trains:
        time.sleep(0.02)
    assert box.ask("cancel", "tiny", "60", timeout_s=90) == ["term", "ended 143", "free"]
    assert state_of(None, box.job("tiny")) == "cancelled"
    assert box.start("tiny", "req-2", "--step", "1", stdin=sent(job=job)).startswith("started")
    seen = Seen("events")
    watched = follow(box.stream, seen, WatchedRun("box", "tiny"), limits=StreamTimeouts(silence_s=10))
    assert watched.done and watched.exit == 0 and bytes(seen.bytes) == run.events.read_bytes(), box.output("tiny")
    assert watched.last is not None and watched.last["kind"] == "end" and run.step(1).complete.exists()
    job_now = box.job("tiny")
    assert state_of(watched.last, job_now) == "done" and job_now.words["complete"] == "1"
    assert not list(box.code.rglob("__pycache__/*")) or (box.code / "rlhf_train").is_symlink()
