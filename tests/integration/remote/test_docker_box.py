"""A box with Docker, from an SSH address to a model at home; nothing is left on it at the end."""

from __future__ import annotations

import json
import secrets
from pathlib import Path
from typing import Any

import pytest

from tests.integration.remote.models import check_models
from tests.integration.remote.rig import DockerBox, Laptop

pytestmark = pytest.mark.docker
TOKEN = f"hf_{secrets.token_hex(16)}"  # made here: this file, too, is on the box


@pytest.fixture(scope="module")
def deployed(docker_box: DockerBox, laptop: Laptop) -> DockerBox:
    laptop.fab("deploy", "--host", docker_box.name, timeout_s=900)
    return docker_box


def test_it_is_fit(docker_box: DockerBox, laptop: Laptop, job: Path) -> None:
    said = json.loads(laptop.fab("doctor", "--host", docker_box.name, "--job", str(job), "--json").out)
    checks = {check["name"]: check for check in said["checks"]}
    assert said["fit"] is True
    assert "docker" in checks["provider"]["value"] and checks["Docker"]["status"] == "ok"


def test_three_steps_and_the_models_come_home(deployed: DockerBox, laptop: Laptop, job: Path) -> None:
    host = ("--host", deployed.name)
    done = laptop.fab("train", *host, "--job", str(job), "--step", "all", "--wait", HF_TOKEN=TOKEN)
    assert [f"step {step}  done in" in done.out for step in (1, 2, 3)] == [True, True, True]
    (run,) = json.loads(laptop.fab("ps", *host, "--json").out)["runs"]
    assert (run["name"], run["state"], run["exit"], run["steps_complete"]) == ("tiny", "done", 0, [1, 2, 3])
    assert laptop.fab("logs", *host, "--json").out == deployed.read("runs/tiny/events.jsonl")
    laptop.fab("fetch", *host, "--run", "tiny")
    check_models(laptop.runs / deployed.name / "tiny")
    # The token reached the process of the training alone.
    kept = deployed.sh('grep -rlF "$1" "$2" "$3" || true', TOKEN, deployed.data_folder, str(laptop.folder / "state"))
    assert kept == "" and deployed.ls("secrets") == []
    assert TOKEN not in done.all + laptop.fab("logs", *host, "--raw").all


def test_a_changed_file_builds_nothing(deployed: DockerBox, laptop: Laptop) -> None:
    def deploy() -> dict[str, Any]:
        said: dict[str, Any] = json.loads(laptop.fab("deploy", "--host", deployed.name, "--json").out)
        return said

    before = deploy()
    assert before["changed"] is False
    with (laptop.checkout / "README.md").open("a") as readme:
        readme.write("\nA line.\n")
    after = deploy()
    assert after["changed"] is True and after["code"] != before["code"] and after["image"] == before["image"]
    assert "environment" not in [part["name"] for part in after["parts"]]
    assert deployed.read(f"code/{after['code']}/README.md").endswith("A line.\n")
    assert deploy()["changed"] is False


def test_cancel_ends_the_container_and_says_how(deployed: DockerBox, laptop: Laptop, long_job: Path) -> None:
    host = ("--host", deployed.name)
    laptop.fab("train", *host, "--job", str(long_job), "--step", "2", "--run", "cut-short", "--detach")
    following = laptop.start("logs", *host, "--run", "cut-short", "--follow")
    following.says("update 1/", 600)
    (container,) = deployed.docker("ps", "--quiet", "--filter", "name=^rlhf-box-").stdout.split()
    inspected = json.loads(deployed.docker("inspect", container).stdout)[0]
    assert inspected["Config"]["User"] == "1000:1000" and inspected["HostConfig"]["Privileged"] is False
    done = laptop.fab("cancel", *host, "--run", "cut-short")
    assert "nothing of it is left" in done.out
    assert following.wait(30).code == 143
    assert deployed.docker("ps", "--all", "--quiet", "--filter", "name=^rlhf-box-").stdout == ""
    states = {run["name"]: run["state"] for run in json.loads(laptop.fab("ps", *host, "--json").out)["runs"]}
    assert states["cut-short"] == "cancelled"


def test_nothing_is_left_when_it_is_purged(deployed: DockerBox, laptop: Laptop) -> None:
    host = ("--host", deployed.name)
    image = next(line.split()[1] for line in deployed.read("deployed").splitlines() if line.startswith("image "))
    refused = laptop.fab("purge", *host, code=3)  # `cut-short` is not fetched
    assert "cut-short" in refused.err and deployed.ls("runs")
    laptop.fab("purge", *host, "--yes")
    assert deployed.sh('find "$1" "$2" -mindepth 1', deployed.data_folder, str(deployed.folder / "home")) == ""
    assert deployed.docker("image", "ls", "--quiet", image).stdout == ""
    assert "fab deploy" in laptop.fab("train", *host, "--job", "demo", "--detach", code=3).err
