"""Run the type checker over the packages. It is a test, since it takes a core for a minute."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest


def test_the_packages_have_no_wrong_types() -> None:
    if importlib.util.find_spec("mypy") is None:
        pytest.skip("mypy is not in this Python's environment; the lock brings it")
    checked = subprocess.run(
        [sys.executable, "-m", "mypy"], cwd=Path(__file__).parents[1], capture_output=True, text=True, check=False
    )
    assert checked.returncode == 0, checked.stdout + checked.stderr
