"""The verbs as they are typed, against a real sshd and the real supervisor.

What a deploy makes is laid out by hand, with this Python as
the box's: the deploy itself is tested in deploy/test_deployment.py, and with the real environments
in tests/integration/remote.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
import pytest
import yaml

from jobs.events import read_events
from jobs.run_dir import RunDir
from remote import tasks
from remote.deploy.sync import checkout_tree
from tests import tiny
from tests.raw_events import END_3, PLAN, ROLLOUTS

CHECKOUT = Path(__file__).parents[2]
FAB = Path(sys.executable).with_name("fab")
PATIENCE_S = 60.0
Said = subprocess.CompletedProcess[str]


@dataclass
class Laptop:
    """A user's machine: a home of its own, boxes.yaml, and `fab`."""

    folder: Path
    environment: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.folder.mkdir()
        mine = {"XDG_STATE_HOME": "state", "RLHF_BOXES": "boxes.yaml", "RLHF_RUNS": "runs"}
        kept = {name: value for name, value in os.environ.items() if name not in ("HF_TOKEN", "SSH_AUTH_SOCK")}
        self.environment = kept | {name: str(self.folder / value) for name, value in mine.items()} | self.environment

    def command(self, *words: str) -> list[str]:
        return [str(FAB), "--search-root", str(CHECKOUT), *words]

    def fab(self, *words: str, code: int | None = 0, **environment: str) -> Said:
        said = subprocess.run(
            self.command(*words),
            cwd=self.folder,
            env=self.environment | environment,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert code is None or said.returncode == code, (
            f"{words} ended with {said.returncode}\n{said.stdout}\n{said.stderr}"
        )
        return said

    def start(self, *words: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            self.command(*words),
            cwd=self.folder,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )


@dataclass
class Place:
    """A laptop, and a box on which all is deployed."""

    laptop: Laptop
    root: Path
    job: Path

    def fab(self, *words: str, **more: Any) -> Said:
        return self.laptop.fab(words[0], "--host", "gpu-box", *words[1:], **more)

    def run(self, name: str) -> RunDir:
        return RunDir(self.root / "runs" / name)

    def files(self) -> dict[str, bytes]:
        folders = [self.root, self.laptop.folder]
        return {
            str(path): path.read_bytes()
            for folder in folders
            for path in sorted(folder.rglob("*"))
            if path.is_file() and not path.is_symlink()
        }


def entry(server: Any, data: Path) -> dict[str, Any]:
    return {
        "address": "127.0.0.1",
        "port": server.port,
        "user": server.user,
        "key": str(server.key),
        "data_folder": str(data),
        "price_per_hour": 1.98,
    }


def lay_out(root: Path) -> None:
    """As a deploy on a box without Docker leaves it."""
    code = checkout_tree(CHECKOUT).key
    for package in ("env", "jobs", "remote", "rlhf_train"):
        shutil.copytree(
            CHECKOUT / package, root / "code" / code / package, ignore=shutil.ignore_patterns("__pycache__")
        )
    for folder in ("runs", "inputs", "requests", "cache/tmp", "secrets"):
        (root / folder).mkdir(parents=True)
    (root / "secrets").chmod(0o700)
    (root / ".rlhf-box").touch()
    lines = {
        "code": code, "runtime": "bare", "environment": "0" * 16, "python": sys.executable, "route": "direct",
        "mirror": "default", "p2p": "0", "device": "cpu", "torch": "torch-cu118-cpu", "time": "0",
    }  # fmt: skip
    (root / "deployed").write_text("".join(f"{key} {value}\n" for key, value in lines.items()))


@pytest.fixture(scope="module")
def place(make_sshd: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    folder = tmp_path_factory.mktemp("verbs") / "a b"
    folder.mkdir()
    laptop, data = Laptop(folder / "laptop"), folder / "data $(x)"
    lay_out(data / "rlhf-box")
    boxes = {
        "gpu-box": entry(make_sshd(), data),
        "second": entry(make_sshd(), folder / "empty"),
        "gone": entry(make_sshd(), data) | {"port": 1},
    }
    (laptop.folder / "boxes.yaml").write_text(yaml.safe_dump(boxes))
    job = laptop.folder / "my job.yaml"
    rows = tiny.write_rows(laptop.folder / "rows")
    job.write_text(yaml.safe_dump(tiny.job(rows) | {"checkpoint": {"grace_s": 20.0}}))
    place = Place(laptop, data / "rlhf-box", job)
    yield place
    for process in psutil.process_iter(["environ", "cmdline"]):  # whatever a failed test left there
        if str(place.root) in " ".join(process.info["cmdline"] or []) or (process.info["environ"] or {}).get(
            "RLHF_RUNS"
        ) == str(place.root / "runs"):
            process.kill()


def wait_until(what: Callable[[], object], text: str) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not what():
        assert time.monotonic() < deadline, text
        time.sleep(0.05)


# --- help and flags -------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", tasks.verbs().tasks.values(), ids=lambda verb: verb.name)
def test_each_verb_explains_itself(verb: Any) -> None:
    """With an example; and every flag has a word of explanation."""
    assert re.search(rf"^ +fab {verb.name} ", verb.__doc__, re.MULTILINE)
    arguments = verb.get_arguments()
    assert [argument.name for argument in arguments if not argument.help] == []
    flags = {argument.names[0] for argument in arguments}
    assert (
        "dry-run" in flags
        and ("json" in flags or verb.name in ("chat", "shell", "tunnel"))
        and ("host" in flags or verb.name == "add")
    )


def test_help_is_shown_by_fab(tmp_path: Path) -> None:
    laptop = Laptop(tmp_path / "laptop")
    shown = laptop.fab("--help", "train").stdout
    assert "fab train --host gpu-box --job opt-1.3b --step all" in shown
    assert re.search(r"--detach +start the job and return immediately", shown)
    listed = laptop.fab("--list").stdout.split()
    assert [name for name in tasks.FILES if name not in listed] == []


PANEL, PAGE = {"rich.console", "rich.live", "jobs.views.panel"}, {"jobs.views.report.page"}
SURVEY, TRANSFER = {"remote.survey.facts", "jobs.fitness"}, {"remote.deploy.sync", "remote.results.transfer"}
JOB_FILE = {"jobs.spec", "jobs.estimate"}


@pytest.mark.parametrize(
    ("verb", "without"),
    [
        ("logs", PANEL | PAGE | SURVEY | TRANSFER | JOB_FILE),  # the panel only while ssh logs in
        ("ps", PANEL | PAGE | SURVEY | TRANSFER | JOB_FILE),
        ("fetch", PANEL | PAGE | SURVEY | JOB_FILE | {"remote.deploy.sync"}),
    ],
)
def test_a_verb_imports_little_before_it_speaks_with_a_box(tmp_path: Path, verb: str, without: set[str]) -> None:
    """Importing all that the verbs need takes longer than most of them take on the box."""
    laptop = Laptop(tmp_path / "laptop")
    command = [sys.executable, "-X", "importtime", *laptop.command(verb)]
    said = subprocess.run(
        command, cwd=laptop.folder, env=laptop.environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert said.returncode == 2 and "which box?" in said.stderr
    imported = {line.rpartition("|")[2].strip() for line in said.stderr.splitlines() if line.startswith("import time")}
    assert "remote.ssh.connection" in imported and imported & without == set()


@pytest.mark.parametrize(
    ("words", "names"),
    [
        (["ps", "--host", "gpu-box"], ["ps"]),
        (["deploy", "a", "train", "a"], ["deploy", "train"]),
        ([], [*tasks.FILES]),  # --list, --help VERB, --complete
        (["trian", "gpu-box"], [*tasks.FILES]),  # a slip, for which all are named
    ],
)
def test_the_verbs_of_a_call(words: list[str], names: list[str]) -> None:
    assert sorted(tasks.verbs(words).tasks) == sorted(names)


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["ps"], 2, "which box?"),
        (["ps", "--host", "no-such-box.invalid"], 8, "no-such-box.invalid"),
        (["ps", "--host", "gone"], 8, "gone"),
        (["ps", "gpu-bx"], 8, "did you mean gpu-box? boxes.yaml knows: gone, gpu-box, second"),
        (["--host", "gone", "ps"], 8, "gone"),
        (["trian", "--host", "gpu-box"], 2, "did you mean `fab train`?"),
        (["ps", "--host", "second"], 3, "nothing is deployed on `second`"),
        (["ps", "--host", "gpu-box,gpu-box"], 2, "named twice"),
        (["-H", "gpu-box", "ps", "--host", "gpu-box"], 2, "named twice"),
        (["train", "--host", "gpu-box,second"], 2, "this verb takes one box, not 2"),
        (["-H", "gpu-box,second", "train"], 2, "this verb takes one box, not 2"),
        (["train", "--host", "gpu-box", "--job", "nothing"], 2, "there is no job `nothing`"),
        (
            ["train", "--host", "gone", "--job", "demo", "--set", "ppo.klcoef=1"],
            2,
            "ppo.klcoef: unknown field; did you mean kl_coef?",
        ),
        (["train", "--host", "gone", "--step", "4"], 2, "--step 4 is not a step"),
        (["train", "--host", "gone", "--run", "../../etc"], 2, "cannot name a run"),
        (["train", "--host", "gone", "--deployment-type", "multi_node"], 2, "rented containers open no ports"),
        (["train", "--host", "gone", "--detach", "--wait"], 2, "are opposites"),
        (["logs", "--host", "gpu-box", "--since", "yesterday"], 2, "cannot read the time"),
        (["logs", "--host", "gpu-box", "--run", "no-such-run"], 2, "no-such-run"),
        (["status", "--host", "gpu-box", "--run", "no-such-run"], 2, "there is no run `no-such-run`"),
        (["tunnel", "--host", "gpu-box"], 2, "which port"),
        (["exec", "--host", "gpu-box"], 2, "which command"),
        (["cancel", "--host", "gpu-box", "--grace", "soon"], 2, "not a number"),
        (["ps", "--host", "-oProxyCommand=touch pwned"], 2, "cannot name a box"),
        (["ps", "--host", "$(touch pwned)"], 2, "cannot name a box"),
        (["add", "Gpu_Box", "ssh root@h"], 2, "cannot be a box's name"),
        (["add", "gpu-box", "ssh root@h"], 2, "is in"),
        (["add", "new-box", "ssh"], 2, "there is no address"),
        (["add", "new-box", "ssh root@h", "--price", "cheap"], 2, "is not a number"),
    ],
)  # fmt: skip
def test_bad_input_is_one_clear_error(place: Place, words: list[str], code: int, said: str) -> None:
    before = place.files()
    ended = place.laptop.fab(*words, code=code)
    assert said in ended.stderr and "Traceback" not in ended.stderr
    after = place.files()
    assert {name for name in after if after[name] != before.get(name)} <= {
        name for name in after if "known_hosts" in name
    }


def test_errors_are_json_for_programs(place: Place) -> None:
    said = json.loads(place.laptop.fab("ps", "--host", "second", "--json", code=3).stdout)
    assert said == {
        "what": "nothing is deployed on `second`",
        "why": "",
        "hint": "fab deploy --host second",
        "exit_code": 3,
    }
    several = [
        json.loads(line)
        for line in place.laptop.fab("ps", "--host", "gone,second,gpu-box", "--json", code=8).stdout.splitlines()
    ]
    assert {each["host"]: each.get("exit_code") for each in several} == {"gone": 8, "second": 3, "gpu-box": None}


def test_one_failure_hides_no_other_result(place: Place) -> None:
    for words in (["exec", "--host", "gone,gpu-box,second"], ["-H", "gone,gpu-box,second", "exec"]):
        ended = place.laptop.fab(*words, "--command", "echo $PPID 'a  b'", code=8)
        assert re.fullmatch(r"== (gpu-box|second)\n\d+ a  b\n== (gpu-box|second)\n\d+ a  b\n", ended.stdout)
        assert ended.stderr.count("gone: error: ") == 1
    codes = [
        json.loads(line)
        for line in place.laptop.fab(
            "exec", "--host", "gpu-box,second", "--json", "--command", "exit 7", code=7
        ).stdout.splitlines()
    ]
    assert sorted((said["host"], said["exit"]) for said in codes) == [("gpu-box", 7), ("second", 7)]


def test_doctor_by_json(place: Place) -> None:
    ended = place.fab("doctor", "--job", "demo", "--json", code=None)
    said = json.loads(ended.stdout)
    assert (said["host"], said["job"], ended.returncode) == ("gpu-box", "demo", 0 if said["fit"] else 3)
    assert [check["name"] for check in said["checks"]][:3] == ["reachable", "host key", "provider"]
    assert (
        json.loads(place.laptop.fab("doctor", "--host", "gone", "--json", code=8).stdout)["checks"][0]["status"]
        == "unfit"
    )


def test_a_tunnel_needs_a_free_port_here(place: Place) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        ended = place.fab("tunnel", "--port", "80", "--local-port", str(taken.getsockname()[1]), code=2)
    assert (
        "cannot listen on 127.0.0.1" in ended.stderr
        and "--local-port" in ended.stderr
        and "until Ctrl-C" not in ended.stderr
    )


def test_a_shell_is_had_before_the_first_deploy(place: Place) -> None:
    argv = place.laptop.command("shell", "--host", "second")
    said: dict[str, Any] = {"input": "exit 9\n", "capture_output": True, "text": True}
    ended = subprocess.run(argv, cwd=place.laptop.folder, env=place.laptop.environment, check=False, timeout=60, **said)
    assert ended.returncode == 9 and "nothing is deployed here" in ended.stdout + ended.stderr


def test_the_ssh_configuration_is_read_by_ssh_alone(place: Place) -> None:
    """Fabric itself would end at the byte of Latin-1, before any verb."""
    server = yaml.safe_load((place.laptop.folder / "boxes.yaml").read_text())["gpu-box"]
    home = place.laptop.folder / "home"
    (home / ".ssh").mkdir(parents=True)
    text = (
        f'Host far\n  HostName 127.0.0.1\n  Port {server["port"]}\nMatch final all\n  IdentityFile "{server["key"]}"\n'
    )
    (home / ".ssh/config").write_bytes(b"# caf\xe9\n" + text.encode())
    place.laptop.fab("add", "by-add", "ssh root@example.invalid", "--dry-run", HOME=str(home))
    flag = ("-S", str(home / ".ssh/config"))
    for words in (["exec", "--host", "far"], ["-H", "far", "exec"]):
        ended = place.laptop.fab(*flag, *words, "--command", r"""printf '%s\n' 'a\b' "it's" """, HOME=str(home))
        assert ended.stdout == "a\\b\nit's\n"


def test_a_dry_unlock_says_whose_lock_it_is(place: Place) -> None:
    held = place.root / "lock"
    held.mkdir()
    (held / "owner").write_text("token 0123456789abcdef\nwho lin@laptop\nwhy fab deploy\n")
    try:
        assert place.fab("unlock", "--dry-run").stdout.startswith("would be unlocked; the lock was held by lin@laptop")
        assert held.is_dir()
    finally:
        shutil.rmtree(held, ignore_errors=True)


DRY = [
    ["trust"], ["doctor"], ["deploy"], ["unlock"], ["train", "--job", "demo", "--run", "dry"], ["logs"], ["ps"],
    ["status"], ["cancel"],
    ["fetch", "--run", "nothing"], ["report", "--run", "nothing"],
    ["tunnel", "--port", "6006"], ["shell"], ["chat"], ["exec", "--command", "touch pwned"],
    ["purge"], ["stop"],
]  # fmt: skip


@pytest.mark.parametrize("words", DRY, ids=lambda words: words[0])
def test_a_dry_run_changes_nothing(place: Place, words: list[str]) -> None:
    """It shows commands; those that only ask are run, so that what it shows is exact."""
    place.fab("exec", "--command", "true")  # the host key is known from here on
    before = place.files()
    ended = place.fab(*words, "--dry-run", code=None)
    assert "Traceback" not in ended.stderr
    assert re.search(r"^(gpu-box|here)\$ ", ended.stderr, re.MULTILINE) or words == ["trust"]  # which has nothing to do
    assert place.files() == before
    assert not place.run("dry").path.exists()


def test_a_report_brings_events_home_and_no_model(place: Place) -> None:
    run = place.run("told")
    run.path.mkdir(parents=True)
    lines = [PLAN, *ROLLOUTS, END_3 | {"held_out_rows": 100}]
    run.events.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    run.job_file.write_text("name: told\n", encoding="utf-8")
    run.step(3).model.mkdir(parents=True)
    (run.step(3).model / "model.safetensors").write_bytes(b"weights")
    try:
        told = json.loads(place.fab("report", "--run", "told", "--json").stdout)
        home = place.laptop.folder / "runs/gpu-box/told"
        assert (told["verdict"], told["page"]) == ("good", str(home / "report.html"))
        assert told["sentence"].startswith("It worked: good answers, by the rule, rose from 48.0% to 94.0% of 100")
        assert told["sentence"] in (home / "report.html").read_text(encoding="utf-8")
        assert not list(home.rglob("*.safetensors"))
        assert place.fab("report", "--run", "told").stdout == f"{home / 'report.html'}\n"
        other = place.laptop.folder / "told again"
        assert place.fab("report", "--run", "told", "--to", str(other)).stdout == f"{other / 'report.html'}\n"
        assert (other / "events.jsonl").read_bytes() == run.events.read_bytes()
    finally:
        shutil.rmtree(run.path)


def test_a_question_to_a_model_on_the_box(place: Place, tmp_path: Path) -> None:
    """A stand-in for the box's Python prints its words. Its output and its exit code are fab's."""
    deployed, python = place.root / "deployed", tmp_path / "python"
    before = deployed.read_text()
    python.write_text("""#!/bin/sh\ntest -t 1 || printf '<%s>' "$@" "$(cat)"\necho loading >&2\nexit 5\n""")
    python.chmod(0o755)
    deployed.write_text(before.replace(sys.executable, str(python)))
    question, system = """--it's $(touch pwned) "\\ !"\n*""", "-n 你"
    try:
        told = place.fab("chat", "--run", "talk", f"--once={question}", f"--system={system}", code=5)
    finally:
        deployed.write_text(before)
    assert told.stdout == f"<-m><rlhf_train><chat><talk><--once={question}><--system={system}><>"
    assert "loading" in told.stderr


# --- from a job to a model at home ----------------------------------------------------------------


def test_all_three_steps_and_the_model_at_home(place: Place) -> None:
    place.laptop.environment["HF_TOKEN"] = "hf_of_the_tests_1234567"
    ended = place.fab("train", "--job", str(place.job), "--run", "whole", "--set", "sft.max_updates=3", "--wait")
    del place.laptop.environment["HF_TOKEN"]
    assert "run `whole` was started on gpu-box" in ended.stderr and "sending " in ended.stderr
    assert re.search(r"update 3/3  loss ", ended.stdout)

    listed = json.loads(place.fab("ps", "--json").stdout)
    (run,) = [run for run in listed["runs"] if run["name"] == "whole"]
    assert (run["state"], run["exit"], run["steps_complete"]) == ("done", 0, [1, 2, 3])
    assert re.search(r"gpu-box +whole +done ", place.fab("ps").stdout)
    assert re.search(r"^state +done, exit code 0$", place.fab("status").stdout, re.MULTILINE)

    assert place.fab("logs", "--json", "--run", "whole").stdout.encode() == place.run("whole").events.read_bytes()
    raw = subprocess.run(
        place.laptop.command("logs", "--raw", "--host", "gpu-box", "--run", "whole"),
        env=place.laptop.environment,
        capture_output=True,
        check=True,
    )
    assert raw.stdout == place.run("whole").log.read_bytes()
    assert place.fab("logs", "--follow", "--run", "whole").returncode == 0
    last = place.laptop.fab("logs", "gpu-box", "--json", "--run", "whole", "-n", "3").stdout
    assert last.encode() == b"".join(place.run("whole").events.read_bytes().splitlines(keepends=True)[-3:])

    token = b"hf_of_the_tests_1234567"
    assert [name for name, content in place.files().items() if token in content] == []
    assert not list((place.root / "secrets").iterdir())

    place.fab("fetch", "--run", "whole")
    home = place.laptop.folder / "runs/gpu-box/whole"
    from transformers import AutoModelForCausalLM

    assert AutoModelForCausalLM.from_pretrained(home / "step3/model").config.model_type == "opt"
    assert (home / "step3/model/model.safetensors").read_bytes() == (
        place.run("whole").step(3).model / "model.safetensors"
    ).read_bytes()
    assert "nothing new" in place.fab("fetch").stderr

    again = place.fab("train", "--job", str(place.job), "--run", "whole", "--set", "sft.max_updates=3", "--wait")
    assert "sending" not in again.stderr  # its data is there
    events = read_events(place.run("whole").events)[0]
    assert [event["step"] for event in events if event["kind"] == "end"] == [1, 2, 3]


def test_a_job_that_fails_gives_its_own_code(place: Place) -> None:
    ended = place.fab(
        "train", "--job", str(place.job), "--run", "fails", "--set", "hardware.ranks=3", "--step", "1", "--wait", code=2
    )
    assert "the job ended before it could train" in ended.stderr and "cannot be shared by 3 ranks" in ended.stderr
    assert "cannot be shared by 3 ranks" in place.fab("logs", "--raw", "--run", "fails").stdout
    assert "failed (2)" in place.fab("ps").stdout


@pytest.fixture
def long_run(place: Place) -> Iterator[str]:
    """A run that would go on for long: started, and seen to train."""
    name = "long"
    shutil.rmtree(place.run(name).path, ignore_errors=True)
    place.fab(
        "train",
        "--job",
        str(place.job),
        "--run",
        name,
        "--step",
        "1",
        "--set",
        "sft.max_updates=100000",
        "--set",
        "sft.epochs=100000",
        "--detach",
    )
    wait_until(
        lambda: any(event["kind"] == "metrics" for event in read_events(place.run(name).events)[0]), "it does not train"
    )
    yield name
    place.fab("cancel", "--grace", "0", code=None)


def test_a_box_runs_one_job_at_a_time_and_cancel_proves_its_end(place: Place, long_run: str) -> None:
    refused = place.fab("train", "--job", str(place.job), "--run", "other", "--detach", code=5)
    assert "run `long` is being trained there" in refused.stderr and not place.run("other").path.exists()
    assert json.loads(place.fab("ps", "--json").stdout)["running"] == "long"
    assert "a job runs there" in place.fab("stop", code=5).stderr
    assert "a job runs there" in place.fab("purge", code=5).stderr

    said = json.loads(place.fab("cancel", "--json").stdout)
    ended = {"how": "by itself", "exit": 143, "left": [], "gpu_held": [], "proven": True}
    assert said == {"host": "gpu-box", "run": "long", **ended}
    states = {run["name"]: run["state"] for run in json.loads(place.fab("ps", "--json").stdout)["runs"]}
    assert states["long"] == "cancelled"
    assert any(place.run("long").step(1).checkpoints.glob("update-*/complete.json"))
    assert json.loads(place.fab("cancel", "--json").stdout)["how"] == "not running"


def test_ctrl_c_stops_the_watching_and_not_the_job(place: Place, long_run: str) -> None:
    watching = place.laptop.start("logs", "--host", "gpu-box", "--follow")
    assert watching.stdout is not None
    for line in watching.stdout:
        if "update" in line:
            break
    began = time.monotonic()
    watching.send_signal(signal.SIGINT)
    rest = watching.stdout.read()
    assert watching.wait(10) == 0 and "the job keeps running" in rest, rest
    assert time.monotonic() - began < 5  # benchmarks/remote.py shows by how much
    assert json.loads(place.fab("ps", "--json").stdout)["running"] == "long"


# --- leaving --------------------------------------------------------------------------------------


def test_results_that_are_nowhere_else_hold_up_a_stop_and_a_purge(
    make_sshd: Callable[..., Any], tmp_path: Path
) -> None:
    laptop = Laptop(tmp_path / "laptop")
    root = tmp_path / "data" / "rlhf-box"
    lay_out(root)
    run = RunDir(root / "runs" / "r")
    run.step(1).model.mkdir(parents=True)
    (run.step(1).model / "config.json").write_text("{}")
    run.step(1).complete.write_text('{"kind": "end"}')
    run.events.write_text('{"schema": 1, "seq": 0, "time": "2025-01-05T12:00:03Z", "kind": "end", "step": 1}\n')
    (laptop.folder / "boxes.yaml").write_text(yaml.safe_dump({"gpu-box": entry(make_sshd(), tmp_path / "data")}))

    for verb in ("stop", "purge"):
        refused = laptop.fab(verb, "--host", "gpu-box", code=3)
        assert (
            "results that are nowhere else" in refused.stderr and "fab fetch --host gpu-box --run r" in refused.stderr
        )
    laptop.fab("fetch", "--host", "gpu-box", "--run", "r")
    home = laptop.folder / "runs/gpu-box/r"
    home.rename(home.with_name("moved"))
    refused = laptop.fab("stop", "--host", "gpu-box", code=3)  # what was fetched once does not count
    assert refused.stdout.count("run `r`: the models of step 1") == 1 and "run `r`" not in refused.stderr
    assert max(map(len, (refused.stdout + refused.stderr).splitlines())) <= 80
    home.with_name("moved").rename(home)
    RunDir(root / "runs" / "s").step(1).path.mkdir(parents=True)
    fetched = laptop.fab("fetch", "--host", "gpu-box", "--all", "--to", str(laptop.folder / "all"))
    assert "of run `r` are here" in fetched.stderr and "of run `s` are here" in fetched.stderr
    assert {path.name for path in (laptop.folder / "all").iterdir()} >= {"r"}
    card = laptop.fab("stop", "--host", "gpu-box", code=None)
    assert "meter" in card.stdout and card.returncode and "cannot stop itself" in card.stderr  # an unknown provider

    (tmp_path / "data" / "mine").touch()
    purged = laptop.fab("purge", "--host", "gpu-box").stdout
    assert [line.split()[0] for line in purged.splitlines()].count("gone") >= 2
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["mine"]
    laptop.fab("purge", "--host", "gpu-box")
