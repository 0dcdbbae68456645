"""Test env/mirrors as a shell reads them, which is how the build reads them.

docker compose reads them in tests/docker/test_compose.py.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

ENV = Path(__file__).parents[2] / "env"
NAMES = ["APT_MIRROR", "CONDA_CHANNEL", "HF_ENDPOINT", "HF_HUB_DISABLE_XET", "PIP_INDEX_URL", "PYTORCH_WHEELS"]


def source(file: Path, **environment: str) -> dict[str, str]:
    """The environment of a strict shell that has read `file`."""
    done = subprocess.run(
        ["sh", "-euc", f"set -a; . {file}; env -0"],
        env={"PATH": "/usr/bin:/bin", **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    return dict(entry.split("=", 1) for entry in done.stdout.split("\0") if entry)


def test_one_word_changes_every_address() -> None:
    default, cn = (source(ENV / "mirrors" / f"{name}.env") for name in ("default", "cn"))
    assert {name: default[name] for name in NAMES if name in default} == {
        "HF_ENDPOINT": "https://huggingface.co",
        "PYTORCH_WHEELS": "https://download.pytorch.org/whl",
    }
    assert [name for name in NAMES if name not in cn] == []
    assert cn["HF_ENDPOINT"] == "https://hf-mirror.com"
    assert cn["HF_HUB_DISABLE_XET"] == "1"


@pytest.mark.parametrize("mirror", sorted(path.name for path in (ENV / "mirrors").glob("*.env")))
def test_a_mirror_says_only_what_is_known_and_yields_to_the_environment(mirror: str) -> None:
    plain = source(ENV / "mirrors" / mirror)
    assert set(plain) - {"PATH", "PWD", "OLDPWD", "SHLVL", "_"} <= set(NAMES)
    assert source(ENV / "mirrors" / mirror, HF_ENDPOINT="http://mine")["HF_ENDPOINT"] == "http://mine"


def toolkit(folder: Path, *libraries: str) -> str:
    """A folder as CUDA's, as far as a shell looks."""
    (folder / "bin").mkdir(parents=True)
    (folder / "bin/nvcc").write_text("")
    (folder / "bin/nvcc").chmod(0o755)
    for name in libraries:
        (folder / name).mkdir()
        (folder / name / "libcudart.so.11.0").write_text("")
    return str(folder)


def test_the_cuda_environment_is_that_of_the_folder_given(tmp_path: Path) -> None:
    cuda, conda = toolkit(tmp_path / "cuda"), toolkit(tmp_path / "conda")
    found = source(ENV / "cuda.sh", CUDA_HOME=cuda, CONDA_PREFIX=conda, LD_LIBRARY_PATH="/mine")
    assert (found["CUDA_HOME"], found["PATH"], found["LD_LIBRARY_PATH"]) == (
        cuda,
        f"{cuda}/bin:/usr/bin:/bin",
        f"{cuda}/lib64:/mine",
    )


@pytest.mark.parametrize(
    ("libraries", "found_in"),
    [((), "lib64"), (("lib",), "lib"), (("lib", "lib64"), "lib64")],  # conda's packages put them into lib
)
def test_conda_has_its_own(tmp_path: Path, libraries: tuple[str, ...], found_in: str) -> None:
    conda = toolkit(tmp_path / "conda", *libraries)
    found = source(ENV / "cuda.sh", CONDA_PREFIX=conda)
    assert (found["CUDA_HOME"], found["PATH"], found["LD_LIBRARY_PATH"]) == (
        conda,
        f"{conda}/bin:/usr/bin:/bin",
        f"{conda}/{found_in}",
    )


def test_a_folder_without_cuda_is_passed_over(tmp_path: Path) -> None:
    here = "/usr/local/cuda-11.8" if Path("/usr/local/cuda-11.8").is_dir() else None
    found = source(ENV / "cuda.sh", CUDA_HOME=str(tmp_path), CONDA_PREFIX=str(tmp_path))
    assert found["PATH"] == (f"{here}/bin:/usr/bin:/bin" if here else "/usr/bin:/bin")
    assert found["CUDA_HOME"] == (here or str(tmp_path))
