"""`--measure`: few updates in a folder that is removed, and what is said of them."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from jobs.errors import ExitCode, ToolkitError
from jobs.estimate import GIB, Fit, StepMemory, StepTime
from jobs.run_dir import RunDir
from jobs.spec import load_job
from rlhf_train.__main__ import main
from rlhf_train.measure import Taken, measured_job, taken_of, with_log
from tests.tiny import job, write_rows

FIT = Fit(StepMemory({"weights": 3.0 * GIB, "CUDA": 1.0 * GIB}, {"a pass": 2.0 * GIB}), 16, None, True, False)
AT = "2026-01-02T00:00:0{}.000Z"


def events(*updates: tuple[int, float, int]) -> list[dict[str, object]]:
    """(update, elapsed_s, gpu_peak_bytes) of step 1, between its plan and its end."""
    metrics = [
        {"kind": "metrics", "step": 1, "update": update, "elapsed_s": elapsed, "gpu_peak_bytes": peak}
        for update, elapsed, peak in updates
    ]
    plan = {"kind": "plan", "step": 1, "time": AT.format(2), "micro_batch": 8}
    return [plan, *metrics, {"kind": "end", "step": 1, "time": AT.format(5)}, {"kind": "end", "step": 2}]


def test_the_first_update_does_not_count() -> None:
    found = taken_of(events((1, 9.0, 5), (2, 11.0, 7), (3, 14.0, 7)), 1, "cuda", [])
    assert (found.update_s, found.peak_bytes, found.micro_batch) == (2.5, 7, 8)
    # Updates of one rollout share a line; where there is but one line, it counts.
    assert taken_of(events((4, 8.0, 5), (8, 14.0, 5)), 1, "cuda", []).update_s == 1.5
    assert taken_of(events((4, 8.0, 5)), 1, "cuda", []).update_s == 2.0


def test_main_memory_is_that_between_the_plan_and_the_end() -> None:
    start = 1767312000.0  # 2026-01-02T00:00:00Z
    seen = [(start + 1, 900.0), (start + 3, 500.0), (start + 4, 600.0), (start + 6, 800.0)]
    assert taken_of(events((1, 1.0, 0)), 1, "cpu", seen).peak_bytes == 600.0


def test_a_step_s_line() -> None:
    said, taken = StepTime(100, 0.25, 10.0), Taken(0.5, 4.5 * GIB, 8)
    assert taken.line(1, said, FIT, "cuda") == (
        "step 1 (supervised fine-tuning): 0.5 s an update (0.25 s estimated), about 1m00s in all, "
        "4.5 GiB of a GPU, for tensors, at the peak (5.0 GiB estimated), with a micro batch of 8"
    )
    assert Taken(0.5, GIB, 16).line(2, None, FIT, "cpu") == (
        "step 2 (reward model): 0.5 s an update, 1.0 GiB of main memory at the peak (6.0 GiB estimated)"
    )


def test_a_measured_job_is_short_and_alone() -> None:
    settings = ["ppo.critic_warmup_updates=9", "checkpoint.best_every_updates=1", "reward.max_updates=3"]
    whole = load_job("demo", settings)
    few = measured_job(whole)
    # Four rollouts of 64 answers, learned from twice in batches of 32.
    assert (few.sft.max_updates, few.reward.max_updates, few.ppo.max_updates) == (4, 3, 16)
    assert few.ppo.critic_warmup_updates == 0 and few.checkpoint.best_every_updates is None and not few.track
    assert few.data.eval_rows == 32 and few.data.datasets == whole.data.datasets
    assert (few.actor, few.critic, few.hardware) == (whole.actor, whole.critic, whole.hardware)


def test_what_fails_is_said_with_the_log(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    run.log.write_text("".join(f"line {n}\n" for n in range(20)), encoding="utf-8")
    error = with_log(ToolkitError("out of memory", why="it is full", exit_code=ExitCode.TRAINING), run)
    assert (error.what, error.exit_code) == ("measured: out of memory", ExitCode.UNFIT)
    assert error.why.startswith("it is full\nthe end of the log:\nline 10\n") and error.why.endswith("line 19")
    assert with_log(ToolkitError("no", exit_code=ExitCode.USAGE), run).exit_code == ExitCode.USAGE


def test_a_run_is_measured_and_nothing_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RLHF_CACHE", str(tmp_path / "cache"))
    fields = {**job(write_rows(tmp_path / "rows")), "name": "own"}
    fields["actor"]["lora"] = {"rank": 4}
    Path("own.yaml").write_text(yaml.safe_dump(fields), encoding="utf-8")
    assert main(["--job", "own.yaml", "--measure", "--step", "1", "--output-dir", "out"]) == 0
    printed = capsys.readouterr()
    assert "step 1 (supervised fine-tuning): to do; " in printed.out
    measured = printed.out[printed.out.index("measured on this machine, ") :].splitlines()
    assert " s an update (" in measured[1] and " GiB of main memory at the peak (" in measured[1]
    assert measured[2].startswith("time: about ") and len(measured) == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "own.yaml", "rows"]


def test_measure_is_of_this_machine(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--job", "demo", "--measure", "--gpu", "h200"]) == 2
    assert "--measure and --gpu exclude each other" in capsys.readouterr().err
