import json
import re
from pathlib import Path
from random import Random
from typing import get_args

import pytest

from jobs.events import RawEvent
from jobs.state import State
from jobs.views.report import curves
from jobs.views.report.curves import histogram
from jobs.views.report.history import METRICS, RunHistory
from jobs.views.report.page import page
from jobs.views.report.run_page import RunPage
from tests.jobs.views.report.pages import whole_page
from tests.raw_events import event, sample


def of(*events: RawEvent, state: str = "running") -> str:
    history = RunHistory("a")
    for each in events:
        history.feed(each)
    return page([RunPage(history, {}, state)], now=0.0)  # type: ignore[arg-type]


def words(html: str) -> str:
    """What a reader sees, roughly: the text without the scripts and the marks."""
    body = re.sub(r"<(script|style)\b.*?</\1>", " ", html, flags=re.DOTALL)
    return " ".join(re.sub(r"<[^>]*>", " ", body).split())


def charts(html: str) -> dict[str, list[list[list[float]]]]:
    (block,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', html)
    return {f"{place} {chart['label']}": chart["tables"] for place, chart in enumerate(json.loads(block)["charts"])}


def test_the_verdict_comes_first_then_time_and_cost() -> None:
    seen = words(page([whole_page()], now=0.0))
    # 62 + 38.4 + 3720 s are 63 min 40 s; at 1.50 an hour: 1.5917.
    assert re.search(r"evil It worked: good answers.*? state done time 1h03m cost €1\.59 last event", seen)
    assert "3 PPO worked complete 1h02m €1.55" in seen  # 3720 s


def test_every_metric_of_every_step_is_a_curve_by_its_field_s_label() -> None:
    found = charts(page([whole_page()]))
    assert len(found) == 3 * len(METRICS)
    labels = [name.split(" ", 1)[1] for name in found]
    assert labels.count("tok/s") == labels.count("kl coef") == 3  # of tokens_per_s, and of a field without a label
    assert found["0 loss"][0][0] == list(range(1, 31)) and found["0 loss"][0][1][1] == found["0 loss"][0][1][0] / 2


def test_versions_hardware_warnings_resumes_and_the_job_are_there() -> None:
    seen = words(page([whole_page(seed="7")]))
    with_what = ["versions: Python 3.11.7, torch 2.0.1", "hardware: 1 x &lt;/script&gt;", "seed 7", "The job: 3 fields"]
    happened = ["step 3, warning", "a warning &lt;", "step 3, resumed", "resumed after update 30"]
    assert [text for text in (*with_what, *happened) if text not in seen] == []


def test_answers_stand_next_to_each_other_with_their_scores() -> None:
    seen = words(page([whole_page()]))
    assert re.search(r"best Human:.*before training reward -0.50 bad .*after update 8 reward 0.50 .*\\x1b\[2J \\u202e"
                     r".*after training reward 1.50 good", seen)  # fmt: skip


def test_margins_are_bars() -> None:
    html = page([whole_page()])
    assert html.count("<svg") == 2
    # Bars of width 1 from -1: those left of 0 are wrong. 120 units are the highest count, 5.
    assert '<rect x="0.0" y="96.0" class="wrong" width="99.0" height="24.0">' in html
    assert '<rect x="300.0" y="0.0" class="right" width="99.0" height="120.0">' in html
    assert "8 margins after training, from -1 to 3; about 1 below 0" in html


def test_both_histograms_share_one_height_and_say_what_their_colours_are() -> None:
    """120 units are 10 pairs, in both: 5 pairs after training are half of them."""
    before, after = ({"low": -1.0, "high": 1.0, "counts": counts} for counts in ([10, 0], [3, 5]))
    html = histogram({"margins_before": before, "margins": after})
    assert re.findall(r' height="([0-9.]+)">', html) == ["120.0", "0.0", "36.0", "60.0"]
    for place, words in enumerate(("right, above 0", "wrong, below 0")):
        assert html.count(f'<span class="key"><i class="dash run{place}"></i>{words}</span>') == 2
    style = (Path(curves.__file__).parent / "page.css").read_text(encoding="utf-8")
    assert ".bars rect { fill: var(--run0); } .bars rect.wrong { fill: var(--run1); }" in style


def test_several_runs_show_their_differences_and_share_their_curves() -> None:
    html = page([whole_page("one", seed="1"), whole_page("two", seed="2", more="x")])
    seen = words(html)
    assert "Comparison of 2 runs" in seen
    assert "field of the job one two name one two seed 1 2 more x" in seen
    assert "actor.model" not in seen.split("Alarms")[0]  # the same in both
    assert {len(tables) for tables in charts(html).values()} == {2}


def test_a_page_of_a_run_that_has_hardly_begun() -> None:
    assert "It is too early to say whether it works: the next step begins." in words(of())
    seen = words(of(event("progress", 1, doing="reading rows"), event("plan", 1, updates=4)))
    assert "step 1 is being trained. state running: reading rows updates 0 of 4 in step 1" in seen
    assert "1 supervised fine-tuning not yet update 0 of 4" in seen


@pytest.mark.parametrize("state", get_args(State))
def test_a_state_has_the_word_that_status_has(state: str) -> None:
    assert re.search(rf"state {state}\b", words(of(event("plan", 1, updates=4), state=state)))


def test_100000_updates_are_at_most_3_mb() -> None:
    history, random = RunHistory("a"), Random(0)
    lines = [{name: random.gauss(0.0, 1.0) for name in METRICS} for _ in range(997)]
    for step in (1, 2, 3):
        for update in range(1, 33_335):
            history.feed({"kind": "metrics", "step": step, "update": update, **lines[update % 997]})
    for update in range(0, 100_000, 100):
        for prompt in "abcdefghijkl":
            history.feed(sample("during", 100 * "word", prompt=prompt, update=update))
    html = page([RunPage(history, {}, "running")])
    assert len(html.encode()) < 3_000_000
    assert all(len(table[0]) <= 722 for tables in charts(html).values() for table in tables)
    assert words(html).count("996 answers from during training are in events.jsonl alone.") == 12
