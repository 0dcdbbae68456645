"""Test the real image, built and run by the commands of docs/container.md.

The tests see which user it runs as, what it leaves, what it prints and how it ends.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from subprocess import CompletedProcess

import pytest
import yaml

from tests import tiny
from tests.docker.images import MARKER, Box
from tests.hub import TOKEN, Hub

pytestmark = pytest.mark.docker


@pytest.fixture(scope="module")
def job(built: Box) -> str:
    return built.put_job("tiny")


@pytest.fixture(scope="module")
def trained(built: Box, job: str) -> CompletedProcess[str]:
    return built.train("--step", "all", "--job", job)


def own(output: str) -> list[str]:
    """What the run printed, without the lines of the build before it."""
    return [line for line in output.splitlines() if not re.match(r"#\d+ |#\d+$|$", line)]


def test_the_build_found_nothing_wrong(built: Box) -> None:
    log = (built.checkout.parent / "build.log").read_text()
    operators = (
        f"operators for {built.variables['CUDA_ARCHS']}"
        if built.variables.get("CUDA_ARCHS")
        else "operators for no card"
    )
    assert re.search(rf"\d+ packages as locked; {operators}", log)
    check = [
        line for line in log.splitlines() if re.match(r"#\d+ [\d.]+ .*(WARNING|ERROR)", line) and "check_image" in line
    ]
    assert check == []
    if not built.variables.get("CUDA_ARCHS"):
        print("DeepSpeed's operators were not compiled: nvcc 11.8 could not be had")


def test_all_three_steps(trained: CompletedProcess[str], built: Box) -> None:
    run = built.checkout / "runs/tiny"
    assert [line for line in own(trained.stdout) if line.startswith("total ")]
    for step in (1, 2, 3):
        assert (run / f"step{step}/model/model.safetensors").stat().st_size > 10_000
    versions = (run / "train.log").read_text()
    assert "DeepSpeed info: version=0.15.4" in versions


def test_everything_belongs_to_the_caller_and_nobody_was_root(trained: CompletedProcess[str], built: Box) -> None:
    made = [path for top in ("runs", "cache") for path in (built.checkout / top).rglob("*")]
    assert len(made) > 30
    assert {(path.lstat().st_uid, path.lstat().st_gid) for path in made} == {(built.uid, built.uid)}
    script = "id -u; id -g; whoami 2>/dev/null || echo nobody; echo $HOME; touch $HOME/x && echo home"
    done = built.compose("run", "--rm", "--entrypoint", "sh", "train", "-c", script)
    assert own(done.stdout)[-5:] == [str(built.uid), str(built.uid), "nobody", "/home/rlhf", "home"]


def test_in_the_evening_it_resumes(trained: CompletedProcess[str], built: Box, job: str) -> None:
    output = own(built.train("--step", "all", "--job", job).stdout)
    assert [line for line in output if "is complete" in line] == [
        f"step {n} ({name}) is complete: runs/tiny/step{n}/model"
        for n, name in ((1, "supervised fine-tuning"), (2, "reward model"), (3, "PPO"))
    ]


def test_nothing_was_compiled_at_start(trained: CompletedProcess[str], built: Box) -> None:
    log = (built.checkout / "runs/tiny/train.log").read_text()
    assert "ninja" not in log.lower() and "JIT" not in log and "nvcc" not in log
    assert not list((built.checkout / "cache").rglob("*.so"))


def test_the_log_has_no_warning_and_no_error(trained: CompletedProcess[str], built: Box) -> None:
    log = (built.checkout / "runs/tiny/train.log").read_text().splitlines()
    assert [line for line in log if re.search(r"\b(WARNING|ERROR)\b|Traceback", line)] == []


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["--step", "4"], 2, "error: --step 4 is not a step"),
        (["--job", "tiny", "--set", "sft.epochz=1"], 2, "sft.epochz: unknown field"),
        (["--job", "tiny", "--run", "on-a-gpu", "--set", "hardware.device=cuda"], 3, "GPU"),
        (["--job", "no-such-job"], 2, "error: there is no job `no-such-job`"),
    ],
)
def test_exit_codes(built: Box, job: str, arguments: list[str], code: int, said: str) -> None:
    done = built.train(*arguments, check=False)
    assert done.returncode == code
    assert said in "\n".join(own(done.stdout))


def test_root_is_refused(built: Box) -> None:
    done = built.train("--step", "1", check=False, RLHF_UID="0", RLHF_GID="0")
    assert done.returncode == 3
    assert "error: this container runs as root, and would leave files of root in your folders" in done.stdout
    assert "make .env" in done.stdout


def test_a_folder_of_somebody_else_is_refused_with_the_fix(built: Box, job: str) -> None:
    if os.getuid() != 0:
        pytest.skip("needs root, to give a folder away")
    other = built.checkout / "elsewhere"
    other.mkdir()
    os.chown(other, 4321, 4321)
    other.chmod(0o755)
    done = built.train("--step", "1", "--job", job, check=False, RLHF_RUNS=str(other))
    assert done.returncode == 3
    what = f"{other} belongs to uid 4321, and this container runs as uid {built.uid}, which cannot write there"
    assert what in done.stdout
    assert f"else sudo chown -R {built.uid}:{built.uid} {other}" in done.stdout
    assert not list(other.iterdir())


def test_a_folder_that_is_not_there_is_not_made_for_root(built: Box) -> None:
    missing = built.checkout / "missing"
    done = built.train("--step", "1", check=False, RLHF_RUNS=str(missing))
    assert done.returncode != 0
    assert str(missing) in own(done.stdout)[-1]
    assert not missing.exists()


def test_a_second_is_told_and_docker_stop_ends_the_first_after_a_checkpoint(built: Box, job: str) -> None:
    """75: preempted, the same command resumes."""
    endless = ["--run", "stopped", "--job", job, "--set", "sft.epochs=999", "--set", "sft.max_updates=100000"]
    started = built.compose("run", "--detach", "--name", "rlhf-box-stopped", "train", *endless)
    assert started.returncode == 0
    try:
        events = built.checkout / "runs/stopped/events.jsonl"
        wait_for(
            lambda: events.exists() and '"kind":"metrics"' in events.read_text().replace(" ", ""),
            "the first update",
            built,
        )
        busy = built.train(*endless, check=False)
        begun = time.monotonic()
        built.docker("stop", "rlhf-box-stopped")
        assert time.monotonic() - begun < 60  # of two minutes of grace: nobody had to be killed
        code = built.docker("inspect", "--format", "{{.State.ExitCode}}", "rlhf-box-stopped").stdout.strip()
        output = built.docker("logs", "rlhf-box-stopped").stdout
    finally:
        built.docker("rm", "--force", "rlhf-box-stopped")
    assert busy.returncode == 5  # two containers in one run: a lock in the folder that both mount
    assert "is being trained by another process" in busy.stdout
    assert code == "75"
    (saved,) = [event for event in map(json.loads, events.read_text().splitlines()) if event["kind"] == "checkpoint"]
    assert f"stopped: the same command resumes in runs/stopped, from update {saved['update']} of step 1" in output
    assert (built.checkout / saved["path"] / "complete.json").exists()


def wait_for(condition: Callable[[], bool], what: str, box: Box, timeout_s: float = 120) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, (
            f"{what} did not come: {box.docker('logs', 'rlhf-box-stopped', check=False).stdout[-3000:]}"
        )
        time.sleep(0.2)


def test_an_edit_is_not_stale(built: Box, job: str) -> None:
    """A job file is mounted; a module is built in, by `run` itself."""
    file = built.checkout / "jobs/tiny.yaml"
    fields = yaml.safe_load(file.read_text())
    (built.checkout / "jobs/edited.yaml").write_text(yaml.safe_dump(fields | {"name": "edited-name"}))
    assert "name: edited-name" in built.train("--job", "edited", "--dry-run", "--verbose").stdout
    module = built.checkout / "rlhf_train/plan/estimate.py"
    module.write_text(module.read_text() + '\nprint("edited just now")\n')
    begun = time.monotonic()
    done = built.train("--job", "edited", "--dry-run")
    print(f"a changed module: {time.monotonic() - begun:.1f} s to the end of a dry run")
    assert "edited just now" in own(done.stdout)


# --- secrets, the hub ---


@pytest.fixture(scope="module")
def hub(built: Box, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    """A gated model and an open data set, on loopback."""
    from transformers import OPTConfig, OPTForCausalLM

    from rlhf_train.models.networks import train_tokenizer

    root = tmp_path_factory.mktemp("hub")
    tokenizer = train_tokenizer(tiny.WORDS, 320)
    tokenizer.save_pretrained(root / "models/some/gated")
    config = root / "models/some/gated/tokenizer_config.json"  # as transformers 4 writes it, which the image has
    config.write_text(json.dumps(json.loads(config.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}))
    opt = {key: value for key, value in tiny.OPT.items() if key != "model_type"}
    OPTForCausalLM(OPTConfig(vocab_size=len(tokenizer), **opt)).save_pretrained(root / "models/some/gated")
    (root / "datasets/some").mkdir(parents=True)
    tiny.write_rows(root / "datasets/some/rows")
    with Hub(root, gated=["some/gated"]) as hub:
        yield hub


@pytest.fixture(scope="module")
def with_secret(built: Box, hub: Hub, job: str) -> Iterator[CompletedProcess[str]]:
    """Step 1 on two ranks, on what only the hub has and only the token opens.

    The container stays, to be looked at.
    """
    override = built.checkout / "host-network.yml"
    override.write_text("services: {train: {network_mode: host}}\n")
    secret = built.checkout / "secrets/HF_TOKEN"
    secret.write_text(TOKEN + "\n")
    secret.chmod(0o400)
    if os.getuid() == 0:
        os.chown(secret, built.uid, built.uid)
    files = ["-f", "docker-compose.yml", "-f", "docker/compose.cpu.yml", "-f", override.name]
    settings = [
        "actor.model=some/gated",
        "data.datasets=[some/rows]",
        "hardware.ranks=2",
        "hardware.micro_batch=2",
        "run",
    ]
    command = [word for setting in settings[:-1] for word in ("--set", setting)]
    yield built.compose(
        *files, "run", "--name", "rlhf-box-secret", "train", "--job", job, "--run", "from-hub", "--step", "1", *command,
        check=False, HF_ENDPOINT=hub.url,
    )  # fmt: skip
    built.docker("rm", "--force", "rlhf-box-secret", check=False)
    secret.unlink()


def test_the_token_and_the_mirror_reach_every_rank(with_secret: CompletedProcess[str], built: Box, hub: Hub) -> None:
    assert with_secret.returncode == 0, with_secret.stdout[-3000:]
    assert (built.checkout / "runs/from-hub/step1/model/model.safetensors").exists()
    assert any(line.startswith("GET /some/gated/resolve/") and line.endswith(" 200") for line in hub.requests)
    assert any("/datasets/some/rows/" in line for line in hub.requests)
    # A rank that asked another hub would have used what the other rank had put into the cache.
    log = (built.checkout / "runs/from-hub/train.log").read_text()
    assert "is taken from the cache" not in with_secret.stdout + log


def test_the_token_is_nowhere_to_be_seen(with_secret: CompletedProcess[str], built: Box) -> None:
    image = "rlhf-box:tests"
    seen = {
        "output": with_secret.stdout,
        "logs": built.docker("logs", "rlhf-box-secret").stdout,
        "inspect": built.docker("inspect", "rlhf-box-secret").stdout + built.docker("inspect", image).stdout,
        "history": built.docker("history", "--no-trunc", image).stdout,
    }
    for top in ("runs", "cache"):
        for path in (built.checkout / top).rglob("*"):
            if path.is_file():
                seen[str(path)] = path.read_bytes().decode("latin-1")
    assert [where for where, text in seen.items() if TOKEN in text] == []
    assert "/run/secrets" in seen["inspect"]  # and it was looked at


def test_a_missing_token_is_said(built: Box, hub: Hub, job: str) -> None:
    files = ["-f", "docker-compose.yml", "-f", "docker/compose.cpu.yml", "-f", "host-network.yml"]
    (built.checkout / "host-network.yml").write_text("services: {train: {network_mode: host}}\n")
    done = built.compose(
        *files, "run", "--rm", "train", "--job", job, "--run", "no-token", "--step", "1",
        "--set", "actor.model=some/gated", check=False, HF_ENDPOINT=hub.url,
        RLHF_CACHE=str(empty_folder(built, "cache-2")), RLHF_SECRETS=str(empty_folder(built, "secrets-2")),
    )  # fmt: skip
    assert done.returncode == 2
    assert "HF_TOKEN" in "\n".join(own(done.stdout)[-6:])


def empty_folder(box: Box, name: str) -> Path:
    folder = box.checkout / name
    folder.mkdir(exist_ok=True)
    if os.getuid() == 0:
        os.chown(folder, box.uid, box.uid)
    return folder


def test_secrets_of_the_build_are_in_no_layer(built: Box) -> None:
    """All layers, each with what a later one hides."""
    inspect = "{{.GraphDriver.Name}} {{.GraphDriver.Data.UpperDir}}:{{.GraphDriver.Data.LowerDir}}"
    driver, _, folders = built.docker("inspect", "--format", inspect, "rlhf-box:tests").stdout.strip().partition(" ")
    look = ["grep", "--recursive", "--text", "--fixed-strings", "-e", MARKER, "-e", TOKEN]
    if driver == "overlay2" and os.getuid() == 0:  # quicker than to pack them as they would travel
        layers = folders.split(":")
        assert len(layers) > 5 and all(Path(layer).is_dir() for layer in layers)
        found = subprocess.run([*look, "--files-with-matches", *layers], capture_output=True, text=True, check=False)
        assert (found.returncode, found.stdout) == (1, ""), found
    else:
        search = f"docker save rlhf-box:tests | grep -a -c -e '{MARKER}' -e '{TOKEN}' || true"
        found = subprocess.run(
            ["sh", "-c", search], env=dict(built.docker.environment), capture_output=True, text=True, check=True
        )
        assert found.stdout.strip() == "0", found.stderr
    assert MARKER in Path(built.variables["CA_BUNDLE"]).read_text()
    history = built.docker("history", "--no-trunc", "rlhf-box:tests").stdout
    assert built.variables["CA_BUNDLE"] not in history


def test_layers_hold_no_caches_and_no_compiler(built: Box) -> None:
    look = "find /root/.cache /var/lib/apt/lists /var/cache/apt /build -type f 2>/dev/null; "
    look += "find / -xdev -name '*.deb' -o -xdev -name nvcc; which g++ gcc; true"
    output = built.docker("run", "--rm", "--user=0", "--entrypoint=sh", "rlhf-box:tests", "-c", look).stdout
    assert [line for line in output.splitlines() if not line.endswith("/lock")] == []


def test_byte_code_is_in_the_image(built: Box) -> None:
    """Nobody can write it later, and compiling PyTorch and transformers takes seconds."""
    count = "find /opt/venv/lib/python3.10/site-packages/torch -name '*.pyc' | wc -l"
    output = built.docker("run", "--rm", "--user=1000", "--entrypoint=sh", "rlhf-box:tests", "-c", count).stdout
    assert int(output) > 1000


def test_the_mirror_is_there_when_a_job_runs(built: Box) -> None:
    def endpoint(**variables: str) -> str:
        return own(
            built.compose("run", "--rm", "--entrypoint", "sh", "train", "-c", "echo $HF_ENDPOINT", **variables).stdout
        )[-1]

    assert endpoint() == "http://hub.of.the.tests.invalid"
    assert endpoint(HF_ENDPOINT="http://mine") == "http://mine"
