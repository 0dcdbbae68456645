"""How sure a change is: the same held-out rows are measured before and after a step.

The two numbers of a row depend on each other: a hard row is hard before and after. So the error of
the change is that of the rows' differences, mostly much smaller than the errors of two samples.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np


def standard_error(numbers: Sequence[float] | np.ndarray) -> float | None:
    """Return the standard error of their mean, s/√n with s over n − 1; None for fewer than two."""
    return float(np.std(numbers, ddof=1) / np.sqrt(len(numbers))) if len(numbers) > 1 else None


def mean_change_error(before: Sequence[float] | None, after: Sequence[float] | None) -> float | None:
    """Return the standard error of mean(after) − mean(before), of the same n rows in order.

    s/√n of the differences d = after − before: the paired t-test's (Student 1908, Biometrika 6, p.
    1). None if one of them is not known, or is of other rows.
    """
    if before is None or after is None or len(before) != len(after):
        return None
    return standard_error(np.asarray(after, dtype=float) - np.asarray(before, dtype=float))


def share_of_both(before: Sequence[bool] | None, after: Sequence[bool] | None) -> float | None:
    """Return the share of the rows that are true before and after, of the same rows in order.

    With the two shares by themselves it makes the whole table of four that the interval of the
    change needs: jobs/views/report/intervals.py. None as in `mean_change_error`.
    """
    if before is None or after is None or len(before) != len(after) or not len(before):
        return None
    return float(np.mean(np.asarray(before, dtype=bool) & np.asarray(after, dtype=bool)))


def perplexity_change_error(
    before: Sequence[float] | None, after: Sequence[float] | np.ndarray, tokens: np.ndarray
) -> float | None:
    """Return the standard error of a change of perplexity, exp(m₁) − exp(m₀), on the same n rows.

    before, after: each row's negative log-likelihood in nats, summed over its `tokens`, in the same
    order. With m = Σ nll / Σ tokens, a row's part in the change is, to first order,
    e = exp(m₁)(nll₁ − m₁ tokens) − exp(m₀)(nll₀ − m₀ tokens), over Σ tokens. So the error is
    √(n/(n−1) Σ e²) / Σ tokens: the comparison of two ratios of one sample in Cochran 1977, Sampling
    Techniques, chapter 6, with the delta method for exp. None as in `mean_change_error`.
    """
    rows = len(tokens)
    if before is None or len(before) != rows or rows < 2:
        return None
    parts = []
    for nll in (np.asarray(after, dtype=float), np.asarray(before, dtype=float)):
        mean = float(nll.sum() / tokens.sum())
        with np.errstate(invalid="ignore"):  # a row of probability 0: the error is not a number
            parts.append(math.exp(min(mean, 700.0)) * (nll - mean * tokens))
    with np.errstate(invalid="ignore", over="ignore"):
        return math.sqrt(rows / (rows - 1) * float(((parts[0] - parts[1]) ** 2).sum())) / float(tokens.sum())
