"""The panel that a terminal shows while a run goes on: `Board` is what stands in it, for any width, from the events and
the viewer's clock; `Live` draws it.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from types import TracebackType
from typing import TYPE_CHECKING

from rich import live
from rich.console import Console, Group, RenderableType
from rich.control import Control
from rich.segment import ControlType
from rich.text import Text

from jobs.events import RawEvent
from jobs.lines import LINES, checkpoint_text, error_text, marked, plan_lines, warning_line
from jobs.words import FORMATS, LABELS, STEPS, Pace, duration, facts, number, one_line, visible

if TYPE_CHECKING:
    from typing_extensions import Self

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
            self._print_above(marked(warning_line(event)))
        elif event["kind"] == "error":
            self._print_above(marked(visible(error_text(event))))

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
