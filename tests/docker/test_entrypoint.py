"""Test docker/entrypoint and docker/dotenv.sh without an engine.

The tests see what they refuse and write, in a copy with other folders.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from pathlib import Path

import pytest

DOCKER = Path(__file__).parents[2] / "docker"
NOBODY = 65534


@pytest.fixture
def entrypoint(tmp_path: Path) -> Path:
    """The script, with the secrets in `tmp_path`/secrets and without the CUDA environment."""
    script = tmp_path / "entrypoint"
    text = (DOCKER / "entrypoint").read_text(encoding="utf-8")
    assert "secrets=/run/secrets\n" in text and ". /app/env/cuda.sh\n" in text
    for path, folder in {"/run/secrets": "secrets", "/app/runs": "app-runs", "/cache": "app-cache"}.items():
        text = text.replace(path, str(tmp_path / folder))
    shutil.copy(DOCKER.parent / "env/secrets.sh", tmp_path / "secrets.sh")
    text = text.replace(". /app/env/cuda.sh", "true").replace("/app/env/secrets.sh", str(tmp_path / "secrets.sh"))
    script.write_text(text, encoding="utf-8")
    script.chmod(0o755)
    for folder in [tmp_path, *list(tmp_path.parents)[:3]]:
        if folder != Path("/tmp") and os.getuid() == 0:
            folder.chmod(0o755)
    return script


def start(script: Path, *command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    user = NOBODY if os.getuid() == 0 else None
    environment = {"PATH": "/usr/bin:/bin", **environment}
    return subprocess.run(
        ["/bin/sh", str(script), *command], user=user, env=environment, capture_output=True, text=True, check=False
    )


def secret(folder: Path, name: str, value: str, mode: int = 0o400) -> None:
    (folder / "secrets").mkdir(mode=0o700, exist_ok=True)
    (folder / "secrets" / name).write_text(value)
    (folder / "secrets" / name).chmod(mode)
    if os.getuid() == 0:
        for path in (folder / "secrets", folder / "secrets" / name):
            os.chown(path, NOBODY, NOBODY)


def test_secrets_are_for_the_process_and_the_values_are_whole(entrypoint: Path, tmp_path: Path) -> None:
    secret(tmp_path, "HF_TOKEN", "hf_'a b$(c)\"\n")
    secret(tmp_path, "ca_bundle.pem", "certificate")
    done = start(entrypoint, "env")
    assert done.returncode == 0, done.stderr
    assert "HF_TOKEN=hf_'a b$(c)\"" in done.stdout.splitlines()
    assert f"REQUESTS_CA_BUNDLE={tmp_path}/secrets/ca_bundle.pem" in done.stdout.splitlines()
    assert done.stderr == ""


def test_a_stop_before_training_begins_is_a_preemption(entrypoint: Path, tmp_path: Path) -> None:
    """`docker stop` in the first moments, when the script itself gets SIGTERM."""
    text = entrypoint.read_text(encoding="utf-8")
    assert text.count("\ntrue\n") == 1  # where the CUDA environment is read
    begun = tmp_path / "begun"
    entrypoint.write_text(text.replace("\ntrue\n", f"\n: >'{begun}'; sleep 1\n"), encoding="utf-8")
    tmp_path.chmod(0o777)
    user = NOBODY if os.getuid() == 0 else None
    stopped = subprocess.Popen(["/bin/sh", entrypoint, "true"], user=user, env={"PATH": "/usr/bin:/bin"})
    deadline = time.monotonic() + 60
    while not begun.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    stopped.terminate()
    assert stopped.wait(60) == 75


def test_no_secrets_are_fine(entrypoint: Path, tmp_path: Path) -> None:
    assert start(entrypoint, "echo", "here").stdout == "here\n"
    secret(tmp_path, "gone", "")
    (tmp_path / "secrets/gone").unlink()
    assert start(entrypoint, "echo", "here").stdout == "here\n"


@pytest.mark.parametrize(
    ("name", "mode", "said"),
    [
        ("hf-token", 0o400, "error: the secret `hf-token` does not name a variable"),
        ("HF_TOKEN", 0o000, f"error: the secret `HF_TOKEN` cannot be read by uid {NOBODY}"),
    ],
)
def test_a_secret_that_cannot_be_used_is_named_and_not_shown(
    entrypoint: Path, tmp_path: Path, name: str, mode: int, said: str
) -> None:
    if os.getuid() != 0:
        pytest.skip("needs root, to start as another user")
    secret(tmp_path, name, "hf_secret_value", mode)
    done = start(entrypoint, "env")
    assert done.returncode == 3
    assert done.stderr.splitlines()[0] == said
    assert "hf_secret_value" not in done.stdout + done.stderr


@pytest.mark.parametrize(
    ("folder", "host"),
    [("app-runs", "'/data/my runs'"), ("app-cache", "cache"), ("app-cache/huggingface", "cache/huggingface")],
)
def test_a_folder_of_somebody_else_is_named_as_on_the_host(
    entrypoint: Path, tmp_path: Path, folder: str, host: str
) -> None:
    if os.getuid() != 0:
        pytest.skip("needs root, to start as another user")
    (tmp_path / folder).mkdir(parents=True)
    if folder.count("/"):
        os.chown((tmp_path / folder).parent, NOBODY, NOBODY)
    done = start(entrypoint, "env", RLHF_HOST_RUNS="/data/my runs")
    assert done.returncode == 3
    assert done.stderr.splitlines() == [
        f"error: {host} belongs to uid 0, and this container runs as uid {NOBODY}, which cannot write there",
        "",
        f"hint: on the host: `rm .env; make .env` if you are that user; else sudo chown -R {NOBODY}:0 {host}",
    ]


def test_a_folder_among_the_secrets_is_named(entrypoint: Path, tmp_path: Path) -> None:
    secret(tmp_path, "HF_TOKEN", "x")
    (tmp_path / "secrets/OTHER").mkdir()
    done = start(entrypoint, "env")
    assert done.returncode == 3
    assert "the secret `OTHER` is not a file" in done.stderr


def test_the_command_takes_the_place_of_the_script(entrypoint: Path) -> None:
    """So that a signal reaches it, and its exit code is the container's."""
    done = start(entrypoint, "sh", "-c", "tr '\\0' ' ' </proc/$$/cmdline; exit 75")
    assert done.returncode == 75
    assert done.stdout.startswith("sh -c")


def test_root_is_refused(entrypoint: Path) -> None:
    if os.getuid() != 0:
        pytest.skip("needs root, to be refused")
    done = subprocess.run(["/bin/sh", str(entrypoint), "env"], capture_output=True, text=True, check=False)
    assert done.returncode == 3
    assert "error: this container runs as root" in done.stderr


# --- .env ---


@pytest.mark.parametrize(
    ("sudo", "uid"), [({}, 1000), ({"SUDO_UID": "1234", "SUDO_GID": "1234"}, 1234), ({"SUDO_UID": "0"}, 1000)]
)
def test_the_env_file_never_says_root(tmp_path: Path, sudo: dict[str, str], uid: int) -> None:
    if os.getuid() != 0:
        pytest.skip("needs root: others are themselves")
    for folder in ("docker", "jobs"):
        (tmp_path / folder).mkdir()
    shutil.copy(DOCKER / "dotenv.sh", tmp_path / "docker/dotenv.sh")
    subprocess.run(
        ["sh", "docker/dotenv.sh"], cwd=tmp_path, env={"PATH": "/usr/bin:/bin", **sudo}, check=True, capture_output=True
    )
    lines = (tmp_path / ".env").read_text().splitlines()
    assert f"RLHF_UID={uid}" in lines and f"RLHF_GID={uid}" in lines
    for folder in ("data", "runs", "cache", "secrets"):
        assert (tmp_path / folder).stat().st_uid == uid
    assert (tmp_path / "secrets").stat().st_mode & 0o777 == 0o700
    has_driver = Path("/proc/driver/nvidia/version").exists() or shutil.which("nvidia-smi", path="/usr/bin:/bin")
    assert ("COMPOSE_FILE=docker-compose.yml:docker/compose.cpu.yml" in lines) == (not has_driver)
