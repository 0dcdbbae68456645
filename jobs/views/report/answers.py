"""Choose the prompts to show: the best answer's, the worst one's, a random one, then the rest."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from jobs.events import RawEvent

MOST_SHOWN = 24  # prompts of one run
MOST_DURING = 4  # answers of a prompt from during training: a long run has a thousand
ORDER = ("before", "during", "after")  # training


@dataclass(frozen=True)
class Answered:
    """One held-out prompt with its answers that are shown, oldest first."""

    prompt: str
    answers: tuple[RawEvent, ...] = ()
    mark: str = ""  # why it is shown: best, worst, random
    left_out: int = 0  # answers from during training

    @property
    def score(self) -> float:
        """The reward of its newest answer; NaN if there is none."""
        try:
            return float(self.answers[-1].get("reward", math.nan))
        except (TypeError, ValueError, IndexError):
            return math.nan


def by_prompt(samples: Sequence[RawEvent]) -> list[Answered]:
    """Put the answers to each prompt together; of one that was written twice the newest counts.

    Of those from during training, MOST_DURING stay, evenly spread, with the first and the last.
    """
    found: dict[str, dict[tuple[int, int], RawEvent]] = {}
    for sample in samples:
        when = str(sample.get("when"))
        key = (ORDER.index(when) if when in ORDER else 1, int(sample.get("update", 0)))
        found.setdefault(str(sample.get("prompt")), {})[key] = sample
    return [_answered(prompt, answers) for prompt, answers in found.items()]


def _answered(prompt: str, answers: Mapping[tuple[int, int], RawEvent]) -> Answered:
    during = [key for key in sorted(answers) if ORDER[key[0]] == "during"]
    last, most = len(during) - 1, MOST_DURING - 1
    kept = during if last <= most else [during[round(place * last / most)] for place in range(MOST_DURING)]
    shown = sorted({*kept, *(answers.keys() - {*during})})
    return Answered(prompt, tuple(answers[key] for key in shown), left_out=len(during) - len(kept))


def chosen(samples: Sequence[RawEvent]) -> list[Answered]:
    """Return the prompts with the best and the worst newest answer, a random one, then the others.

    The random one is drawn from the rest by a fixed seed, so that a page made again is the same.
    """
    rest = by_prompt(samples)
    scored = [each for each in rest if math.isfinite(each.score)]
    picked: list[Answered] = []
    for mark in ("best", "worst", "random"):
        left = [each for each in scored if each.prompt not in {p.prompt for p in picked}]
        if not left:
            break
        if mark == "random":
            found = random.Random(0).choice(left)
        else:
            found = (max if mark == "best" else min)(left, key=lambda each: each.score)
        picked.append(replace(found, mark=mark))
    seen = {each.prompt for each in picked}
    return [*picked, *(each for each in rest if each.prompt not in seen)][:MOST_SHOWN]
