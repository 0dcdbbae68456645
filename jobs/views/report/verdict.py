"""Say in one sentence whether a run worked, from its held-out numbers and their errors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from jobs.events import RawEvent
from jobs.formatting import number, one_line, plural
from jobs.state import State
from jobs.steps import REWARD, STEPS, label_of
from jobs.views.report.history import RunHistory
from jobs.views.report.intervals import Interval, difference_of_means, difference_of_shares, wilson

Tone = Literal["good", "bad", "unsure", "running"]
OPENINGS: dict[Tone, str] = {
    "good": "It worked",
    "bad": "It did not work",
    "unsure": "It cannot be told{rows} whether it worked",
    "running": "It is too early to say whether it works",
}
NO_ERROR = "without an error, since the run recorded none"


@dataclass(frozen=True)
class Verdict:
    """What a step or a run came to. `reason` is a part of a sentence, without its end."""

    tone: Tone
    reason: str
    rows: int | None = None  # held-out rows that it was measured on

    @property
    def sentence(self) -> str:
        rows = f" from {plural(self.rows, 'rows')}" if self.rows else ""
        return f"{OPENINGS[self.tone].format(rows=rows)}: {self.reason}."


def verdict_of_run(history: RunHistory, state: State) -> Verdict:
    """Return the verdict on a run: that of its last complete step, unless something speaks against.

    A failed run has not worked. Of a running one the last complete step is reported.
    """
    ended = [(step, verdict_of_step(each.end)) for step, each in history.numbered_steps() if each.end]
    known = [(step, verdict) for step, verdict in ended if verdict is not None]
    told = _told(ended)
    if state == "failed":
        errors = [note for note in history.notes if note["kind"] == "error"]
        what = one_line(errors[-1].get("what")) if errors else "its last error is in train.log"
        where = f" in step {errors[-1]['step']}" if errors and errors[-1].get("step") in STEPS else ""
        return Verdict("bad", f"it failed{where}, {what.rstrip('.')}")
    unfinished = [step for step, each in history.numbered_steps() if not each.end]
    if unfinished or state in ("running", "queued"):
        doing = "is being trained" if state in ("running", "queued") else "was stopped"
        now = f"step {unfinished[-1]} {doing}" if unfinished else "the next step begins"
        return Verdict("running", "; ".join(filter(None, (now, told))))
    if not ended:
        return Verdict("unsure", "the events tell of no complete step")
    step, last = ended[-1]
    if last is None:  # an earlier step's verdict is not this run's
        return Verdict("unsure", told)
    judge = dict(known[:-1]).get(REWARD.number)
    if last.tone == "good" and _is_judged_by_reward(history, step) and judge is not None and judge.tone != "good":
        return Verdict("unsure", f"{last.reason}, but {judge.reason}, and that model gives the reward")
    return last


def _told(ended: Sequence[tuple[int, Verdict | None]]) -> str:
    """Tell of the last complete step, and of the last one with numbers where that has none."""
    if not ended:
        return ""
    (step, last), known = ended[-1], [(step, verdict) for step, verdict in ended if verdict is not None]
    if last is not None:
        return f"step {step} is complete, {last.reason}"
    before = f"; step {known[-1][0]}: {known[-1][1].reason}" if known else ""
    return f"step {step} is complete, but has no finite held-out numbers{before}"


def _is_judged_by_reward(history: RunHistory, step: int) -> bool:
    end = history.steps[step].end or {}
    return "mean_reward_after" in end and not {"good_share_after", "judge_score_after"} & end.keys()


def verdict_of_step(end: RawEvent) -> Verdict | None:
    """Return the verdict on a complete step; None if its event holds no numbers."""
    for judge, needed in (
        (_of_answers, ("good_share_before", "good_share_after")),
        (_of_judge, ("judge_score_before", "judge_score_after")),
        (_of_reward, ("mean_reward_before", "mean_reward_after")),
        (_of_accuracy, ("reward_accuracy",)),
        (_of_perplexity, ("perplexity_before", "perplexity_after")),
    ):
        if all(number_in(end, name) is not None for name in needed):
            return judge(end)
    return None


def _of_answers(end: RawEvent) -> Verdict:
    before, after, rows = end["good_share_before"], end["good_share_after"], rows_of(end)
    reason = f"{label_of('good_share')}, by the rule, {_change(before, after)} from {before:.1%} to {after:.1%}"
    if not rows:
        tone = _tone(after - before)
        return _against_reward(end, Verdict(tone, f"{reason}, {NO_ERROR}"))
    gain = difference_of_shares(before, after, rows, number_in(end, "good_share_both"))
    verdict = Verdict(_tone_of(gain), f"{reason} of {rows} held-out prompts ({_points(gain)})", rows)
    return _against_reward(end, verdict)


def _points(gain: Interval) -> str:
    """Write a change of a share, in points of 100."""
    bounds = f"95 % interval {gain.low * 100:+.1f} to {gain.high * 100:+.1f}{_doubt(gain)}"
    return f"{gain.value * 100:+.1f} points, {bounds}"


def _against_reward(end: RawEvent, verdict: Verdict) -> Verdict:
    """Say that the reward rose while the answers got worse: the reward model is being exploited."""
    gain = gain_of("mean_reward", end)
    if verdict.tone == "bad" and gain is not None and gain.value > 0:
        reason = f"the {label_of('mean_reward')} rose by {gain.value:.2f}, but {verdict.reason}"
        return replace(verdict, reason=reason)
    return verdict


def gain_of(name: str, end: RawEvent) -> Interval | None:
    """Return how far a mean rose on held-out data, with its interval.

    name: of its fields, without `_before` and `_after`. The bounds are alike if there is no error.
    """
    before, after = number_in(end, f"{name}_before"), number_in(end, f"{name}_after")
    if before is None or after is None:
        return None
    one, two = (number_in(end, f"{name}_error_{when}") for when in ("before", "after"))
    if one is not None and two is not None:
        return difference_of_means(before, after, one, two, number_in(end, f"{name}_change_error"))
    return Interval(after - before, after - before, after - before)


def number_in(event: RawEvent, name: str) -> float | None:
    """Return a finite number of an event; None if it is not there, as in events of older runs."""
    value = event.get(name)
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def _of_judge(end: RawEvent) -> Verdict:
    return _against_reward(end, _of_mean(end, "judge_score", "prompts", is_up_good=True))


def _of_reward(end: RawEvent) -> Verdict:
    return _of_mean(end, "mean_reward", "prompts", is_up_good=True)


def _of_perplexity(end: RawEvent) -> Verdict:
    return _of_mean(end, "perplexity", "answers", is_up_good=False)


def _of_mean(end: RawEvent, name: str, noun: str, *, is_up_good: bool) -> Verdict:
    """Return the verdict by a mean that has a standard error. noun: what it was measured on."""
    gain, rows, sign = gain_of(name, end), rows_of(end), 1 if is_up_good else -1
    assert gain is not None, "chosen for having both numbers"
    before, after = (number(end[f"{name}_{when}"], ".2f") for when in ("before", "after"))
    on = f"{rows} held-out {noun}" if rows else f"held-out {noun}"
    reason = f"the {label_of(name)} on {on} {_change(0.0, gain.value)} from {before} to {after}"
    if gain.low == gain.high:
        return Verdict(_tone(sign * gain.value), f"{reason}, {NO_ERROR}")
    bounds = f"95 % interval {gain.low:+.2f} to {gain.high:+.2f}{_doubt(gain)}"
    tone: Tone = _tone(sign * gain.value) if gain.is_up or gain.is_down else "unsure"
    return Verdict(tone, f"{reason} ({gain.value:+.2f}, {bounds})", rows)


def _of_accuracy(end: RawEvent) -> Verdict:
    share, rows = end["reward_accuracy"], rows_of(end)
    reason = f"the {label_of('reward_accuracy')} is {share:.1%} on"
    if not rows:
        return Verdict(_tone(share - 0.5), f"{reason} held-out pairs, {NO_ERROR}; chance is 50 %")
    seen = wilson(share, rows)
    bounds = f"95 % interval {seen.low:.1%} to {seen.high:.1%}; chance is 50 %"
    tone: Tone = "good" if seen.low > 0.5 else "bad" if seen.high < 0.5 else "unsure"
    before, both = number_in(end, "reward_accuracy_before"), number_in(end, "reward_accuracy_both")
    if before is None or both is None:
        return Verdict(tone, f"{reason} {rows} held-out pairs ({bounds})", rows)
    gain = difference_of_shares(before, share, rows, both)
    change = f"{_change(before, share)} from {before:.1%} ({_points(gain)})"
    if gain.is_down and tone == "good":
        tone = "bad"  # better than chance, but worse than before
    return Verdict(tone, f"{reason} {rows} held-out pairs ({bounds}), and {change}", rows)


def rows_of(end: RawEvent) -> int | None:
    """Return how many rows the numbers were measured on; None if the event does not say."""
    rows = end.get("held_out_rows")
    return rows if isinstance(rows, int) and rows > 0 else None


def _change(before: float, after: float) -> str:
    return "rose" if after > before else "fell" if after < before else "did not change"


def _doubt(gain: Interval) -> str:
    return "" if gain.is_up or gain.is_down else ", which includes no change"


def _tone(gain: float) -> Tone:
    return "good" if gain > 0 else "bad" if gain < 0 else "unsure"


def _tone_of(gain: Interval) -> Tone:
    return "good" if gain.is_up else "bad" if gain.is_down else "unsure"
