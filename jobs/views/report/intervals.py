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
    half = Z * _root_of(share * (1 - share) / rows + Z**2 / (4 * rows**2))
    scale = 1 + Z**2 / rows
    return Interval(share, max((middle - half) / scale, 0.0), min((middle + half) / scale, 1.0))


def difference_of_shares(before: float, after: float, rows: int, both: float | None = None) -> Interval:
    """Return the interval of `after - before`, two shares of the same rows.

    Newcombe 1998, Statistics in Medicine 17, p. 2635, method 10, for paired data: with Wilson's
    bounds l and u, p₁ after and p₂ before, and the correlation φ of the two,
    d − √((p₁−l₁)² − 2φ(p₁−l₁)(u₂−p₂) + (u₂−p₂)²) to
    d + √((u₁−p₁)² − 2φ(u₁−p₁)(p₂−l₂) + (p₂−l₂)²).
    both: the share of the rows that are true before and after; None: not known. Then φ is 0, as for
    two samples (p. 873 there), and the interval is mostly too wide.
    """
    one, two = wilson(after, rows), wilson(before, rows)
    phi = 0.0 if both is None else _correlation(before, after, both, rows)
    low = _root(after - one.low, two.high - before, phi)
    high = _root(one.high - after, before - two.low, phi)
    return Interval(after - before, after - before - low, after - before + high)


def _root(one: float, two: float, phi: float) -> float:
    return _root_of(one**2 - 2 * phi * one * two + two**2)


def _root_of(square: float) -> float:
    """Return the square root; 0 of what rounding, or a damaged share above 1, makes negative."""
    return math.sqrt(max(square, 0.0))


def _correlation(before: float, after: float, both: float, rows: int) -> float:
    """Return φ = (ad − bc) / √((a+b)(c+d)(a+c)(b+d)) of the counts; 0 where a share is 0 or 1.

    a: true before and after, b: after alone, c: before alone, d: neither. A positive numerator is
    n/2 smaller, but not below 0: Newcombe's correction for counts.
    """
    a, b, c = both * rows, (after - both) * rows, (before - both) * rows
    d = rows - a - b - c
    margins = (a + b) * (c + d) * (a + c) * (b + d)
    excess = a * d - b * c
    excess = max(excess - rows / 2, 0.0) if excess > 0 else excess
    return excess / math.sqrt(margins) if margins > 0 else 0.0


def difference_of_means(
    before: float, after: float, error_before: float, error_after: float, change_error: float | None = None
) -> Interval:
    """Return the interval of `after - before` from standard errors, d ± z s.

    change_error: of the difference itself, which is that of the same rows; None: not known. Then s
    is √(s₁² + s₂²), as for two samples, which is mostly too wide.
    """
    half = Z * (math.hypot(error_before, error_after) if change_error is None else change_error)
    return Interval(after - before, after - before - half, after - before + half)
