"""The panel that a terminal shows while a run trains.

`Board` makes its lines for any width, from the events and the viewer's clock. `Live` draws them.
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
from rich.cells import cell_len
from rich.console import Console, Group, RenderableType
from rich.control import Control
from rich.segment import ControlType
from rich.text import Text

from jobs.events import SHOWN, Curve, RawEvent
from jobs.formatting import (
    duration,
    facts,
    fold,
    is_for_terminal,
    money,
    number,
    one_line,
    plural,
    tail,
    verdict_of,
    visible,
)
from jobs.pace import JobPace, Pace
from jobs.steps import STEPS, label_of
from jobs.views.gpus import GpuUsage, cards_text
from jobs.views.plain import (
    LINES,
    all_steps_text,
    checkpoint_text,
    error_text,
    head,
    marked,
    plan_lines,
    resumed_text,
    warning_line,
)

if TYPE_CHECKING:
    from typing_extensions import Self


def sparkline(values: Sequence[float], width: int) -> tuple[str, float, float]:
    """Draw a curve in `width` characters; return it with the lowest and highest value drawn.

    A value that is not finite is drawn as `?`.
    """
    count = len(values)
    if count > width:
        cuts = [i * count // width for i in range(width + 1)]
        values = [sum(values[a:b]) / (b - a) for a, b in pairwise(cuts)]
    finite = [value for value in values if math.isfinite(value)]
    low, high = (min(finite), max(finite)) if finite else (math.nan, math.nan)
    scale = 7.999 / (high - low) if high > low else 0.0
    return (
        "".join("▁▂▃▄▅▆▇█"[int((value - low) * scale)] if math.isfinite(value) else "?" for value in values),
        low,
        high,
    )


@dataclass(frozen=True)
class BoxView:
    """What the panel knows of the box on which a run trains, from the process that watches it.

    Times are by the viewer's clock, in seconds.
    """

    name: str
    line: str = "connecting"
    is_good: bool = True  # whether nothing needs a person's attention
    away_at: float | None = None  # since when nothing has come
    away_why: str = ""
    cards: tuple[GpuUsage, ...] = ()
    price_per_hour: float | None = None
    currency: str = ""
    started_at: float | None = None  # the job
    ended_at: float | None = None
    steps: tuple[int, ...] = ()  # what the job is to do; (): not known


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
    sample: RawEvent | None = None
    end: RawEvent | None = None

    def feed(self, event: RawEvent, now: float) -> None:
        kind = event["kind"]
        self.updates = int(event.get("updates", self.updates))
        if kind == "metrics":
            self.update, self.metrics, self.metrics_at, self.doing = int(event.get("update", 0)), event, now, ""
            for name in STEPS[event["step"]].curves(far=True) if "step" in event else ():
                if name in event:
                    self.curves.setdefault(name, []).append((self.update, float(event[name])))
        elif kind == "progress":
            self.doing, self.doing_at = one_line(event.get("doing")), now
        elif kind == "checkpoint":
            self.saved, self.doing = checkpoint_text(event), ""
        elif kind == "sample":
            self.sample = event if is_for_terminal(event) else self.sample
        elif kind == "error":
            self.failed = one_line(event.get("what"))
        elif kind == "end":
            self.end = event
        elif kind == "resumed":
            self._drop_after(event.get("from_update", 0))

    def _drop_after(self, update: int) -> None:
        self.update, self.metrics, self.metrics_at, self.end, self.failed, self.doing = update, {}, None, None, "", ""
        self.curves = {name: [point for point in points if point[0] <= update] for name, points in self.curves.items()}
        if not update or (self.sample or {}).get("when") == "after":
            self.sample = None


class Board:
    """The panel as lines, for any width.

    `now` is the viewer's clock in seconds, and changes only elapsed times.
    """

    def __init__(self) -> None:
        self._steps: dict[int, StepView] = {}
        self._current = 0
        self._pace, self._job_pace = Pace(), JobPace()
        self._box: BoxView | None = None

    def feed_box(self, box: BoxView) -> None:
        """Take the present state of the box, for a run on another machine."""
        self._box = box

    def feed(self, event: RawEvent, now: float) -> None:
        step = event.get("step", self._current)  # an error without a step belongs to the current one
        if step not in STEPS or event["kind"] not in ("metrics", *LINES):
            return
        if event["kind"] in ("metrics", "resumed"):
            self._pace.feed(event)
        self._job_pace.feed(event)
        self._current = step
        self._steps.setdefault(step, StepView()).feed(event, now)

    def lines(self, width: int, now: float, height: int | None = None) -> list[Text]:
        box = self._box
        running_at = now if box is None or box.ended_at is None else box.ended_at  # a run that is over grows no older
        ends = [(step, view.end) for step, view in sorted(self._steps.items()) if view.end]
        lines = [line for step, end in ends for line in self._finished(step, end, width)]
        view = self._steps.get(self._current)
        if view and not view.end:
            lines += self._running(self._current, view, width, running_at)
        if box:
            # The box takes 6 lines: an empty one, cards, cost, prompt, answer, state.
            spare = height - len(lines) - 6 if height else 0
            lines += [Text(""), *self._far(box, view, width, now, spare)]
            if height and len(lines) > height:
                lines = [line for line in lines if line.plain.strip()]
            if height and len(lines) > height:
                lines = [*lines[: height - 1], lines[-1]]  # the last line says whether the rest is up to date
        for line in lines:
            line.no_wrap = True
            _fit(line, width)
        return lines

    def _finished(self, step: int, end: RawEvent, width: int) -> list[Text]:
        """Show a finished step's numbers, on more lines where one has no room for all."""
        lines = [_title("✓", "green", step).append(f"{duration(end.get('seconds')):<7}")]
        for fact in facts(end, "→"):
            if lines[-1].cell_len + len(fact) + 2 > width:
                lines.append(Text())
            lines[-1].append(f"  {fact}")
        return lines

    def _running(self, step: int, view: StepView, width: int, now: float) -> list[Text]:
        share = view.update / view.updates if view.updates else 0.0
        since = now - view.metrics_at if view.metrics_at is not None else 0.0
        title = _title("✗", "red", step) if view.failed else _title("▸", "cyan", step)
        if view.updates:  # while the step is being prepared, the number of updates is not known yet
            title.append(f"{view.update:>{len(str(view.updates))}} of {view.updates}  {share:4.0%}")
        if view.metrics_at is not None:
            title.append(f"  {duration(float(view.metrics.get('elapsed_s', 0)) + since)}")
        if (left_s := self._left_s(view, now)) is not None:
            title.append(f"  eta {duration(left_s)}")
        job_left_s = self._job_left_s(view, now)
        after_bar = f"  {all_steps_text(job_left_s)}" if job_left_s is not None else ""
        bar = _bar(share, max(width - 2 - len(after_bar), 8)).append(after_bar)
        lines = [title, *([bar] if view.updates else [])]
        if view.metrics:
            curves = STEPS[step].curves(far=self._box is not None)
            curves = {name: curve for name, curve in curves.items() if view.curves.get(name)}
            lines += [Text(""), *(self._curve(name, curve, view, width) for name, curve in curves.items())]
            numbers = [name for name in STEPS[step].panel if name in view.metrics and name not in curves]
            lines += [Text(""), *_grid(numbers, view.metrics, width)]
        status = _status(view, now)
        return lines if self._box and not status.plain.strip() else [*lines, Text(""), status]

    def _left_s(self, view: StepView | None, now: float) -> float | None:
        """Return the time until the running step has made its updates."""
        is_over = self._box is not None and self._box.ended_at is not None
        if view is None or view.end or view.failed or view.metrics_at is None or self._pace.eta_s is None or is_over:
            return None
        return max(self._pace.eta_s - (now - view.metrics_at), 0.0)

    def _job_left_s(self, view: StepView | None, now: float) -> float | None:
        """Return the time until all steps have ended, if steps follow this one."""
        is_over = self._box is not None and self._box.ended_at is not None
        if view is None or view.failed or self._job_pace.left_s is None or is_over:
            return None
        since = 0.0 if view.metrics_at is None else now - view.metrics_at
        return max(self._job_pace.left_s - since, 0.0)

    def _far(self, box: BoxView, view: StepView | None, width: int, now: float, spare: int) -> list[Text]:
        lines, cells = [], max(width - 18, 8)
        if box.cards:
            label = "gpu" if len(box.cards) == 1 else f"{len(box.cards)} gpus"
            lines.append(_labelled(label, cards_text(box.cards, cells)))
        if cost := self._cost(box, view, now):
            lines.append(_labelled("cost", _fitting(cost, cells)))
        if view and view.sample:
            prompt, response = (one_line(view.sample.get(name)) for name in ("prompt", "response"))
            answer = fold(f"{verdict_of(view.sample)}{response}", cells, 1 + min(max(spare, 0), 3))
            label = f"answer {one_line(view.sample.get('when', ''))}"  # before, or after training
            lines += [
                _labelled("prompt", tail(prompt, cells)),
                *(_labelled(label if i == 0 else "", part) for i, part in enumerate(answer)),
            ]
        mark, style = ("●", "green") if box.is_good and box.away_at is None else ("○", "yellow")
        state = box.line
        if box.away_at is not None:
            state += f" for {duration(now - box.away_at)}, reconnecting: {box.away_why}"
        box_line = Text.assemble("  ", (mark, style), f" {box.name:<12}  ", state if box.is_good else (state, style))
        return [*lines, box_line]

    def _cost(self, box: BoxView, view: StepView | None, now: float) -> list[str]:
        """Return the cost so far, the expected cost, and the price, most important first.

        The time of a step that has not begun is not known.
        """
        if box.price_per_hour is None or box.started_at is None:
            return []
        price = f"{money(box.price_per_hour, box.currency)}/h"
        seconds = max((now if box.ended_at is None else box.ended_at) - box.started_at, 0.0)
        spent = box.price_per_hour * seconds / 3600
        parts = [f"{money(spent, box.currency)} so far"]
        if box.ended_at is not None:
            return [f"{money(spent, box.currency)} for this job", f"{price} until the box is stopped"]
        if (left_s := self._job_left_s(view, now)) is not None:
            parts.append(f"about {money(spent + box.price_per_hour * left_s / 3600, box.currency)} when the job ends")
        elif (left_s := self._left_s(view, now)) is not None:
            later = [step for step in box.steps or STEPS if step > self._current]
            until = f"after step {self._current}" if later else "when the job ends"
            parts.append(f"about {money(spent + box.price_per_hour * left_s / 3600, box.currency)} {until}")
            if later and box.steps:
                parts.append(f"then {plural(len(later), 'steps').split()[1]} {' and '.join(map(str, later))}")
        return [*parts, f"at {price}"]

    def _curve(self, name: str, curve: Curve, view: StepView, width: int) -> Text:
        values = [value for _, value in view.curves[name]]
        # From all values: a long curve is drawn from means, which the newest value may exceed.
        _, low, high = sparkline(values, len(values))
        between = f"  {number(low, SHOWN[name].spec)} to {number(high, SHOWN[name].spec)}"
        line = _cell(name, view.metrics.get(name))
        spark, _, _ = sparkline(values, min(max(width - line.cell_len - len(between), 8), 60))
        line.append(spark, style=curve.color)
        line.append(between, style="dim")
        return line


def _fitting(parts: Sequence[str], cells: int) -> str:
    """Join the first parts, as many as there is room for, and at least one."""
    count = next((count for count in range(len(parts), 1, -1) if cell_len(", ".join(parts[:count])) <= cells), 1)
    return ", ".join(parts[:count])


def _fit(line: Text, width: int) -> None:
    """End a line that is too long with `…`, after a whole word if one ends in its second half."""
    if line.cell_len <= width:
        return
    whole = line.plain
    line.truncate(width - 1)
    kept = line.plain
    is_within_word = not kept.endswith(" ") and not whole[len(kept) :].startswith(" ")
    if is_within_word and (space := kept.rfind(" ")) > len(kept) // 2:
        line.right_crop(len(kept) - space)
    line.rstrip()
    line.append("…")


def _labelled(label: str, text: str) -> Text:
    return Text.assemble((f"  {label:<14}  ", "dim"), text)


def _title(mark: str, style: str, step: int) -> Text:
    return Text.assemble((mark, style), " ", (f"step {step}", "bold"), f"  {STEPS[step].title:<22}  ")


def _bar(share: float, width: int) -> Text:
    done = int(min(max(share, 0.0), 1.0) * width)
    return Text.assemble("  ", ("━" * done, "cyan"), ("─" * (width - done), "dim"))


def _cell(name: str, value: object) -> Text:
    label = f"  {label_of(name) + ' ':<16}"
    return Text.assemble((label, "dim"), (f"{number(value, SHOWN[name].spec):<{26 - len(label)}}", "bold"))


def _grid(names: Sequence[str], metrics: RawEvent, width: int) -> list[Text]:
    """Lay out labels and numbers in columns, as evenly as possible."""
    most = max(width // 26, 1)
    columns = math.ceil(len(names) / math.ceil(len(names) / most)) if names else 1
    return [
        Text().join(_cell(name, metrics[name]) for name in names[start : start + columns])
        for start in range(0, len(names), columns)
    ]


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
        self._live = live.Live(
            console=console, get_renderable=self._frame, redirect_stdout=False, redirect_stderr=False
        )

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.stop()

    def feed(self, event: RawEvent, *, at: float | None = None, quiet: bool = False) -> None:
        """Show an event.

        at: when it was written, by the clock of this panel; None: now. quiet: only the panel
        changes, and nothing is printed above it.
        """
        with self._lock:
            self._board.feed(event, self._clock() if at is None else at)
        if quiet:
            return
        if event["kind"] == "plan":
            self._print_above(Text("\n".join(plan_lines(event)), style="dim"))
        elif event["kind"] == "warning":
            self._print_above(marked(warning_line(event)))
        elif event["kind"] == "error":
            self._print_above(marked(visible(error_text(event))))
        elif event["kind"] == "resumed":  # printed, so that an error above it is known to be old
            self._print_above(Text(head(event) + resumed_text(event), style="dim"))

    def feed_box(self, box: BoxView) -> None:
        with self._lock:
            self._board.feed_box(box)

    def note(self, text: str) -> None:
        self._print_above(Text(visible(text), style="dim"))

    def _print_above(self, text: Text) -> None:
        self._live.refresh()  # redraws after a resize, which print does not
        self._console.print(text, soft_wrap=False)

    def _frame(self) -> RenderableType:
        width = self._console.width - 1  # the last column may wrap
        height = self._console.height - 2  # one line for the empty line above, one for the cursor below
        with self._lock:
            lines = [Text(""), *self._board.lines(width, self._clock(), height)]
        # A terminal that was made narrower has folded the lines that we drew, but rich moves up by
        # lines, not by folds.
        folds = sum(max(cells - 1, 0) // self._console.width for cells in self._drawn)
        if folds and self._live.is_started:
            self._console.control(Control(*((ControlType.CURSOR_UP, 1), (ControlType.ERASE_IN_LINE, 2)) * folds))
        self._drawn = [line.cell_len for line in lines]
        return Group(*lines)
