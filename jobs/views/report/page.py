"""Compose the report of one run or of several: one HTML file that needs nothing from outside."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path

from jobs.events import RawEvent, time_of
from jobs.formatting import before_and_after, duration, money, one_line, plural, size, verdict_of
from jobs.steps import STEPS
from jobs.views.plain import plan_lines, resumed_text
from jobs.views.report.alarms import AlarmCheck, checks_of
from jobs.views.report.answers import Answered, chosen
from jobs.views.report.checkpoints import saved_weights
from jobs.views.report.curves import Curves, histogram
from jobs.views.report.history import StepHistory
from jobs.views.report.html import Html, data, element, joined, table, text
from jobs.views.report.run_page import RunPage, differences
from jobs.views.report.verdict import Tone, verdict_of_run, verdict_of_step

HERE = Path(__file__).parent
MOST_CHARACTERS = 4000  # of a prompt or an answer
# Nothing may be fetched: what is shown is in the file. Written into the page, so that a mistake of
# ours, or a model's text, is stopped by the browser.
POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"
WORDS: dict[Tone, str] = {"good": "worked", "bad": "did not work", "unsure": "cannot be told", "running": "not yet"}
# The words of `status`, and what they ask for.
STATES = {
    "preempted": "preempted; the same command resumes it",
    "lost": "lost: it stopped without an exit code; the same command resumes it",
}


def page(runs: Sequence[RunPage], now: float | None = None) -> str:
    """Return the page. now: when it is made, in seconds since 1970."""
    now = time.time() if now is None else now
    curves = Curves([run.history for run in runs])
    title = " and ".join(run.history.name for run in runs)
    is_one = len(runs) == 1
    heading = "" if is_one else element("h1", f"Comparison of {plural(len(runs), 'runs')}")
    body = [
        element("a", "Skip to the curves", href="#curves", class_="skip"),
        element("header", heading, *(_opening(run, now, is_one=is_one) for run in runs)),
        element(
            "main",
            _section("Steps", joined(_steps(run, is_one=is_one) for run in runs)),
            _section("Checkpoints and models", joined(_checkpoints(run, is_one=is_one) for run in runs)),
            _differences(runs) if not is_one else "",
            _section("Alarms", joined(_alarms(run, is_one=is_one) for run in runs)),
            _section("Curves", *_all_curves(runs, curves), id_="curves"),
            _section("Answers", joined(_answers(run, is_one=is_one) for run in runs)),
            _section("What happened", joined(_notes(run, is_one=is_one) for run in runs)),
            _section("Job, versions, hardware", joined(_job(run, is_one=is_one) for run in runs)),
        ),
        element("footer", "Made from the run's events, by rlhf-box. The curves are drawn by uPlot (MIT license)."),
    ]
    head = [
        Html('<meta charset="utf-8">'),
        Html(f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'),
        Html('<meta name="viewport" content="width=device-width, initial-scale=1">'),
        Html('<meta name="color-scheme" content="light dark">'),
        element("title", f"{title}: report"),
        Html('<link rel="icon" href="data:,">'),
        Html(f"<style>{_file('uplot/uPlot.min.css')}\n{_file('page.css')}</style>"),
    ]
    scripts = [
        data(curves.data(), "data"),
        Html(f"<script>/*{_file('uplot/LICENSE')}*/\n{_file('uplot/uPlot.iife.min.js')}</script>"),
        Html(f"<script>{_file('page.js')}</script>"),
    ]
    whole = element("html", element("head", *head), element("body", *body, *scripts), lang="en")
    return f"<!doctype html>\n{whole}\n"


def _file(name: str) -> Html:
    return Html((HERE / name).read_text(encoding="utf-8"))


def _section(title: str, *inside: object, id_: str | None = None) -> Html:
    if not joined(inside):
        return Html("")
    return element("section", element("h2", title), *inside, id_=id_)


def _named(run: RunPage, *inside: object, is_one: bool) -> Html:
    """Put the run's name above its part, where there are several runs."""
    return joined(inside) if is_one else element("div", element("h3", run.history.name), *inside, class_="run")


def _opening(run: RunPage, now: float, *, is_one: bool) -> Html:
    history, verdict = run.history, verdict_of_run(run.history, run.state)
    seconds = sum(seconds_of(step) for _, step in history.numbered_steps())
    updates = [f"{step.last_update} of {step.planned_updates} in step {number_}"
               for number_, step in history.numbered_steps() if not step.end and step.planned_updates]  # fmt: skip
    state = STATES.get(run.state, run.state)
    facts = {
        "state": f"{state}: {one_line(history.doing)}" if run.state == "running" and history.doing else state,
        "updates": ", ".join(updates),
        "time": duration(seconds),
        "cost": cost_text(run, seconds),
        "last event": _clock(history.last_time),
        "page made": _clock(now),
    }
    items = [
        element("div", element("dt", name), element("dd", value, class_="made" if name == "page made" else None))
        for name, value in facts.items()
        if value
    ]
    return joined(
        [
            element("h1" if is_one else "h2", history.name, class_="run-name"),
            element("p", verdict.sentence, class_=f"verdict {verdict.tone}"),
            element("p", "", class_="stale", hidden=True, data_made=f"{now:.0f}", data_state=run.state),
            element("dl", *items, class_="facts"),
        ]
    )


def seconds_of(step: StepHistory) -> float:
    """Return how long a step has taken: what its end says, else up to its last update."""
    seconds = (step.end or {}).get("seconds", step.elapsed_s)
    return float(seconds) if isinstance(seconds, int | float) and math.isfinite(seconds) else 0.0


def cost_text(run: RunPage, seconds: float) -> str:
    """Return what so much time costs; "" where no price is known."""
    if run.price.per_hour is None:
        return ""
    return money(run.price.per_hour * seconds / 3600, run.price.currency)


def _clock(seconds: float) -> object:
    if not math.isfinite(seconds):
        return ""
    at = datetime.fromtimestamp(seconds, timezone.utc)
    return element("time", at.strftime("%Y-%m-%d %H:%M UTC"), datetime=at.isoformat(timespec="seconds"))


# --- steps ----------------------------------------------------------------------------------------


def _steps(run: RunPage, *, is_one: bool) -> Html:
    rows: list[list[object]] = []
    for step_number, step in run.history.numbered_steps():
        verdict = verdict_of_step(step.end) if step.end else None
        tone: Tone = verdict.tone if verdict else "unsure" if step.end else "running"
        done = "complete" if step.end else f"update {step.last_update} of {step.planned_updates}"
        mark = element("span", WORDS[tone], class_=f"tone {tone}")
        seconds = seconds_of(step)
        rows.append(
            [
                f"{step_number}  {STEPS[step_number].title}",
                mark,
                done,
                duration(seconds),
                *([cost_text(run, seconds)] if run.price.per_hour is not None else []),
                _outcomes(step_number, step.end or {}),
            ]
        )
    if not rows:
        return _named(run, element("p", "No step has begun."), is_one=is_one)
    cost = ["cost"] if run.price.per_hour is not None else []
    made = table(
        ["step", "verdict", "progress", "time", *cost, "on held-out data, before and after"], rows, "the steps"
    )
    return _named(run, made, is_one=is_one)


def _outcomes(step: int, end: RawEvent) -> Html:
    parts = []
    for outcome in STEPS[step].outcomes:
        before, after = before_and_after(outcome, end)
        if after is not None:
            values = after if before is None else f"{before} → {after}"
            parts.append(element("div", f"{outcome.label} ", element("b", values), class_="fact"))
    return joined(parts)


def _checkpoints(run: RunPage, *, is_one: bool) -> Html:
    saved = saved_weights(run.history, run.folders)
    if not saved:
        return Html("")
    rows = [
        [element("code", each.folder), each.what, each.update, size(each.size_bytes), "yes" if each.is_here else "no"]
        for each in saved
    ]
    made = table(["folder", "what it holds", "after update", "size", "in this folder"], rows, "the saved weights")
    return _named(run, made, is_one=is_one)


def _differences(runs: Sequence[RunPage]) -> Html:
    changed = differences([run.job for run in runs])
    if not changed:
        return _section("Differences", element("p", "The jobs are the same."))
    names = [run.history.name for run in runs]
    rows = [[element("code", field), *(element("code", value) for value in changed[field])] for field in changed]
    return _section("Differences", table(["field of the job", *names], rows, "differences of the jobs"))


# --- alarms ---------------------------------------------------------------------------------------


def _alarms(run: RunPage, *, is_one: bool) -> Html:
    checks = checks_of(run.history)
    alarms = [check for check in checks if check.result == "alarm"]
    words = "Nothing is out of bounds." if not alarms else f"{plural(len(alarms), 'alarms')}: " + "; ".join(
        f"{check.name}, {check.seen}" for check in alarms
    )  # fmt: skip
    rows = [[check.name, _result(check), check.seen or "-", check.threshold] for check in checks]
    made = table(["check", "result", "seen", "an alarm if"], rows, "the checks and their thresholds")
    return _named(run, element("p", words, class_="alarms" if alarms else None), made, is_one=is_one)


def _result(check: AlarmCheck) -> Html:
    tones = {"fine": "good", "alarm": "bad", "not known": "none"}
    return element("span", check.result, class_=f"tone {tones[check.result]}")


# --- curves ---------------------------------------------------------------------------------------


def _all_curves(runs: Sequence[RunPage], curves: Curves) -> list[Html]:
    numbers = sorted({step for run in runs for step in run.history.steps})
    parts = []
    if len(runs) > 1:
        names = [
            element("li", element("i", class_=f"dash run{place}"), run.history.name) for place, run in enumerate(runs)
        ]
        parts.append(element("ul", *names, class_="runs"))
    for step in numbers:
        drawn = curves.of_step(step)
        margins = joined(
            _named(run, found, is_one=len(runs) == 1)
            for run in runs
            if step in run.history.steps and (found := histogram(run.history.steps[step].end or {}))
        )
        if drawn or margins:
            parts.append(element("h3", f"Step {step}: {STEPS[step].title}"))
            parts += [drawn, margins]
    if parts:
        parts.append(element("noscript", element("p", "The curves need JavaScript.")))
    return parts


# --- answers --------------------------------------------------------------------------------------


def _answers(run: RunPage, *, is_one: bool) -> Html:
    samples = [sample for _, step in run.history.numbered_steps() for sample in step.samples]
    shown = [_answered(each) for each in chosen(samples)]
    if not shown:
        return Html("")
    first, rest = shown[:3], shown[3:]
    more = [element("details", element("summary", f"{len(rest)} more prompts"), *rest)] if rest else []
    return _named(run, *first, *more, is_one=is_one)


def _answered(answered: Answered) -> Html:
    columns = []
    for sample in answered.answers:
        when = str(sample.get("when"))
        if when == "during":
            when = f"after update {sample.get('update')}"
        title = element("h4", f"{when} training" if when in ("before", "after") else when)
        score = element("p", verdict_of(sample).strip(), class_="score")
        columns.append(
            element("div", title, score, element("p", _cut(sample.get("response")), class_="model", dir="auto"))
        )
    mark = element("span", answered.mark, class_="mark") if answered.mark else ""
    prompt = element("p", _cut(answered.prompt), class_="model prompt", dir="auto")
    count, answers = answered.left_out, plural(answered.left_out, "answers")
    note = f"{answers} from during training {'is' if count == 1 else 'are'} in events.jsonl alone."
    left_out = element("p", note, class_="score") if count else ""
    return element("article", mark, prompt, element("div", *columns, class_="columns"), left_out)


def _cut(value: object) -> Html:
    words = str(value if value is not None else "").strip()
    if len(words) > MOST_CHARACTERS:
        words = f"{words[:MOST_CHARACTERS]} … ({len(words) - MOST_CHARACTERS} more characters)"
    return text(words)


# --- what happened, and with what -----------------------------------------------------------------


def _notes(run: RunPage, *, is_one: bool) -> Html:
    items = []
    for note in run.history.notes:
        words = [note.get("message") or note.get("what") or "", note.get("why"), note.get("hint")]
        if note["kind"] == "resumed":
            words = [resumed_text(note)]
        where = f"step {note['step']}, " if note.get("step") in STEPS else ""
        at = _clock(time_of(note))
        lines = [element("p", line, class_="line") for line in words if line]
        label = element("span", f"{where}{note['kind']}", class_=f"tone {_tone_of_note(str(note['kind']))}")
        items.append(element("li", label, " ", at, *lines))
    if run.history.left_out:
        items.insert(len(items) // 2, element("li", f"{run.history.left_out} more are in events.jsonl"))
    if not items:
        return _named(run, element("p", "No warnings, no errors, no resumes."), is_one=is_one)
    return _named(run, element("ol", *items, class_="notes"), is_one=is_one)


def _tone_of_note(kind: str) -> Tone:
    return "bad" if kind == "error" else "running" if kind == "resumed" else "unsure"


def _job(run: RunPage, *, is_one: bool) -> Html:
    parts: list[Html] = []
    shown: set[str] = set()  # what one step says of machine and versions, mostly all of them say
    for _, step in run.history.numbered_steps():
        lines = [line for line in _plan(step.plan) if line not in shown] if step.plan else []
        shown.update(lines)
        if lines:
            parts.append(element("p", *(element("span", line, class_="line") for line in lines)))
    rows = [[element("code", name), element("code", value)] for name, value in run.job.items()]
    if rows:
        fields = table(["field", "value"], rows, "the job's fields")
        parts.append(element("details", element("summary", f"The job: {len(rows)} fields"), fields))
    return _named(run, *parts, is_one=is_one)


def _plan(plan: RawEvent) -> list[str]:
    lines = plan_lines(plan)
    if plan.get("hardware"):
        lines.append(f"hardware: {one_line(plan['hardware'])}")
    versions = plan.get("versions")
    if isinstance(versions, dict):
        lines.append("versions: " + ", ".join(f"{one_line(name)} {one_line(each)}" for name, each in versions.items()))
    return lines
