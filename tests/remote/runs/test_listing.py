"""What `supervisor.sh list` says, as a person and a program get to see it.

Expected texts by hand.
"""

from __future__ import annotations

import json
import re

import pytest

from remote.runs import listing
from remote.runs.job_state import JobState, state_text

TEXT = """Welcome to a box!

run done request=a alive=0 training=0 exit=0 cancelled=0 started=1000 ended=4600 size_kb=2048 complete=1,2,3
last done {"schema": 1, "seq": 9, "time": "1970-01-01T01:16:40Z", "kind": "end", "step": 3}
run orphan request=b alive=0 training=1 cancelled=0 started=4000 heartbeat=4100 complete=1 checkpoint=1:9,2:40
last orphan {"schema": 1, "seq": 3, "time": "1970-01-01T01:23:00Z", "kind": "metrics", "step": 2, \
"update": 40, "updates": 100}
run torn request=c alive=0 training=0 exit=4 started=900 ended=910
last torn {"schema": 1, "se
gpu 0 41984 81920 97
gpu 1 - - -
slot orphan b
disk 1024
beat 5000
"""


def test_what_is_said() -> None:
    found = listing.parse(TEXT)
    assert [(run.name, run.state) for run in found.runs] == [
        ("done", "done"),
        ("orphan", "running"),
        ("torn", "failed"),
    ]
    assert (found.slot, found.disk_free_bytes, found.clock) == ("orphan", 1024 * 1024, 5000.0)
    assert [card.use for card in found.cards][:1] == [97.0]
    assert found.newest() == found.run("orphan") == found.running
    assert found.run("done") is not None and found.run("done").complete == (1, 2, 3)  # type: ignore[union-attr]
    assert listing.parse("") == listing.Listing()


def test_a_line_for_each_run() -> None:
    table = [listing.HEAD, *listing.rows("gpu-box", listing.parse(TEXT), 5000.0, 3.6, "¥")]
    lines = list(listing.columns(table, 200))
    assert [re.sub(r" {2,}", " | ", line) for line in lines] == [
        "box | run | state | now at | steps done | time | spent | size",
        "gpu-box | done | done | step 3, complete | 1,2,3 | 1h00m | ¥3.60 | 2.1 MB",
        "gpu-box | orphan | running, unattended | step 2, update 40/100 | 1 | 16m40s | ¥1.00",
        "gpu-box | torn | failed (4) | 10s | ¥0.01",
    ]
    assert {
        line.index(word) for line, word in zip(lines, ("state", "done     ", "running", "failed"), strict=True)
    } == {lines[0].index("state")}


LONG = "a-run-with-a-long-name-0123456789-0123456789-0123456789-0123456"


def test_80_columns_are_enough() -> None:
    """Texts are folded within their column; a long name stays whole, on a line of its own."""
    more = f"run {LONG} request=d alive=1 training=1 started=900 complete=1 host=host-2\n"
    table = [listing.HEAD, *listing.rows("gpu-box", listing.parse(TEXT + more), 5000.0, 3.6, "¥")]
    assert list(listing.columns(table, 80)) == [
        "box      run     state          now at         steps done  time    spent  size",
        LONG,
        "gpu-box          running on                    1           1h08m   ¥4.10",
        "                 host-2",
        "gpu-box  done    done           step 3,        1,2,3       1h00m   ¥3.60  2.1 MB",
        "                                complete",
        "gpu-box  orphan  running,       step 2,        1           16m40s  ¥1.00",
        "                 unattended     update 40/100",
        "gpu-box  torn    failed (4)                                10s     ¥0.01",
    ]


def test_a_run_of_another_host_that_shares_the_folder() -> None:
    away = "run r request=a alive=1 training=1 started=900 host=host-2\nbeat 5000\n"
    found = listing.parse(away + "run mine request=b alive=1 training=1 started=800\n")
    assert found.running == found.run("mine")  # the box's own, if there are two
    run = found.run("r")
    assert run is not None and run.state == "running"
    assert dict(listing.card(run, 5000.0, 3.6, "¥"))["on"] == "host-2, which shares this folder"
    assert [each["host"] for each in listing.as_json("b", found, 5000.0, None, "")["runs"]] == [None, "host-2"]
    assert "not heard of: it ran on host-2" in state_text(JobState({"alive": "0", "host": "host-2"}))[0]


def test_for_programs() -> None:
    said = listing.as_json("gpu-box", listing.parse(TEXT), 5000.0, 3.6, "¥")
    assert (said["running"], said["runs"][1]["supervised"], said["runs"][1]["checkpoint"]) == (
        "orphan",
        False,
        {"step": 2, "update": 40},
    )
    assert [round(run["spent"], 4) for run in said["runs"]] == [3.6, 1.0, 0.01]
    assert said["gpus"][1] == {"index": 1, "used_mib": None, "total_mib": None, "use": None}


def test_one_run_in_full() -> None:
    found = listing.parse(TEXT)
    run = found.run("orphan")
    assert run is not None
    card = dict(listing.card(run, 5000.0, 3.6, "¥"))
    assert (
        card["spent"] == "¥1.00 (¥3.60/h)"
        and card["last event"] == "metrics, 20s ago"
        and card["checkpoint"] == "step 2, update 40"
    )
    assert "unattended" in card[""]


def test_models_of_ones_own_are_told() -> None:
    end = {"kind": "end", "step": 3, "own_models": {"actor.sft_model": "my/sft", "critic.reward_model": "my/rm"}}
    ended = "run r request=a alive=0 training=0 exit=0 started=900 ended=910"
    run = listing.parse(f"{ended}\nlast r {json.dumps(end)}\nbeat 5000\n").run("r")
    assert run is not None
    card = dict(listing.card(run, 5000.0, 3.6, "¥"))
    assert card["started from"] == "actor.sft_model my/sft, critic.reward_model my/rm"


@pytest.mark.parametrize("name", ["what", "message"])  # of today, and of an older run
def test_the_error_that_ended_a_run_is_told(name: str) -> None:
    error = {"kind": "error", "rank": 0, name: "out of\nmemory", "why": "too large", "exit_code": 4}
    ended = "run r request=a alive=0 training=0 exit=4 started=900 ended=910"
    run = listing.parse(f"{ended}\nlast r {json.dumps(error)}\nbeat 5000\n").run("r")
    assert run is not None
    card = dict(listing.card(run, 5000.0, 3.6, "¥"))
    assert (card["error"], card["why"]) == ("out of memory", "too large")
