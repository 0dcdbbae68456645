"""Choose the prompts to show: the best answer's, the worst one's, a random one, then the rest."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

from jobs.events import RawEvent

MOST_SHOWN = 24  # prompts of one run
ORDER = ("before", "during", "after")  # training


@dataclass(frozen=True)
class Answered:
    """One held-out prompt with its answers, oldest first."""

    prompt: str
    answers: tuple[RawEvent, ...] = ()
    mark: str = ""  # why it is shown: best, worst, random

    @property
    def score(self) -> float:
        """The reward of its newest answer; NaN if there is none."""
        try:
            return float(self.answers[-1].get("reward", math.nan))
        except (TypeError, ValueError, IndexError):
            return math.nan


def by_prompt(samples: Sequence[RawEvent]) -> list[Answered]:
    """Put the answers to each prompt together; of one that was written twice the newest counts."""
    found: dict[str, dict[tuple[int, int], RawEvent]] = {}
    for sample in samples:
        when = str(sample.get("when"))
        key = (ORDER.index(when) if when in ORDER else 1, int(sample.get("update", 0)))
        found.setdefault(str(sample.get("prompt")), {})[key] = sample
    return [Answered(prompt, tuple(answers[key] for key in sorted(answers))) for prompt, answers in found.items()]


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
        picked.append(Answered(found.prompt, found.answers, mark))
    seen = {each.prompt for each in picked}
    return [*picked, *(each for each in rest if each.prompt not in seen)][:MOST_SHOWN]
