"""One laptop, one box of each sort, one long line for all the tests here.

Nothing of it is on this machine when they are over.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tests import tiny
from tests.docker import images
from tests.docker.engine import Docker
from tests.integration.remote import rig
from tests.integration.remote.far_line import FarLine
from tests.integration.remote.rig import BareBox, DockerBox, Laptop, Network


@pytest.fixture(scope="session")
def rig_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("rig")


@pytest.fixture(scope="session")
def laptop(rig_folder: Path, sshd_program: str) -> Laptop:
    """With ssh and rsync."""
    (rig_folder / "laptop").mkdir()
    return Laptop.make(rig_folder / "laptop")


@pytest.fixture(scope="session")
def network(docker: Docker) -> Iterator[Network]:
    if os.getuid() != 0 or not shutil.which("ip"):
        pytest.skip("only root reaches into containers, and cuts lines")
    with rig.network(docker) as network:
        yield network


@pytest.fixture(scope="session")
def docker_box(
    built: images.Box, network: Network, laptop: Laptop, rig_folder: Path, sshd_program: str
) -> Iterator[DockerBox]:
    """Not yet deployed to; the image's layers are there."""
    build = {
        name: built.variables[name]
        for name in ("BASE_IMAGE", "BUILD_IMAGE", "TORCH", "CUDA_ARCHS", "CA_BUNDLE")
        if name in built.variables
    }
    addresses = [str(network.address(1)), "127.0.0.1"]
    with rig.docker_box(built.docker, sshd_program, rig_folder / "docker-box", laptop, build, addresses) as box:
        laptop.add(box.name, box.entry)
        yield box


@pytest.fixture(scope="session")
def bare_box(box: images.Box, network: Network, laptop: Laptop, rig_folder: Path) -> Iterator[BareBox]:
    """Not yet deployed to."""
    if "BASE_IMAGE" not in box.variables:
        pytest.skip("needs a BASE_IMAGE with Debian and Python 3.10 that is on this machine")
    base, trusted = box.variables["BASE_IMAGE"], Path(box.variables["CA_BUNDLE"])
    with rig.bare_box(box.docker, rig_folder / "bare-box", laptop, base, network, trusted) as bare:
        laptop.add(bare.name, bare.entry)
        yield bare


@pytest.fixture(scope="session")
def deployed(bare_box: BareBox, laptop: Laptop) -> BareBox:
    """The bare box, ready to run: about two minutes, most of them pip's."""
    laptop.fab("deploy", "--host", bare_box.name, timeout_s=900)
    return bare_box


@pytest.fixture(autouse=True)
def _leaves_no_job(request: pytest.FixtureRequest, laptop: Laptop) -> Iterator[None]:
    """A test that fails takes none of the next ones with it."""
    yield
    if "running" not in request.fixturenames and "deployed" in request.fixturenames:
        box = request.getfixturevalue("deployed")
        if box.exists("slot/run"):
            laptop.fab("cancel", "--host", box.name, "--run", box.read("slot/run").strip(), code=None)


@pytest.fixture(scope="session")
def line(network: Network) -> Iterator[FarLine]:
    with rig.line_through(network) as line:
        yield line


@pytest.fixture(scope="session")
def job(laptop: Laptop) -> Path:
    """A job file with rows of its own, which are not in the checkout: three steps in seconds."""
    rows = tiny.write_rows(laptop.folder / "rows")
    file = laptop.folder / "tiny.yaml"
    file.write_text(yaml.safe_dump(tiny.job(rows)), encoding="utf-8")
    return file


@pytest.fixture(scope="session")
def long_job(laptop: Laptop, job: Path) -> Path:
    """Make a job whose step 2 would take hours.

    Step 1 is quick, with a model of some megabytes, so that sending it takes a moment.
    """
    fields = yaml.safe_load(job.read_text())
    fields["name"] = "long"
    fields["actor"]["model"]["config"] |= {"hidden_size": 384, "word_embed_proj_dim": 384, "ffn_dim": 1024}
    fields["critic"] = {"model": {"config": tiny.OPT}}
    fields["reward"] |= {"max_updates": 1_000_000, "epochs": 100_000}
    fields["checkpoint"] = {"every_updates": 100}
    file = laptop.folder / "long.yaml"
    file.write_text(yaml.safe_dump(fields), encoding="utf-8")
    return file
