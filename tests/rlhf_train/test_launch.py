"""Test real launchers and ranks on a tiny job: what a person sees, and what is left behind."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
import pytest
import yaml

from jobs import fitness
from jobs.errors import ToolkitError
from jobs.events import read_events
from jobs.run_dir import RunDir
from jobs.spec import load_job
from rlhf_train import launch
from rlhf_train.__main__ import main
from rlhf_train.plan.placement import Machine, Placement, place
from rlhf_train.ranks.processes import SpareRanks
from rlhf_train.worker import LastWords
from tests.faults.scene import fault, is_rank, variables_of
from tests.tiny import CHECKOUT, job, write_rows
from tests.wandb_files import offline_runs, points

PATIENCE_S = 90.0  # limit for what takes seconds; other work may share the machine
FOREVER = ["--set", "sft.max_updates=1000000", "--set", "sft.epochs=1000000"]

Said = pytest.CaptureFixture[str]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunDir:
    """Return the run that `start` and `main` train with the job `own.yaml`.

    The current folder is not the checkout, and runs are named by a relative path.
    """
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(job(write_rows(tmp_path / "rows"))), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RLHF_CACHE", str(tmp_path / "cache"))
    return RunDir(tmp_path / "out" / "tiny")


WORDS = ["--job", "own.yaml", "--output-dir", "out", "--step", "1"]


@contextmanager
def start(*words: str) -> Iterator[subprocess.Popen[str]]:
    """A launcher of its own; nothing of it outlives the test."""
    script = Path("bin", "rlhf-train")  # as an installation writes it
    script.parent.mkdir(exist_ok=True)
    script.write_text("import sys\nfrom rlhf_train.__main__ import main\nsys.exit(main())\n", encoding="utf-8")
    environment = os.environ | {"PYTHONPATH": str(CHECKOUT)}
    command = [sys.executable, str(script), *WORDS, *words]
    launcher = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        yield launcher
    finally:
        for process in (*ranks_of(launcher.pid).values(), launcher):
            process.kill()
        launcher.wait()


def finish(launcher: subprocess.Popen[str]) -> tuple[int, str, str]:
    """-> (exit code, what it wrote to standard output, and to standard error)"""
    out, err = launcher.communicate(timeout=PATIENCE_S)
    return launcher.returncode, out, err


def ranks_of(launcher: int) -> dict[int, psutil.Process]:
    """The ranks that a launcher has started, by their numbers."""
    found = {}
    try:
        for process in psutil.Process(launcher).children(recursive=True):
            if is_rank(process):
                found[int(process.name().removeprefix("rank "))] = process
    except psutil.NoSuchProcess:
        pass
    return found


def importers_of(launcher: int) -> list[psutil.Process]:
    """The processes that import for a launcher's ranks, and fork them."""
    return [child for child in psutil.Process(launcher).children() if "rlhf_train.worker" in child.cmdline()]


def wait_for(condition: Callable[[], Any], what: str) -> Any:
    deadline = time.monotonic() + PATIENCE_S
    while not (found := condition()):
        assert time.monotonic() < deadline, f"waited {PATIENCE_S} s in vain for {what}"
        time.sleep(0.05)
    return found


def events(run: RunDir, kind: str) -> list[dict[str, Any]]:
    return [event for event in read_events(run.events)[0] if event["kind"] == kind]


def wait_for_event(run: RunDir, kind: str) -> None:
    wait_for(lambda: events(run, kind), f"an event `{kind}`")


def gone(process: psutil.Process) -> bool:
    return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE


# --- a launcher of its own ---


def test_a_launcher_that_is_killed_takes_its_ranks_along_and_the_same_command_resumes(
    run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    with start() as launcher:
        wait_for_event(run, "progress")
        (rank,) = ranks_of(launcher.pid).values()
        rank.suspend()
        launcher.kill()
        launcher.wait()
    try:
        with (
            monkeypatch.context() as patch,
            pytest.raises(ToolkitError, match="processes of an earlier call still hold run `tiny`") as raised,
        ):
            patch.setattr(launch, "GRACE_S", 0.2)
            with launch.locked(run):  # not while a rank lives, which may be writing
                pass
        assert raised.value.why.startswith(f"process {rank.pid} (") and "rlhf_train.worker" in raised.value.why
        assert raised.value.why.endswith(
            f"were left by process {launcher.pid} on {socket.gethostname()}, which is gone"
        )
        assert (raised.value.hint, raised.value.exit_code) == (f"kill -9 {rank.pid}", 5)
    finally:
        rank.resume()
    with launch.locked(run):
        assert gone(rank)
    # The packages of the folder that it is called from are not ours. (Python 3.10 cannot be told
    # so.)
    for package in ("jobs", "env", "rlhf_train") if sys.version_info >= (3, 11) else ():
        Path(package).mkdir()
        Path(package, "__init__.py").write_text("raise ImportError('not this one')", encoding="utf-8")
    monkeypatch.setenv("WANDB_MODE", "offline")
    with start("--set", "track=[wandb]") as launcher:
        code, out, err = finish(launcher)
    assert code == 0, err
    (tracked,) = offline_runs(run.wandb)
    losses = [(event["update"], event["loss"]) for event in events(run, "metrics")]
    assert points(tracked, "step1/loss", "step1/update") == losses and len(losses) == 4
    assert [(event["step"], event["from_update"]) for event in events(run, "resumed")] == [(1, 0)]
    assert [(event["step"], event["updates"], event["model"]) for event in events(run, "end")] == [
        (1, 4, "out/tiny/step1/model")
    ]
    assert {path.name for path in run.step(1).model.iterdir()} >= {"config.json", "model.safetensors", "tokenizer.json"}
    assert run.step(1).complete.exists() and "update 4/4" in run.log.read_text(encoding="utf-8")
    assert "step 1  update 4/4  loss " in err and "Traceback" not in err  # what it does, on standard error
    assert out.splitlines()[0].split() == [
        "step",
        "on",
        "held-out",
        "data",
        "before",
        "after",
    ]  # the report, on standard output
    assert "out/tiny/step1/model" in out


def test_an_owner_that_lives_is_waited_for_whatever_its_host_is_called(run: RunDir) -> None:
    """Two containers may share process numbers, but not the host's name."""
    run.lock.parent.mkdir(parents=True)
    hold = (
        "import fcntl, os, sys; file = open(sys.argv[1], 'a'); fcntl.flock(file, fcntl.LOCK_EX); "
        "file.write(f'{os.getpid()} on host-2'); file.flush(); print('held', flush=True); sys.stdin.read()"
    )
    argv = [sys.executable, "-c", hold, str(run.lock)]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdout and owner.stdout.readline() == "held\n"
        with pytest.raises(ToolkitError, match="is being trained by another process") as raised, launch.locked(run):
            pass
        assert raised.value.why == f"process {owner.pid} on host-2 holds {run.lock}"
        assert raised.value.hint == "wait for it, or use another --run"
        assert owner.stdin
        owner.stdin.close()
    with launch.locked(run):
        pass


def test_ctrl_c_and_a_second_launcher(run: RunDir) -> None:
    with start(*FOREVER) as launcher:
        wait_for_event(run, "metrics")
        (rank,) = ranks_of(launcher.pid).values()
        with start(*FOREVER) as second:
            code, _, err = finish(second)
        assert (code, err) == (
            5,
            "error: run `tiny` is being trained by another process\n"
            f"  why: process {launcher.pid} on {socket.gethostname()} holds out/tiny/job/lock\n\n"
            "hint: wait for it, or use another --run\n",
        )
        launcher.send_signal(signal.SIGINT)
        code, out, err = finish(launcher)
    assert (code, out) == (130, "") and gone(rank)
    (saved,) = events(run, "checkpoint")
    last = events(run, "metrics")[-1]["update"]
    assert saved["update"] == last and Path(saved["path"], "complete.json").exists()
    assert err.splitlines()[-1] == f"stopped: the same command resumes in out/tiny, from update {last} of step 1"
    assert events(run, "error") == [] and "Traceback" not in err


def test_sigterm_while_the_ranks_start(run: RunDir) -> None:
    """There is nothing to keep yet, so nothing is waited for."""
    with start() as launcher:
        wait_for(run.log.exists, "the log")  # the importer has been there for longer
        (importer,) = importers_of(launcher.pid)
        launcher.terminate()
        code, _, err = finish(launcher)
    assert code == 75 and gone(importer)
    starting, stopped = err.splitlines()
    assert starting == "step 1  starting 1 rank, which imports libraries"
    assert stopped == "stopped: the same command resumes in out/tiny, from the start of step 1"


def test_sigterm_while_the_machine_is_looked_at(run: RunDir) -> None:
    with start() as launcher:
        (importer,) = wait_for(lambda: importers_of(launcher.pid), "an importer")
        launcher.terminate()
        code, _, err = finish(launcher)
    assert (code, err) == (75, "") and gone(importer) and not run.path.exists()


def test_sigterm_twice_on_two_ranks(run: RunDir) -> None:
    """Preemption: the ranks agree on an update, save it, and end with 75. Then the run resumes.

    The second signal changes nothing.
    """
    words = [*FOREVER, "--set", "hardware.ranks=2"]
    with start(*words) as launcher:
        wait_for_event(run, "metrics")
        launcher.terminate()
        time.sleep(0.05)
        launcher.terminate()
        code, _, _ = finish(launcher)
    (saved,) = events(run, "checkpoint")
    assert code == 75 and saved["update"] == events(run, "metrics")[-1]["update"]
    with start(*words) as launcher:
        wait_for(lambda: events(run, "metrics")[-1]["update"] > saved["update"] + 1, "an update after the checkpoint")
        (resumed,) = events(run, "resumed")
        assert resumed["from_update"] == saved["update"]
        run.cancelled.touch()
        launcher.terminate()
        assert finish(launcher)[0] == 143  # it must not resume


def test_a_rank_that_is_told_to_end(run: RunDir, capsys: Said) -> None:
    """By somebody who signals every process of a container: as if the launcher had been told."""

    def terminate() -> None:
        ranks_of(os.getpid())[0].terminate()

    thread = when(lambda: events(run, "metrics"), terminate)
    assert main([*WORDS, *FOREVER]) == 75
    thread.join()
    assert [event["update"] for event in events(run, "checkpoint")] == [events(run, "metrics")[-1]["update"]]


def test_a_second_ctrl_c_waits_for_nothing(run: RunDir) -> None:
    with start(*FOREVER) as launcher:
        wait_for_event(run, "metrics")
        (rank,) = ranks_of(launcher.pid).values()
        rank.suspend()
        launcher.send_signal(signal.SIGINT)
        time.sleep(0.5)
        assert launcher.poll() is None
        launcher.send_signal(signal.SIGINT)
        assert finish(launcher)[0] == 130
    assert gone(rank) and events(run, "checkpoint") == []


def test_ranks_that_do_not_end_in_time(run: RunDir) -> None:
    """After the grace, less the launcher's own end, nothing is saved; the code is still right."""
    with start(*FOREVER, "--set", "checkpoint.grace_s=4.0") as launcher:
        wait_for_event(run, "metrics")
        (rank,) = ranks_of(launcher.pid).values()
        rank.suspend()
        before = time.monotonic()
        launcher.terminate()
        assert finish(launcher)[0] == 75
    assert 1.9 < time.monotonic() - before < 30  # 4 - END_S
    assert gone(rank) and events(run, "checkpoint") == []


def test_sigterm_before_anything_runs(run: RunDir) -> None:
    with start() as launcher:
        time.sleep(0.3)
        launcher.terminate()
        code, _, err = finish(launcher)
    assert code in (75, -signal.SIGTERM)  # the latter while Python itself starts
    assert "Traceback" not in err


# --- a launcher in this process, to spare its start ---


def when(condition: Callable[[], Any], act: Callable[[], Any]) -> threading.Thread:
    """Do `act` concurrently with the test, as soon as `condition` holds.

    It is done in the end in any case: the test would last forever without it.
    """

    def wait_and_act() -> None:
        try:
            wait_for(condition, "what the test waits for")
        finally:
            act()

    thread = threading.Thread(target=wait_and_act, daemon=True)
    thread.start()
    return thread


def test_a_rank_that_is_killed(run: RunDir, capsys: Said) -> None:
    def kill() -> None:
        ranks_of(os.getpid())[0].kill()

    thread = when(lambda: events(run, "plan"), kill)
    assert main([*WORDS, *FOREVER]) == 4
    thread.join()
    lines = capsys.readouterr().err
    error = lines[lines.index("error: ") :]
    assert error.startswith(
        "error: rank 0 was ended by SIGKILL\n"
        "  why: the kernel kills the largest process when memory runs out (see dmesg)\n"
        "       the last lines of out/tiny/train.log:\n"
    )
    assert "       step 1  supervised fine-tuning: 1000000 updates, " in error
    assert error.endswith("\n\nhint: the same command resumes the run\n")
    (event,) = events(run, "error")
    assert (event["step"], event["rank"], event["what"], event["exit_code"]) == (1, 0, "rank 0 was ended by SIGKILL", 4)
    assert ranks_of(os.getpid()) == {}


def test_of_two_ranks_one_is_killed_and_the_other_is_ended(run: RunDir, capsys: Said) -> None:
    ranks: dict[int, psutil.Process] = {}

    def kill_rank_1() -> None:
        ranks.update(ranks_of(os.getpid()))
        ranks[1].kill()

    thread = when(lambda: events(run, "plan"), kill_rank_1)
    assert main([*WORDS, *FOREVER, "--set", "hardware.ranks=2"]) == 4
    thread.join()
    assert "error: rank 1 was ended by SIGKILL\n" in capsys.readouterr().err
    assert [event["rank"] for event in events(run, "error")] == [1]
    assert sorted(ranks) == [0, 1] and all(gone(rank) for rank in ranks.values())


@pytest.mark.parametrize(
    ("codes", "failed", "ended_here", "found"),
    [
        ([4, -signal.SIGKILL], [0], [], [1]),  # rank 0's error was of the connection to rank 1
        ([4, -signal.SIGKILL], [0], [1], []),  # rank 1 waited for rank 0
        ([4, -signal.SIGABRT], [0], [], []),  # a library gave up, since rank 0 had failed
        ([-signal.SIGKILL, 4], [0], [], []),
        ([4, 75], [0], [], []),
    ],
)
def test_a_rank_that_others_killed_is_the_cause(
    codes: list[int], failed: list[int], ended_here: list[int], found: list[int]
) -> None:
    assert launch.killed_by_others(codes, {*failed, *ended_here}) == found


@pytest.mark.parametrize(("grace_s", "is_saved"), [(60.0, True), (5.0, False)])
def test_of_two_ranks_one_is_killed_while_the_other_saves(
    run: RunDir, tmp_path: Path, capsys: Said, monkeypatch: pytest.MonkeyPatch, grace_s: float, is_saved: bool
) -> None:
    """A checkpoint that rank 0 writes is waited for, up to the machine's grace."""
    go_on, partial = tmp_path / "go on", run.step(1).checkpoints / "update-2.partial"
    for name, value in variables_of(fault("wait", "saving", file=str(go_on)), tmp_path / "fault.json").items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(launch, "OTHERS_S", 0.5)

    def kill_rank_1() -> None:
        ranks_of(os.getpid())[1].kill()
        time.sleep(4.0)  # as a slow disk
        if is_saved:
            go_on.touch()

    thread = when(partial.exists, kill_rank_1)
    settings = ["hardware.ranks=2", "checkpoint.every_updates=2", f"checkpoint.grace_s={grace_s}"]
    assert main([*WORDS, *FOREVER, *(word for setting in settings for word in ("--set", setting))]) == 4
    thread.join()
    assert "error: rank 1 was ended by SIGKILL\n" in capsys.readouterr().err
    assert ranks_of(os.getpid()) == {}
    assert (run.step(1).checkpoints / "update-2" / "complete.json").exists() == is_saved


def test_a_bad_row(run: RunDir, tmp_path: Path, capsys: Said) -> None:
    rows = tmp_path / "rows/train.jsonl"
    good = rows.read_text(encoding="utf-8")
    rows.write_text(good + '{"prompt": "p", "chosen": "c"}\n', encoding="utf-8")
    assert main(WORDS) == 2
    err = capsys.readouterr().err
    error = err[err.index("error: ") :]
    assert error == (
        f"error: bad rows in {rows}\n"
        "  why: line 241, column `rejected`: missing; the row has prompt, chosen\n\n"
        "hint: pairs of text: every row needs prompt, chosen, rejected; docs/models-and-data.md shows each form\n"
    )
    (event,) = events(run, "error")
    assert (event["rank"], event["what"], event["exit_code"]) == (0, f"bad rows in {rows}", 2)
    assert "Traceback" not in err and "Traceback" in run.log.read_text(encoding="utf-8")


def ended(last_words: str) -> subprocess.Popen[bytes]:
    """A process that wrote this to the pipe of a rank, and failed."""
    code = "import sys; sys.stdout.write(sys.argv[1]); sys.exit(4)"
    process = subprocess.Popen([sys.executable, "-S", "-c", code, last_words], stdout=subprocess.PIPE)
    process.wait()
    return process


def test_the_first_error_is_the_cause_of_the_others(run: RunDir) -> None:
    def words(what: str, at_s: float) -> str:
        return json.dumps(asdict(LastWords(what=what, why="", hint="", exit_code=4, at_s=at_s)))

    run.path.mkdir(parents=True)
    run.log.write_text("the last line\n", encoding="utf-8")
    ranks = [
        ended(words("connection closed by peer", 7.5)),
        ended(words("out of memory", 7.25)),
        ended(""),
        ended('{"what": "tor'),
    ]
    last_words = launch._all_last_words(ranks)
    assert sorted(last_words) == [0, 1]
    assert (
        launch._failure(run, 3, ranks, [0], last_words).what == "out of memory"
    )  # also when rank 0's end was seen first
    for mute in (2, 3):  # they had no time to report why
        assert launch._failure(run, 3, ranks, [mute], last_words).what == f"rank {mute} was ended by exit code 4"
    assert [(event["step"], event["rank"]) for event in events(run, "error")] == [(3, 1), (3, 2), (3, 3)]


def test_the_end_of_a_long_log_is_read_and_no_more(run: RunDir) -> None:
    run.path.mkdir(parents=True)
    with run.log.open("wb") as log:
        log.truncate(2**26)
        log.seek(2**26)
        log.write(b"\n" + b"".join(b"line %d \xff\n" % number for number in range(20)))
    tracemalloc.start()
    error = launch._sudden_end(run, 0, 1)
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert error.why == f"the last lines of {run.log}:\n" + "\n".join(
        f"line {number} \ufffd" for number in range(10, 20)
    )
    assert most < 2**22


def test_a_log_that_is_gone(run: RunDir) -> None:
    error = launch._sudden_end(run, 1, -signal.SIGTERM)
    assert (error.what, error.why) == (
        "rank 1 was ended by SIGTERM",
        f"the last lines of {run.log}:\n(No such file or directory)",
    )


# --- NCCL ---

TWO_GPUS = Placement("cuda", "", 2, "bfloat16", 2, 2, (4, 4, 4), 64, 8, no_peer_access="they are too far apart")
BOTH = {"NCCL_P2P_DISABLE": "1", "NCCL_IB_DISABLE": "1"}


@pytest.mark.parametrize(
    ("environ", "settings"),
    [
        ({}, BOTH),
        ({"NCCL_P2P_DISABLE": "", "NCCL_DEBUG": "INFO"}, BOTH),
        ({"NCCL_P2P_DISABLE": "0"}, {"NCCL_IB_DISABLE": "1"}),
        ({"NCCL_P2P_LEVEL": "NVL"}, {"NCCL_IB_DISABLE": "1"}),
        ({"NCCL_IB_DISABLE": "0"}, {"NCCL_P2P_DISABLE": "1"}),
        ({"NCCL_IB_DISABLE": "1", "NCCL_P2P_DISABLE": "1"}, {}),
    ],
)
def test_ranks_without_peer_access(environ: dict[str, str], settings: dict[str, str]) -> None:
    """What the user has set stays."""
    assert launch.nccl_settings(TWO_GPUS, environ) == settings
    environment = launch.rank_environment(load_job("demo"), TWO_GPUS, environ).environment_of(environ)
    assert {name: value for name, value in environment.items() if name.startswith("NCCL")} == environ | settings
    assert (environment["WORLD_SIZE"], environment["DS_ACCELERATOR"]) == ("2", "cuda")
    assert environment["GLOO_SOCKET_IFNAME"] == "lo"


def test_ranks_talk_over_the_loopback_unless_told_otherwise() -> None:
    chosen = {"GLOO_SOCKET_IFNAME": "eth7"}
    environment = launch.rank_environment(load_job("demo"), TWO_GPUS, chosen).environment_of(chosen)
    assert environment["GLOO_SOCKET_IFNAME"] == "eth7"
    assert "GLOO_SOCKET_IFNAME" not in launch.rank_environment(
        load_job("demo"), replace(TWO_GPUS, ranks=1), {}
    ).environment_of({})


def test_ranks_with_peer_access_get_no_setting() -> None:
    assert launch.nccl_settings(replace(TWO_GPUS, no_peer_access=""), {}) == {}


@pytest.mark.parametrize(
    ("why", "notes"),
    [
        ("", ["a note"]),
        (
            "they are too far apart",
            ["a note", f"{' and '.join(f'{n}=1' for n in BOTH)} for the ranks: they are too far apart"],
        ),
    ],
)
def test_the_setting_is_said(run: RunDir, monkeypatch: pytest.MonkeyPatch, why: str, notes: list[str]) -> None:
    """Run on the CPU, where it has no effect: a placement's note becomes an event and a line."""
    for name in BOTH:
        monkeypatch.delenv(name, raising=False)
    placement = replace(place(load_job("own.yaml"), Machine(cores=1)), notes=("a note",), no_peer_access=why)
    with launch.locked(run) as lock, SpareRanks(os.environ) as spares:
        assert launch.launch(load_job("own.yaml"), run, [1], placement, Path("cache"), lock, spares) == 0
    assert [event["message"] for event in events(run, "warning")] == notes


# --- disks ---


@contextmanager
def disk(folder: Path, options: str) -> Iterator[None]:
    """A file system of its own in `folder`; skips the test where it may not be mounted."""
    folder.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], capture_output=True, text=True, check=False
    )
    if done.returncode:
        pytest.skip(f"needs to mount a tmpfs: {done.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


# Pages have 4 kB: with the first size, no event can be written, not even one of an error.
@pytest.mark.parametrize("size", ["20k", "28k"])
def test_a_disk_that_is_too_small_for_the_job(
    run: RunDir, tmp_path: Path, capsys: Said, monkeypatch: pytest.MonkeyPatch, size: str
) -> None:
    monkeypatch.setattr(fitness, "judge", lambda *_: [])  # it asks for the disk space of any run
    with disk(tmp_path / "out", f"size={size}"):
        code, err = main(WORDS), capsys.readouterr().err
    error = err[err.index("error: ") :]
    assert (code, error.splitlines()[0]) == (3, "error: the disk is too small for the models and checkpoints of step 1")
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (
            "size=28k",
            "28.7 kB are free at out, and a run needs 500 MB at least: "
            "make room, or choose an --output-dir on a larger disk",
        ),
        (
            "size=600m,nr_inodes=1000",
            "999 inodes are free at out, and a run needs 2000 at least: "
            "remove many small files (`df -i` and `du --inodes` show where), "
            "or choose an --output-dir on another disk",
        ),
    ],
)
def test_a_disk_that_is_full(run: RunDir, tmp_path: Path, capsys: Said, options: str, line: str) -> None:
    with disk(tmp_path / "out", options):
        code, err = main(WORDS), capsys.readouterr().err
        assert list((tmp_path / "out").iterdir()) == []
    assert (code, err) == (3, f"error: this machine is not fit for the job\n  why: {line}\n")


def test_a_disk_that_is_read_only(run: RunDir, tmp_path: Path, capsys: Said) -> None:
    with disk(tmp_path / "out", "ro"):
        code, err = main(WORDS), capsys.readouterr().err
    assert (code, err) == (
        3,
        "error: this machine is not fit for the job\n"
        "  why: out is on a read-only file system: "
        "mount it writable, or choose another --output-dir, or mend the path\n",
    )
