"""The table at the end of a run: what each step changed, its time, its model, and some answers."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from rich import box
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.table import Table
from rich.text import Text

from jobs.events import RawEvent, effective
from jobs.formatting import before_and_after, duration, encodable, one_line, own_models, verdict_of, visible
from jobs.steps import STEPS, Outcome
from jobs.views.report.verdict import Tone, verdict_of_step

COLORS: dict[Tone, str] = {"good": "green", "bad": "red", "unsure": "yellow", "running": "yellow"}


def report(events: Iterable[RawEvent], encoding: str = "utf-8") -> RenderableType:
    """Make the report: numbers before and after, times, models, three prompts with answers."""
    held = effective(events)
    ends = {event.get("step", 0): event for event in held if event["kind"] == "end"}
    samples: dict[str, dict[str, RawEvent]] = {}  # prompt -> when -> sample; a resumed run may write one twice
    for event in held:
        if event["kind"] == "sample" and event.get("step") == 3:
            samples.setdefault(str(event.get("prompt")), {})[str(event.get("when"))] = event
    parts: list[RenderableType] = [Text("no step has ended yet")]
    if ends:
        shown = {outcome.label: outcome for outcome, _ in _rows(ends)}
        parts = [_outcomes(ends, encoding), Text(""), *_verdicts(ends), Text(""), *_models(ends, encoding)]
        parts += [Text(""), *_meanings(shown.values(), _plus_minus(encoding) if _has_errors(ends) else "")]
    for index, (prompt, answers) in enumerate(list(samples.items())[:3], start=1):
        parts += [Text(""), Text(f"prompt {index}", style="bold"), _folded(prompt, encoding)]
        for when in ("before", "after"):
            if sample := answers.get(when):
                parts += [_answer_title(when, sample), _folded(str(sample.get("response")), encoding)]
    return Group(*parts)


def _rows(ends: dict[int, RawEvent]) -> list[tuple[Outcome, int]]:
    """Return what was measured, each with its step."""
    return [
        (outcome, step)
        for step, end in sorted(ends.items())
        for outcome in (STEPS[step].outcomes if step in STEPS else ())
        if end.get(outcome.before) is not None or end.get(outcome.after) is not None
    ]


def _outcomes(ends: dict[int, RawEvent], encoding: str) -> Table:
    table, last = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False), 0
    table.add_column("step")
    table.add_column("on held-out data")
    table.add_column("before", justify="right")
    table.add_column("after", justify="right")
    for outcome, step in _rows(ends):
        title = f"{step}  {STEPS[step].title}" if step != last else ""
        last = step
        table.add_row(
            title, outcome.label, *(x or "-" for x in before_and_after(outcome, ends[step], _plus_minus(encoding)))
        )
    return table


def _verdicts(ends: dict[int, RawEvent]) -> list[_Hanging]:
    """Say of each step whether it worked."""
    told = ((step, verdict_of_step(end)) for step, end in sorted(ends.items()))
    return [_Hanging(f"step {step}  ", verdict.sentence, COLORS[verdict.tone]) for step, verdict in told if verdict]


def _meanings(outcomes: Iterable[Outcome], plus_minus: str) -> list[_Hanging]:
    """Say what each number means. plus_minus: the sign before errors; "": there are none."""
    said = [(each.label, f"{each.meaning}; {each.good}") for each in outcomes]
    if plus_minus:
        said.append((plus_minus, "the standard error; the true number is within two of them in 95 of 100 cases"))
    return [_Hanging(f"{label}: ", meaning, "dim", indent=4) for label, meaning in said]


def _has_errors(ends: dict[int, RawEvent]) -> bool:
    return any({outcome.error_before, outcome.error_after} & ends[step].keys() for outcome, step in _rows(ends))


def _plus_minus(encoding: str) -> str:
    return "±" if encodable("±", encoding) == "±" else "+-"


def _models(ends: dict[int, RawEvent], encoding: str) -> list[Text]:
    """List times and models; a line is never folded, so that its path can be copied."""
    rows = [(f"step {step}", end.get("seconds"), one_line(end.get("model"))) for step, end in sorted(ends.items())]
    total = sum(seconds for _, seconds, _ in rows if isinstance(seconds, int | float))
    lines = [f"{name:<7} {duration(seconds):>6}  {encodable(model, encoding)}" for name, seconds, model in rows]
    lines.append(f"{'total':<7} {duration(total):>6}")
    starts = {step: own_models(end) for step, end in sorted(ends.items())}
    lines += [f"step {step} started from {encodable(own, encoding)}" for step, own in starts.items() if own]
    return [Text(line.rstrip(), no_wrap=True, overflow="ignore") for line in lines]


def _answer_title(when: str, sample: RawEvent) -> Text:
    title = Text(f"{when:<6}  {verdict_of(sample)}".rstrip(), style="bold")
    title.highlight_regex(r"\bgood$", "green")
    title.highlight_regex(r"\bbad$", "red")
    return title


@dataclass(frozen=True)
class _Hanging:
    """A label and a text that is folded between words, its later lines set in."""

    label: str
    text: str
    style: str
    indent: int = 8

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        room = max(options.max_width - self.indent, 1)
        first, *rest = Text.assemble(self.label, (self.text, self.style)).wrap(console, options.max_width)
        for line in (first, *rest):
            line.rstrip()
        yield first
        if rest:
            for line in Text(" ", self.style).join(rest).wrap(console, room):
                line.rstrip()
                yield Text(" " * self.indent).append_text(line)


@dataclass(frozen=True)
class _Folded:
    """A text indented and folded, whole, without trailing spaces."""

    text: Text

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for line in self.text.wrap(console, max(options.max_width - 4, 1), overflow="fold"):
            yield Text("    ").append_text(line)


def _folded(text: str, encoding: str) -> _Folded:
    return _Folded(Text(encodable(visible(text.strip()), encoding)))
