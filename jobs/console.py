"""What a person sees of a run, drawn from its events and nothing else: here, over SSH, or from an old file alike.

`Plain` writes lines for pipes and logs, `Live` draws a panel on a terminal, `report` is the table at the end.
Kinds and fields that a newer writer added are ignored. Text from a model is shown, never obeyed: see `visible`.
"""

from __future__ import annotations

import math
import re
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from itertools import pairwise
from types import TracebackType
from typing import TYPE_CHECKING, Any, TextIO

from rich import box, live
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.control import Control
from rich.segment import ControlType
from rich.table import Table
from rich.text import Text

from jobs.errors import ToolkitError
from jobs.events import effective

if TYPE_CHECKING:
    from typing_extensions import Self

RawEvent = dict[str, Any]

STEPS = {1: "supervised fine-tuning", 2: "reward model", 3: "PPO"}
ROWS = {1: "rows", 2: "pairs", 3: "prompts"}
# The names of a plan's `data`: what became of the rows.
FATES = {
    "rows": ("", "rows"),
    "empty_prompt": ("left out", "empty prompts"),
    "empty_answer": ("left out", "empty answers"),
    "prompt_too_long": ("left out", "overlong prompts"),
    "identical_answers": ("left out", "identical answers"),
    "answer_cut": ("cut", "overlong answers"),
}

# How each number of a metrics event is written, and its label where that is not its name.
FORMATS = {
    "loss": ".4f", "lm_loss": ".4f", "accuracy": ".1%", "margin": ".3f",
    "policy_loss": ".4f", "value_loss": ".4f", "mean_reward": ".2f", "kl": ".3f", "entropy": ".3f",
    "clip_fraction": ".1%", "response_length": ".1f", "eos_share": ".1%",
    "learning_rate": ".3g", "grad_norm": ".2f", "tokens_per_s": ".0f",
}  # fmt: skip
LABELS = {"mean_reward": "reward", "tokens_per_s": "tok/s"}
PLAIN_NUMBERS = {
    1: ("loss", "learning_rate", "grad_norm"),
    2: ("loss", "lm_loss", "accuracy", "margin"),
    3: ("policy_loss", "value_loss", "kl", "mean_reward"),
}
CURVES = {1: ("loss",), 2: ("loss", "accuracy"), 3: ("mean_reward", "kl")}
GRID = {
    1: ("learning_rate", "grad_norm", "tokens_per_s"),
    2: ("margin", "lm_loss", "learning_rate", "grad_norm", "tokens_per_s"),
    3: (
        "policy_loss", "value_loss", "entropy", "clip_fraction", "response_length", "eos_share",
        "grad_norm", "learning_rate", "tokens_per_s",
    ),
}  # fmt: skip
GOOD_CURVE = {"mean_reward": "green", "accuracy": "green", "loss": "cyan", "kl": "yellow"}


@dataclass(frozen=True)
class Outcome:
    """One row of the report: two fields of an `end` event."""

    short: str
    long: str
    before: str
    after: str
    spec: str


OUTCOMES = {
    1: (Outcome("perplexity", "perplexity", "perplexity_before", "perplexity_after", ".2f"),),
    2: (Outcome("accuracy", "accuracy on pairs", "reward_accuracy_before", "reward_accuracy", ".1%"),),
    3: (
        Outcome("good answers", "good answers, by the rule", "good_share_before", "good_share_after", ".1%"),
        Outcome("reward", "mean reward", "mean_reward_before", "mean_reward_after", ".2f"),
        Outcome("kl", "KL to the reference", "kl_before", "kl", ".3f"),
        Outcome("length", "response length, tokens", "response_length_before", "response_length_after", ".1f"),
        Outcome("eos", "answers that ended (EOS)", "eos_share_before", "eos_share_after", ".1%"),
    ),
}


# --- words and numbers ---------------------------------------------------------------------------------------------

# Control characters (C0, C1, DEL), line separators, and the marks that turn text around; newline and tab may stay.
_UNSAFE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def visible(text: object) -> str:
    """Text as it can be shown: what a terminal would obey is spelt out (`\\x1b[2J`)."""
    return _UNSAFE.sub(lambda match: match[0].encode("unicode_escape").decode(), str(text))


def one_line(text: object) -> str:
    return " ".join(visible(text).split())


def encodable(text: str, encoding: str) -> str:
    return text.encode(encoding, "backslashreplace").decode(encoding)


def number(value: object, spec: str) -> str:
    """`value` by a format `spec`; what is tiny, huge, not finite or no number at all stays visible."""
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
        return f"{x:.1e}"
    return text


def duration(seconds: object) -> str:
    """42s, 3m10s, 1h02m, 2d05h."""
    try:
        whole = round(float(seconds))  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        return "?"
    minutes, rest = divmod(max(whole, 0), 60)
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


def plural(count: object, noun: str) -> str:
    return f"{count} {noun}" if count != 1 else f"{count} {noun.removesuffix('s')}"


def data_fates(data: object, step: int) -> str:
    """{"rows": 9, "empty_answer": 3, "answer_cut": 0} -> `9 rows; left out: 3 empty answers`."""
    groups: dict[str, list[str]] = {}
    for name, count in data.items() if isinstance(data, dict) else ():
        fate, noun = FATES.get(name, ("", name.replace("_", " ")))
        if count and not (name == "identical_answers" and step != 2):  # a pair says nothing then; a row does
            groups.setdefault(fate, []).append(plural(count, noun))
    return "; ".join((f"{fate}: " if fate else "") + ", ".join(counts) for fate, counts in groups.items())


def facts(end: RawEvent, arrow: str) -> list[str]:
    """`perplexity 31.20 -> 8.41`, for what the `end` event holds."""
    found = []
    for outcome in OUTCOMES.get(end.get("step", 0), ()):
        before, after = end.get(outcome.before), end.get(outcome.after)
        if after is not None:
            start = "" if before is None else f"{number(before, outcome.spec)} {arrow} "
            found.append(f"{outcome.short} {start}{number(after, outcome.spec)}")
    return found


class Pace:
    """Time left of the current step, from the updates that this process has seen made."""

    def __init__(self) -> None:
        self._step: object = None
        self._start: tuple[int, float] | None = None  # update, elapsed_s
        self._latest: tuple[int, float] = (0, 0.0)
        self._updates = 0

    def feed(self, event: RawEvent) -> None:
        step = event.get("step")
        if event["kind"] == "resumed":
            # After a resume, elapsed_s may go on or begin anew: measure from the first update that follows.
            self._step, self._latest = step, (event.get("from_update", 0), 0.0)
            self._start = None if self._latest[0] else (0, 0.0)
        elif event["kind"] == "metrics":
            now = (event.get("update", 0), float(event.get("elapsed_s", math.nan)))
            if step != self._step or now[0] < self._latest[0]:
                self._step, self._start = step, (0, 0.0)
            self._start, self._latest, self._updates = self._start or now, now, event.get("updates", 0)

    @property
    def eta_s(self) -> float | None:
        if self._start is None or self._latest[0] <= self._start[0] or self._latest[0] >= self._updates:
            return None
        seconds = (self._latest[1] - self._start[1]) / (self._latest[0] - self._start[0]) * (self._updates - self._latest[0])
        return seconds if math.isfinite(seconds) else None


# --- lines ---------------------------------------------------------------------------------------------------------


def head(event: RawEvent) -> str:
    return "" if event.get("step") is None else f"step {event['step']}  "


def plan_lines(event: RawEvent) -> list[str]:
    step, rows = event.get("step", 0), ROWS.get(event.get("step", 0), "rows")
    batch = (
        f"batch {event.get('global_batch')} = {event.get('micro_batch')} micro x "
        f"{event.get('gradient_accumulation')} accumulation x {plural(event.get('ranks'), 'ranks')}"
    )
    device = f"on {event.get('device')} ({event.get('device_reason')}), {event.get('precision')}, ZeRO {event.get('zero_stage')}"
    lines = [f"{STEPS.get(step, 'plan')}: {plural(event.get('updates'), 'updates')}, {plural(event.get('rows'), rows)}", batch, device]
    if fates := data_fates(event.get("data"), step):
        lines.append(f"data of all steps: {fates}")
    return [head(event) + one_line(line) for line in lines]


def warning_line(event: RawEvent) -> str:
    hint = f"  hint: {one_line(event['hint'])}" if event.get("hint") else ""
    return f"{head(event)}warning: {one_line(event.get('message'))}{hint}"


def error_text(event: RawEvent) -> str:
    where = "".join(f"{name} {event[name]}, " for name in ("step", "rank") if event.get(name) is not None)
    what = f"{where.removesuffix(', ')}: {event.get('message')}" if where else str(event.get("message"))
    return str(ToolkitError(what, why=str(event.get("why") or ""), hint=str(event.get("hint") or "")))


def checkpoint_text(event: RawEvent) -> str:
    return f"checkpoint at update {event.get('update')}: {size(event.get('size_bytes'))} in {duration(event.get('seconds'))}"


def resumed_text(event: RawEvent) -> str:
    return f"resumed after update {event['from_update']}" if event.get("from_update") else "starts anew"


def sample_line(event: RawEvent) -> str:
    prompt, response = (visible(event.get(name)).replace("\n", "\\n") for name in ("prompt", "response"))
    if len(prompt) > 100:
        prompt = f"({len(prompt) - 100} characters) ... {prompt[-100:]}"
    if len(response) > 300:
        response = f"{response[:300]} ... ({len(response) - 300} more characters)"
    verdict = verdict_of(event)
    return f"{head(event)}{event.get('when')}  {verdict}prompt: {prompt}  response: {response}"


def verdict_of(sample: RawEvent) -> str:
    good = {True: "good  ", False: "bad  "}.get(sample.get("good"), "")  # type: ignore[arg-type]
    return f"reward {number(sample.get('reward'), '.2f')}  {good}"


def metrics_line(event: RawEvent, eta_s: float | None) -> str:
    parts = [f"update {event.get('update')}/{event.get('updates')}"]
    for name in PLAIN_NUMBERS.get(event.get("step", 0), ()):
        if name in event:
            parts.append(f"{LABELS.get(name, name)} {number(event[name], FORMATS[name])}")
    parts.append(f"{number(event.get('tokens_per_s'), '.0f')} tok/s")
    if eta_s is not None:
        parts.append(f"eta {duration(eta_s)}")
    return head(event) + "  ".join(parts)


def end_line(event: RawEvent) -> str:
    parts = [f"done in {duration(event.get('seconds'))}", *facts(event, "->"), f"model {one_line(event.get('model'))}"]
    return head(event) + "  ".join(parts)


LINES: dict[str, Callable[[RawEvent], list[str]]] = {
    "plan": plan_lines,
    "progress": lambda event: [head(event) + one_line(event.get("doing"))],
    "sample": lambda event: [sample_line(event)],
    "checkpoint": lambda event: [f"{head(event)}{checkpoint_text(event)}, {one_line(event.get('path'))}"],
    "warning": lambda event: [warning_line(event)],
    "error": lambda event: [visible(error_text(event))],
    "resumed": lambda event: [head(event) + resumed_text(event)],
    "end": lambda event: [end_line(event)],
}


def time_of(event: RawEvent) -> float:
    """Seconds; NaN where the event has no readable time."""
    try:
        return datetime.fromisoformat(str(event.get("time")).replace("Z", "+00:00")).timestamp()
    except ValueError:
        return math.nan


class Plain:
    """One line an event, for pipes and logs. Of the metrics: each step's first and last, and one now and then between.

    Now and then: 10 s at first, up to 60 s as a step gets long; by the events' own time, so that a file always
    gives the same lines.
    """

    def __init__(self, stream: TextIO) -> None:
        self._console = console_on(stream)
        self._pace = Pace()
        self._held: RawEvent | None = None  # newest metrics event that was not printed
        self._printed: tuple[object, float] = (None, math.nan)  # step and time of the newest that was

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._release()

    def feed(self, event: RawEvent) -> None:
        kind = event["kind"]
        if kind in ("metrics", "resumed"):
            self._pace.feed(event)
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
            self._print(metrics_line(self._held, self._pace.eta_s))
            self._printed = (self._held.get("step"), time_of(self._held))
            self._held = None

    def _print(self, line: str) -> None:
        self._console.print(encodable(line, self._console.encoding))


# --- panel ---------------------------------------------------------------------------------------------------------


def sparkline(values: Sequence[float], width: int) -> tuple[str, float, float]:
    """A curve in `width` characters, and the lowest and highest value drawn. Not finite: `?`."""
    count = len(values)
    if count > width:
        cuts = [i * count // width for i in range(width + 1)]
        values = [sum(values[a:b]) / (b - a) for a, b in pairwise(cuts)]
    finite = [value for value in values if math.isfinite(value)]
    low, high = (min(finite), max(finite)) if finite else (math.nan, math.nan)
    scale = 7.999 / (high - low) if high > low else 0.0
    return "".join("▁▂▃▄▅▆▇█"[int((value - low) * scale)] if math.isfinite(value) else "?" for value in values), low, high


@dataclass
class StepView:
    """What the panel knows of one step."""

    updates: int = 0
    update: int = 0
    metrics: RawEvent = field(default_factory=dict)
    metrics_at: float | None = None  # when it was fed, by the viewer's clock
    curves: dict[str, list[tuple[int, float]]] = field(default_factory=dict)  # name -> (update, value)
    doing: str = ""
    doing_at: float = 0.0
    saved: str = ""
    failed: str = ""
    end: RawEvent | None = None

    def feed(self, event: RawEvent, now: float) -> None:
        kind = event["kind"]
        self.updates = event.get("updates", self.updates)
        if kind == "metrics":
            self.update, self.metrics, self.metrics_at, self.doing = event.get("update", 0), event, now, ""
            for name in CURVES.get(event.get("step", 0), ()):
                if name in event:
                    self.curves.setdefault(name, []).append((self.update, float(event[name])))
        elif kind == "progress":
            self.doing, self.doing_at = one_line(event.get("doing")), now
        elif kind == "checkpoint":
            self.saved, self.doing = checkpoint_text(event), ""
        elif kind == "error":
            self.failed = one_line(event.get("message"))
        elif kind == "end":
            self.end = event
        elif kind == "resumed":
            self._drop_after(event.get("from_update", 0))

    def _drop_after(self, update: int) -> None:
        self.update, self.metrics, self.metrics_at, self.end, self.failed, self.doing = update, {}, None, None, "", ""
        self.curves = {name: [point for point in points if point[0] <= update] for name, points in self.curves.items()}


class Board:
    """The panel as lines, for any width; `now` is the viewer's clock in seconds and moves only elapsed times."""

    def __init__(self) -> None:
        self._steps: dict[int, StepView] = {}
        self._current = 0
        self._pace = Pace()

    def feed(self, event: RawEvent, now: float) -> None:
        step = event.get("step", self._current)  # an error may be nobody's: it is the current step's
        if step not in STEPS or event["kind"] not in ("metrics", *LINES):
            return
        if event["kind"] in ("metrics", "resumed"):
            self._pace.feed(event)
        self._current = step
        self._steps.setdefault(step, StepView()).feed(event, now)

    def lines(self, width: int, now: float) -> list[Text]:
        lines = [self._finished(step, view.end, width) for step, view in sorted(self._steps.items()) if view.end]
        view = self._steps.get(self._current)
        if view and not view.end:
            lines += self._running(self._current, view, width, now)
        for line in lines:
            line.no_wrap = True
            line.truncate(width, overflow="ellipsis")
        return lines

    def _finished(self, step: int, end: RawEvent, width: int) -> Text:
        line = _title("✓", "green", step)
        line.append(f"{duration(end.get('seconds')):<7}")
        for fact in facts(end, "→"):
            if line.cell_len + len(fact) + 2 > width:
                break
            line.append(f"  {fact}")
        return line

    def _running(self, step: int, view: StepView, width: int, now: float) -> list[Text]:
        share = view.update / view.updates if view.updates else 0.0
        since = now - view.metrics_at if view.metrics_at is not None else 0.0
        title = _title("✗", "red", step) if view.failed else _title("▸", "cyan", step)
        title.append(f"{view.update:>{len(str(view.updates))}} of {view.updates}  {share:4.0%}")
        if view.metrics_at is not None:
            title.append(f"  {duration(float(view.metrics.get('elapsed_s', 0)) + since)}")
        if self._pace.eta_s is not None and view.metrics_at is not None and not view.failed:
            title.append(f"  eta {duration(self._pace.eta_s - since)}")
        lines = [title, _bar(share, width - 2)]
        if view.metrics:
            names = [name for name in CURVES[step] if view.curves.get(name)]
            lines += [Text(""), *(self._curve(name, view, width) for name in names)]
            lines += [Text(""), *_grid([name for name in GRID[step] if name in view.metrics], view.metrics, width)]
        return [*lines, Text(""), _status(view, now)]

    def _curve(self, name: str, view: StepView, width: int) -> Text:
        spec = FORMATS[name]
        spark, low, high = sparkline([value for _, value in view.curves[name]], min(max(width - 45, 8), 60))
        line = _cell(name, view.metrics.get(name))
        line.append(spark, style=GOOD_CURVE[name])
        line.append(f"  {number(low, spec)} to {number(high, spec)}", style="dim")
        return line


def _title(mark: str, style: str, step: int) -> Text:
    return Text.assemble((mark, style), " ", (f"step {step}", "bold"), f"  {STEPS[step]:<22}  ")


def _bar(share: float, width: int) -> Text:
    done = int(min(max(share, 0.0), 1.0) * width)
    return Text.assemble("  ", ("━" * done, "cyan"), ("─" * (width - done), "dim"))


def _cell(name: str, value: object) -> Text:
    return Text.assemble((f"  {LABELS.get(name, name):<16}", "dim"), (f"{number(value, FORMATS[name]):<8}", "bold"))


def _grid(names: Sequence[str], metrics: RawEvent, width: int) -> list[Text]:
    """Label and number in columns, as even as they come."""
    most = max(width // 26, 1)
    columns = math.ceil(len(names) / math.ceil(len(names) / most)) if names else 1
    return [Text().join(_cell(name, metrics[name]) for name in names[start : start + columns]) for start in range(0, len(names), columns)]


def _status(view: StepView, now: float) -> Text:
    if view.failed:
        return Text.assemble("  ", ("failed: ", "red"), view.failed)
    if view.doing:
        return Text(f"  {view.doing}  {duration(now - view.doing_at)}")
    return Text(f"  {view.saved}", style="dim")


class Live:
    """A panel that is drawn four times a second, with plans, warnings and errors above it."""

    def __init__(self, console: Console, clock: Callable[[], float] = time.monotonic) -> None:
        self._console = console
        self._clock = clock
        self._board = Board()
        self._lock = threading.Lock()  # the board: fed here, drawn by rich's thread
        self._drawn: list[int] = []  # cells of each line on the screen
        self._live = live.Live(console=console, get_renderable=self._frame, redirect_stdout=False, redirect_stderr=False)

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._live.stop()

    def feed(self, event: RawEvent) -> None:
        with self._lock:
            self._board.feed(event, self._clock())
        if event["kind"] == "plan":
            self._print_above(Text("\n".join(plan_lines(event)), style="dim"))
        elif event["kind"] == "warning":
            self._print_above(_marked(warning_line(event)))
        elif event["kind"] == "error":
            self._print_above(_marked(visible(error_text(event))))

    def _print_above(self, text: Text) -> None:
        self._live.refresh()  # makes good a resize, which print does not
        self._console.print(text, soft_wrap=False)

    def _frame(self) -> RenderableType:
        width = self._console.width - 1  # the last column may wrap
        with self._lock:
            lines = [Text(""), *self._board.lines(width, self._clock())]
        # A terminal made narrower has folded the lines that we drew, and rich goes up by lines, not by folds.
        folds = sum(max(cells - 1, 0) // self._console.width for cells in self._drawn)
        if folds and self._live.is_started:
            self._console.control(Control(*((ControlType.CURSOR_UP, 1), (ControlType.ERASE_IN_LINE, 2)) * folds))
        self._drawn = [line.cell_len for line in lines]
        return Group(*lines)


def _marked(text: str) -> Text:
    """Colour for the words that already say what a line is."""
    marked = Text(text)
    marked.highlight_regex(r"(?m)^(step \d  )?warning:", "yellow")
    marked.highlight_regex(r"^error:", "bold red")
    marked.highlight_regex(r"(?m)(^  why:|^hint:|  hint:)", "bold")
    return marked


def console_on(stream: TextIO) -> Console:
    # A piped line must stay one line, and our text contains [b, t] and [/paths], which rich takes for markup.
    return Console(file=stream, soft_wrap=True, markup=False, highlight=False, emoji=False)


def view(stream: TextIO | None = None) -> Plain | Live:
    """`Live` on a terminal that can draw it, else `Plain`; on standard error if no stream is given."""
    stream = stream or sys.stderr
    console = console_on(stream)
    can_draw = console.is_terminal and not console.is_dumb_terminal and console.encoding.startswith("utf")
    return Live(console) if can_draw else Plain(stream)


# --- the end -------------------------------------------------------------------------------------------------------


def report(events: Iterable[RawEvent], encoding: str = "utf-8") -> RenderableType:
    """Numbers before and after, times, models, and three prompts with their answers before and after."""
    held = effective(events)
    ends = {event.get("step", 0): event for event in held if event["kind"] == "end"}
    samples: dict[str, dict[str, RawEvent]] = {}  # prompt -> when -> sample; a resumed run may write one twice
    for event in held:
        if event["kind"] == "sample" and event.get("step") == 3:
            samples.setdefault(str(event.get("prompt")), {})[str(event.get("when"))] = event
    parts: list[RenderableType] = [_outcomes(ends), Text(""), *_models(ends, encoding)] if ends else [Text("no step has ended yet")]
    for index, (prompt, answers) in enumerate(list(samples.items())[:3], start=1):
        parts += [Text(""), Text(f"prompt {index}", style="bold"), _folded(prompt, encoding)]
        for when in ("before", "after"):
            if sample := answers.get(when):
                parts += [_answer_title(when, sample), _folded(str(sample.get("response")), encoding)]
    return Group(*parts)


def _outcomes(ends: dict[int, RawEvent]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    table.add_column("step")
    table.add_column("on held-out data")
    table.add_column("before", justify="right")
    table.add_column("after", justify="right")
    for step, end in sorted(ends.items()):
        title = f"{step}  {STEPS.get(step, '')}"
        for outcome in OUTCOMES.get(step, ()):
            before, after = end.get(outcome.before), end.get(outcome.after)
            if before is not None or after is not None:
                table.add_row(title, outcome.long, *("-" if x is None else number(x, outcome.spec) for x in (before, after)))
                title = ""
    return table


def _models(ends: dict[int, RawEvent], encoding: str) -> list[Text]:
    """Never folded by us: a path is there to be copied."""
    rows = [(f"step {step}", end.get("seconds"), one_line(end.get("model"))) for step, end in sorted(ends.items())]
    total = sum(seconds for _, seconds, _ in rows if isinstance(seconds, int | float))
    lines = [f"{name:<7} {duration(seconds):>6}  {encodable(model, encoding)}" for name, seconds, model in rows]
    return [Text(line.rstrip(), no_wrap=True, overflow="ignore") for line in [*lines, f"{'total':<7} {duration(total):>6}"]]


def _answer_title(when: str, sample: RawEvent) -> Text:
    title = Text(f"{when:<6}  {verdict_of(sample)}".rstrip(), style="bold")
    title.highlight_regex(r"\bgood$", "green")
    title.highlight_regex(r"\bbad$", "red")
    return title


@dataclass(frozen=True)
class _Folded:
    """A text indented and folded, whole, without trailing spaces."""

    text: Text

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for line in self.text.wrap(console, max(options.max_width - 4, 1), overflow="fold"):
            yield Text("    ").append_text(line)


def _folded(text: str, encoding: str) -> _Folded:
    return _Folded(Text(encodable(visible(text.strip()), encoding)))


def print_report(events: Iterable[RawEvent], console: Console | None = None) -> None:
    """On standard output: the report is data."""
    console = console or console_on(sys.stdout)
    if console.is_terminal:
        console.line()
    console.print(report(events, console.encoding), soft_wrap=False, crop=False)


def print_error(error: object, console: Console | None = None) -> None:
    """A ToolkitError as it stands, its labels in colour; on standard error."""
    console = console or console_on(sys.stderr)
    console.print(_marked(encodable(visible(error), console.encoding)))
