"""Test ranks that wait for the next step while one ends.

They train it, or end with all others, however the launcher ends.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil  # type: ignore[import-untyped]
import pytest

from rlhf_train import launch
from tests.faults.scene import PATIENCE_S, Scene, events, ranks_of, until, when
from tests.tiny import CHECKOUT

Said = pytest.CaptureFixture[str]

# A step 1 of seconds: at its first update, the ranks of step 2 are started.
SECONDS = ["sft.max_updates=100", "sft.epochs=10"]


def both(launcher: int) -> list[psutil.Process]:
    """The rank that trains and the one that waits, once there are two."""
    found = sorted(ranks_of(launcher), key=lambda rank: rank.create_time())
    return found if len(found) == 2 else []


def waits(spare: psutil.Process) -> bool:
    """It does nothing: all was imported before it was forked."""
    before = sum(spare.cpu_times()[:2])
    time.sleep(0.3)
    return sum(spare.cpu_times()[:2]) - before < 0.05


def test_the_next_step_is_done_by_those_that_waited_and_nobody_is_left_when_it_fails(
    scene: Scene, capsys: Said
) -> None:
    run, waited, held, at_work = scene.run("two"), list[int](), set[str](), list[psutil.Process]()

    def look_and_kill() -> None:
        _, spare = until(lambda: both(os.getpid()))
        waited.append(spare.pid)
        held.update(link.readlink().name for link in Path(f"/proc/{spare.pid}/fd").iterdir())
        until(lambda: events(run, "metrics", 2))
        at_work.extend(until(lambda: both(os.getpid())))  # and another for step 3
        at_work[0].kill()

    thread = when(lambda: events(run, "metrics", 1), look_and_kill)
    assert scene.train("two", *SECONDS, "reward.max_updates=100", "reward.epochs=10", step="all") == 4
    thread.join()
    assert at_work[0].pid == waited[0]
    assert not held & {"lock", "train.log", "events.jsonl"}  # it held no lock, and wrote nothing
    assert not at_work[1].is_running() and ranks_of(os.getpid()) == []
    assert [(event["step"], event["what"]) for event in events(run, "error", 2)] == [(2, "rank 0 was ended by SIGKILL")]


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGTERM, 75), (signal.SIGKILL, -9)])
def test_a_launcher_that_is_ended_while_somebody_waits(scene: Scene, sent: int, code: int) -> None:
    words = ["--job", "job.yaml", "--output-dir", "runs", "--run", "ended", "--step", "1", "2"]
    for setting in (*SECONDS, "checkpoint.grace_s=4.0"):
        words += ["--set", setting]
    environment = os.environ | {"PYTHONPATH": str(CHECKOUT), "RLHF_CACHE": str(scene.folder / "cache")}
    launcher = subprocess.Popen(
        [sys.executable, "-m", "rlhf_train", *words], cwd=scene.folder, env=environment, stderr=subprocess.DEVNULL
    )
    seen: list[psutil.Process] = []
    try:
        rank, spare = seen = until(lambda: both(launcher.pid))
        rank.suspend()  # or step 1 would end
        until(lambda: waits(spare))
        began = time.monotonic()
        launcher.send_signal(sent)
        assert launcher.wait(PATIENCE_S) == code
        until(lambda: not spare.is_running())
        assert time.monotonic() - began < 20  # 4 s less END_S, and a busy machine
        if sent == signal.SIGKILL:
            rank.resume()
        until(lambda: not rank.is_running())
    finally:
        launcher.kill()
        launcher.wait()
        for process in seen:
            with suppress(psutil.NoSuchProcess):
                process.kill()
    with launch.locked(scene.run("ended")):  # nobody holds it
        pass
