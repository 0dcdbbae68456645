"""Draw every metric of a run as a curve, and the margins as a histogram."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, TypeGuard

from jobs.events import RawEvent
from jobs.formatting import number
from jobs.steps import STEPS, label_of, spec_of
from jobs.views.report.history import METRICS, RunHistory
from jobs.views.report.html import Html, element, joined, rounded
from jobs.views.report.thinning import thin

BUCKETS = 360  # of a curve, two points each: a curve is at most about 360 pixels wide on a phone, 620 on a desktop
FEWEST_BUCKETS = 60  # of each of many runs
BAR, TALL = 10, 120  # a histogram's units


def metrics_of(step: int, histories: Sequence[RunHistory]) -> list[str]:
    """Return the metrics that a run has written in a step, those of the panel first."""
    written = {name for history in histories if step in history.steps for name in history.steps[step].series}
    panel = [name for name in STEPS[step].panel if name in written]
    return [*panel, *(name for name in METRICS if name in written and name not in panel)]


class Curves:
    """The charts of a page: figures where the script draws, and the data that it reads."""

    def __init__(self, histories: Sequence[RunHistory]) -> None:
        self._histories = histories
        self.charts: list[dict[str, Any]] = []

    def of_step(self, step: int) -> Html:
        """Return the figures of a step; metrics that the panel does not show are folded away."""
        names = metrics_of(step, self._histories)
        main = [name for name in names if name in STEPS[step].panel]
        other = [name for name in names if name not in main]
        parts = [element("div", *(self._figure(step, name) for name in main), class_="charts")] if main else []
        if other:
            summary = element("summary", f"{len(other)} more: {', '.join(map(label_of, other))}")
            figures = element("div", *(self._figure(step, name) for name in other), class_="charts")
            parts.append(element("details", summary, figures))
        return joined(parts)

    def data(self) -> dict[str, Any]:
        return {"runs": [history.name for history in self._histories], "charts": self.charts}

    def _figure(self, step: int, name: str) -> Html:
        buckets = max(BUCKETS // len(self._histories), FEWEST_BUCKETS)
        tables, said = [], []
        for history in self._histories:
            xs, ys = history.steps[step].curve(name) if step in history.steps else ([], [])
            thin_xs, thin_ys = thin(xs, ys, buckets) if len(xs) else ([], [])
            tables.append([[rounded(x) for x in thin_xs], [rounded(y) for y in thin_ys]])
            said.append(_described(ys, spec_of(name)))
        place = len(self.charts)
        self.charts.append({"label": label_of(name), "spec": spec_of(name), "tables": tables})
        names = [f"{history.name}: " if len(self._histories) > 1 else "" for history in self._histories]
        words = "; ".join(f"{run}{each}" for run, each in zip(names, said, strict=True))
        last = element("span", said[0].split(",")[0], class_="last") if len(said) == 1 else ""
        caption = element("figcaption", element("span", label_of(name), class_="name"), last)
        plot = element(
            "div", class_="plot", data_chart=place, role="img", aria_label=f"curve of {label_of(name)}: {words}"
        )
        return element("figure", caption, plot)


def _described(values: Sequence[float], spec: str) -> str:
    """Describe a curve in words, for those who do not see it."""
    finite = values if math.isfinite(sum(values)) else [value for value in values if math.isfinite(value)]
    if not len(finite):
        return "no finite value"
    first, last, low, high = (number(value, spec) for value in (finite[0], finite[-1], min(finite), max(finite)))
    return f"{last} at last, {first} at first, between {low} and {high}"


def histogram(end: RawEvent) -> Html:
    """Draw the margins on held-out pairs before and after training; empty if they are not known.

    A margin is the score of the chosen answer minus that of the rejected one.
    """
    after, before = end.get("margins"), end.get("margins_before")
    if not _is_histogram(after):
        return Html("")
    shown = [("before", before)] if _is_histogram(before) else []
    shown.append(("after", after))
    low, high = (
        min(float(each["low"]) for _, each in shown),
        max(float(each["high"]) for _, each in shown),
    )
    most = max(int(count) for _, each in shown for count in each["counts"])
    parts = [_bars(when, each, low, high, most or 1) for when, each in shown]
    return element("div", *parts, class_="charts")


def _is_histogram(value: Any) -> TypeGuard[dict[str, Any]]:
    if not isinstance(value, dict) or not isinstance(value.get("counts"), list) or not value["counts"]:
        return False
    ends = [value.get("low"), value.get("high")]
    are_counts = all(type(count) is int and 0 <= count < 2**63 for count in value["counts"])
    return are_counts and all(isinstance(end, int | float) and abs(end) < 1e300 for end in ends)


def _bars(when: str, margins: dict[str, Any], low: float, high: float, most: int) -> Html:
    """Draw one histogram, from `low` to `high`; `most` pairs are its whole height."""
    counts = [int(count) for count in margins["counts"]]
    width = (float(margins["high"]) - float(margins["low"])) / len(counts) or 1.0
    span = (high - low) or 1.0
    wide = BAR * 40

    def at(value: float) -> float:
        return (value - low) / span * wide

    bars = []
    for place, count in enumerate(counts):
        left = float(margins["low"]) + place * width
        title = element("title", f"{number(left, '.3g')} to {number(left + width, '.3g')}: {count} pairs")
        height = TALL * count / most
        kind = "wrong" if left + width / 2 < 0 else "right"
        bars.append(
            element("rect", title, x=f"{at(left):.1f}", y=f"{TALL - height:.1f}", class_=kind,
                    width=f"{max(width / span * wide - 1, 1):.1f}", height=f"{height:.1f}")
        )  # fmt: skip
    zero = element("line", x1=f"{at(0):.1f}", x2=f"{at(0):.1f}", y1=0, y2=TALL) if low <= 0 <= high else ""
    wrong = sum(count for place, count in enumerate(counts) if float(margins["low"]) + (place + 0.5) * width < 0)
    total = sum(counts)
    words = f"{total} margins {when} training, from {number(margins['low'], '.3g')} to {number(margins['high'], '.3g')}"
    drawn = element(
        "svg", *bars, zero, viewBox=f"0 0 {wide} {TALL}", preserveAspectRatio="none", role="img",
        aria_label=f"histogram of {words}; about {wrong} below 0",
    )  # fmt: skip
    ends = element("div", element("span", number(low, ".3g")), element("span", number(high, ".3g")), class_="ends")
    colours = (
        element("span", element("i", class_=f"dash run{place}"), words, class_="key")
        for place, words in enumerate(("right, above 0", "wrong, below 0"))
    )
    name = element("span", f"margins {when} training", class_="name")
    caption = element("figcaption", name, element("span", *colours, class_="last"))
    return element("figure", caption, element("div", drawn, ends, class_="bars"))
