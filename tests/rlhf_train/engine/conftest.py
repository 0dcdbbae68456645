"""The run folder that tests of checkpoints write to."""

from __future__ import annotations

from pathlib import Path

import pytest

from jobs.run_dir import RunDir


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    folder = RunDir(tmp_path / "run")
    folder.path.mkdir()
    return folder
