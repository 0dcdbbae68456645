"""A run that meets no fault, for all that are compared with it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults.scene import Scene
from tests.tiny import Trained


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Scene:
    """In its run `untroubled`, steps 1 and 2 are complete."""
    scene = Scene.made_in(tmp_path_factory.mktemp("base"))
    assert scene.train("untroubled", step="1 2") == 0
    return scene


@pytest.fixture(scope="session")
def untroubled(base: Scene) -> Trained:
    return Trained(base.run("untroubled"))


@pytest.fixture
def scene(tmp_path: Path) -> Scene:
    return Scene.made_in(tmp_path)
