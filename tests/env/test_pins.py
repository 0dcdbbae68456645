"""Test the pins: they have reasons, their locks agree, and one of them avoids a known bug."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from env.settings import Settings

PINS = Path(__file__).parents[2] / "env/pins"
LOCKS = [
    *("cpu.txt", "cu118.txt", "cu118-test.txt", "cu130.txt", "cu130-test.txt", "laptop.txt", "pip.txt"),
    *("torch-ci.txt", "torch-cu130.txt", "uv.txt"),
]


def name(package: str) -> str:
    return re.sub(r"[-_.]+", "-", package).lower()


def requirements(file: str) -> dict[str, str]:
    """name -> version of every exact line."""
    found = re.findall(r"^([A-Za-z0-9_.-]+)==([^\s;\\#]+)", (PINS / file).read_text(encoding="utf-8"), re.MULTILINE)
    return {name(package): version for package, version in found}


@pytest.mark.parametrize("lock", [*LOCKS, "torch-cu118.txt", "torch-cu118-cpu.txt", "torch-cu130-cpu.txt"])
def test_every_line_of_a_lock_has_a_hash(lock: str) -> None:
    text = re.sub(r"^ *#.*\n", "", (PINS / lock).read_text(encoding="utf-8"), flags=re.MULTILINE).replace("\\\n", " ")
    lines = [line for line in text.splitlines() if line.strip()]
    assert lines
    assert [line for line in lines if not re.search(r"--hash=sha256:[0-9a-f]{64}\b", line)] == []


@pytest.mark.parametrize(
    ("written", "lock"),
    [
        ("cpu.in", "cpu.txt"),
        ("cu118.in", "cu118.txt"),
        ("cu118-test.in", "cu118-test.txt"),
        ("cu130.in", "cu130.txt"),
        ("cu130-test.in", "cu130-test.txt"),
        ("torch-ci.in", "torch-ci.txt"),
        ("uv.in", "uv.txt"),
    ],
)
def test_a_lock_has_what_was_written(written: str, lock: str) -> None:
    locked = requirements(lock)
    pinned = {package: version for package, version in requirements(written).items() if package != "torch"}
    assert pinned
    assert {package: locked.get(package) for package in pinned} == pinned


@pytest.mark.parametrize("written", sorted(path.name for path in PINS.glob("*.in")))
def test_a_pin_has_its_reason_and_its_end_on_its_line(written: str) -> None:
    lines = [
        line for line in (PINS / written).read_text(encoding="utf-8").splitlines() if line and not line.startswith("#")
    ]
    assert lines
    assert [line for line in lines if not re.search(r" # .+\b(Raise|Goes|goes|Stays)\b", line)] == []


def test_the_stack_is_the_one_promised() -> None:
    pinned = requirements("cu118.in")
    assert pinned["torch"] == "2.0.1" and pinned["fsspec"] == "2023.9.2"
    assert requirements("torch-cu118.txt") == {"torch": "2.0.1+cu118"}
    assert requirements("torch-ci.txt")["torch"] == "2.0.1"
    assert "torch" not in requirements("cu118.txt")


def test_the_modern_stack_is_the_one_that_the_tests_run_with() -> None:
    """Except where another Python has other versions: cpu.txt has lines for several."""
    text = (PINS / "cpu.txt").read_text(encoding="utf-8")
    tested: dict[str, set[str]] = {}
    for package, version in re.findall(r"^([A-Za-z0-9_.-]+)==([^\s;\\#]+)", text, re.MULTILINE):
        tested.setdefault(name(package), set()).add(version)
    modern = requirements("cu130.txt")
    assert {
        package: version for package, version in modern.items() if version not in tested.get(package, {version})
    } == {}
    assert modern["fsspec"] == requirements("torch-cu130.txt")["fsspec"]
    written = {requirements(file)["torch"] for file in ("cpu.in", "cu130.in", "torch-cu130.in", "torch-cu130.txt")}
    assert written == {"2.13.0"} and requirements("torch-cu130-cpu.txt") == {"torch": "2.13.0+cpu"}


@pytest.mark.parametrize("flavour", sorted(file.stem for file in PINS.parent.glob("flavours/*.env")))
def test_a_flavour_names_what_is_there(flavour: str) -> None:
    text = (PINS.parent / f"flavours/{flavour}.env").read_text(encoding="utf-8")
    settings = dict(re.findall(r"^([A-Z_]+)=(.*)$", text, re.MULTILINE))
    assert set(settings) == {"PYTHON", "CUDA", "UBUNTU", "CUDA_ARCHS", "WHEEL", "COMPILER"}
    assert settings["WHEEL"].startswith(f"cp{settings['PYTHON'].replace('.', '')}-")
    for lock in (flavour, f"{flavour}-test", f"torch-{flavour}", f"torch-{flavour}-cpu"):
        assert (PINS / f"{lock}.txt").exists()
    dockerfile = (PINS.parents[1] / "docker/Dockerfile").read_text(encoding="utf-8")
    assert f" AS base-{flavour}\n" in dockerfile and f" AS build-{flavour}\n" in dockerfile


@pytest.mark.parametrize("flavour", ["cu118", "cu130"])
def test_the_tests_in_the_image_change_nothing_of_its_lock(flavour: str) -> None:
    image, more = requirements(f"{flavour}.txt"), requirements(f"{flavour}-test.txt")
    assert {package: image[package] for package in more if package in image} == {
        package: more[package] for package in more if package in image
    }


def test_conda_installs_the_same_locks() -> None:
    environment = yaml.safe_load((PINS.parent / "environment.yml").read_text(encoding="utf-8"))
    *plain, pip = environment["dependencies"]
    assert {"python=3.10", "cuda-toolkit=11.8.0"} <= set(plain)
    files = [line.split()[1] for line in pip["pip"] if line.startswith("--requirement")]
    assert files == ["pins/torch-cu118.txt", "pins/cu118.txt"]
    assert all((PINS.parent / file).exists() for file in files)


# --- the bug that fsspec is pinned for ---

LOAD = """
import sys
from datasets import load_dataset
print(load_dataset("json", data_files=sys.argv[1], split="train")["prompt"])
"""


@pytest.fixture(scope="module")
def python_with_old_datasets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make an environment with datasets 2.14.4.

    It is the last version with the bug whose metadata allows both versions of fsspec.
    """
    if not Settings.from_environ(os.environ).ci:
        pytest.skip("downloads 100 MB into an environment of its own; CI does")
    folder = tmp_path_factory.mktemp("old") / "venv"
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    pinned = [
        f"{package}=={version}"
        for package, version in requirements("cu118.in").items()
        if package in ("numpy", "pandas", "fsspec")
    ]
    install(folder / "bin/python", "datasets==2.14.4", "pyarrow==14.0.2", "setuptools<70", *pinned)
    return folder / "bin/python"


def install(python: Path, *packages: str) -> None:
    done = subprocess.run(
        [python, "-m", "pip", "install", "--quiet", *packages], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]


def load(python: Path, folder: Path) -> tuple[int, str]:
    folder.mkdir()
    (folder / "rows.jsonl").write_text('{"prompt": "a"}\n')
    environment = os.environ | {"HF_HOME": str(folder / "home"), "HF_DATASETS_OFFLINE": "1"}
    done = subprocess.run(
        [python, "-c", LOAD, folder / "rows.jsonl"], env=environment, capture_output=True, text=True, check=False
    )
    return done.returncode, (done.stdout if done.returncode == 0 else done.stderr).strip().splitlines()[-1]


def test_fsspec_is_pinned_for_a_reason(python_with_old_datasets: Path, tmp_path: Path) -> None:
    """The bug belongs to a pair: with datasets 2.14.6 and later, fsspec 2023.10 is fine."""
    python = python_with_old_datasets
    assert load(python, tmp_path / "pinned") == (0, "['a']")
    install(python, "fsspec==2023.10.0")
    assert load(python, tmp_path / "later") == (
        1,
        "NotImplementedError: Loading a dataset cached in a LocalFileSystem is not supported.",
    )
