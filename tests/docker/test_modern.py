"""The image of flavour cu130: built, trained in, with the marked tests inside it.

A run may move from one flavour to the other, both ways.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import pytest

from tests.docker.images import LEFT_TO_IMAGES, Box
from tests.docker.test_pinned import pytest_in, results

pytestmark = pytest.mark.docker


@pytest.fixture(scope="module")
def job(modern: Box) -> str:
    return modern.put_job("moves")


@pytest.fixture(scope="module")
def trained(modern: Box, job: str) -> Path:
    modern.train("--step", "all", "--job", job, "--run", "modern")
    return modern.checkout / "runs/modern"


def test_the_build_found_nothing_wrong(modern: Box) -> None:
    """Its build image has no compiler, as with `CUDA_ARCHS=` for the other flavour."""
    log = (modern.checkout.parent / "build-cu130.log").read_text()
    assert re.search(r"\d+ packages as locked; operators for no card", log)
    labels = json.loads(modern.docker("inspect", "--format", "{{json .Config.Labels}}", "rlhf-box:tests-cu130").stdout)
    assert labels["rlhf-box.flavour"] == "cu130" and labels["org.opencontainers.image.title"] == "rlhf-box"


def test_all_three_steps(trained: Path) -> None:
    for step in (1, 2, 3):
        assert (trained / f"step{step}/model/model.safetensors").stat().st_size > 10_000


@pytest.mark.parametrize("begun", ["modern", "built"])
def test_a_run_moves_to_the_other_flavour(trained: Path, request: pytest.FixtureRequest, job: str, begun: str) -> None:
    """Begin steps 1 and 2 with one image; `docker compose run train --step 3` in the other."""
    other = {"modern": "built", "built": "modern"}[begun]
    first, second = (request.getfixturevalue(name) for name in (begun, other))
    if begun == "built":
        first.train("--step", "1", "2", "--job", job, "--run", "from-built")
    source = "modern" if begun == "modern" else "from-built"
    second.train("--step", "3", "--job", job, "--run", f"moved-{begun}", "--from", source)
    assert (trained.parent / f"moved-{begun}/step3/model/model.safetensors").exists()


def test_the_marked_tests(in_modern_image: Callable[..., CompletedProcess[str]], pytestconfig: pytest.Config) -> None:
    """Run all that the other image runs without a shim, and that CI has left to both."""
    done = pytest_in(in_modern_image, "pinned", {})
    counts = results(done)
    print(f"cu130: {counts}")
    assert done.returncode == 0, done.stdout[-6000:]
    assert counts["failures"] == counts["errors"] == counts["skipped"] == 0
    assert counts["tests"] >= max(800, pytestconfig.stash.get(LEFT_TO_IMAGES, 0))


def test_the_stack_is_the_one_promised(in_modern_image: Callable[..., CompletedProcess[str]]) -> None:
    """Triton needs a C compiler and Python's headers when a job runs."""
    script = (
        "import sys, sysconfig, shutil, pathlib, torch, deepspeed, transformers, bitsandbytes; "
        "headers = pathlib.Path(sysconfig.get_path('include'), 'Python.h').exists(); "
        "print(sys.version_info[:2], torch.__version__, torch.version.cuda, deepspeed.__version__, "
        "transformers.__version__, headers, bool(shutil.which('gcc')))"
    )
    done = in_modern_image("-c", script, environment={"DS_ACCELERATOR": "cpu"})
    assert done.stdout.splitlines()[-1].startswith("(3, 12) 2.13.0")
    assert done.stdout.splitlines()[-1].endswith(" 13.0 0.19.8 5.23.0 True True")
