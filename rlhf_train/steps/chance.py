"""Tell a reward model that ranks pairs from one that guesses."""

from __future__ import annotations

import math

from jobs.events import Warning
from jobs.formatting import plural


def warning_of_chance(step: int, accuracy: float, pairs: int) -> Warning | None:
    """Warn of an accuracy that is not more than two standard errors above one half.

    accuracy: the share of `pairs` held-out pairs that are ranked right. A guess's standard error is
    sqrt(1/2 · 1/2 / pairs). Returns None if the reward model is better than that.
    """
    margin = 2 * math.sqrt(0.25 / pairs)
    if accuracy > 0.5 + margin:
        return None
    found = f"the reward model ranks {accuracy:.1%} of {plural(pairs, 'held-out pairs')} right"
    if accuracy < 0.5 - margin:
        return Warning(
            step=step,
            message=f"{found}: fewer than a guess would",
            hint="are the columns `chosen` and `rejected` swapped? PPO on these scores would teach the worse answers",
        )
    return Warning(
        step=step,
        message=f"{found}, which a guess may do too: {0.5 - margin:.1%} to {0.5 + margin:.1%} are two standard "
        "errors about 50 %",
        hint="PPO on these scores learns noise. Look at the pairs, give step 2 more of them or more epochs, "
        "or raise data.eval_rows to measure on more",
    )
