"""The view of one line for each event, for pipes and logs.

`Plain` prints the lines, and `Live` prints plans, warnings and errors in the same words. Kinds and
fields that a newer writer added are ignored.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING

from rich.console import Console
from rich.text import Text

from jobs.errors import ToolkitError
from jobs.events import SHOWN, RawEvent, time_of
from jobs.formatting import (
    data_row_counts,
    duration,
    encodable,
    facts,
    is_for_terminal,
    number,
    one_line,
    own_models,
    plural,
    size,
    verdict_of,
    visible,
)
from jobs.pace import JobPace, Pace
from jobs.steps import STEPS, label_of, spec_of

if TYPE_CHECKING:
    from typing_extensions import Self


def head(event: RawEvent) -> str:
    return "" if event.get("step") is None else f"step {event['step']}  "


def plan_lines(event: RawEvent) -> list[str]:
    step = STEPS.get(event.get("step", 0))
    title, rows = (step.title, step.rows_noun) if step else ("plan", "rows")
    batch = (
        f"batch {event.get('global_batch')} = {event.get('micro_batch')} micro x "
        f"{event.get('gradient_accumulation')} accumulation x {plural(event.get('ranks'), 'ranks')}"
    )
    device = f"on {event.get('device')} ({event.get('device_reason')})"
    device += f", {event.get('precision')}, ZeRO {event.get('zero_stage')}"
    lines = [f"{title}: {plural(event.get('updates'), 'updates')}, {plural(event.get('rows'), rows)}", batch, device]
    if own := own_models(event):
        lines.append(f"starts from {own}")
    if counts := data_row_counts(event.get("data"), event.get("step", 0)):
        lines.append(f"data of all steps: {counts}")
    return [head(event) + one_line(line) for line in lines]


def warning_line(event: RawEvent) -> str:
    hint = f"  hint: {one_line(event['hint'])}" if event.get("hint") else ""
    return f"{head(event)}warning: {one_line(event.get('message'))}{hint}"


def error_text(event: RawEvent) -> str:
    where = "".join(f"{name} {event[name]}, " for name in ("step", "rank") if event.get(name) is not None)
    what = f"{where.removesuffix(', ')}: {event.get('what')}" if where else str(event.get("what"))
    return str(ToolkitError(what, why=str(event.get("why") or ""), hint=str(event.get("hint") or "")))


def checkpoint_text(event: RawEvent) -> str:
    seconds, waited, metric = event.get("seconds"), event.get("held_up_s"), event.get("metric")
    parts = [f"checkpoint at update {event.get('update')}: {size(event.get('size_bytes'))} in {_brief(seconds)}"]
    if metric is not None:
        parts.append(f"the best {label_of(metric)} so far, {number(event.get('value'), spec_of(metric))}")
    if waited is not None:
        parts.append(f"training waited {_brief(waited)}")
    return ", ".join(parts)


def _brief(seconds: object) -> str:
    return f"{seconds:.1f}s" if isinstance(seconds, int | float) and 0 <= seconds < 9.95 else duration(seconds)


def resumed_text(event: RawEvent) -> str:
    return f"resumed after update {event['from_update']}" if event.get("from_update") else "starts from scratch"


def sample_line(event: RawEvent) -> str:
    prompt, response = (visible(event.get(name)).replace("\n", "\\n") for name in ("prompt", "response"))
    if len(prompt) > 100:
        prompt = f"({len(prompt) - 100} characters) ... {prompt[-100:]}"
    if len(response) > 300:
        response = f"{response[:300]} ... ({len(response) - 300} more characters)"
    verdict = verdict_of(event)
    return f"{head(event)}{event.get('when')}  {verdict}prompt: {prompt}  response: {response}"


def metrics_line(event: RawEvent, eta_s: float | None, job_left_s: float | None = None) -> str:
    parts = [f"update {event.get('update')}/{event.get('updates')}"]
    step = STEPS.get(event.get("step", 0))
    for name in step.line if step else ():
        if name in event:
            parts.append(f"{label_of(name)} {number(event[name], SHOWN[name].spec)}")
    parts.append(f"{number(event.get('tokens_per_s'), SHOWN['tokens_per_s'].spec)} {label_of('tokens_per_s')}")
    if eta_s is not None:
        parts.append(f"eta {duration(eta_s)}")
    if job_left_s is not None:
        parts.append(all_steps_text(job_left_s))
    return head(event) + "  ".join(parts)


def all_steps_text(left_s: float) -> str:
    return f"all steps: eta {duration(left_s)}"


def end_line(event: RawEvent) -> str:
    parts = [f"done in {duration(event.get('seconds'))}", *facts(event, "->"), f"model {one_line(event.get('model'))}"]
    return head(event) + "  ".join(parts)


LINES: dict[str, Callable[[RawEvent], list[str]]] = {
    "plan": plan_lines,
    "progress": lambda event: [head(event) + one_line(event.get("doing"))],
    "sample": lambda event: [sample_line(event)] if is_for_terminal(event) else [],
    "checkpoint": lambda event: [f"{head(event)}{checkpoint_text(event)}, {one_line(event.get('path'))}"],
    "warning": lambda event: [warning_line(event)],
    "error": lambda event: [visible(error_text(event))],
    "resumed": lambda event: [head(event) + resumed_text(event)],
    "end": lambda event: [end_line(event)],
}


def marked(text: str) -> Text:
    """Colour the words that say what a line is."""
    marked = Text(text)
    marked.highlight_regex(r"(?m)^(step \d  )?warning:", "yellow")
    marked.highlight_regex(r"^error:", "bold red")
    marked.highlight_regex(r"(?m)(^  why:|^hint:|  hint:)", "bold")
    return marked


class Plain:
    """Prints one line for each event, for pipes and logs.

    Of the metrics it prints each step's first and last, and between them one every 10 s, or up to
    every 60 s as a step gets long. The events' own time counts, so that a file always gives the
    same lines.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._pace, self._job_pace = Pace(), JobPace()
        self._held: RawEvent | None = None  # newest metrics event that was not printed
        self._printed: tuple[object, float] = (None, math.nan)  # step and time of the newest that was

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._release()

    def feed(self, event: RawEvent, *, quiet: bool = False) -> None:
        """Print an event. quiet: only take note of it, since later lines depend on it."""
        kind = event["kind"]
        if kind in ("metrics", "resumed"):
            self._pace.feed(event)
        self._job_pace.feed(event)
        if quiet:
            return
        if kind == "metrics":
            self._held = event
            if self._is_due(event):
                self._release()
        elif kind in LINES:
            if kind in ("error", "end", "resumed"):
                self._release()
                self._printed = (None, math.nan)
            for line in LINES[kind](event):
                self._print(line)

    def _is_due(self, event: RawEvent) -> bool:
        step, at = self._printed
        if event.get("step") != step or event.get("update") == event.get("updates"):
            return True
        interval = min(max(10.0, float(event.get("elapsed_s", 0)) / 20), 60.0)
        return not time_of(event) - at < interval

    def _release(self) -> None:
        if self._held is not None:
            self._print(metrics_line(self._held, self._pace.eta_s, self._job_pace.left_s))
            self._printed = (self._held.get("step"), time_of(self._held))
            self._held = None

    def _print(self, line: str) -> None:
        self._console.print(encodable(line, self._console.encoding))


class Quiet(Plain):
    """Prints warnings and errors alone."""

    def feed(self, event: RawEvent, *, quiet: bool = False) -> None:
        if event["kind"] in ("warning", "error"):
            super().feed(event, quiet=quiet)
