"""Formatting of numbers and texts for a person: `1h02m`, `2.63 GB`, row counts.

Control characters in a model's text are made visible, so that a terminal does not obey them: see
`visible`.
"""

from __future__ import annotations

import json
import math
import re

from rich.cells import cell_len, chop_cells, set_cell_size

from jobs.events import RawEvent
from jobs.steps import STEPS, Outcome

TERMINAL_PROMPTS = 3  # whose answers a terminal shows

# The names of a plan's `data`, which counts rows -> (left out or cut, noun).
ROW_COUNTS = {
    "rows": ("", "rows"),
    "empty_prompt": ("left out", "empty prompts"),
    "empty_answer": ("left out", "empty answers"),
    "prompt_too_long": ("left out", "overlong prompts"),
    "identical_answers": ("left out", "identical answers"),
    "answer_cut": ("cut", "overlong answers"),
    "duplicate": ("kept", "duplicate rows"),
    "prompt_held_out": ("kept", "held-out prompts"),
    "control_token": ("as text", "typed control tokens"),
    "rendered_template": ("as text", "rendered templates"),
    "no_answer": ("left out", "missing answers"),
    "different_prompts": ("left out", "differing prompts"),
    "label_is_false": ("left out", "answers labelled false"),
    "turns_joined": ("changed", "joined turns"),
    "assistant_first": ("changed", "dropped opening answers"),
    "unanswered_end": ("changed", "dropped last questions"),
}

# Control characters (C0, C1, DEL), line separators, and marks that change the text direction.
# Newline and tab are allowed.
_UNSAFE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def visible(text: object) -> str:
    """Make control characters visible, as in `\\x1b[2J`, so that a terminal does not obey them."""
    return _UNSAFE.sub(lambda match: match[0].encode("unicode_escape").decode(), str(text))


def one_line(text: object) -> str:
    return " ".join(visible(text).split())


def shown(value: object) -> str:
    """Write a value of somebody's data for an error: as JSON, cut after 60 characters."""
    text = json.dumps(value, default=str)
    return text if len(text) <= 60 else f"{text[:60]}..."


def encodable(text: str, encoding: str) -> str:
    return text.encode(encoding, "backslashreplace").decode(encoding)


def number(value: object, spec: str) -> str:
    """Format `value` by `spec`, so that a tiny, huge, not finite or damaged value stays visible."""
    try:
        x = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return "?" if value is None else one_line(value)
    if not math.isfinite(x):
        return str(x)
    if abs(x) >= 1e7:
        return f"{x:.2e}"
    text = format(x, spec)
    if x and spec.endswith("f") and not float(text):
        return f"{x:.1e}" if abs(x) >= 1e-5 else text.removeprefix("-")  # smaller ones are rounding errors
    return text


def duration(seconds: object) -> str:
    """Format a duration: 42s, 3m10s, 1h02m, 2d05h."""
    try:
        rounded = round(float(seconds))  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        return "?"
    minutes, rest = divmod(max(rounded, 0), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days}d{hours:02}h"
    if hours:
        return f"{hours}h{minutes:02}m"
    return f"{minutes}m{rest:02}s" if minutes else f"{rest}s"


def size(size_bytes: object) -> str:
    value = float(size_bytes) if isinstance(size_bytes, int | float) else math.nan
    for unit in ("bytes", "kB", "MB"):
        if value < 1000:
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.3g} GB"


def money(amount: float, currency: str = "") -> str:
    """Format an amount: `¥6.31`, `6.31 EUR`; a small amount keeps two significant digits."""
    text = f"{amount:.2f}" if amount >= 0.1 or not amount else f"{amount:.2g}"
    return f"{text} {currency}" if currency.isalpha() else f"{currency}{text}"


def tail(text: str, cells: int) -> str:
    """Return the end of a text that is too long for its place; a wide character takes two cells."""
    if cell_len(text) <= cells:
        return text
    start = max(len(text) - cells, 0)
    while start < len(text) and cell_len(text[start:]) > cells - 1:
        start += 1
    return f"…{text[start:]}"


def fold(text: str, cells: int, most: int) -> list[str]:
    """Fold a line into one to `most` lines, none wider than `cells`.

    A text that does not fit ends with `…`.
    """
    lines = [""]
    for word in text.split(" "):
        if not lines[-1]:
            lines[-1:] = chop_cells(word, cells) or [""]
        elif cell_len(lines[-1]) + 1 + cell_len(word) <= cells:
            lines[-1] += f" {word}"
        else:
            lines += chop_cells(word, cells) or [""]
    if len(lines) > most:
        last = f"{lines[most - 1]} …"
        lines[most - 1] = last if cell_len(last) <= cells else f"{set_cell_size(last, cells - 1)}…"
    return lines[:most]


def plural(count: object, noun: str) -> str:
    return f"{count} {noun}" if count != 1 else f"{count} {noun.removesuffix('s')}"


def data_row_counts(data: object, step: int) -> str:
    """Describe row counts.

    {"rows": 9, "empty_answer": 3, "answer_cut": 0} -> `9 rows; left out: 3 empty answers`.
    """
    groups: dict[str, list[str]] = {}
    for name, count in data.items() if isinstance(data, dict) else ():
        outcome, noun = ROW_COUNTS.get(name, ("", name.replace("_", " ")))
        if count and not (name == "identical_answers" and step != 2):  # step 2 alone cannot use it
            groups.setdefault(outcome, []).append(plural(count, noun))
    return "; ".join((f"{outcome}: " if outcome else "") + ", ".join(counts) for outcome, counts in groups.items())


def facts(end: RawEvent, arrow: str) -> list[str]:
    """Describe the outcomes of an `end` event: `perplexity 31.20 -> 8.41`."""
    found = []
    step = STEPS.get(end.get("step", 0))
    for outcome in step.outcomes if step else ():
        before, after = end.get(outcome.before), end.get(outcome.after)
        if after is not None:
            start = "" if before is None else f"{number(before, outcome.spec)} {arrow} "
            found.append(f"{outcome.label} {start}{number(after, outcome.spec)}")
    return found


def before_and_after(outcome: Outcome, end: RawEvent, plus_minus: str = "±") -> tuple[str | None, str | None]:
    """Write an outcome's two numbers, each with its standard error if the event has one.

    None: it was not measured.
    """

    def text(value: object, error: object) -> str | None:
        if value is None:
            return None
        has_error = isinstance(error, int | float)
        return number(value, outcome.spec) + (f" {plus_minus} {number(error, outcome.spec)}" if has_error else "")

    return (
        text(end.get(outcome.before), end.get(outcome.error_before)),
        text(end.get(outcome.after), end.get(outcome.error_after)),
    )


def progress_text(last: RawEvent | None) -> str:
    """Say how far a run is, by its last event: `step 3, update 12/400`."""
    if last is None:
        return ""
    words = [f"step {last['step']}"] if "step" in last else []
    if "update" in last:
        words.append(f"update {last['update']}" + (f"/{last['updates']}" if "updates" in last else ""))
    elif last["kind"] == "end":
        words.append("complete")
    elif doing := last.get("doing"):
        words.append(one_line(doing))
    return ", ".join(words)


def own_models(event: RawEvent) -> str:
    """Name the models of one's own that a step started from: `actor.sft_model my/sft`."""
    models = event.get("own_models")
    items = models.items() if isinstance(models, dict) else ()
    return ", ".join(f"{field} {one_line(model)}" for field, model in items)


def is_for_terminal(sample: RawEvent) -> bool:
    """Tell whether a terminal shows this sample; it shows few prompts, the report shows all."""
    return int(sample.get("place", 0)) < TERMINAL_PROMPTS


def verdict_of(sample: RawEvent) -> str:
    good = {True: "good  ", False: "bad  "}.get(sample.get("good"), "")  # type: ignore[arg-type]
    judge = f"judge {number(sample['judge_score'], '.2f')}  " if sample.get("judge_score") is not None else ""
    return f"reward {number(sample.get('reward'), '.2f')}  {judge}{good}"
