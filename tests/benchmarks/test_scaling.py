"""Test benchmarks over several ranks: one real run on a CPU, and what its numbers become."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import psutil  # type: ignore[import-untyped]

from benchmarks import scaling
from benchmarks.machine import Where
from benchmarks.product import Ran
from benchmarks.work import SIZES, write_models
from jobs.run_dir import RunDir

TINY = SIZES["tiny"]


def test_two_ranks_are_measured_and_end_without_their_model(tmp_path: Path) -> None:
    models = write_models(TINY, tmp_path / "models", "cpu", seed=1)
    work = scaling.write_work(1, TINY, tmp_path / "work", "cpu", 1, models)
    twice = replace(scaling.TWO[0], times=2)
    ran = work.run(twice, Where("cpu", 1), 2)
    (plan,) = ran.events("plan", 1)
    assert (plan["ranks"], plan["global_batch"], plan["zero_stage"]) == (2, 2 * work.samples, 1)
    assert len(ran.updates(1, scaling.EXTENTS[1].warm_up)) >= 2 and ran.process_peak_bytes > 2**26
    assert not ran.run.step(1).model.exists() and not ran.run.step(1).complete.exists()
    assert [p for p in psutil.process_iter(["cmdline"]) if str(tmp_path) in " ".join(p.info["cmdline"] or [])] == []


def test_samples_a_second_are_set_against_those_of_one_gpu(tmp_path: Path) -> None:
    def taking(seconds: float) -> tuple[Ran, float]:
        run = RunDir(tmp_path / f"{seconds}")
        run.path.mkdir(exist_ok=True)
        lines = [
            {"kind": "metrics", "step": 1, "seq": n, "update": n + 1, "elapsed_s": seconds * n, "gpu_peak_bytes": 2**30}
            for n in range(5)
        ]
        run.events.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        return Ran(run, dict.fromkeys(range(5), 0.0), dict.fromkeys(range(5), 0.0), 0), 2.0 * 2**30

    same, twice = scaling.TWO[0], replace(scaling.TWO[0], name="twice", times=2)
    ran = {scaling.ONE.name: taking(2.0), same.name: taking(1.25), "twice": taking(2.0)}
    assert scaling.row_of(same, ran, 1, samples=8) == [
        same.name,
        "1.250 (1.250-1.250)",
        "6.4",
        "1.60x",
        "-",
        "-",
        "-",
        "1.0",
        "2.0",
    ]
    assert scaling.row_of(twice, ran, 1, samples=8)[1:4] == ["2.000 (2.000-2.000)", "8.0", "2.00x"]


def test_curves_are_compared_by_update() -> None:
    one, other = (
        [{"kl": 0.5, "loss": 4.0}, {"kl": 0.25, "loss": 2.0}],
        [{"kl": 0.5, "loss": 4.0}, {"kl": -0.25, "loss": 1.5}],
    )
    assert scaling.difference(one, other, "kl") == "0.0e+00 / 5.0e-01"
    assert scaling.difference(one, other, "loss") == "0.0e+00 / 2.5e-01"
