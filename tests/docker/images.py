"""The engine, and the image, for all tests that need them: made once a session. tests/conftest.py
makes them fixtures.
"""

from __future__ import annotations

import os
import shutil
import ssl
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from subprocess import CompletedProcess

import pytest
import yaml

from env.settings import Settings
from tests import tiny
from tests.docker import engine
from tests.docker.engine import Docker

CHECKOUT = Path(__file__).parents[2]
MARKER = "a line of the secret of the build, which no layer may hold"
# A mirror of one's own: a hub that nobody can reach, and everything else as it is by default.
MIRROR = (
    "HF_ENDPOINT=${HF_ENDPOINT:-http://hub.of.the.tests.invalid}\nPYTORCH_WHEELS=https://download.pytorch.org/whl\n"
)
# Where marked tests are, and those that are not for images: the laptop's half is in none, and some
# data lies next to the checkout.
PLACES_IN_IMAGES = ("jobs", "rlhf_train", "integration")
NOT_IN_IMAGES = ("integration/remote/", "test_real_preference_data")
LEFT_TO_IMAGES = pytest.StashKey[int]()  # how many tests tests/conftest.py has left to them


@pytest.fixture(scope="session")
def docker(request: pytest.FixtureRequest) -> Iterator[Docker]:
    ci = Settings.from_environ(os.environ).ci
    if not ci and "docker" not in request.config.option.markexpr:
        pytest.skip("builds an image of some GB: make test PYTEST_ARGS='-m docker'")
    why_not = Docker().answers()
    if not why_not:
        yield Docker()
    elif not ci:
        pytest.skip(f"needs Docker with Compose: {why_not}")
    elif os.getuid() != 0 or not shutil.which("apt-get"):
        pytest.fail(f"no Docker engine answers ({why_not}), and only root on Debian can install one")
    else:
        with engine.installed_engine() as docker:
            yield docker


@dataclass(frozen=True)
class Box:
    """A checkout in which `docker compose` is called as docs/container.md says."""

    docker: Docker
    checkout: Path
    variables: Mapping[str, str]
    uid: int

    def compose(
        self, *arguments: str, check: bool = True, timeout_s: float = 600, **variables: str
    ) -> CompletedProcess[str]:
        return self.docker(
            "compose",
            *arguments,
            cwd=self.checkout,
            check=check,
            timeout_s=timeout_s,
            **{**self.variables, **variables},
        )

    def train(
        self, *arguments: str, options: tuple[str, ...] = (), check: bool = True, **variables: str
    ) -> CompletedProcess[str]:
        return self.compose(
            "--progress", "plain", "run", "--rm", *options, "train", *arguments, check=check, **variables
        )

    def put_job(self, name: str) -> str:
        """Put a job that trains in seconds where a user puts his: in ./jobs, its rows in ./data."""
        rows = tiny.write_rows(self.checkout / f"data/{name}-rows")
        fields = tiny.job(rows) | {"name": name}
        fields["data"]["datasets"] = [str(rows.relative_to(self.checkout))]
        (self.checkout / f"jobs/{name}.yaml").write_text(yaml.safe_dump(fields))
        return name


@pytest.fixture(scope="session")
def box(docker: Docker, tmp_path_factory: pytest.TempPathFactory) -> Box:
    """Not yet built, with `.env`.

    BASE_IMAGE, BUILD_IMAGE and TORCH of the environment are taken if they are there.
    """
    checkout = tmp_path_factory.mktemp("docker") / "rlhf-box"
    uid = os.getuid() or 1000
    engine.copy_checkout(CHECKOUT, checkout, uid)
    variables = {"RLHF_TAG": "tests"} | {
        name: os.environ[name] for name in ("BASE_IMAGE", "BUILD_IMAGE", "TORCH", "CUDA_ARCHS") if name in os.environ
    }
    if not os.environ.get("BASE_IMAGE") and Settings.from_environ(os.environ).ci:
        base = engine.make_base(docker)
        build = engine.make_build(docker, base)
        variables |= {
            "BASE_IMAGE": base,
            "BUILD_IMAGE": build or base,
            "TORCH": "torch-ci",
            "CUDA_ARCHS": "8.6" if build else "",
        }
    # What this machine trusts, which may be a proxy that looks into TLS, and a line that is found
    # again if it stays in a layer.
    bundle = next(
        (os.environ[name] for name in ("PIP_CERT", "SSL_CERT_FILE", "REQUESTS_CA_BUNDLE") if os.environ.get(name)), None
    )
    trusted = Path(bundle or ssl.get_default_verify_paths().cafile or os.devnull).read_text()
    (checkout.parent / "ca.pem").write_text(f"# {MARKER}\n{trusted}")
    (checkout / "env/mirrors/tests.env").write_text(MIRROR)
    variables |= {"CA_BUNDLE": str(checkout.parent / "ca.pem"), "MIRROR": "tests"}
    engine.shell("make", ".env", cwd=checkout)
    return Box(docker, checkout, variables, uid)


@pytest.fixture(scope="session")
def built(box: Box) -> Box:
    """With the image, by the command of docs/container.md; the log is next to the checkout."""
    done = box.compose("--progress", "plain", "build", timeout_s=5400)
    (box.checkout.parent / "build.log").write_text(done.stdout)
    return box


@pytest.fixture(scope="session")
def modern(built: Box) -> Box:
    """The same checkout, with the image of flavour cu130. Its PyTorch is the package index's."""
    variables = {**built.variables, "FLAVOUR": "cu130", "RLHF_TAG": "tests-cu130", "TORCH": "torch-cu130"}
    variables["CUDA_ARCHS"] = "default"
    if "BASE_IMAGE" in built.variables:
        variables |= {"BUILD_IMAGE": built.variables["BASE_IMAGE"]}
    box = replace(built, variables=variables)
    done = box.compose("--progress", "plain", "build", timeout_s=5400)
    (box.checkout.parent / "build-cu130.log").write_text(done.stdout)
    return box
