from __future__ import annotations

from dataclasses import FrozenInstanceError
from pathlib import Path

import pytest

from env.settings import Settings

HOME = {"HOME": "/home/lin"}


@pytest.mark.parametrize(
    ("environ", "cache"),
    [
        ({}, "/home/lin/.cache/rlhf-box"),
        ({"XDG_CACHE_HOME": "/scratch/a b"}, "/scratch/a b/rlhf-box"),
        ({"XDG_CACHE_HOME": ""}, "/home/lin/.cache/rlhf-box"),
        ({"XDG_CACHE_HOME": "not/absolute"}, "/home/lin/.cache/rlhf-box"),
        ({"XDG_CACHE_HOME": "/scratch", "RLHF_CACHE": "/big/cache"}, "/big/cache"),
        ({"XDG_CACHE_HOME": "/scratch", "RLHF_CACHE": ""}, "/scratch/rlhf-box"),
    ],
)
def test_cache(environ: dict[str, str], cache: str) -> None:
    assert Settings.from_environ(HOME | environ).cache == Path(cache)


@pytest.mark.parametrize(
    ("environ", "runs"), [({}, "runs"), ({"RLHF_RUNS": ""}, "runs"), ({"RLHF_RUNS": "/data/runs"}, "/data/runs")]
)
def test_runs(environ: dict[str, str], runs: str) -> None:
    assert Settings.from_environ(HOME | environ).runs == Path(runs)


@pytest.mark.parametrize(
    ("environ", "ci"), [({}, False), ({"RLHF_CI": ""}, False), ({"RLHF_CI": "0"}, False), ({"RLHF_CI": "1"}, True)]
)
def test_only_1_is_continuous_integration(environ: dict[str, str], ci: bool) -> None:
    """CI may install a Docker engine: no other word may be taken for a yes."""
    assert Settings.from_environ(HOME | environ).ci is ci


def test_only_the_mapping_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RLHF_CACHE", "RLHF_RUNS", "RLHF_BOXES", "RLHF_FLAVOUR", "XDG_CACHE_HOME", "XDG_STATE_HOME", "HOME"):
        monkeypatch.setenv(name, "/somewhere/else")
    monkeypatch.setenv("RLHF_CI", "1")
    assert Settings.from_environ(HOME) == Settings(
        cache=Path("/home/lin/.cache/rlhf-box"),
        runs=Path("runs"),
        ci=False,
        boxes=Path("boxes.yaml"),
        state=Path("/home/lin/.local/state/rlhf-box"),
        flavour="",
    )


def test_settings_are_not_changed_later() -> None:
    with pytest.raises(FrozenInstanceError):
        Settings.from_environ(HOME).ci = True  # type: ignore[misc]
