"""Thin a curve to what a screen shows: the lowest and the highest point of each pixel's width."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence

Points = tuple[list[float], list[float | None]]  # x and y; None where a value is missing or not finite


def thin(xs: Sequence[float], ys: Sequence[float], buckets: int) -> Points:
    """Return at most two points a bucket, in order of x, with the first and the last point.

    xs: rising. Buckets are of equal width in x, so that a spike keeps its place and its height. A
    bucket without a finite value becomes one gap.
    """
    if len(xs) <= 2 * buckets:
        return list(xs), [y if math.isfinite(y) else None for y in ys]
    width = (xs[-1] - xs[0]) / buckets or 1.0
    kept: list[int] = []
    start, count = 0, len(xs)
    for bucket in range(buckets):
        is_last = bucket == buckets - 1
        end = count if is_last else bisect_left(xs, xs[0] + (bucket + 1) * width, start)
        if end > start:
            kept += _extremes(ys, start, end)
        start = end
    kept = sorted({0, *kept, count - 1})
    return [xs[i] for i in kept], [ys[i] if math.isfinite(ys[i]) else None for i in kept]


def _extremes(ys: Sequence[float], start: int, end: int) -> list[int]:
    """Return the places of the lowest and the highest finite value; if there is none, the first."""
    part = list(ys[start:end])
    finite = part if math.isfinite(sum(part)) else [y for y in part if math.isfinite(y)]
    if not finite:
        return [start]
    return [start + part.index(min(finite)), start + part.index(max(finite))]
