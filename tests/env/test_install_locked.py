"""Test env/install_locked.sh and env/take_torch.py with real environments, pip and uv."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from env.settings import Settings
from tests.remote.small_checkout import digest, make_index, wheel_of

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_index(tmp_path_factory.mktemp("index") / "simple")


@pytest.fixture
def venv(tmp_path: Path) -> Path:
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    return tmp_path / "venv"


def lock_of(folder: Path, index: Path, package: str, version: str) -> Path:
    lock = folder / f"{package}.txt"
    lock.write_text(f"{package}=={version} \\\n    --hash=sha256:{digest(index, package)}\n", encoding="utf-8")
    return lock


def installed_by(venv: Path, package: str) -> str:
    code = f"import importlib.metadata as m; print(m.distribution('{package}').read_text('INSTALLER'))"
    done = subprocess.run([venv / "bin/python", "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def has_bytecode(venv: Path, module: str) -> bool:
    """Without it, a process that may write none compiles the module each time that it starts."""
    return any(venv.glob(f"lib/python*/site-packages/__pycache__/{module}.*.pyc"))


def install(venv: Path, lock: Path, *words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["sh", ROOT / "env/install_locked.sh", venv / "bin/python", lock, *words],
        env=os.environ | variables,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("words", [[], ["--download-first", "--retries", "0"]])
def test_where_uv_cannot_be_had_pip_does_it(venv: Path, tmp_path: Path, index: Path, words: list[str]) -> None:
    done = install(venv, lock_of(tmp_path, index, "alpha", "1.0"), *words, PIP_INDEX_URL=index.as_uri())
    assert done.returncode == 0, done.stderr
    assert installed_by(venv, "alpha") == "pip"
    assert has_bytecode(venv, "alpha")
    assert "uv could not install it; pip does" in done.stdout
    assert sorted(path.name for path in venv.iterdir() if path.name in ("uv", "downloads")) == []


def test_uv_does_it_with_the_index_of_pips_own_files(venv: Path, tmp_path: Path, index: Path) -> None:
    if not Settings.from_environ(os.environ).ci:
        pytest.skip("downloads uv, 20 MB; CI does")
    pip = [venv / "bin/python", "-m", "pip", "install", "-q", "--no-deps", "--require-hashes"]
    subprocess.run([*pip, "--target", venv / "uv", "--requirement", ROOT / "env/pins/uv.txt"], check=True)
    lock = lock_of(tmp_path, index, "alpha", "1.0")
    (tmp_path / "pip.conf").write_text(f"[global]\nindex-url = {index.as_uri()}\n", encoding="utf-8")
    variables = {"PIP_CONFIG_FILE": str(tmp_path / "pip.conf"), "UV_CACHE_DIR": str(tmp_path / "cache")}
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("PIP_INDEX_URL", raising=False)
        done = install(venv, lock, **variables)
    assert done.returncode == 0, done.stderr
    assert installed_by(venv, "alpha") == "uv"
    assert has_bytecode(venv, "alpha")


def test_another_file_than_the_locked_one_is_refused(venv: Path, tmp_path: Path, index: Path) -> None:
    lock = lock_of(tmp_path, index, "alpha", "1.0")
    lock.write_text(lock.read_text(encoding="utf-8").replace(digest(index, "alpha"), "0" * 64), encoding="utf-8")
    done = install(venv, lock, PIP_INDEX_URL=index.as_uri())
    assert done.returncode != 0
    assert "THESE PACKAGES DO NOT MATCH THE HASHES" in done.stderr


# --- what the box has already ---


def take(python: Path, lock: Path, target: Path) -> subprocess.CompletedProcess[str]:
    target.mkdir(exist_ok=True)
    words = [python, ROOT / "env/take_torch.py", lock, target]
    return subprocess.run(words, capture_output=True, text=True, check=False)


@pytest.fixture
def theirs(venv: Path, index: Path) -> Path:
    """An environment with PyTorch, as a provider's image has."""
    command = [venv / "bin/python", "-m", "pip", "install", "-q", "--no-index", wheel_of(index, "torch")]
    subprocess.run(command, check=True)
    return venv


def test_the_locked_pytorch_of_the_box_is_taken(theirs: Path, tmp_path: Path, index: Path) -> None:
    target = tmp_path / "target"
    done = take(theirs / "bin/python", lock_of(tmp_path, index, "torch", "2.0.1"), target)
    assert done.returncode == 0, done.stdout + done.stderr
    code = "import importlib.metadata as m, torch; print(torch.__file__, m.version('torch'), torch.version.cuda)"
    found = subprocess.run(
        [sys.executable, "-S", "-c", code], env={"PYTHONPATH": str(target)}, capture_output=True, text=True, check=True
    )
    assert found.stdout.split() == [str(target / "torch/__init__.py"), "2.0.1", "None"]


def test_packages_that_share_a_file_are_taken_together(venv: Path, tmp_path: Path, index: Path) -> None:
    """On one disk, where files are linked: the second package finds the first one's link."""
    wheels = [wheel_of(index, package) for package in ("cudnn", "nvrtc")]
    subprocess.run([venv / "bin/python", "-m", "pip", "install", "-q", "--no-index", *wheels], check=True)
    lock = tmp_path / "lock.txt"
    lock.write_text("cudnn==8.5\nnvrtc==11.7\n", encoding="utf-8")
    done = take(venv / "bin/python", lock, target := tmp_path / "target")
    assert done.stdout.startswith("cudnn==8.5, nvrtc==11.7 taken from ")
    code = "from nvidia import cudnn, nvrtc; print(cudnn.VALUE, nvrtc.VALUE)"
    found = subprocess.run(
        [sys.executable, "-S", "-c", code], env={"PYTHONPATH": str(target)}, capture_output=True, text=True, check=True
    )
    assert found.stdout == "8 11\n"


@pytest.mark.parametrize(
    ("version", "spoil", "said"),
    [
        ("2.0.0", "", "torch is 2.0.1, not 2.0.0"),
        ("2.0.1", "torch/version.py", "is not as it was installed"),
    ],
)
def test_another_or_a_changed_pytorch_is_not_taken(
    theirs: Path, tmp_path: Path, index: Path, version: str, spoil: str, said: str
) -> None:
    if spoil:
        python = f"python{sysconfig.get_python_version()}"
        with (theirs / "lib" / python / "site-packages" / spoil).open("a") as file:
            file.write("# changed\n")
    done = take(theirs / "bin/python", lock_of(tmp_path, index, "torch", version), tmp_path / "target")
    assert done.returncode == 0
    assert said in done.stdout
    assert list((tmp_path / "target").iterdir()) == []
