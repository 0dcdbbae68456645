"""docs/walk-through.md as it is typed: each of its commands runs, in its order, read out of it.

The box is a real sshd on loopback with a home of its own, where `fab deploy` puts the code and
`fab train` starts the real supervisor. A hub on loopback has tiny models and rows under the names
of the two recipes.

What differs from a reader's machine: the address in `fab add`; the recipes' lengths and hardware,
since no GPU is here; and the environment, which is this Python in place of the locked packages. How
a deploy makes that one, and that `make venv` sets a checkout up, is shown elsewhere:
tests/integration/remote and tests/env/test_venv.py.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
import pytest
import yaml

from jobs.events import read_events
from jobs.run_dir import RunDir
from remote.deploy.deployment import environment_key
from tests import tiny
from tests.docker.engine import copy_checkout
from tests.hub import Hub
from tests.remote.small_checkout import git

CHECKOUT = Path(__file__).parents[2]
PAGE = CHECKOUT / "docs/walk-through.md"
ALIAS = "alias fab=.venv/bin/fab"
RENTED_QUOTED = "'ssh -p 41022 root@connect.example.com'"
RECIPES = ("opt-1.3b-lora", "opt-1.3b")
PROMPT = "red cat"  # typed into the chat
A_COMMAND_S = 300.0


@dataclass(frozen=True)
class Ran:
    line: str  # as the page has it, without its remark
    code: int
    said: str  # on both streams


@dataclass(frozen=True)
class Walk:
    ran: list[Ran]
    checkout: Path
    box: Path  # our folder there
    hub: Hub

    def after(self, beginning: str) -> Ran:
        """The first command that begins so."""
        return next(each for each in self.ran if each.line.startswith(beginning))

    def run(self, name: str) -> RunDir:
        return RunDir(self.checkout / "runs/gpu-box" / name)


def lines_of_page() -> list[str]:
    """Its commands, each as it is typed into a shell."""
    blocks = re.findall(r"^```console\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    return [line.partition("  #")[0].rstrip() for block in blocks for line in re.findall(r"^\$ (.*)$", block, re.M)]


def fill_hub(root: Path) -> None:
    from transformers import OPTConfig, OPTForCausalLM

    from rlhf_train.models.networks import train_tokenizer

    tokenizer = train_tokenizer([" ".join(tiny.WORDS)], 320)
    config = {key: value for key, value in tiny.OPT.items() if key != "model_type"}
    for name in ("opt-1.3b", "opt-350m"):
        folder = root / "models/facebook" / name
        OPTForCausalLM(OPTConfig(vocab_size=len(tokenizer), **config)).save_pretrained(folder)
        tokenizer.save_pretrained(str(folder))
    (root / "datasets/Dahoas").mkdir(parents=True)
    tiny.write_rows(root / "datasets/Dahoas/rm-static", train=60, held_out=8)


def make_checkout(folder: Path, hub: Hub) -> Path:
    """A clone with this environment, this hub, and recipes for a small machine."""
    checkout = folder / "rlhf-box"
    copy_checkout(CHECKOUT, checkout, os.getuid())
    (checkout / "env/mirrors/default.env").write_text(f"HF_ENDPOINT={hub.url}\n")
    small = tiny.job(Path())
    for name in RECIPES:
        file = checkout / f"jobs/{name}.yaml"
        recipe = yaml.safe_load(file.read_text())
        for length in ("max_prompt_tokens", "max_response_tokens"):
            recipe["data"][length] = small["data"][length]
        file.write_text(yaml.safe_dump(recipe | {"hardware": small["hardware"]}))
    git(checkout, "init", "-q")
    git(checkout, "add", "-A")
    git(checkout, "commit", "-qm", "the checkout")
    (checkout / ".venv").symlink_to(sys.prefix)
    with (checkout / ".git/info/exclude").open("a") as exclude:
        exclude.write(".venv\n")
    return checkout


def lay_out_environment(root: Path, checkout: Path) -> None:
    """As `fab deploy` would leave it, but of this Python's packages."""
    environment = root / "env" / environment_key(checkout, "bare", "cu118", "torch-cu118-cpu", "default", {}, "cpu")
    (environment / "bin").mkdir(parents=True)
    python = environment / "bin/python"
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    (environment / "complete").write_text("1\n")
    (root / ".rlhf-box").touch()


@pytest.fixture(scope="module")
def walk(make_sshd: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Walk]:
    """All commands but the first, in one go."""
    folder, server = tmp_path_factory.mktemp("walk"), make_sshd()
    fill_hub(folder / "hub")
    root = server.home / "rlhf-box"
    try:
        with Hub(folder / "hub") as hub:
            checkout = make_checkout(folder, hub)
            lay_out_environment(root, checkout)
            yield Walk(list(typed(server, checkout, folder / "home")), checkout, root, hub)
    finally:
        for process in psutil.process_iter(["cmdline"]):  # of a walk that broke off
            if str(root) in " ".join(process.info["cmdline"] or []):
                process.kill()


def typed(server: Any, checkout: Path, home: Path) -> Iterator[Ran]:
    """Run the page's commands, as a shell reads them."""
    dropped = ("HF_", "RLHF_", "SSH_", "XDG_", "PYTEST_")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(dropped)}
    home.mkdir()
    environment = kept | {"HOME": str(home), "PYTHONPATH": str(checkout)}
    address = shlex.join(["ssh", "-i", str(server.key), "-p", str(server.port), f"{server.user}@127.0.0.1"])
    set_up, alias, *lines = lines_of_page()
    assert (set_up, alias) == ("make venv", ALIAS)
    for line in lines:
        script = f"{alias}\n{line.replace(RENTED_QUOTED, shlex.quote(address))}"
        done = subprocess.run(
            ["sh", "-c", script], cwd=checkout, env=environment, input=f"{PROMPT}\n",
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=A_COMMAND_S, check=False,
        )  # fmt: skip
        yield Ran(line, done.returncode, done.stdout)
        if line.startswith("fab add"):  # Docker or a GPU may be here, too, and a mirror within reach
            boxes = yaml.safe_load((checkout / "boxes.yaml").read_text())
            boxes["gpu-box"] |= {"provider": "generic", "runtime": "bare", "mirror": "default"}
            boxes["gpu-box"]["build"] = {"TORCH": "torch-cu118-cpu"}
            (checkout / "boxes.yaml").write_text(yaml.safe_dump(boxes))


def test_each_command_ends_well(walk: Walk) -> None:
    assert len(walk.ran) == 16
    # This machine's Python, or its way to the real hub, may be unfit; its meter has no switch.
    allowed = {"fab doctor": {0, 3}, "fab stop": {2}}
    unwell = [each for each in walk.ran if each.code not in allowed.get(" ".join(each.line.split()[:2]), {0})]
    assert unwell == []


def test_the_box_is_looked_at_for_the_recipe(walk: Walk) -> None:
    assert "price_per_hour: 3.96\n  currency: ¥\n" in walk.after("fab add").said
    assert "host key SHA256:" in walk.after("fab trust").said
    assert re.search(r"^(not )?fit for opt-1\.3b-lora", walk.after("fab doctor").said, re.MULTILINE)
    assert walk.after("fab stop").said.count("error: gpu-box cannot stop itself\n") == 1


def test_a_deploy_leaves_nothing_to_download(walk: Walk) -> None:
    said = walk.after("fab deploy").said
    assert "sync: " in said and "`fab train` downloads nothing" in said
    for file in ("facebook/opt-1.3b/resolve/", "facebook/opt-350m/resolve/", "datasets/Dahoas/rm-static/resolve/"):
        assert any(f"GET /{file}" in request for request in walk.hub.requests)


def test_both_recipes_train_and_their_models_come_home(walk: Walk) -> None:
    from tests.integration.remote.models import check_models  # it imports torch

    for name, trained in zip(RECIPES, ([1, 2, 3], [1, 3]), strict=True):
        run = walk.run(name)
        events = read_events(run.events)[0]
        assert sorted(event["step"] for event in events if event["kind"] == "end") == [1, 2, 3]
        assert sorted({event["step"] for event in events if event["kind"] == "metrics"}) == trained
        check_models(run.path)
    assert (walk.run(RECIPES[0]).path / "step3/model/adapter").is_dir()
    assert not (walk.run(RECIPES[1]).path / "step3/model/adapter").exists()


def test_the_training_is_watched_and_its_cost_is_known(walk: Walk) -> None:
    watched = walk.after("fab logs").said
    assert [f"step {step}  done in" in watched for step in (1, 2, 3)] == [True, True, True]
    assert re.search(r"gpu-box +opt-1\.3b-lora +done .* ¥0\.\d+", walk.after("fab ps").said)


def test_the_reports_are_where_they_are_said_to_be(walk: Walk) -> None:
    assert walk.after("fab report").said == "runs/gpu-box/opt-1.3b-lora/report.html\n"
    one = (walk.checkout / walk.after("fab report").said.strip()).read_text(encoding="utf-8")
    both = (walk.checkout / walk.after(".venv/bin/rlhf-train report").said.strip()).read_text(encoding="utf-8")
    assert 'class="verdict' in one and "Comparison of 2 runs" in both
    assert all(f">{name}</h2>" in both for name in RECIPES)


@pytest.mark.parametrize("command", [".venv/bin/rlhf-train chat", "fab chat"])
def test_the_two_models_answer_next_to_each_other(walk: Walk, command: str) -> None:
    said = walk.after(command).said
    assert "step 1 (supervised fine-tuning)" in said and "step 3 (PPO)" in said
    assert len(re.findall(r"^reward -?\d+\.\d\d\r?$", said, re.MULTILINE)) == 2


def test_nothing_is_left_on_the_box(walk: Walk) -> None:
    assert "removed " in walk.after("fab purge").said and not walk.box.exists()
