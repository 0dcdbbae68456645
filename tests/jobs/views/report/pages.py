"""Runs that a page shows: all kinds of events, and answers that try to be more than text."""

from __future__ import annotations

from jobs.events import RawEvent
from jobs.views.report.history import METRICS, RunHistory
from jobs.views.report.run_page import Price, RunPage
from tests.raw_events import END_1, END_2, END_3, PLAN, event, sample

EVIL = "</script><script>document.title = 'taken'</script><img src=x onerror=\"document.title = 'taken'\">"
FAR = '<img src="http://192.0.2.1/x.png"><link rel=stylesheet href="http://192.0.2.1/x.css">'
UPDATES = 30
MARGINS = {"low": -1.0, "high": 3.0, "counts": [1, 0, 2, 5]}


def metrics(step: int, updates: int, scale: float = 1.0) -> list[RawEvent]:
    """Every metric of jobs/events.py, in a line for each update."""
    return [
        event("metrics", step, update=update, updates=updates, elapsed_s=2.0 * update,
              **{name: scale * (place + 1) / update for place, name in enumerate(METRICS)})
        for update in range(1, updates + 1)
    ]  # fmt: skip


def whole_run(name: str = "evil", scale: float = 1.0) -> RunHistory:
    history = RunHistory(name)
    for each in (
        *metrics(1, UPDATES, scale),
        END_1,
        event("plan", 2, updates=UPDATES, data={}),
        *metrics(2, UPDATES, scale),
        END_2 | {"held_out_rows": 100, "margins_before": MARGINS, "margins": MARGINS},
        PLAN | {"hardware": f"1 x {EVIL}", "versions": {"Python": "3.11.7", "torch": "2.0.1"}},
        sample("before", f"{EVIL} and {FAR}", reward=-0.5, good=False, prompt=f"Human: {EVIL}\nAssistant:"),
        event("warning", 3, message=f"a warning {EVIL}", hint=FAR),
        *metrics(3, UPDATES, scale),
        event("resumed", 3, from_update=UPDATES),
        sample("during", f"fine \x1b[2J \u202e {EVIL}", reward=0.5, update=8, prompt=f"Human: {EVIL}\nAssistant:"),
        sample("after", f"{FAR} {EVIL}", reward=1.5, good=True, prompt=f"Human: {EVIL}\nAssistant:"),
        END_3 | {"held_out_rows": 100},
        event("error", None, rank=0, what=EVIL, exit_code=4),
    ):
        history.feed(each)
    return history


def whole_page(name: str = "evil", scale: float = 1.0, **job: str) -> RunPage:
    return RunPage(whole_run(name, scale), {"name": name, "actor.model": EVIL, **job}, "done", Price(1.5, "€"))
