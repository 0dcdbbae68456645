"""Test `python benchmarks/run.py`: its names, its mistakes, and one real run of the product."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

from benchmarks import run as command_line
from benchmarks.tables import TABLES
from benchmarks.work import SIZES

ROOT = Path(__file__).parents[2]


def run(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "benchmarks/run.py", *words]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=300)


def test_an_unknown_name_is_refused_with_those_that_are_known() -> None:
    done = run("ppo", "pppo")
    assert done.returncode == 2
    assert "`pppo` is no NAME: ceilings, decode" in done.stderr and "Traceback" not in done.stderr


def test_list_says_every_name() -> None:
    done = run("--list")
    assert [line.split()[0] for line in done.stdout.splitlines()] == list(TABLES), done.stderr
    assert tuple(SIZES) == command_line.SIZES


def test_step_3_runs_for_real(tmp_path: Path) -> None:
    """The EOS ends its answers: how many tokens they have is asserted inside."""
    options = "--size tiny --repeats 1 --lengths real --device cpu"
    done = run("ppo", *options.split(), "--output", str(tmp_path / "out.json"))
    assert done.returncode == 0, done.stderr
    (update,) = json.loads((tmp_path / "out.json").read_text())["ppo"]["numbers"]["real lengths"]
    phases = [update[name] for name in ("generation_s", "scoring_s", "training_s")]
    assert all(seconds > 0 for seconds in phases) and sum(phases) <= update["total_s"] * 1.01
    rate = re.search(r"^real lengths .* (\d+\.\d+)  +[\d,]+$", done.stdout, re.MULTILINE)
    assert rate and abs(float(rate[1]) - 8 / update["total_s"]) < 0.01  # the size's 8 prompts an update
    assert "$ python benchmarks/run.py ppo --size tiny" in done.stdout and "MALLOC_MMAP_MAX_=0" in done.stdout
