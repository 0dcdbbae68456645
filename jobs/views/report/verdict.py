"""Say in one sentence whether a run worked, from its held-out numbers and their errors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from jobs.events import RawEvent
from jobs.formatting import number, one_line
from jobs.state import State
from jobs.steps import STEPS
from jobs.views.report.history import RunHistory
from jobs.views.report.intervals import Interval, difference_of_means, difference_of_shares, wilson

Tone = Literal["good", "bad", "unsure", "running"]
OPENINGS: dict[Tone, str] = {
    "good": "It worked",
    "bad": "It did not work",
    "unsure": "It cannot be told whether it worked",
    "running": "It is too early to say whether it works",
}
NO_ERROR = "without an error, since the run recorded none"


@dataclass(frozen=True)
class Verdict:
    """What a step or a run came to. `reason` is a part of a sentence, without its end."""

    tone: Tone
    reason: str

    @property
    def sentence(self) -> str:
        return f"{OPENINGS[self.tone]}: {self.reason}."


def verdict_of_run(history: RunHistory, state: State) -> Verdict:
    """Return the verdict on a run: that of its last complete step, unless something speaks against.

    A failed run has not worked. Of a running one the last complete step is reported.
    """
    ended = [(step, verdict_of_step(each.end)) for step, each in history.numbered_steps() if each.end]
    known = [(step, verdict) for step, verdict in ended if verdict is not None]
    told = f"step {known[-1][0]} is complete, {known[-1][1].reason}" if known else ""
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
    if not known:
        return Verdict("unsure", "the events hold no numbers on held-out data")
    step, last = known[-1]
    earlier = dict(known[:-1])
    if last.tone == "good" and _is_judged_by_reward(history, step) and any(v.tone != "good" for v in earlier.values()):
        weak = next(each for each, verdict in earlier.items() if verdict.tone != "good")
        return Verdict("unsure", f"{last.reason}, but {earlier[weak].reason}, and that model gives the reward")
    return last


def _is_judged_by_reward(history: RunHistory, step: int) -> bool:
    end = history.steps[step].end or {}
    return "mean_reward_after" in end and "good_share_after" not in end


def verdict_of_step(end: RawEvent) -> Verdict | None:
    """Return the verdict on a complete step; None if its event holds no numbers."""
    for judge, needed in (
        (_of_answers, ("good_share_before", "good_share_after")),
        (_of_reward, ("mean_reward_before", "mean_reward_after")),
        (_of_accuracy, ("reward_accuracy",)),
        (_of_perplexity, ("perplexity_before", "perplexity_after")),
    ):
        if all(isinstance(end.get(name), int | float) for name in needed):
            return judge(end)
    return None


def _of_answers(end: RawEvent) -> Verdict:
    before, after, rows = end["good_share_before"], end["good_share_after"], end.get("held_out_rows")
    change = _change(before, after)
    reason = f"good answers, by the rule, {change} from {before:.1%} to {after:.1%}"
    if not rows:
        tone = _tone(after - before)
        return _against_reward(end, Verdict(tone, f"{reason}, {NO_ERROR}"))
    gain = difference_of_shares(before, after, rows)
    points = (
        f"{gain.value * 100:+.1f} points, 95 % interval {gain.low * 100:+.1f} to {gain.high * 100:+.1f}{_doubt(gain)}"
    )
    verdict = Verdict(_tone_of(gain), f"{reason} of {rows} held-out prompts ({points})")
    return _against_reward(end, verdict)


def _against_reward(end: RawEvent, verdict: Verdict) -> Verdict:
    """Say that the reward rose while the answers got worse: the reward model is being exploited."""
    gain = reward_gain(end)
    if verdict.tone == "bad" and gain is not None and gain.value > 0:
        return Verdict("bad", f"the mean reward rose by {gain.value:.2f}, but {verdict.reason}")
    return verdict


def reward_gain(end: RawEvent) -> Interval | None:
    """Return how far the mean reward rose, with its interval; bounds alike if there is no error."""
    before, after = end.get("mean_reward_before"), end.get("mean_reward_after")
    if not isinstance(before, int | float) or not isinstance(after, int | float):
        return None
    errors = [end.get(f"mean_reward_error_{when}") for when in ("before", "after")]
    if all(isinstance(error, int | float) for error in errors):
        return difference_of_means(before, after, *errors)  # type: ignore[arg-type]
    return Interval(after - before, after - before, after - before)


def _of_reward(end: RawEvent) -> Verdict:
    gain = reward_gain(end)
    assert gain is not None, "chosen for having both rewards"
    before, after = number(end["mean_reward_before"], ".2f"), number(end["mean_reward_after"], ".2f")
    reason = f"the mean reward on held-out prompts {_change(0.0, gain.value)} from {before} to {after}"
    if gain.low == gain.high:
        return Verdict(_tone(gain.value), f"{reason}, {NO_ERROR}")
    bounds = f"95 % interval {gain.low:+.2f} to {gain.high:+.2f}{_doubt(gain)}"
    return Verdict(_tone_of(gain), f"{reason} ({gain.value:+.2f}, {bounds})")


def _of_accuracy(end: RawEvent) -> Verdict:
    share, rows = end["reward_accuracy"], end.get("held_out_rows")
    reason = f"the reward model scores the better answer higher in {share:.1%}"
    if not rows:
        return Verdict(_tone(share - 0.5), f"{reason} of held-out pairs, {NO_ERROR}; chance is 50 %")
    seen = wilson(share, rows)
    bounds = f"95 % interval {seen.low:.1%} to {seen.high:.1%}; chance is 50 %"
    tone: Tone = "good" if seen.low > 0.5 else "bad" if seen.high < 0.5 else "unsure"
    return Verdict(tone, f"{reason} of {rows} held-out pairs ({bounds})")


def _of_perplexity(end: RawEvent) -> Verdict:
    before, after = end["perplexity_before"], end["perplexity_after"]
    change = _change(before, after)
    reason = f"perplexity on held-out answers {change} from {number(before, '.2f')} to {number(after, '.2f')}"
    return Verdict(_tone(before - after), reason)


def _change(before: float, after: float) -> str:
    return "rose" if after > before else "fell" if after < before else "did not change"


def _doubt(gain: Interval) -> str:
    return "" if gain.is_up or gain.is_down else ", which includes no change"


def _tone(gain: float) -> Tone:
    return "good" if gain > 0 else "bad" if gain < 0 else "unsure"


def _tone_of(gain: Interval) -> Tone:
    return "good" if gain.is_up else "bad" if gain.is_down else "unsure"
