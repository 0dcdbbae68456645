"""How busy the GPUs of a machine are, in words."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class GpuUsage:
    """One GPU, as nvidia-smi sees it; NaN for what it does not say."""

    index: int
    used_mib: float
    total_mib: float
    use: float  # percent


def cards_text(cards: Sequence[GpuUsage], width: int) -> str:
    """Describe use and memory of all GPUs on one line.

    Each GPU by itself if there is room; otherwise a block for each, and the range of all.
    """

    def usage(card: GpuUsage) -> str:
        used, total = _range([card.used_mib], ".1f", 1024), _range([card.total_mib], ".1f", 1024)
        return f"{_range([card.use], '.0f')}% busy, {used} of {total} GiB"

    text = "   ".join(map(usage, cards))
    if len(text) <= width:
        return text
    blocks = "".join(
        "▁▂▃▄▅▆▇█"[int(min(max(card.use, 0.0), 99.0) / 12.5)] if math.isfinite(card.use) else "?" for card in cards
    )
    used, total = (_range([getattr(card, name) for card in cards], ".0f", 1024) for name in ("used_mib", "total_mib"))
    return f"{blocks}  {_range([card.use for card in cards], '.0f')}% busy, {used} of {total} GiB each"


def _range(values: Sequence[float], spec: str, unit: float = 1.0) -> str:
    """Format the range of values: `3`, or `1 to 4`; `?` if one is not finite."""
    if not all(map(math.isfinite, values)):
        return "?"
    low, high = (format(value / unit, spec) for value in (min(values), max(values)))
    return low if low == high else f"{low} to {high}"
