"""`fab deploy --job` as it is typed: a real sshd, the real supervisor, and a hub on loopback.

The code and the environment are laid out by hand, with this Python as the box's.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
import pytest
import yaml

from remote.deploy.deployment import environment_key
from remote.deploy.sync import checkout_tree
from tests import tiny
from tests.hub import TOKEN, Hub
from tests.remote.test_tasks import CHECKOUT, Laptop, entry, lay_out, wait_until

WEIGHTS = "some/opt/model.safetensors"


def model(folder: Path) -> None:
    """A tiny OPT, as its owner put it onto the hub."""
    from transformers import OPTConfig, OPTForCausalLM

    from rlhf_train.models.networks import train_tokenizer

    config = OPTConfig(**{key: value for key, value in tiny.OPT.items() if key != "model_type"}, vocab_size=320)
    OPTForCausalLM(config).save_pretrained(folder)
    train_tokenizer([" ".join(tiny.WORDS)], 320).save_pretrained(str(folder))


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    folder = tmp_path_factory.mktemp("hub")
    model(folder / "models/some/opt")
    (folder / "datasets/some").mkdir(parents=True)
    tiny.write_rows(folder / "datasets/some/rows")
    with Hub(folder, gated=["some/opt"]) as hub:
        yield hub


class Scene:
    """A laptop with a job, and two boxes on which all is deployed."""

    def __init__(self, folder: Path, server: Any, hub: Hub) -> None:
        self.laptop, self.server, self.hub = Laptop(folder / "laptop"), server, hub
        key = environment_key(CHECKOUT, "bare", "cu118", "torch-cu118-cpu", "default", {}, "cpu")
        boxes, self.roots = {}, {}
        for name in ("one", "two"):
            root = self.roots[name] = folder / name / "rlhf-box"
            lay_out(root)
            environment = root / "env" / key
            (environment / "bin").mkdir(parents=True)
            python = environment / "bin/python"
            python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
            python.chmod(0o755)
            (environment / "complete").write_text("1\n")
            mirror = root / "code" / checkout_tree(CHECKOUT).key / "env/mirrors/default.env"
            mirror.write_text(f"HF_ENDPOINT={hub.url}\n")
            more = {"runtime": "bare", "build": {"TORCH": "torch-cu118-cpu"}, "secrets": ["HF_TOKEN"]}
            boxes[name] = entry(server, root.parent) | more
        boxes["gone"] = boxes["one"] | {"port": 1}
        (self.laptop.folder / "boxes.yaml").write_text(yaml.safe_dump(boxes))
        self.laptop.environment["HF_TOKEN"] = TOKEN
        self.job = self.laptop.folder / "my job.yaml"
        job = tiny.job(tiny.write_rows(self.laptop.folder / "own")) | {"actor": {"model": "some/opt"}}
        job["data"]["datasets"] = ["some/rows", "own"]
        job["sft"]["max_updates"] = 1
        self.job.write_text(yaml.safe_dump(job))

    def deploy(self, *words: str, host: str = "one", code: int = 0) -> Any:
        return self.laptop.fab("deploy", "--host", host, "--job", str(self.job), *words, code=code)

    def fetched(self) -> list[str]:
        """The files whose content was asked for."""
        gets = (re.fullmatch(r"GET /(\S+)/resolve/\w+/(\S+) 20\d", line) for line in self.hub.requests)
        return [f"{get[1]}/{get[2]}" for get in gets if get]

    def processes(self) -> list[psutil.Process]:
        """What runs of the training package on the boxes."""
        found = []
        for process in psutil.process_iter(["cmdline"]):
            line = " ".join(process.info["cmdline"] or [])
            if "rlhf_train --download" in line and any(str(root) in line for root in self.roots.values()):
                found.append(process)
        return found


@pytest.fixture(scope="module")
def scene(make_sshd: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory, hub: Hub) -> Iterator[Scene]:
    scene = Scene(tmp_path_factory.mktemp("prefetch"), make_sshd(), hub)
    yield scene
    for process in scene.processes():
        process.kill()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--job", "demo", "--set", "sft.nothing=1"], "error: one mistake in "),
        (["--job", "demo", "--set", "data.datasets=[./nothing.jsonl]"], "error: there is no `./nothing.jsonl` here"),
        (["--set", "sft.epochs=1"], "error: --set changes a job, and no job is named"),
    ],
)
def test_a_wrong_job_is_told_before_the_box_is_asked(scene: Scene, words: list[str], said: str) -> None:
    ended = scene.laptop.fab("deploy", "--host", "gone", *words, code=2)
    assert ended.stderr.startswith(said)


def test_a_dry_run_says_what_would_be_fetched(scene: Scene) -> None:
    scene.hub.requests.clear()
    ended = scene.deploy("--dry-run")
    assert "download: would fetch some/opt, some/rows\n" in ended.stderr and "sending `own`: 2 files" in ended.stderr
    assert scene.hub.requests == [] and not list((scene.roots["one"] / "inputs").iterdir())


def test_a_download_that_breaks_off_resumes(scene: Scene) -> None:
    scene.hub.fail(f"GET /{WEIGHTS.replace('opt/', 'opt/resolve/.*/')}", "stall", times=1)
    started = scene.laptop.start("deploy", "--host", "one", "--job", str(scene.job))
    wait_until(lambda: WEIGHTS in scene.fetched() or started.poll() is not None, "it does not download")
    assert len(scene.processes()) == 1
    assert not any(TOKEN in " ".join(each.info["cmdline"] or []) for each in psutil.process_iter(["cmdline"]))
    assert json.loads(scene.laptop.fab("ps", "--host", "one", "--json").stdout)["runs"] == []
    scene.server.cut()
    said = started.communicate(timeout=60)[0]
    assert started.returncode == 8, said
    assert "error: the connection to `one` broke while models and data were fetched" in said
    wait_until(lambda: not scene.processes(), "it still downloads")


def test_after_it_training_downloads_nothing(scene: Scene) -> None:
    scene.hub.requests.clear()
    ended = scene.deploy(host="one,two")
    assert scene.fetched().count(WEIGHTS) == 2
    for name, root in scene.roots.items():
        assert re.search(
            f"^{name}: has what `{scene.job}` needs, in .*; `fab train` downloads nothing$", ended.stdout, re.M
        )
        assert re.search(rf"^{name}: download: some/opt: .* kB, fetched and verified \(", ended.stderr, re.MULTILINE)
        assert list(root.rglob("model.safetensors")) and not (root / "slot").exists()
        assert not any(TOKEN.encode() in path.read_bytes() for path in root.rglob("*") if path.is_file())

    scene.hub.requests.clear()
    said = json.loads(scene.deploy("--json").stdout)
    assert scene.fetched() == [] and said["changed"] is False
    assert [line.split(", ")[1:] for line in said["download"]["said"][:2]] == [["all there", "verified"]] * 2

    ended = scene.laptop.fab("train", "--host", "one", "--job", str(scene.job), "--step", "1", "--wait")
    assert "sending" not in ended.stderr
    assert scene.fetched() == [] and any("some/opt" in line for line in scene.hub.requests)
    (run,) = json.loads(scene.laptop.fab("ps", "--host", "one", "--json").stdout)["runs"]
    assert (run["state"], run["steps_complete"]) == ("done", [1])


def test_what_the_hub_refuses_is_the_verbs_error(scene: Scene) -> None:
    ended = scene.deploy("--set", "actor.model=some/nothing", code=2)
    assert "error: `one`: cannot load some/nothing from the hub\n  why: " in ended.stderr
    assert ended.stderr.endswith("hint: check the name; HF_TOKEN opens a gated or private model\n")
    said = json.loads(scene.deploy("--set", "actor.model=some/nothing", "--json", code=2).stdout)
    assert said["what"] == "`one`: cannot load some/nothing from the hub" and said["exit_code"] == 2
