"""env/mirrors as a shell reads them, which is how the build does; docker compose reads them in tests/docker/test_compose.py."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

ENV = Path(__file__).parents[2] / "env"
NAMES = ["APT_MIRROR", "HF_ENDPOINT", "HF_HUB_DISABLE_XET", "PIP_INDEX_URL", "PYTORCH_WHEELS"]


def source(file: Path, **environment: str) -> dict[str, str]:
    """The environment of a strict shell that has read `file`."""
    done = subprocess.run(
        ["sh", "-euc", f"set -a; . {file}; env -0"], env={"PATH": "/usr/bin:/bin", **environment}, capture_output=True, text=True, check=True
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


def test_the_cuda_environment_is_that_of_the_folder_given(tmp_path: Path) -> None:
    (tmp_path / "cuda/bin").mkdir(parents=True)
    found = source(ENV / "cuda.sh", CUDA_HOME=str(tmp_path / "cuda"), LD_LIBRARY_PATH="/mine")
    assert found["CUDA_HOME"] == str(tmp_path / "cuda")
    assert found["PATH"] == f"{tmp_path}/cuda/bin:/usr/bin:/bin"
    assert found["LD_LIBRARY_PATH"] == f"{tmp_path}/cuda/lib64:/mine"


def test_cuda_is_found_where_it_is_and_else_nothing_changes() -> None:
    here = next((folder for folder in ("/usr/local/cuda-11.8", "/usr/local/cuda") if Path(folder).is_dir()), None)
    found = source(ENV / "cuda.sh", CUDA_HOME="/no/such/folder" if here else "")
    assert found["PATH"] == (f"{here}/bin:/usr/bin:/bin" if here else "/usr/bin:/bin")
    assert found.get("CUDA_HOME") == (here or "")
    assert found.get("LD_LIBRARY_PATH") == (f"{here}/lib64" if here else None)
