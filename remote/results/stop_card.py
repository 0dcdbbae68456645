"""The card that is shown before a stop: what it means for cost and data, and what is not fetched.

The card is made by pure functions; `stop` at the end stops the box.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

from env.settings import Fate, Provider
from jobs.errors import ExitCode, ToolkitError
from jobs.formatting import money, plural, size
from remote.results.run_contents import FetchedRun, Results, Unfetched, how_to_fetch, unfetched
from remote.scripts import script
from remote.ssh.commands import sh_script

if TYPE_CHECKING:
    from remote.ssh.connection import BoxConnection

FIRST_PROCESS = "/proc/1/environ"
STOP_S = 60.0


@dataclass(frozen=True)
class FolderFate:
    path: str  # as it is on the box
    on_stop: Fate
    on_release: Fate
    days: int | None
    note: str

    def __str__(self) -> str:
        stopped = {"kept": "kept", "lost": "LOST", "unknown": "not known"}[self.on_stop]
        days = f", for {plural(self.days, 'days')}" if self.days is not None and self.on_stop == "kept" else ""
        released = {"kept": "kept", "lost": "lost", "unknown": "not known"}[self.on_release]
        note = f" ({self.note})" if self.note else ""
        return f"{self.path}: {stopped}{days}; when the box is given back: {released}{note}"


@dataclass(frozen=True)
class StopCard:
    host: str
    provider: str  # its title
    meter: str  # once it is stopped: off, on, unknown
    price_per_hour: float | None
    currency: str
    disk: str  # while it is stopped: free, paid, unknown
    disk_note: str
    deadline: float | None  # when the data is deleted, if the box is stopped now; by the laptop's clock
    deadline_days: int | None
    deadline_note: str
    restart_note: str
    root: str  # our folder, without links; "": there is none
    root_fate: Fate  # when the box is stopped
    folders: tuple[FolderFate, ...]
    running: str | None  # the run whose job runs on the box
    running_elsewhere: str | None  # a run whose job another host runs, which shares our folder: `tiny on host-2`
    unfetched: tuple[Unfetched, ...]
    command: tuple[str, ...]  # run on the box to stop the meter; (): there is none
    variables: tuple[str, ...]  # that the command needs
    by_hand: str

    @property
    def unfetched_bytes(self) -> int:
        return sum(each.size_bytes for each in self.unfetched)

    def lines(self) -> list[tuple[str, str]]:
        """Describe the card for a person; each line is a label and a text."""
        meter = {
            "off": "stops",
            "on": "KEEPS RUNNING: a stopped box costs as much as a running one",
            "unknown": "not known: look at the box's page",
        }[self.meter]
        price = f" ({money(self.price_per_hour, self.currency)}/h)" if self.price_per_hour is not None else ""
        disk = {
            "free": "costs nothing while the box is stopped",
            "paid": "costs money while the box is stopped",
            "unknown": "not known",
        }[self.disk]
        rows = [
            ("box", f"{self.host}, {self.provider}"),
            ("meter", meter + price),
            ("disk", _noted(disk, self.disk_note)),
        ]
        rows += [("folder", str(folder)) for folder in self.folders]
        if self.root:
            fate = {
                "kept": "survives a stop",
                "lost": "is LOST by a stop",
                "unknown": "may not survive a stop",
            }[self.root_fate]
            rows.append(("our folder", f"{self.root} {fate}"))
        if self.deadline is not None:
            date = datetime.fromtimestamp(self.deadline, timezone.utc).astimezone().strftime("%Y-%m-%d")
            released = f"the data is deleted after {plural(self.deadline_days, 'days')}, about {date}"
            rows.append(("deadline", _noted(released, self.deadline_note)))
        elif self.deadline_note:
            rows.append(("deadline", self.deadline_note))
        if self.restart_note:
            rows.append(("start again", self.restart_note))
        rows.append(("running", f"run `{self.running}`" if self.running is not None else "no job"))
        if self.running_elsewhere:
            rows.append(("", f"{self.running_elsewhere}, which shares our folder, and is not stopped"))
        unfetched_texts = [*map(str, self.unfetched)] or ["nothing: all results are on this laptop"]
        return rows + [("not fetched", text) for text in unfetched_texts]

    def as_json(self) -> dict[str, Any]:
        others = ("folders", "unfetched", "command", "variables")
        tree = {name: getattr(self, name) for name in self.__dataclass_fields__ if name not in others}
        return tree | {
            "folders": [vars(folder) for folder in self.folders],
            "unfetched": [vars(each) for each in self.unfetched],
            "unfetched_bytes": self.unfetched_bytes,
            "can_stop_itself": bool(self.command),
        }


def _noted(text: str, note: str) -> str:
    return f"{text}; {note}" if note else text


def card_of(
    host: str,
    provider: Provider,
    results: Results,
    fetched: Mapping[str, FetchedRun],
    *,
    home: str,
    now: float,
    price_per_hour: float | None = None,
    currency: str = "",
) -> StopCard:
    """Make the card of a box from its provider's facts and its results.

    home: of the box's user, "" if it is not known. now: the laptop's time.
    """
    stop = provider.stop
    folders = tuple(
        FolderFate(_at_home(each.path, home), each.on_stop, each.on_release, each.days, each.note)
        for each in provider.folders
    )
    return StopCard(
        host=host,
        provider=provider.title,
        meter=stop.meter,
        price_per_hour=price_per_hour,
        currency=currency,
        disk=stop.disk,
        disk_note=stop.disk_note,
        deadline=None if stop.deadline_days is None else now + timedelta(days=stop.deadline_days).total_seconds(),
        deadline_days=stop.deadline_days,
        deadline_note=stop.deadline_note,
        restart_note=stop.restart_note,
        root=results.root,
        root_fate=fate_of(results.root, folders),
        folders=folders,
        running=None if results.elsewhere else results.running,
        running_elsewhere=f"run `{results.running}` on {results.elsewhere}" if results.elsewhere else None,
        unfetched=unfetched(results, fetched),
        command=stop.command,
        variables=stop.variables,
        by_hand=stop.by_hand,
    )


def _at_home(path: str, home: str) -> str:
    if home and (path == "$HOME" or path.startswith("$HOME/")):
        return f"{home.rstrip('/')}{path.removeprefix('$HOME')}"
    return path


def fate_of(path: str, folders: tuple[FolderFate, ...]) -> Fate:
    """Return what a stop does to a path, by the innermost known folder that holds it."""
    holding = [folder for folder in folders if PurePosixPath(path).is_relative_to(folder.path)] if path else []
    return max(holding, key=lambda folder: len(PurePosixPath(folder.path).parts)).on_stop if holding else "unknown"


def may_stop(card: StopCard, *, yes: bool = False) -> None:
    """Raise ToolkitError if the box may not be stopped without `yes`.

    BUSY while a job runs; UNFIT while something is not fetched.
    """
    if yes:
        return
    if card.running is not None:
        run = shlex.quote(card.running)
        raise ToolkitError(
            f"cannot stop {card.host}: a job runs there",
            hint=f"fab cancel --host {shlex.quote(card.host)} --run {run} saves a checkpoint and ends it; "
            "or --yes to stop the box anyway",
            exit_code=ExitCode.BUSY,
        )
    if card.unfetched:
        raise ToolkitError(
            f"{card.host} has results that are nowhere else",
            why=f"{size(card.unfetched_bytes)}, named above",
            hint=f"{how_to_fetch(card.host, card.unfetched)}\nor --yes to stop the box anyway",
            exit_code=ExitCode.UNFIT,
        )


def stop_command(card: StopCard) -> list[str]:
    """Build the provider's own command, as it is called inside the box.

    Raises ToolkitError: there is none that stops the meter.
    """
    if card.meter == "on":
        raise ToolkitError(
            f"shutting {card.host} down does not stop its meter",
            why=_noted(f"{card.provider}: a box that is shut down costs as much as a running one", card.disk_note),
            hint=card.by_hand,
            exit_code=ExitCode.UNFIT,
        )
    if not card.command or card.meter != "off":
        raise ToolkitError(
            f"{card.host} cannot stop itself",
            why=f"{card.provider}: no command inside the box is known to stop the meter",
            hint=card.by_hand,
        )
    return sh_script("stop", FIRST_PROCESS, *card.variables, "--", *card.command)


@dataclass(frozen=True)
class StopOutcome:
    said: str  # what the command printed
    broke: bool  # the connection closed because the box went down


def stop(connection: BoxConnection, card: StopCard, *, yes: bool = False) -> StopOutcome:
    """Stop the box.

    Raises ToolkitError: it may not be stopped, cannot stop itself, or its command failed.

    The command's variables (among them a key of the account) are read on the box, from its first
    process. They are in no argument of ours.
    """
    may_stop(card, yes=yes)
    argv = stop_command(card)
    connection.connect()  # if the connection breaks after this, the box is going down
    try:
        answer = connection.change(argv, stdin=script("results.sh"), timeout_s=STOP_S, check=False)
    except ToolkitError as error:
        if error.exit_code != ExitCode.UNREACHABLE:
            raise
        return StopOutcome("", broke=True)
    output = " ".join(word for word in (answer.out + answer.err).split() if word != "begin")
    if answer.code and answer.code != 255:  # 255: the connection ended with the box
        raise ToolkitError(
            f"{card.host} was not stopped",
            why=f"its command ended with exit code {answer.code}: {output[-400:]}",
            hint=card.by_hand,
            exit_code=ExitCode.UNFIT,
        )
    return StopOutcome(output, broke=bool(answer.code))
