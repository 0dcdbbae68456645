"""`rlhf-train status` and `rlhf-train logs`, on run folders with events of each kind."""

from __future__ import annotations

import fcntl
import json
import os
import threading
import time
from collections.abc import Sequence
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest

from jobs.errors import ToolkitError
from jobs.events import RawEvent, read_events
from jobs.run_dir import RunDir
from jobs.views import console
from jobs.views.report.history import RunHistory
from jobs.views.report.page import page
from jobs.views.report.run_page import RunPage
from rlhf_train.local_runs import last_events, logs, status
from tests.raw_events import BARE, END_1, END_2, END_3, EXPECTED, PLAN, PPO, ROLLOUTS, event, sample, squeezed

Said = pytest.CaptureFixture[str]


def run_of(folder: Path, name: str, events: Sequence[RawEvent], age_s: float = 0.0) -> RunDir:
    """Make a run whose last event was written `age_s` seconds ago."""
    run = RunDir(folder / name)
    run.lock.parent.mkdir(parents=True)
    run.lock.touch()
    when = datetime.now(timezone.utc) - timedelta(seconds=age_s)
    lines = [json.dumps(each | {"time": when.isoformat()}) for each in events]
    run.events.write_text("".join(f"{line}\n" for line in lines))
    os.utime(run.events, (when.timestamp(),) * 2)
    return run


def test_fetched_runs_are_named_by_their_box(tmp_path: Path, capsys: Said, monkeypatch: pytest.MonkeyPatch) -> None:
    run_of(tmp_path, "gpu-box/demo", [PLAN, END_3], age_s=60)
    run_of(tmp_path, "gpu-box/trains", [PLAN, PPO], age_s=30)
    run_of(tmp_path, "demo", [PLAN, PPO], age_s=10)
    run_of(tmp_path, "demo/copy", [PLAN], age_s=5)  # inside a run
    (tmp_path / "a file").touch()
    assert status([], tmp_path) == 0
    assert status(["gpu-box/demo"], tmp_path) == 0
    assert squeezed(capsys.readouterr().out.splitlines()) == [
        "run state progress last event",
        "gpu-box/demo done step 3, complete 1m00s ago",
        "gpu-box/trains unknown step 3, update 120/480 30s ago",
        "demo lost step 3, update 120/480 10s ago",
        "run state progress last event",
        "gpu-box/demo done step 3, complete 1m00s ago",
    ]
    with pytest.raises(ToolkitError) as caught:
        status(["gpu-box/none"], tmp_path)
    assert "gpu-box/demo, gpu-box/trains, demo" in caught.value.hint
    monkeypatch.chdir(tmp_path)  # a folder is one still
    assert status(["./gpu-box/demo"], tmp_path / "elsewhere") == 0


def test_each_run_has_a_line_with_its_state(tmp_path: Path, capsys: Said) -> None:
    run_of(tmp_path, "done", [PLAN, *ROLLOUTS, END_3], age_s=7200)
    run_of(tmp_path, "failed", [PLAN, event("error", 3, what="out of memory")], age_s=200)
    killed = run_of(tmp_path, "killed", [PLAN, PPO], age_s=60)
    busy = run_of(tmp_path, "busy", [PLAN, event("progress", 3, doing="loading the actor")], age_s=2)
    cancelled = run_of(tmp_path, "cancelled", [PLAN, PPO], age_s=90_000)
    cancelled.cancelled.touch()
    (tmp_path / "no run").mkdir()
    with busy.lock.open("rb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert status([], tmp_path) == 0
        assert status([f"{killed.path}/", "done"], tmp_path) == 0
    assert squeezed(capsys.readouterr().out.splitlines()) == [
        "run state progress last event",
        "cancelled cancelled step 3, update 120/480 1d01h ago",
        "done done step 3, complete 2h00m ago",
        "failed failed step 3 3m20s ago",
        "killed lost step 3, update 120/480 1m00s ago",
        "busy running step 3, loading the actor 2s ago",
        "run state progress last event",
        "killed lost step 3, update 120/480 1m00s ago",
        "done done step 3, complete 2h00m ago",
    ]


def test_what_is_no_run_is_told_with_those_that_are(tmp_path: Path) -> None:
    with pytest.raises(ToolkitError, match="there is no run in ") as empty:
        status([], tmp_path / "none")
    assert "--job demo" in empty.value.hint
    run_of(tmp_path, "one", [PLAN])
    for verb in (status, logs):
        with pytest.raises(ToolkitError, match="there is no run `two`") as raised:
            verb(["two"], tmp_path)
        assert raised.value.hint == f"runs of {tmp_path}: one"


@pytest.mark.parametrize("many", [0, 3000])
def test_the_last_events_are_whole_ones(tmp_path: Path, many: int) -> None:
    """3000 lines are more than what is read of the end; the last line is being written."""
    run = run_of(tmp_path, "one", [*[PPO] * many, PLAN, END_1])
    with run.events.open("a") as file:
        file.write('{"kind": "err')
    found = last_events(run)
    assert [each["kind"] for each in found[-2:]] == ["plan", "end"]
    assert (len(found) == 2) == (many == 0) and len(found) < 3000


def test_logs_are_the_newest_runs_lines(tmp_path: Path, capsys: Said) -> None:
    run_of(tmp_path, "old", [END_1], age_s=60)
    run_of(tmp_path, "new", [PLAN, PPO, END_3])
    assert logs([], tmp_path) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "step 3  PPO: 480 updates, 1920 prompts" and lines[-1].startswith("step 3  done in 1h02m")
    assert logs(["--tail", "1", "new"], tmp_path) == 0
    assert [line[:15] for line in capsys.readouterr().out.splitlines()] == ["step 3  done in"]
    assert logs(["old"], tmp_path) == 0
    assert capsys.readouterr().out.startswith("step 1  done in 1m02s")
    with pytest.raises(ToolkitError, match="--tail takes a number"):
        logs(["--tail", "-1"], tmp_path)


def test_a_run_without_events_says_so(tmp_path: Path, capsys: Said) -> None:
    run_of(tmp_path, "young", [])
    assert status([], tmp_path) == logs([], tmp_path) == logs(["-f"], tmp_path) == 0
    out, err = capsys.readouterr()
    assert squeezed(out.splitlines())[1].endswith("no event yet") and "?" not in out
    assert err == "no event yet\n" * 2


def test_a_followed_run_is_shown_until_nobody_trains_in_it(tmp_path: Path, capsys: Said) -> None:
    run = run_of(tmp_path, "one", [PLAN])
    with run.lock.open("rb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)

        def train() -> None:
            time.sleep(1.5)  # it is followed by then, or what comes now is old: both are shown
            with run.events.open("a") as file:
                file.write(json.dumps(END_3) + "\n")
            fcntl.flock(lock, fcntl.LOCK_UN)

        trains = threading.Thread(target=train)
        trains.start()
        assert logs(["-f"], tmp_path) == 0
        trains.join()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "step 3  PPO: 480 updates, 1920 prompts" and lines[-1].startswith("step 3  done in 1h02m")


def test_a_run_that_cannot_be_read_hides_no_other(tmp_path: Path, capsys: Said) -> None:
    run_of(tmp_path, "done", [PLAN, END_3], age_s=60)
    (tmp_path / "a folder" / "events.jsonl").mkdir(parents=True)
    (tmp_path / "loop").mkdir()
    (tmp_path / "loop" / "events.jsonl").symlink_to("events.jsonl")
    timeless = run_of(tmp_path, "timeless", [])
    timeless.events.write_text(json.dumps(END_3 | {"time": "noon"}) + "\n")
    assert status([], tmp_path) == status(["a folder"], tmp_path) == 0
    lines = squeezed(capsys.readouterr().out.splitlines())
    assert sorted(lines) == sorted(
        [
            "run state progress last event",
            "done done step 3, complete 1m00s ago",
            "timeless done step 3, complete -",
            "a folder unreadable -",
            "run state progress last event",
            "a folder unreadable -",
        ]
    )


def test_damaged_events_end_no_view(tmp_path: Path, capsys: Said) -> None:
    """Each field of each kind holds once what its kind does not, and every verb shows the run."""
    margins = {"low": -1.0, "high": 1.0, "counts": [1, 2]}
    rows = {"held_out_rows": 100, "margins": margins, "margins_before": margins, "reward_accuracy_before": 0.5}
    plan = PLAN | {"expected": {"3": EXPECTED["1"], "4": EXPECTED["2"]}, "versions": {"torch": "2.0.1"}}
    whole = [plan, PPO, sample("before", "x", reward=1.0, good=True, place=1, update=3), END_1, END_2 | rows, END_3]
    whole += [event("checkpoint", 3, path="a", size_bytes=1, update=3), event("resumed", 3, from_update=60), *BARE]
    wrong: list[object] = ["much", ["much"], {"a": []}, None, True, -100, 2.5, float("inf"), 10**400]
    damaged = [each | {name: value} for each in whole for name in each if name != "kind" for value in wrong]
    for place, value in ((place, value) for place in margins for value in [*wrong, [], [-1]]):
        damaged.append(END_2 | rows | {"margins": margins | {place: value}})
    damaged += [plan | {"expected": {"3": EXPECTED["1"], "4": EXPECTED["2"] | {"update_s": value}}} for value in wrong]
    run = run_of(tmp_path, "one", damaged)
    run.events.write_text("".join(json.dumps(each) + "\n" for each in damaged))
    assert logs([], tmp_path) == status([], tmp_path) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) > len(damaged) / 2
    ends = [each for each in read_events(run.events)[0] if each["kind"] == "end"]
    assert len(ends) > 400
    for end in ends:
        history = RunHistory("one")
        history.feed(end)
        assert page([RunPage(history, {}, "done")]).endswith("</html>\n")
    console.print_report(read_events(run.events)[0])
