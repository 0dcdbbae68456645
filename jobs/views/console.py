"""The views of a run, drawn from its events and nothing else.

They are the same here, over SSH, and from an old file: a panel or lines while the run trains
(panel.py, plain.py), and a table at the end (final_table.py), with the words of formatting.py.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable
from typing import TextIO

from rich.console import Console

from jobs.events import RawEvent
from jobs.formatting import encodable, visible
from jobs.views.final_table import report
from jobs.views.panel import Live
from jobs.views.plain import Plain, Quiet, marked


def console_on(stream: TextIO) -> Console:
    # Our text contains [b, t] and [/paths], which rich would take for markup.
    console = Console(file=stream, markup=False, highlight=False, emoji=False)
    console.soft_wrap = not console.is_terminal  # a piped line stays one line; a terminal would break words
    return console


def view(
    stream: TextIO | None = None, clock: Callable[[], float] = time.monotonic, *, quiet: bool = False
) -> Plain | Live:
    """Return `Live` for a terminal that can draw it, else `Plain`; default: standard error.

    clock: of the panel, in seconds. quiet: show warnings and errors alone.
    """
    console = console_on(stream or sys.stderr)
    if quiet:
        return Quiet(console)
    can_draw = console.is_terminal and not console.is_dumb_terminal and console.encoding.startswith("utf")
    return Live(console, clock) if can_draw else Plain(console)


def print_report(events: Iterable[RawEvent], console: Console | None = None) -> None:
    """Print the report on standard output, since it is data."""
    console = console or console_on(sys.stdout)
    if console.is_terminal:
        console.line()
    console.print(report(events, console.encoding), soft_wrap=False, crop=False)


def print_error(error: object, console: Console | None = None) -> None:
    """Print a ToolkitError on standard error, with its labels in colour."""
    console = console or console_on(sys.stderr)
    console.print(marked(encodable(visible(error), console.encoding)))
