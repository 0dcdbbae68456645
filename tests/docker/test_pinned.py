"""The tests that are marked for it, inside the image, on its exact lock."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess
from xml.etree import ElementTree

import pytest

from rlhf_train.ranks.collectives import World
from tests import stacks
from tests.docker.images import NOT_IN_IMAGES, PLACES_IN_IMAGES, Box

pytestmark = pytest.mark.docker

InImage = Callable[..., CompletedProcess[str]]


def results(done: CompletedProcess[str]) -> dict[str, int]:
    """pytest's own counts, from the report that it prints last."""
    assert "<testsuites" in done.stdout, done.stdout[-3000:]
    suite = ElementTree.fromstring(done.stdout[done.stdout.rindex("<?xml") :].strip()).find("testsuite")
    assert suite is not None
    return {name: int(suite.attrib[name]) for name in ("tests", "failures", "errors", "skipped")}


def pytest_in(
    in_image: InImage,
    marker: str,
    environment: dict[str, str],
    options: tuple[str, ...] = (),
) -> CompletedProcess[str]:
    script = (
        "import pytest, sys; code = pytest.main(sys.argv[1:]); print(open('/tmp/report.xml').read()); sys.exit(code)"
    )
    arguments = [
        "-q",
        "-m",
        marker,
        "-p",
        "no:cacheprovider",
        "--basetemp=/tmp/pytest",
        "--junit-xml=/tmp/report.xml",
        *(f"--ignore=tests/{name}" for name in NOT_IN_IMAGES if name.endswith("/")),
        *("-k", " and ".join(f"not {name}" for name in NOT_IN_IMAGES if not name.endswith("/"))),
        *(f"tests/{place}" for place in PLACES_IN_IMAGES),
    ]
    return in_image("-c", script, *arguments, environment=environment, options=options)


@pytest.fixture(scope="module")
def exchange(built: Box, tmp_path_factory: pytest.TempPathFactory, _only_rank: World) -> Path:
    """A folder with the models that today's stack saves, and one for those of the image."""
    folder = tmp_path_factory.mktemp("exchange")
    for name in ("outside", "image"):
        (folder / name).mkdir()
    stacks.save_all(_only_rank, folder / "outside")
    os.chown(folder / "image", built.uid, built.uid)
    for file in folder.rglob("*.safetensors"):  # made for us alone, and the image's user is another
        file.chmod(0o644)
    return folder


@pytest.fixture(scope="module")
def without_a_shim(in_image: InImage, exchange: Path) -> CompletedProcess[str]:
    """What is marked `pinned`, run in the image. See tests/integration/test_stacks.py."""
    mounts = (f"--volume={exchange}/outside:/stacks/outside:ro", f"--volume={exchange}/image:/stacks/image")
    return pytest_in(in_image, "pinned", {"STACKS": "/stacks"}, mounts)


def test_without_a_shim(without_a_shim: CompletedProcess[str]) -> None:
    """Run what needs no shim on the pinned stack.

    That is SFT, reward model and PPO in float32 at ZeRO 0 on one rank and two; LoRA; export; the
    hub; the versions; the models that today's stack saved.
    """
    done, counts = without_a_shim, results(without_a_shim)
    print(f"pinned stack, no shim: {counts}")
    assert done.returncode == 0, done.stdout[-6000:]
    assert counts["failures"] == counts["errors"] == counts["skipped"] == 0
    assert counts["tests"] > 400


@pytest.mark.parametrize("name", stacks.NAMES)
def test_a_model_of_the_image_is_the_same_outside(
    without_a_shim: CompletedProcess[str], exchange: Path, name: str
) -> None:
    image = exchange / "image"
    assert (image / name / "expected.json").exists(), without_a_shim.stdout[-3000:]
    assert stacks.differences(stacks.what_it_is(image / name), stacks.described(image / name)) == []
    if name in stacks.SIZES:
        source = image / f"{name}-source"
        assert stacks.differences(stacks.loaded_by_us(source), stacks.described(source)) == []


def test_with_a_shim_for_gloo(in_image: InImage) -> None:
    """ZeRO 2 and 3 on two ranks, which PyTorch 2.0's gloo cannot carry by itself."""
    done = pytest_in(in_image, "pinned_gloo", {"PYTHONPATH": "/app:/app/tests/gloo_shim"})
    counts = results(done)
    print(f"pinned stack, gloo shim: {counts}")
    assert done.returncode == 0, done.stdout[-6000:]
    assert counts["failures"] == counts["errors"] == counts["skipped"] == 0
    assert counts["tests"] > 70


def test_the_stack_is_the_one_promised(in_image: InImage) -> None:
    versions = "torch.__version__.split('+')[0], importlib.metadata.version('fsspec'), deepspeed.__version__"
    script = f"import sys, torch, deepspeed, importlib.metadata; print(sys.version_info[:2], {versions})"
    done = in_image("-c", script, environment={"DS_ACCELERATOR": "cpu"})
    assert done.stdout.splitlines()[-1] == "(3, 10) 2.0.1 2023.9.2 0.15.4"


def test_cpu_adam_was_compiled_and_computes_adamw(in_image: InImage, built: Box) -> None:
    """Compare DeepSpeed's operator on this CPU with PyTorch's AdamW over three updates.

    Nothing may be compiled for it.
    """
    script = Path(__file__).with_name("cpu_adam.py").name
    if built.variables.get("CUDA_ARCHS") == "":
        print("DeepSpeed's operators were not compiled: nvcc 11.8 could not be had")
        return
    done = in_image(
        f"/app/tests/docker/{script}", environment={"DS_ACCELERATOR": "cuda", "PATH": "/opt/venv/bin:/usr/bin:/bin"}
    )
    assert done.returncode == 0, done.stdout[-3000:]
    assert done.stdout.splitlines()[-1] == "compiled before, and computes AdamW"
