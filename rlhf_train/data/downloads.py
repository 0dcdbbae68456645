"""Fetch what a job needs from the hub before it runs: models, tokenizers and data sets, verified.

It needs neither a GPU nor torch, so it may run where an hour is cheap. A run then finds all files
in the cache, and asks the hub only whether they are the newest.
"""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TextIO

import huggingface_hub

from jobs.errors import ExitCode, ToolkitError
from jobs.flavours import refuse_family
from jobs.formatting import duration, size
from jobs.spec import Job
from jobs.views.console import console_on
from rlhf_train.data import hub
from rlhf_train.data.reading import find_data_set, search_folders
from rlhf_train.disk import read_json

SHOW_S, LINE_S = 0.5, 5.0  # between two states of a download: on a terminal, elsewhere
ERASE = "\r\x1b[K"  # the terminal's line

Say = Callable[[str], None]


@dataclass(frozen=True)
class Download:
    """What is wanted of one repository of the hub."""

    name: str
    kind: hub.Kind
    wanted: hub.Wanted
    listed: hub.Repository = field(default_factory=hub.Repository)  # the wanted files; empty: the hub did not say
    config: str | None = None  # of a data set; None: the default

    def received_bytes(self) -> int:
        return hub.received_bytes(self.name, self.kind, self.listed)

    def missing_bytes(self) -> int:
        return self.listed.size_bytes - self.received_bytes()


class DownloadScreen:
    """Prints lines that stay, and the passing state of a download."""

    def __init__(self, stream: TextIO) -> None:
        console = console_on(stream)
        self._stream = stream
        self._draws = console.is_terminal and not console.is_dumb_terminal
        self._width = console.width
        self._shown_at = time.monotonic()

    def say(self, text: str) -> None:
        self._write(f"{ERASE if self._draws else ''}{text}\n")
        self._shown_at = time.monotonic()

    def now(self, text: str) -> None:
        """Show a state: in place of the one before; without a terminal on a line, now and then."""
        if self._draws:
            # The cursor returns to the line's begin: another text takes the place of this one.
            self._write(f"{ERASE}{text[: self._width - 1]}\r")
        elif time.monotonic() >= self._shown_at + LINE_S:
            self.say(text)

    def _write(self, text: str) -> None:
        self._stream.write(text)  # in one piece, since others write to this stream, too
        self._stream.flush()


def downloads_of(job: Job, steps: Collection[int]) -> list[Download]:
    """List what `steps` load from the hub. Raises ToolkitError: a local path is not there."""
    whole, tokenizers = job.models_read(steps)
    models = [*((name, hub.model_files) for name in whole), *((name, hub.tokenizer_files) for name in tokenizers)]
    found = [Download(name, "model", wanted) for name, wanted in models if not hub.local(name)]
    for name, wanted in models:
        if hub.local(name):
            hub.model(name, wanted)
    sources = dict.fromkeys((entry.name, entry.config) for entry in job.data.entries)
    of_hub = [source for source in sources if find_data_set(source[0], search_folders()) is None]
    return found + [Download(name, "dataset", hub.data_files, config=config) for name, config in of_hub]


def describe(downloads: Sequence[Download]) -> list[str]:
    """Say what would be fetched, a line each. Nothing is, not even a data set's card."""
    lines = []
    for each in map(_asked, downloads):
        total, missing = each.listed.size_bytes, each.missing_bytes()
        at_most = "at most " if each.kind == "dataset" else ""
        what = "the hub does not answer" if not each.listed.files else "all is here" if not missing else ""
        lines.append(f"{each.name}: {what or f'would fetch {at_most}{size(missing)} of {size(total)}'}")
    return lines or [NOTHING]


NOTHING = "nothing to fetch: the job names no model or data set of a hub"


def fetch_all(downloads: Sequence[Download], screen: DownloadScreen, flavour: str = "") -> None:
    """Fetch and verify all, and show it. Raises ToolkitError and OSError as a run would.

    What an earlier call has fetched is kept, so the same call resumes. flavour: of this stack, if
    it is known; a model that it lacks is refused after its config.json has come, before all else.
    """
    huggingface_hub.utils.disable_progress_bars()
    for model in [each.name for each in downloads if each.kind == "model" and flavour]:
        config = read_json(Path(hub.model(model, hub.config_files)) / "config.json")
        refuse_family(model, config if isinstance(config, dict) else {}, flavour)
    listed = [_asked(_with_card(each)) for each in downloads]
    _check_room(listed)
    for each in listed:
        _fetch(each, screen)
    screen.say(f"all that the job needs is in {hub.constants.HF_HUB_CACHE}" if listed else NOTHING)


def _with_card(download: Download) -> Download:
    """Fetch a data set's card, which says what of it is wanted."""
    if download.kind != "dataset":
        return download
    return replace(download, wanted=hub.rows_wanted(download.name, download.config))


def _asked(download: Download) -> Download:
    return replace(download, listed=hub.listing(download.name, download.kind).of(download.wanted))


def _check_room(downloads: Sequence[Download]) -> None:
    cache = Path(hub.constants.HF_HUB_CACHE)
    place = next((folder for folder in (cache, *cache.parents) if folder.is_dir()), Path("/"))
    missing, free = sum(each.missing_bytes() for each in downloads), shutil.disk_usage(place).free
    if missing > free:
        raise ToolkitError(
            "the disk has no room for what the job needs from the hub",
            why=f"{size(missing)} are still to come, and {size(free)} are free at {place}",
            hint="make room there, or set HF_HOME to a folder on a larger disk; then the same command resumes",
            exit_code=ExitCode.UNFIT,
        )


def _fetch(download: Download, screen: DownloadScreen) -> None:
    missing, began = download.missing_bytes(), time.monotonic()
    with _shown(download, screen):
        if download.kind == "model":
            folder = Path(hub.model(download.name, download.wanted))
        else:
            folder = hub.data_set(download.name, download.config)
    if download.listed.files:
        took = f"fetched and verified ({duration(time.monotonic() - began)})" if missing else "all there, verified"
        screen.say(f"{download.name}: {size(download.listed.size_bytes)}, {took}")
    else:
        came = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        screen.say(f"{download.name}: {size(came)}, verified")


@contextmanager
def _shown(download: Download, screen: DownloadScreen) -> Iterator[None]:
    """Show how far a download is, until it has ended."""
    ended = threading.Event()
    thread = threading.Thread(target=_show, args=(download, screen, ended), daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _show(download: Download, screen: DownloadScreen, ended: threading.Event) -> None:
    total, began, first = download.listed.size_bytes, time.monotonic(), download.received_bytes()
    while not ended.wait(SHOW_S):
        received, seconds = download.received_bytes(), time.monotonic() - began
        if received >= total > 0:
            state = f"{size(total)} are here, verifying"
        elif total:
            state = f"{size(received)} of {size(total)}, {size((received - first) / seconds)}/s"
        else:
            state = "waiting for the hub"
        screen.now(f"downloading {download.name}: {state}, {duration(seconds)}")
