"""Look for the ways in which a run goes wrong while its score rises. All thresholds are here."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import stdev
from typing import Literal

from jobs.events import RawEvent
from jobs.formatting import number
from jobs.steps import PPO, REWARD, label_of
from jobs.views.report.history import RunHistory, StepHistory
from jobs.views.report.intervals import Z, difference_of_shares, wilson
from jobs.views.report.verdict import gain_of, number_in, rows_of

LENGTH_FACTOR = 2.0  # answers this many times longer or shorter than at first
REPEATED_SHARE = 0.3  # of an answer's groups of four words that have occurred in it before
REPEATED_GROUP = 4
# Nats a response. Rewards are trusted to about √KL = 5; further away the true quality falls while
# the reward rises (Gao et al. 2022, arXiv:2210.10760, figure 1; Bai et al. 2022, arXiv:2204.05862).
KL_NATS = 25.0
ENDED_SHARE = 0.5  # fewer answers that end by themselves: most are cut
END_PART = 10  # the first and the last tenth of a curve are compared

Result = Literal["fine", "alarm", "not known"]


@dataclass(frozen=True)
class AlarmCheck:
    """One check: what was seen, and the threshold."""

    name: str
    result: Result
    seen: str
    threshold: str


def checks_of(history: RunHistory) -> list[AlarmCheck]:
    """Return all checks of a run, in a fixed order; those without numbers are `not known`."""
    ppo, reward = (history.steps.get(step.number, StepHistory()) for step in (PPO, REWARD))
    return [
        _length(ppo),
        _ended(ppo),
        _repetition(ppo.samples),
        _kl(ppo),
        _score_against_rule(ppo.end or {}),
        _score_against_judge(ppo),
        _chance(reward.end or {}),
        _finite(history),
    ]


def ends_of_curve(values: Sequence[float]) -> tuple[float, float]:
    """Return the means of the first and of the last tenth of the finite values; NaN if none."""
    finite = [value for value in values if math.isfinite(value)]
    part = max(len(finite) // END_PART, 1)
    return (sum(finite[:part]) / part, sum(finite[-part:]) / part) if finite else (math.nan, math.nan)


def _length(step: StepHistory) -> AlarmCheck:
    name, threshold = label_of("response_length"), f"{LENGTH_FACTOR:g} times longer or shorter"
    first, last = ends_of_curve(step.curve("response_length")[1])
    if not first > 0:
        return AlarmCheck(name, "not known", "", threshold)
    factor = last / first
    is_off = not 1 / LENGTH_FACTOR < factor < LENGTH_FACTOR
    return AlarmCheck(name, "alarm" if is_off else "fine", f"{first:.1f} to {last:.1f} tokens", threshold)


def _ended(step: StepHistory) -> AlarmCheck:
    name, threshold = label_of("eos_share"), f"under {ENDED_SHARE:.0%} end by themselves"
    _, last = ends_of_curve(step.curve("eos_share")[1])
    if math.isnan(last):
        return AlarmCheck(name, "not known", "", threshold)
    return AlarmCheck(name, "alarm" if last < ENDED_SHARE else "fine", f"{last:.1%} over the last tenth", threshold)


def repeated_share(text: str) -> float:
    """Return the share of a text's groups of four words that have occurred in it before.

    1 − distinct groups / groups, as seq-rep-4 in Welleck et al. 2020, arXiv:1908.04319, section
    6.1. A text of fewer words has no group, and repeats nothing.
    """
    words = text.split()
    groups = [tuple(words[i : i + REPEATED_GROUP]) for i in range(len(words) - REPEATED_GROUP + 1)]
    return 1 - len({*groups}) / len(groups) if groups else 0.0


def _repetition(samples: Sequence[RawEvent]) -> AlarmCheck:
    name, threshold = "repetition", f"over {REPEATED_SHARE:.0%} of an answer's groups of four words repeat"
    shares = [repeated_share(str(sample.get("response", ""))) for sample in samples if sample.get("when") != "before"]
    if not shares:
        return AlarmCheck(name, "not known", "", threshold)
    worst = sum(share > REPEATED_SHARE for share in shares)
    seen = f"{sum(shares) / len(shares):.0%} on average, {worst} of {len(shares)} answers over it"
    return AlarmCheck(name, "alarm" if worst * 4 >= len(shares) else "fine", seen, f"{threshold}, in a quarter of them")


def _kl(step: StepHistory) -> AlarmCheck:
    name, threshold = label_of("kl_k3"), f"over {KL_NATS:g} nats a response"
    _, last = ends_of_curve(step.curve("kl_k3")[1])
    if math.isnan(last):
        return AlarmCheck(name, "not known", "", threshold)
    return AlarmCheck(
        name, "alarm" if last > KL_NATS else "fine", f"{number(last, '.2f')} nats over the last tenth", threshold
    )


def _score_against_rule(end: RawEvent) -> AlarmCheck:
    reward, good = label_of("mean_reward"), label_of("good_share")
    name, threshold = f"{reward} against {good}", f"the {reward} rises while the rule finds fewer {good}"
    gain, before, after = gain_of("mean_reward", end), end.get("good_share_before"), end.get("good_share_after")
    if gain is None or not isinstance(before, int | float) or not isinstance(after, int | float):
        return AlarmCheck(name, "not known", "no rule" if gain else "", threshold)
    rows, both = rows_of(end), number_in(end, "good_share_both")
    fell = difference_of_shares(before, after, rows, both).is_down if rows else after < before
    seen = f"{reward} {gain.value:+.2f}, {good} {(after - before) * 100:+.1f} points"
    return AlarmCheck(name, "alarm" if gain.value > 0 and fell else "fine", seen, threshold)


def _score_against_judge(step: StepHistory) -> AlarmCheck:
    reward, judge = label_of("mean_reward"), label_of("judge_score")
    name, threshold = f"{reward} against {judge}", f"the {reward} rises while the {judge} falls"
    gain, judged = gain_of("mean_reward", step.end or {}), gain_of("judge_score", step.end or {})
    if gain is not None and judged is not None:
        seen = f"{reward} {gain.value:+.2f}, {judge} {judged.value:+.2f}"
        return AlarmCheck(name, "alarm" if gain.value > 0 and judged.is_down else "fine", seen, threshold)
    rewards, scores = (step.curve(each)[1] for each in ("mean_reward", "judge_score"))
    (reward_first, reward_last), (first, last) = ends_of_curve(rewards), ends_of_curve(scores)
    if math.isnan(last):
        return AlarmCheck(name, "not known", "no judge" if step.end else "", threshold)
    seen = f"{reward} {reward_last - reward_first:+.2f}, {judge} {last - first:+.2f}, over the rollouts"
    is_off = reward_last > reward_first and falls(scores)
    return AlarmCheck(name, "alarm" if is_off else "fine", seen, threshold)


def falls(values: Sequence[float]) -> bool:
    """Tell whether a curve's last tenth lies below its first by more than its points scatter.

    The difference of the two means, of k values each, is compared with 1.96 s √(2/k), where s is
    the standard deviation of all values: the slope is in it, too, so a doubtful fall is none. Under
    ten values tell nothing.
    """
    finite = [value for value in values if math.isfinite(value)]
    if len(finite) < END_PART:
        return False
    first, last = ends_of_curve(finite)
    return last - first < -Z * stdev(finite) * math.sqrt(2 / (len(finite) // END_PART))


def _chance(end: RawEvent) -> AlarmCheck:
    name = f"{label_of('reward_accuracy')} against chance"
    threshold = "the 95 % interval includes 50 %, or is below"
    share, rows = end.get("reward_accuracy"), rows_of(end)
    if not isinstance(share, int | float):
        return AlarmCheck(name, "not known", "", threshold)
    low = wilson(share, rows).low if rows else share
    return AlarmCheck(name, "alarm" if low <= 0.5 else "fine", f"{share:.1%}", threshold)


def _finite(history: RunHistory) -> AlarmCheck:
    name, threshold = "numbers", "a loss or a gradient is not finite"
    watched = ("loss", "policy_loss", "value_loss", "grad_norm", "critic_grad_norm")
    curves = [step.curve(each)[1] for _, step in history.numbered_steps() for each in watched]
    if not any(curves):
        return AlarmCheck(name, "not known", "", threshold)
    bad = sum(sum(not math.isfinite(value) for value in values) for values in curves)
    return AlarmCheck(name, "alarm" if bad else "fine", f"{bad} are not finite" if bad else "all are finite", threshold)
