"""Mistakes that cost no minutes: each is one clear line, before anything is built."""

from __future__ import annotations

import json
import re
import time

import pytest

from tests.docker.images import Box

pytestmark = pytest.mark.docker


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"FLAVOUR": "nope"}, "/nope."),  # of env/flavours, or of env/pins, whichever is looked for first
        ({"MIRROR": "nope"}, "env/mirrors/nope.env"),
        ({"TORCH": "torch-nope"}, "env/pins/torch-nope.txt"),
        ({"BASE_IMAGE": "no.such.registry.invalid/base:1"}, "no.such.registry.invalid"),
        ({"BUILD_IMAGE": "no.such.registry.invalid/build:1"}, "no.such.registry.invalid"),
        ({"CA_BUNDLE": "/no/such/ca.pem"}, "/no/such/ca.pem"),
    ],
)
def test_a_wrong_name_is_named(box: Box, variables: dict[str, str], said: str) -> None:
    done = box.compose("--progress", "plain", "build", check=False, **variables)
    assert done.returncode != 0
    assert said in done.stdout.strip().splitlines()[-1]
    assert "Downloading" not in done.stdout  # nothing that takes minutes had begun


@pytest.mark.parametrize(
    ("what", "dockerfile", "variables", "said"),
    [
        (
            "no apt-get",
            "FROM {base}\nRUN rm /usr/bin/apt-get",
            {},
            "error: BASE_IMAGE is not Debian or Ubuntu (no apt-get): leave BASE_IMAGE out: flavour cu118 has one",
        ),
        (
            "no Python 3.10",
            "FROM {base}\nRUN rm -f /usr/local/bin/python3.10",
            {},
            "error: BASE_IMAGE has no Python 3.10, and is not Ubuntu 22.04",
        ),
        (
            "no nvcc",
            "FROM {base}",
            {"CUDA_ARCHS": "8.6"},
            "error: BUILD_IMAGE has nvcc not at all, and 11.8 compiles DeepSpeed's operators",
        ),
    ],
)
def test_a_wrong_base_is_refused_at_the_first_step(
    box: Box, what: str, dockerfile: str, variables: dict[str, str], said: str
) -> None:
    if "BASE_IMAGE" not in box.variables:
        pytest.skip("needs a BASE_IMAGE that is on this machine")
    wrong = f"rlhf-box-tests/{what.replace(' ', '-').lower().replace('.', '')}"
    box.docker("build", "--tag", wrong, "-", stdin=dockerfile.format(base=box.variables["BASE_IMAGE"]))
    done = box.compose("--progress", "plain", "build", check=False, BASE_IMAGE=wrong, BUILD_IMAGE=wrong, **variables)
    assert done.returncode != 0
    assert said in done.stdout


def test_the_mirror_is_one_word_for_the_build_and_the_run(box: Box) -> None:
    def resolved(**variables: str) -> dict[str, str | None]:
        variables = {"MIRROR": "default", **variables}
        train = json.loads(box.compose("config", "--format", "json", **variables).stdout)["services"]["train"]
        return {**train["environment"], "built with": train["build"]["args"]["MIRROR"]}

    found = resolved(MIRROR="cn")
    assert (found["built with"], found["HF_ENDPOINT"], found["HF_HUB_DISABLE_XET"]) == (
        "cn",
        "https://hf-mirror.com",
        "1",
    )
    found = resolved()
    assert (found["built with"], found["HF_ENDPOINT"]) == ("default", "https://huggingface.co")
    assert resolved(MIRROR="cn", HF_ENDPOINT="http://mine")["HF_ENDPOINT"] == "http://mine"


@pytest.mark.parametrize(
    ("mirror", "variables", "said"),
    [
        (
            "PIP_INDEX_URL=http://127.0.0.1:9/simple",
            {},
            "error: no answer from http://127.0.0.1:9/simple",
        ),
        # Nobody has this address (RFC 5737): packets to it are lost.
        ("PIP_INDEX_URL=http://192.0.2.1/simple", {}, "error: no answer from http://192.0.2.1/simple"),
        ("", {"HTTPS_PROXY": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9"}, "Cannot connect to proxy"),
    ],
)
def test_the_build_asks_the_mirror_and_the_proxy(box: Box, mirror: str, variables: dict[str, str], said: str) -> None:
    """Nothing answers there: the build stops, and names it, before pip's retries are through."""
    if "BASE_IMAGE" not in box.variables:
        pytest.skip("needs a BASE_IMAGE that is on this machine")
    file = box.checkout / "env/mirrors/dead.env"
    # A new file each time, or layers of an earlier run would answer.
    file.write_text(f"HF_ENDPOINT=http://x\nPYTORCH_WHEELS=http://x\nPIP_RETRIES=1\nSTARTED={time.time()}\n{mirror}\n")
    try:
        done = box.compose("--progress", "plain", "build", check=False, MIRROR="dead", **variables)
    finally:
        file.unlink()
    assert done.returncode != 0
    assert said in done.stdout


def test_apt_works_behind_the_secret(box: Box) -> None:
    """CI's base has all that the Dockerfile would install, so this installs another package."""
    if "BASE_IMAGE" not in box.variables:
        pytest.skip("needs a BASE_IMAGE that is on this machine")
    dockerfile = f"""
FROM {box.variables["BASE_IMAGE"]}
ARG MIRROR=tests FLAVOUR=cu118
COPY env/flavours/cu118.env env/mirrors/tests.env docker/install.sh /build/
RUN --mount=type=secret,id=ca_bundle set -eu; . /build/install.sh; apt_install tree; tree --version; \
    ! test -e /tmp/apt.conf
RUN ! sh -c '. /build/install.sh; apt_install no-such-package; echo went on'
"""
    (box.checkout / "apt.Dockerfile").write_text(dockerfile)
    (box.checkout / "apt.Dockerfile.dockerignore").write_text("")
    secret = f"--secret=id=ca_bundle,src={box.variables['CA_BUNDLE']}"
    done = box.docker(
        "build", secret, "--progress=plain", "--no-cache", "--file=apt.Dockerfile", ".", cwd=box.checkout, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:]
    assert "tree v" in done.stdout and "went on" not in re.sub(r"RUN .*", "", done.stdout)


def test_who_has_no_env_file_is_told_before_a_build(box: Box) -> None:
    (box.checkout / ".env").rename(box.checkout / "other.env")
    try:
        done = box.compose("run", "--rm", "train", "--step", "3", check=False)
    finally:
        (box.checkout / "other.env").rename(box.checkout / ".env")
    assert done.returncode != 0
    assert "run `make .env` first (it writes who you are, and chooses the image for a machine" in done.stdout
    assert "#1 " not in done.stdout  # no step of a build
    assert json.loads(box.compose("config", "--format", "json").stdout)["services"]["train"]["user"] == (
        f"{box.uid}:{box.uid}"
    )


def test_what_compose_promises(box: Box) -> None:
    """As `docker compose config` resolves it, for a machine with GPUs."""
    train = json.loads(box.compose("-f", "docker-compose.yml", "config", "--format", "json").stdout)["services"][
        "train"
    ]
    assert train["deploy"]["resources"]["reservations"]["devices"] == [
        {"capabilities": ["gpu"], "driver": "nvidia", "count": -1}
    ]
    assert int(train["shm_size"]) >= 2**30
    assert train["init"] is True
    assert train["pull_policy"] == "build"
    assert train["stop_grace_period"] == "2m0s"
    assert train["ulimits"]["memlock"] == -1
    mounts = {mount["target"]: mount for mount in train["volumes"]}
    assert {target: mount.get("read_only", False) for target, mount in mounts.items()} == {
        "/app/jobs": True, "/app/data": True, "/app/runs": False, "/cache": False, "/run/secrets": True,
    }  # fmt: skip
    assert not any(mount.get("bind", {}).get("create_host_path") for mount in mounts.values())


def test_chat_is_train_but_for_what_a_talk_needs(box: Box) -> None:
    """As `docker compose config` resolves it: the same image, mounts and GPUs, and a terminal."""
    compose = ("-f", "docker-compose.yml", "--profile", "chat", "config", "--format", "json")
    services = json.loads(box.compose(*compose).stdout)["services"]
    changed = {name: value for name, value in services["chat"].items() if services["train"].get(name) != value}
    assert changed == {
        "entrypoint": ["/opt/entrypoint", "python", "-m", "rlhf_train", "chat"],
        "profiles": ["chat"],
        "stdin_open": True,
        "tty": True,
    }
    assert services["train"].keys() <= services["chat"].keys()
    without = json.loads(box.compose("-f", "docker-compose.yml", "config", "--format", "json").stdout)["services"]
    assert [*without] == ["train"]  # `docker compose up` starts neither a chat nor TensorBoard


def test_the_cpu_file_asks_for_no_gpu(box: Box) -> None:
    train = json.loads(
        box.compose("-f", "docker-compose.yml", "-f", "docker/compose.cpu.yml", "config", "--format", "json").stdout
    )["services"]["train"]
    assert "deploy" not in train
    assert train["environment"]["CUDA_VISIBLE_DEVICES"] == ""
