"""Build pieces of HTML in which text from elsewhere stays text."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

from jobs.formatting import visible

SIGNIFICANT_DIGITS = 5


class Html(str):
    """Text that is HTML already."""

    __slots__ = ()


def text(value: object) -> Html:
    """Escape a text; its control characters become visible."""
    return Html(escape(visible(value)))


def element(name: str, *inside: object, **attributes: object) -> Html:
    """Make an element. `class_`, `aria_label`: an attribute's underscores become hyphens.

    What is inside is escaped unless it is `Html`. An attribute that is None or False is left out.
    """
    words = [name]
    for key, value in attributes.items():
        key = key.rstrip("_").replace("_", "-")
        if value is True:
            words.append(key)
        elif value is not None and value is not False:
            words.append(f'{key}="{text(value)}"')
    return Html(f"<{' '.join(words)}>{joined(inside)}</{name}>")


def joined(parts: Iterable[object]) -> Html:
    return Html("".join(part if isinstance(part, Html) else text(part) for part in parts))


def table(head: Sequence[object], rows: Iterable[Sequence[object]], label: str) -> Html:
    """Make a table that scrolls by itself if it is too wide; a row's first cell is its heading."""
    # With their roles: on a narrow screen the cells stand below each other, and each has its label.
    top = element("tr", *(element("th", cell, scope="col", role="columnheader") for cell in head), role="row")
    body = [
        element(
            "tr",
            element("th", row[0], scope="row", role="rowheader"),
            *(element("td", cell, role="cell", data_label=name) for name, cell in zip(head[1:], row[1:], strict=True)),
            role="row",
        )
        for row in rows
    ]
    inside = (element("thead", top, role="rowgroup"), element("tbody", *body, role="rowgroup"))
    made = element("table", *inside, role="table", aria_label=label)
    return element("div", made, class_="scroll", tabindex=0, role="region", aria_label=f"{label}, scrolls if too wide")


def data(value: Any, identifier: str) -> Html:
    """Make a block of JSON that the page's script reads.

    `<` is written as an escape, so that no text can end the block.
    """
    body = json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    return Html(f'<script type="application/json" id="{identifier}">{body}</script>')


def rounded(value: float | None) -> float | int | None:
    """Round to what a curve can show; None stays None, and so do numbers that JSON lacks."""
    if value is None or not math.isfinite(value):
        return None
    short = float(f"{value:.{SIGNIFICANT_DIGITS}g}")
    return int(short) if short.is_integer() and abs(short) < 1e15 else short
