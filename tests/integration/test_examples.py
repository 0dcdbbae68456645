"""Test examples/ by its job file's command: own data, a job on it and a rule, in three steps."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from jobs.events import read_events
from jobs.run_dir import RunDir

CHECKOUT = Path(__file__).parents[2]
COMMAND = ".venv/bin/python -m rlhf_train --job examples/job.yaml --step all"


@pytest.mark.parametrize("page", ["README.md", "docs/models-and-data.md", "examples/job.yaml"])
def test_the_command_is_shown(page: str) -> None:
    assert COMMAND in (CHECKOUT / page).read_text(encoding="utf-8")


def test_the_rows_have_the_form_that_the_pages_say() -> None:
    rows = {
        name: [json.loads(line) for line in (CHECKOUT / f"examples/data/{name}.jsonl").open(encoding="utf-8")]
        for name in ("train", "test")
    }
    assert [len(rows["train"]), len(rows["test"])] == [20, 4]
    prompts = [row["prompt"] for part in rows.values() for row in part]
    assert len({*prompts}) == 24
    assert all(prompt.startswith("\n\nHuman: ") and prompt.endswith("\n\nAssistant:") for prompt in prompts)
    assert all(
        {*row} == {"prompt", "chosen", "rejected"} and row["chosen"] != row["rejected"]
        for part in rows.values()
        for row in part
    )


def test_the_rule_tells_good_answers_from_bad_ones() -> None:
    asked = "from examples.rule import is_good; print(*(is_good('p', *answer) for answer in {answers}))"
    answers = [(" It is so.", True), (" It is so.", False), (" It is so", True), (" No.", True), ("", True)]
    done = subprocess.run(
        [sys.executable, "-c", asked.format(answers=answers)], cwd=CHECKOUT, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["True", "False", "False", "False", "False"]


def test_the_job_trains_all_three_steps_on_the_rows(tmp_path: Path) -> None:
    environment = os.environ | {"RLHF_RUNS": str(tmp_path / "runs"), "RLHF_CACHE": str(tmp_path / "cache")}
    words = [sys.executable, *shlex.split(COMMAND)[1:]]
    done = subprocess.run(
        words, cwd=CHECKOUT, env=environment, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    run = RunDir(tmp_path / "runs" / "example")
    events = read_events(run.events)[0]
    plans = [event for event in events if event["kind"] == "plan"]
    ends = {event["step"]: event for event in events if event["kind"] == "end"}
    assert [plan["step"] for plan in plans] == [1, 2, 3] == sorted(ends)
    assert [plan["data"] for plan in plans] == [{**plans[0]["data"], "rows": 20}] * 3
    assert sum(plan["rows"] for plan in plans) == 20  # none left out: each step has its third
    assert ends[1]["perplexity_after"] < ends[1]["perplexity_before"] / 2
    assert "good_share_after" in ends[3]  # the rule was asked
    assert all((run.step(step).model / "model.safetensors").is_file() for step in (1, 2, 3))
