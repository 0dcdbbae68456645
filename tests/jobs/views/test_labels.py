"""Panel, lines of text, final table and report call a number by the label of its metadata."""

from __future__ import annotations

import io
from dataclasses import replace

import pytest
from rich.console import Console

from jobs.events import SHOWN, RawEvent
from jobs.steps import OUTCOMES, STEPS
from jobs.views.console import print_report
from jobs.views.panel import Board
from jobs.views.plain import Plain
from jobs.views.report.history import RunHistory
from jobs.views.report.page import page
from jobs.views.report.run_page import RunPage
from tests.raw_events import END_1, END_2, END_3, PPO, REWARD, SFT, event

UPDATES = [SFT, REWARD | {"lm_loss": 0.5}, PPO | {"objective": 1.2, "explained_variance": 0.25, "judge_score": 2.5}]
OF_STEP_3 = {"objective_before": 0.5, "objective_after": 1.5, "judge_score_before": 0.5, "judge_score_after": 1.5}
ENDS = [END_1, END_2, END_3 | OF_STEP_3]
BEST = event("checkpoint", 3, update=9, path="step3/best", metric="mean_reward", value=1.0, size_bytes=1, seconds=1.0)


@pytest.fixture
def marked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every label stands in brackets, where the labels are kept."""
    for name, each in SHOWN.items():
        monkeypatch.setitem(SHOWN, name, replace(each, label=f"[{each.label}]"))
    for step in tuple(STEPS.values()):
        outcomes = tuple(replace(each, label=f"[{each.label}]") for each in step.outcomes)
        monkeypatch.setitem(STEPS, step.number, replace(step, outcomes=outcomes))
        for each in outcomes:
            monkeypatch.setitem(OUTCOMES, each.after, each)


def panel(events: list[RawEvent]) -> str:
    board, shown = Board(), ""
    for each in events:
        board.feed(each, 0.0)
        shown += " ".join(line.plain for line in board.lines(150, 0.0))
    return shown


def lines(events: list[RawEvent]) -> str:
    stream = io.StringIO()
    with Plain(Console(file=stream, width=1000, markup=False)) as plain:
        for each in events:
            plain.feed(each)
    return stream.getvalue()


def table(events: list[RawEvent]) -> str:
    stream = io.StringIO()
    print_report(events, Console(file=stream, width=119))
    return stream.getvalue()


def report(events: list[RawEvent]) -> str:
    history = RunHistory("a")
    for each in events:
        history.feed(each)
    return page([RunPage(history, {}, "done")], now=0.0)


@pytest.mark.usefixtures("marked")
def test_every_view_takes_its_labels_from_one_place() -> None:
    metrics = {SHOWN[name].label for step in STEPS.values() for name in step.panel}
    of_lines = {SHOWN[name].label for step in STEPS.values() for name in step.line}
    outcomes = {each.label for step in STEPS.values() for each in step.outcomes}
    assert [label for label in metrics if label not in panel(UPDATES)] == []
    assert [label for label in of_lines if label not in lines(UPDATES)] == []
    for view in (panel, lines, table):
        assert [label for label in outcomes if label not in view(ENDS)] == []
    seen = report([*UPDATES, *ENDS])
    assert [label for label in metrics | outcomes if label not in seen] == []
    assert "the best [mean reward] so far, 1.00" in lines([BEST])
    for name in ("[response length]", "[eos share]", "[kl k3]", "[accuracy] against chance"):  # the alarms
        assert f">{name}</th>" in seen
