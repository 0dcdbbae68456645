"""Faults between a laptop and a box, each made for real.

What was there before still holds, nothing starts twice, nothing is lost.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import subprocess
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from tests.integration.remote.far_line import FarLine
from tests.integration.remote.rig import BareBox, DockerBox, Fab, Laptop, make_key, until

pytestmark = pytest.mark.docker


@pytest.fixture
def far(laptop: Laptop, line: FarLine) -> Iterator[Laptop]:
    line.delay(0.05)
    yield laptop.far(line)
    line.mend()
    line.rate(0)


def change(laptop: Laptop) -> None:
    """Of the checkout, so that there is something to deploy."""
    with (laptop.checkout / "README.md").open("a") as readme:
        readme.write("\nOne more line.\n")


def runs_of(laptop: Laptop, name: str) -> dict[str, Any]:
    return {run["name"]: run for run in json.loads(laptop.fab("ps", "--host", name, "--json").out)["runs"]}


def end_all(laptop: Laptop, box: BareBox | DockerBox) -> None:
    for name, run in runs_of(laptop, box.name).items():
        if run["state"] in ("running", "queued"):
            laptop.fab("cancel", "--host", box.name, "--run", name)
    assert box.ls("slot") == []


# --- deploy ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["the server's side is killed", "packets are dropped"])
def test_a_deploy_that_is_cut_while_it_sends(
    how: str, deployed: BareBox, laptop: Laptop, far: Laptop, line: FarLine
) -> None:
    host, before = ("--host", deployed.name), deployed.read("deployed")
    change(laptop)
    line.rate(400_000)
    deploying = far.start("deploy", *host)
    until(lambda: any(name.endswith(".partial") for name in deployed.ls("code")), 60, lambda: deploying.err)
    if how == "packets are dropped":
        line.cut()
    else:
        other = laptop.other(f"second-{os.getpid()}")
        busy = other.fab("deploy", *host, code=5)
        assert "another deploy holds the lock" in busy.err and "ago" in busy.err
        until(lambda: deployed.cut(), 10)
    done = deploying.wait(120)
    assert done.code == 8 and "hint: " in done.err, done.all
    assert deployed.read("deployed") == before
    line.mend()
    line.rate(0)
    again = json.loads(far.fab("deploy", *host, "--json").out)
    assert again["changed"] is True and deployed.exists(f"code/{again['code']}/fabfile.py")
    assert not [name for name in deployed.ls("code") if name.endswith((".partial", ".temp"))]


def test_a_deploy_that_is_cut_while_pip_installs(deployed: BareBox, laptop: Laptop) -> None:
    """A folder of its own, with nothing in it yet.

    What pip does there ends by itself, soon after nobody hears it any more.
    """
    laptop.add("cut-box", {**deployed.entry, "data_folder": "/data2"})
    deployed.sh("mkdir -p /data2")
    host = ("--host", "cut-box")
    deploying = laptop.start("deploy", *host)
    deploying.says("environment: PyTorch", 300)
    until(lambda: deployed.processes("/data2", "pip"), 20)
    deployed.cut()
    done = deploying.wait(60)
    assert done.code == 8 and "the same command" in done.err, done.all
    until(
        lambda: not deployed.processes("/data2"),
        30,
        lambda: str([process.cmdline() for process in deployed.processes("/data2")]),
    )
    assert deployed.sh("ls /data2/rlhf-box/deployed /data2/rlhf-box/env/*/complete 2>/dev/null || true") == ""
    assert "fab deploy --host cut-box" in laptop.fab("train", *host, "--job", "demo", "--detach", code=3).err
    laptop.fab("purge", *host)
    assert deployed.sh("ls -A /data2") == ""


def test_a_full_disk_is_told_and_nothing_half_done_is_taken_for_whole(deployed: BareBox, laptop: Laptop) -> None:
    """Of inodes: /small has bytes enough, and room for the code, but not for an environment."""
    laptop.add("small-box", {**deployed.entry, "data_folder": "/small"})
    done = laptop.fab("deploy", "--host", "small-box", code=3)
    assert "the disk is full" in done.err and "hint: make room" in done.err, done.all
    assert (
        deployed.sh(
            "ls /small/rlhf-box/deployed /small/rlhf-box/lock /small/rlhf-box/env/*/complete 2>/dev/null || true"
        )
        == ""
    )
    again = laptop.fab("deploy", "--host", "small-box", code=3)
    assert "inodes are free" in again.err and "hint: " in again.err, again.all
    laptop.fab("purge", "--host", "small-box")
    assert deployed.sh("ls -A /small") == ""


def test_no_python_310_is_told_before_anything_is_done(deployed: BareBox, laptop: Laptop) -> None:
    laptop.add("no-python", {**deployed.entry, "data_folder": "/data3"})
    deployed.sh("mkdir -p /data3; mv /usr/local/bin/python3.10 /rig/python3.10")
    try:
        done = laptop.fab("deploy", "--host", "no-python", code=3)
    finally:
        deployed.sh("mv /rig/python3.10 /usr/local/bin/python3.10")
    assert "no Python 3.10" in done.err and "pipx install uv" in done.err
    assert deployed.sh("ls -A /data3; rmdir /data3") == ""


# --- who is who -----------------------------------------------------------------------------------


def test_a_key_that_is_refused(deployed: BareBox, laptop: Laptop) -> None:
    make_key(laptop.folder / "wrong")
    laptop.add("wrong-key", {**deployed.entry, "key": str(laptop.folder / "wrong")})
    for verb in (("ps",), ("deploy",), ("logs", "--follow")):
        done = laptop.fab(*verb, "--host", "wrong-key", code=8, timeout_s=30)
        assert "key" in done.err and "fab trust" in done.err, done.all


def test_another_machine_at_the_same_address_gets_nothing(deployed: BareBox, laptop: Laptop) -> None:
    laptop.add("changed", deployed.entry)
    laptop.fab("ps", "--host", "changed")
    with deployed.another_sshd(host_key="other_host_key") as entry:
        laptop.add("changed", entry)
        for verb in (("ps",), ("deploy",), ("logs", "--follow")):
            done = laptop.fab(*verb, "--host", "changed", code=8, timeout_s=30)
            assert "host key" in done.err and "fab trust" in done.err, done.all
        laptop.fab("trust", "--host", "changed", "--replace")
        laptop.fab("ps", "--host", "changed")


def test_an_sshd_that_is_frozen(deployed: BareBox, laptop: Laptop) -> None:
    with deployed.frozen():
        done = laptop.fab("ps", "--host", deployed.name, code=8, timeout_s=60)
    assert "hint: " in done.err, done.all


# --- launch ---------------------------------------------------------------------------------------

ASKED = 'case $SSH_ORIGINAL_COMMAND in *supervisor.sh*" start "*) ;; *) exec sh -c "$SSH_ORIGINAL_COMMAND" ;; esac\n'
ANSWER_IS_LOST = f'{ASKED}sh -c "$SSH_ORIGINAL_COMMAND" >/rig/answer; kill -KILL $PPID'
# The box takes it up only when the laptop has asked what became of it.
COMES_LATE = (
    f'{ASKED}cat >/rig/request; (sleep 4; sh -c "$SSH_ORIGINAL_COMMAND" </rig/request >/rig/answer) '
    f">/dev/null 2>&1 & kill -KILL $PPID"
)
BOX_IS_GONE = f"{ANSWER_IS_LOST} $(cat /rig/listener)"


@contextlib.contextmanager
def sshd_that(deployed: BareBox, laptop: Laptop, force: str) -> Iterator[str]:
    deployed.sh("rm -f /rig/answer /rig/request")
    with deployed.another_sshd(force=force) as entry:
        (listener,) = [
            process for process in deployed.processes("/rig/another") if process.ppid() == deployed.server.pid
        ]
        inside = next(
            line.split()[-1]
            for line in Path(f"/proc/{listener.pid}/status").read_text().splitlines()
            if line.startswith("NSpid")
        )
        deployed.sh('echo "$1" >/rig/listener', inside)
        laptop.add("forced", entry)
        yield "forced"


def answer_of(deployed: BareBox) -> list[str]:
    """Return what the forced command said, in the place of the laptop; marks stand around it."""
    return deployed.sh("cat /rig/answer 2>/dev/null || true").splitlines()


def test_a_start_whose_answer_was_lost_is_started_once(deployed: BareBox, laptop: Laptop, long_job: Path) -> None:
    requests = set(deployed.ls("requests"))
    with sshd_that(deployed, laptop, ANSWER_IS_LOST) as name:
        done = laptop.fab(
            "train", "--host", name, "--job", str(long_job), "--step", "2", "--run", "launched", "--detach"
        )
    assert "the job was started" in done.err, done.all
    assert any(line.startswith("started ") for line in answer_of(deployed))
    assert len(set(deployed.ls("requests")) - requests) == 1
    assert runs_of(laptop, deployed.name)["launched"]["state"] in ("queued", "running")
    end_all(laptop, deployed)


def test_a_start_that_comes_late_is_refused(deployed: BareBox, laptop: Laptop, long_job: Path) -> None:
    with sshd_that(deployed, laptop, COMES_LATE) as name:
        done = laptop.fab(
            "train", "--host", name, "--job", str(long_job), "--step", "2", "--run", "late", "--detach", code=8
        )
        assert "was not started, and will not be" in done.err and "the same command again is safe" in done.err
        said = until(lambda: [line for line in answer_of(deployed) if line.startswith("withdrawn ")], 20)
    assert len(said) == 1
    assert "late" not in runs_of(laptop, deployed.name) and deployed.ls("slot") == []


def test_a_box_that_is_gone_after_a_start_leaves_it_uncertain(
    deployed: BareBox, laptop: Laptop, long_job: Path
) -> None:
    with sshd_that(deployed, laptop, BOX_IS_GONE) as name:
        done = laptop.fab(
            "train", "--host", name, "--job", str(long_job), "--step", "2", "--run", "uncertain", "--detach", code=6
        )
    assert "fab ps --host forced" in done.err
    assert runs_of(laptop, deployed.name)["uncertain"]["state"] in (
        "queued",
        "running",
    )  # by the way that is still there
    twice = laptop.fab(
        "train", "--host", deployed.name, "--job", str(long_job), "--step", "2", "--run", "another", "--detach", code=5
    )
    assert "`uncertain`" in twice.err
    end_all(laptop, deployed)


def test_a_disk_that_is_full_when_a_job_starts(docker_box: DockerBox, laptop: Laptop, long_job: Path) -> None:
    folder = Path(f"{docker_box.data_folder}-full")
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=600m", "tmpfs", str(folder)], check=True)
    try:
        laptop.add("full-box", {**docker_box.entry, "data_folder": str(folder)})
        host, train = ("--host", "full-box"), ("--job", str(long_job), "--step", "2", "--run", "full", "--detach")
        laptop.fab("deploy", *host)
        docker_box.sh('cat /dev/zero >"$1/filler" 2>/dev/null || true', str(folder))
        done = laptop.fab("train", *host, *train, code=None)
        assert done.code in (2, 3) and "disk" in done.err, done.all
        assert docker_box.sh('ls -A "$1/rlhf-box/slot" 2>/dev/null || true', str(folder)) == ""
        (folder / "filler").unlink()
        laptop.fab("train", *host, *train)
        laptop.fab("cancel", *host, "--run", "full")
        laptop.fab("purge", *host, "--yes")
        assert list(folder.iterdir()) == []
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


# --- a run that keeps running ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def running(deployed: BareBox, laptop: Laptop, long_job: Path) -> Iterator[str]:
    """Step 1 is complete, step 2 takes hours."""
    laptop.fab("train", "--host", deployed.name, "--job", str(long_job), "--step", "1,2", "--run", "long", "--detach")
    until(lambda: runs_of(laptop, deployed.name)["long"]["steps_complete"] == [1], 120)
    yield "long"
    end_all(laptop, deployed)


def test_a_view_is_exact_over_every_break_of_the_line(
    running: str, deployed: BareBox, laptop: Laptop, far: Laptop, line: FarLine
) -> None:
    host = ("--host", deployed.name, "--run", running)
    views = {
        "train.log": far.start("logs", *host, "--follow", "--raw"),
        "events.jsonl": far.start("logs", *host, "--follow", "--json"),
    }

    def grow() -> None:
        sizes = {name: len(view.out_bytes) for name, view in views.items()}
        until(
            lambda: all(len(view.out_bytes) > sizes[name] for name, view in views.items()),
            60,
            lambda: str([view.err for view in views.values()]),
        )

    def away(times: int) -> None:
        until(lambda: all(view.err.count("connection lost") >= times for view in views.values()), 60)

    grow()
    assert deployed.cut() >= 2
    away(1)
    grow()
    line.cut()
    away(2)
    line.mend()
    grow()
    with deployed.frozen():
        away(3)
    grow()
    for name, view in views.items():
        view.interrupt()
        done = view.wait(10)
        assert done.code == 0 and "the job keeps running" in done.err, done.all
        shown, file = view.out_bytes, deployed.read(f"runs/{running}/{name}").encode()
        assert shown and file.startswith(shown)


def test_a_second_job_is_refused_with_what_runs(running: str, deployed: BareBox, laptop: Laptop, job: Path) -> None:
    done = laptop.fab("train", "--host", deployed.name, "--job", str(job), "--detach", code=5)
    assert f"`{running}`" in done.err and "fab cancel" in done.err


def test_a_fetch_that_is_cut_goes_on(
    running: str, deployed: BareBox, laptop: Laptop, far: Laptop, line: FarLine
) -> None:
    """Also while it trains: of what is complete."""
    home = laptop.runs / deployed.name / running
    line.rate(1_000_000)
    fetching: Fab = far.start("fetch", "--host", deployed.name, "--run", running)
    until(
        lambda: (
            sum(file.stat().st_size for file in laptop.runs.rglob("*") if file.is_file() and running in str(file))
            > 3_000_000
        ),
        60,
    )
    deployed.cut()
    done = fetching.wait(120)
    if done.code:  # it may also go on by itself
        assert done.code == 8 and not (home / "step1/model/model.safetensors").exists(), done.all
    line.rate(0)
    far.fab("fetch", "--host", deployed.name, "--run", running)
    wanted = deployed.sh('sha256sum "$1"', f"{deployed.root}/runs/{running}/step1/model/model.safetensors").split()[0]
    assert hashlib.sha256((home / "step1/model/model.safetensors").read_bytes()).hexdigest() == wanted
    assert not (home / "step2/model").exists()


def test_another_laptop_sees_the_same(running: str, deployed: BareBox, laptop: Laptop) -> None:
    other = laptop.other("elsewhere")
    shown = other.fab("logs", "--host", deployed.name, "--json").out  # the one that runs
    assert deployed.read(f"runs/{running}/events.jsonl").startswith(shown) and shown.count("\n") > 10


def test_a_job_outlives_its_supervisor(running: str, deployed: BareBox, laptop: Laptop) -> None:
    host = ("--host", deployed.name, "--run", running)
    for process in deployed.processes("supervisor.sh\0run"):
        process.kill()
    assert runs_of(laptop, deployed.name)[running]["state"] == "running"
    following = laptop.start("logs", *host, "--follow", "--json")
    until(lambda: following.out, 20)
    size = len(following.out)
    until(lambda: len(following.out) > size, 30)
    assert "nothing of it is left" in laptop.fab("cancel", *host).out
    following.wait(30)
    assert runs_of(laptop, deployed.name)[running]["state"] == "cancelled"
    assert deployed.processes("-m", "rlhf_train") == [] and deployed.ls("slot") == []


def test_a_box_that_was_restarted_has_lost_its_job_and_the_same_command_goes_on(
    deployed: BareBox, laptop: Laptop, long_job: Path
) -> None:
    host = ("--host", deployed.name)
    train = ("train", *host, "--job", str(long_job), "--step", "2", "--run", "restarted")
    first = laptop.start(*train)
    first.says("checkpoint at update", 600)
    deployed.restart()
    done = first.wait(90)
    assert done.code == 7 and "the same command resumes" in done.err, done.all
    assert runs_of(laptop, deployed.name)["restarted"]["state"] == "lost"
    second = laptop.start(*train)
    second.says("resumed after update", 600)
    second.kill()
    end_all(laptop, deployed)


def test_a_clock_that_is_off(deployed: BareBox, laptop: Laptop, long_job: Path) -> None:
    """Three hours behind: what the box says is read by the box's own clock."""
    host = ("--host", "behind")
    with deployed.clock_off("-3h") as entry:
        laptop.add("behind", entry)
        clock = next(
            check
            for check in json.loads(laptop.fab("doctor", *host, "--json").out)["checks"]
            if check["name"] == "clock"
        )
        assert clock["status"] == "warning" and re.match(r"108\d\d\.\d s behind", clock["value"]), clock
        change(laptop)
        laptop.fab("deploy", *host)
        laptop.fab("train", *host, "--job", str(long_job), "--step", "2", "--run", "behind", "--detach")
        until(lambda: "update 1/" in laptop.fab("logs", *host, "--run", "behind").out, 90)
        events = [json.loads(line) for line in laptop.fab("logs", *host, "--run", "behind", "--json").out.splitlines()]
        assert (
            10_700
            < time.time() - datetime.fromisoformat(events[-1]["time"].replace("Z", "+00:00")).timestamp()
            < 11_100
        )
        run = runs_of(laptop, "behind")["behind"]
        assert run["state"] == "running" and 0 <= run["seconds"] < 300
        assert "update" in laptop.fab("logs", *host, "--run", "behind", "--since", "10m").out
        assert "nothing of it is left" in laptop.fab("cancel", *host, "--run", "behind").out
        assert runs_of(laptop, "behind")["behind"]["state"] == "cancelled"
