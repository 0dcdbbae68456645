from __future__ import annotations

import fcntl
import json
from pathlib import Path

import pytest

from jobs.errors import ToolkitError
from jobs.run_dir import RunDir
from jobs.views.report.run_page import differences, names_of, read_run
from tests.raw_events import END_1, PLAN, event


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    found = RunDir(tmp_path / "a")
    found.path.mkdir()
    found.lock.parent.mkdir()
    found.lock.touch()
    return found


def write(run: RunDir, *events: object) -> None:
    run.events.write_text("".join(json.dumps(each) + "\n" for each in events), encoding="utf-8")


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["/x/runs/a", "/x/runs/b"], ["a", "b"]),
        (["/x/runs/a", "/y/runs/a", "/x/runs/b"], ["x/runs/a", "y/runs/a", "b"]),
        (["/x/a", "/x/a"], ["a", "a"]),  # one run, twice
        (["/a", "/x/a"], ["/a", "x/a"]),
    ],
)
def test_runs_of_the_same_name_are_told_apart_by_their_paths(paths: list[str], names: list[str]) -> None:
    assert names_of([RunDir(Path(path)) for path in paths]) == names


def test_the_job_s_fields_are_flat_and_a_folder_without_a_job_has_none(run: RunDir) -> None:
    write(run, END_1)
    assert read_run(run).job == {}
    run.job_file.write_text("a: {b: 1e-5, c: [x, 2], d: null}\ne: word\n", encoding="utf-8")
    assert read_run(run).job == {"a.b": "1e-05", "a.c": '["x", 2]', "a.d": "null", "e": "word"}


def test_a_folder_without_events_is_refused(run: RunDir) -> None:
    with pytest.raises(ToolkitError, match="holds no run"):
        read_run(run)


def test_the_state_is_that_of_the_folder(run: RunDir) -> None:
    write(run, END_1)
    assert read_run(run).state == "done"  # only step 1 was asked for
    write(run, END_1, PLAN)
    assert read_run(run).state == "lost"
    write(run, END_1, PLAN, event("error", 3, what="x"))
    assert read_run(run).state == "failed"
    run.cancelled.touch()
    assert read_run(run).state == "cancelled"
    run.exit.write_text("4\n", encoding="utf-8")
    assert read_run(run).state == "failed"
    with run.lock.open("a") as holder:
        fcntl.flock(holder, fcntl.LOCK_EX)
        assert read_run(run).state == "running"
    assert read_run(run, state="preempted").state == "preempted"


def test_differences_of_jobs() -> None:
    jobs = [{"a": "1", "b": "2"}, {"a": "1", "b": "3", "c": "4"}]
    assert differences(jobs) == {"b": ["2", "3"], "c": ["", "4"]}
    assert differences(jobs[:1] * 2) == {}
