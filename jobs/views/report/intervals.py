"""Compute 95 % intervals of shares and of differences, by their formulas."""

from __future__ import annotations

import math
from dataclasses import dataclass

Z = 1.959964  # 97.5 % of a normal distribution lie below it


@dataclass(frozen=True)
class Interval:
    """A value, and the bounds between which it lies in 95 of 100 such measurements."""

    value: float
    low: float
    high: float

    @property
    def is_up(self) -> bool:
        """Tell whether the whole interval is above 0."""
        return self.low > 0

    @property
    def is_down(self) -> bool:
        return self.high < 0


def wilson(share: float, rows: int) -> Interval:
    """Return the score interval of a share that was seen in so many rows.

    Wilson 1927, Journal of the American Statistical Association 22, p. 209:
    (p + z²/2n ± z √(p(1−p)/n + z²/4n²)) / (1 + z²/n).
    """
    middle = share + Z**2 / (2 * rows)
    half = Z * math.sqrt(share * (1 - share) / rows + Z**2 / (4 * rows**2))
    scale = 1 + Z**2 / rows
    return Interval(share, max((middle - half) / scale, 0.0), min((middle + half) / scale, 1.0))


def difference_of_shares(before: float, after: float, rows: int) -> Interval:
    """Return the interval of `after - before`, each share seen in so many rows.

    Newcombe 1998, Statistics in Medicine 17, p. 873, method 10: with Wilson's bounds l and u,
    d − √((p₁−l₁)² + (u₂−p₂)²) to d + √((u₁−p₁)² + (p₂−l₂)²), here p₁ after and p₂ before. It takes
    the two for independent. Ours are of the same prompts, so the true interval is rather shorter.
    """
    one, two = wilson(after, rows), wilson(before, rows)
    low = math.hypot(after - one.low, two.high - before)
    high = math.hypot(one.high - after, before - two.low)
    return Interval(after - before, after - before - low, after - before + high)


def difference_of_means(before: float, after: float, error_before: float, error_after: float) -> Interval:
    """Return the interval of `after - before` from the standard error of each mean.

    d ± z √(s₁² + s₂²), for means that are independent; see `difference_of_shares`.
    """
    half = Z * math.hypot(error_before, error_after)
    return Interval(after - before, after - before - half, after - before + half)
