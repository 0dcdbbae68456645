"""Test one run that is killed six times, once in each phase of a step, by benchmarks/faults.py.

It is compared with a run that nobody touched.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from benchmarks import faults
from benchmarks.faults import BETWEEN, ENDING, KILLED, ROLLOUT, SAVE, STARTING, UPDATE, Bench, Wish

# Step, phase, after how many updates of the step, seconds later.
KILLS = [
    Wish(1, STARTING, 0, 0.2),
    Wish(1, UPDATE, 7, 0.02),
    Wish(2, BETWEEN, 0, 0.2),
    Wish(2, ENDING, 0, 0.02),
    Wish(3, SAVE, 4, 0.0),
    Wish(3, ROLLOUT, 8, 0.02),
]


def test_six_kills_leave_no_trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(faults, "UPDATES", {1: 20, 2: 10, 3: 16})
    monkeypatch.setattr(faults, "EVERY_UPDATES", 5)
    faults.write_rows(tmp_path / "rows")
    bench = Bench(tmp_path, argparse.Namespace(ranks=1, zero=0))
    bench.unbroken(0)
    broken = bench.broken(0, KILLS, print)
    assert broken.ended
    assert [fault.signal for fault in broken.faults] == [KILLED] * 6 and all(fault.went_on for fault in broken.faults)
    assert len({fault.doing for fault in broken.faults}) >= 4  # where they hit, as far as a busy machine lets us aim
    assert all(fault.lost <= 5 for fault in broken.faults)
    assert faults.difference(bench.run("broken-0"), bench.run("unbroken-0")) == ""
