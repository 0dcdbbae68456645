"""A box that is a container with Python 3.10 and sshd, over a connection of 100 ms.

It has neither Docker nor rsync.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml

from tests import walk_through
from tests.hub import Hub
from tests.integration.remote.far_line import FarLine
from tests.integration.remote.models import check_models
from tests.integration.remote.rig import BareBox, Done, Laptop, until

pytestmark = pytest.mark.docker


def test_the_walk_through_ends_with_a_model_at_home(deployed: BareBox, laptop: Laptop, line: FarLine, hub: Hub) -> None:
    """Each command of docs/walk-through.md, in its order."""
    line.delay(0.05)
    far, at_home = laptop.far(line), {"RLHF_RUNS": str(laptop.checkout / "runs")}
    codes = {"doctor": None, "stop": None}  # a box without a GPU, and without a way to stop its meter
    said: dict[str, list[Done]] = {}
    for program, verb, *words in walk_through.commands({"key": str(laptop.key), **deployed.entry}):
        if program == walk_through.HERE:
            done = laptop.rlhf_train(verb, *words, typed="red cat", **at_home)
        else:
            done = far.fab(verb, *words, code=codes.get(verb, 0), timeout_s=600, **at_home)
        said.setdefault(verb, []).append(done)
        if verb == "add":  # what the tests know of this box, and a reader's box has by default
            boxes = yaml.safe_load(laptop.boxes.read_text())
            laptop.add(walk_through.BOX, boxes[walk_through.BOX] | dict(deployed.fields))

    assert "already up to date" in said["deploy"][0].out and "`fab train` downloads nothing" in said["deploy"][0].out
    assert any("/facebook/opt-1.3b/resolve/" in request for request in hub.requests)
    assert [f"step {step}  done in" in said["logs"][0].out for step in (1, 2, 3)] == [True, True, True]
    assert [f"step {step}  update 1/1" in said["train"][1].out for step in (1, 2, 3)] == [True, False, True]
    host = ("--host", walk_through.BOX)
    runs = {run["name"]: run for run in json.loads(far.fab("ps", *host, "--json").out)["runs"]}
    for name in ("opt-1.3b-lora", "opt-1.3b"):
        assert (runs[name]["state"], runs[name]["exit"], runs[name]["steps_complete"]) == ("done", 0, [1, 2, 3])
        check_models(laptop.checkout / "runs" / walk_through.BOX / name)
    assert "opt-1.3b-lora, step 3 (PPO)\n" in said["chat"][0].out and said["chat"][0].out.count("\nreward ") == 2
    assert all(Path(laptop.checkout, done.out.strip()).is_file() for done in said["report"])
    assert "gpu-box cannot stop itself" in said["stop"][0].err
    assert far.fab("logs", *host, "--run", "opt-1.3b", "--raw").out == deployed.read("runs/opt-1.3b/train.log")
    # Complete already: the same command says so, and does nothing.
    again = far.fab(*said["train"][1].words)
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
    following.says("resumed after update", 300)
    following.interrupt()
    stopped = following.wait(10)
    assert stopped.code == 0 and "the job keeps running" in stopped.all
    laptop.fab("cancel", *host, "--run", "goes-on")
