"""A box that is a container with Python 3.10 and sshd, over a connection of 100 ms.

It has neither Docker nor rsync.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tests.integration.remote.far_line import FarLine
from tests.integration.remote.models import check_models
from tests.integration.remote.rig import BareBox, Laptop, until

pytestmark = pytest.mark.docker


def test_three_steps_and_the_models_come_home(deployed: BareBox, laptop: Laptop, line: FarLine, job: Path) -> None:
    line.delay(0.05)
    far, host = laptop.far(line), ("--host", deployed.name)
    said = json.loads(far.fab("deploy", *host, "--json").out)
    assert said["changed"] is False and said["runtime"] == "bare"
    done = far.fab("train", *host, "--job", str(job), "--step", "1,2,3")
    assert [f"step {step}  done in" in done.out for step in (1, 2, 3)] == [True, True, True]
    runs = {run["name"]: run for run in json.loads(far.fab("ps", *host, "--json").out)["runs"]}
    assert (runs["tiny"]["state"], runs["tiny"]["exit"], runs["tiny"]["steps_complete"]) == ("done", 0, [1, 2, 3])
    assert far.fab("logs", *host, "--run", "tiny", "--raw").out == deployed.read("runs/tiny/train.log")
    far.fab("fetch", *host, "--run", "tiny")
    check_models(laptop.runs / deployed.name / "tiny")
    # Complete already: the same command says so, and does nothing.
    again = far.fab("train", *host, "--job", str(job), "--step", "1,2,3", "--wait")
    assert "done" in again.all


def test_nothing_lies_outside_of_the_folder(deployed: BareBox) -> None:
    """Compared by the engine after a deploy and a run, without what sshd, apt and the rig wrote."""
    changed = [line.split(maxsplit=1)[1] for line in deployed.docker("diff", deployed.container).stdout.splitlines()]
    known = ("/data", "/rig", "/run", "/etc", "/small", "/var/log")
    assert [path for path in changed if not path.startswith(known) and path not in ("/root", "/tmp", "/var")] == []


def test_rsync_serves_where_it_comes_later(deployed: BareBox, laptop: Laptop) -> None:
    """The first deploys went by tar."""
    host = ("--host", deployed.name)
    with (laptop.checkout / "README.md").open("a") as readme:
        readme.write("\nBy tar.\n")
    assert "by tar (no rsync on the box)" in laptop.fab("deploy", *host).err
    deployed.sh("apt-get -qq update && apt-get -qq install -y --no-install-recommends rsync >/dev/null 2>&1")
    try:
        with (laptop.checkout / "README.md").open("a") as readme:
            readme.write("\nBy rsync.\n")
        assert "by rsync" in laptop.fab("deploy", *host).err
        code = next(line.split()[1] for line in deployed.read("deployed").splitlines() if line.startswith("code "))
        assert deployed.read(f"code/{code}/README.md").endswith("By tar.\n\nBy rsync.\n")
    finally:
        deployed.sh("apt-get -qq purge -y rsync >/dev/null 2>&1; rm -rf /var/lib/apt/lists/*")


def test_the_same_command_goes_on_and_its_events_are_one_story(
    deployed: BareBox, laptop: Laptop, long_job: Path
) -> None:
    """`cancel` keeps a checkpoint, and the same command resumes from it.

    A TERM counts as a preemption only when the provider sends it.
    """
    host, train = ("--host", deployed.name), ("--job", str(long_job), "--step", "2", "--run", "goes-on")
    laptop.fab("train", *host, *train, "--detach")
    until(lambda: re.search(r"checkpoint at update \d+", laptop.fab("logs", *host, "--run", "goes-on").out), 300)
    assert "nothing of it is left" in laptop.fab("cancel", *host, "--run", "goes-on").out
    assert deployed.processes("-m", "rlhf_train") == []
    following = laptop.start("train", *host, *train)
    following.says("resumed after update", 600)
    following.interrupt()
    stopped = following.wait(10)
    assert stopped.code == 0 and "the job keeps running" in stopped.all
    laptop.fab("cancel", *host, "--run", "goes-on")
