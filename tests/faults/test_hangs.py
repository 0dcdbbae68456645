"""Test a rank that hangs while the others wait: it is found and named, and the run resumes."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import time

import pytest

from rlhf_train import launch
from tests.faults.scene import Scene, curve, error_of, events, fault, ranks_here
from tests.tiny import Trained

Said = pytest.CaptureFixture[str]

PLENTY_S = 10.0  # an update of the tiny job takes a tenth of a second; the first takes longer on a busy machine


def test_a_rank_that_is_stopped(base: Scene, untroubled: Trained, capsys: Said) -> None:
    run, settings = base.run("stopped"), ["hardware.ranks=2", "checkpoint.every_updates=1"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "HANG_S", PLENTY_S)
        assert base.train("stopped", *settings, met=fault("stop", rank=1, first=5)) == 4  # in update 3
    assert ranks_here() == []
    output = capsys.readouterr().err
    found = re.fullmatch(
        "error: rank 1 on (.*) hangs: no rank has made progress for ([0-9]+) s\n"
        r"  why: rank 0 on \1 \(process [0-9]+, (?:waiting|running)\): update 3\n"
        r"       rank 1 on \1 \(process [0-9]+, stopped by a signal\): update 3\n\n"
        "hint: the stacks of all ranks are at the end of train.log; "
        "a GPU that hangs shows as Xid in `dmesg`, a disk in `df`;\n"
        "      the same command resumes from the last checkpoint\n",
        error_of(output),
    )
    assert found is not None, error_of(output)
    assert found.group(1) == socket.gethostname()
    assert PLENTY_S <= int(found.group(2)) < 60
    (error,) = events(run, "error")
    assert error["exit_code"] == 4 and error["what"].startswith("rank 1 on ")
    log = run.log.read_text(encoding="utf-8", errors="replace")
    stack = log[log.rindex("most recent call first") :]
    # What rank 0 waited in.
    for part in (" in all_reduce", 'deepspeed_engine.py", line', " in backward", 'sft.py", line'):
        assert part in stack

    assert base.train("stopped", *settings) == 0  # and nobody stops it this time
    (resumed,) = events(run, "resumed")
    assert resumed["from_update"] in (1, 2)  # the checkpoint of update 2 was maybe being written
    assert curve(run) == pytest.approx(curve(untroubled.dir), rel=1e-5)


def test_the_state_of_a_process() -> None:
    child = subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(60)"])
    try:
        child.send_signal(19)  # SIGSTOP
        deadline = time.monotonic() + 10
        while launch.process_state(child.pid) != "T":
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert launch.STATES["T"] == "stopped by a signal"
        assert launch.process_state(os.getpid()) == "R"
    finally:
        child.kill()
    while launch.process_state(child.pid) != "Z":  # dead, and not yet waited for
        assert time.monotonic() < deadline
        time.sleep(0.01)
    child.wait()
    assert launch.process_state(child.pid) == "?"
