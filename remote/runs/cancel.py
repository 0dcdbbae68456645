"""Cancelling a job on a box, and the proof that nothing of it is left."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from env.settings import Provider
from jobs.errors import ExitCode, ToolkitError
from jobs.formatting import one_line
from remote.runs.deployed import check, dispatch, last_lines
from remote.ssh.connection import BoxConnection


@dataclass(frozen=True)
class Cancelled:
    """How a job ended when it was asked to."""

    how: Literal["not running", "by itself", "killed"]
    exit: int | None = None
    left: tuple[str, ...] = ()  # processes that are still there
    gpu_held: tuple[str, ...] = ()  # who holds GPU memory
    run: str = ""  # "": it was not said

    @property
    def is_proven(self) -> bool:
        return not self.left and not self.gpu_held

    def text(self) -> str:
        of_run = f"run `{self.run}`: " if self.run else ""
        code = f", exit code {self.exit}" if self.exit is not None else ""
        ended = {
            "not running": "no job of it is running" if self.run else "no job is running",
            "by itself": f"ended by itself{code}",
            "killed": f"killed, since it did not end by itself{code}",
        }
        leftovers = [f"still running: process {each}" for each in self.left]
        leftovers += [f"still in GPU memory: {each}" for each in self.gpu_held]
        proof = leftovers or ["nothing of it is left: none of its processes runs or holds GPU memory"]
        return "\n".join([of_run + ended[self.how], *proof])


def cancel(
    connection: BoxConnection, providers: Mapping[str, Provider], run: str, grace_s: str, say: Callable[[str], None]
) -> Cancelled:
    """Send SIGTERM, give time for a checkpoint, send SIGKILL, and prove that nothing is left.

    run, grace_s: `-` for the running run, and for the job's own grace. Raises ToolkitError: nothing
    is deployed, there is no such run; BUSY if another host runs it; UNCERTAIN if the connection
    broke before the end was seen.
    """
    argv = dispatch(connection.box, providers, "cancel", run, grace_s)
    lines: list[str] = []

    def heard(text: str) -> None:
        lines.append(text)
        if text.strip() in ("term", "kill"):
            of_run = f" of run `{name}`" if (name := _run_of(lines, run)) else ""
            job = f"the job{of_run}"
            say(f"asked {job} to end" if text.strip() == "term" else f"the grace is over: killing {job}")

    # First, since it has our own words for a connection that fails. The command below takes as long
    # as the job needs to end.
    connection.connect()
    answer = connection.long_change(argv, heard)
    if connection.dry_run:
        return Cancelled("not running")
    name = _run_of(lines, run)
    if away := _elsewhere(connection.box.name, name, lines):
        raise away
    ended = read_cancel("\n".join(lines))
    if ended is None and answer.code == 255:
        raise ToolkitError(
            f"the connection to `{connection.box.name}` broke while the job was ending",
            why=one_line(answer.err),
            hint="run the same command again: it is safe, and says how the job ended",
            exit_code=ExitCode.UNCERTAIN,
        )
    if ended is None:
        check(connection.box, answer)
        raise ToolkitError(
            f"`{connection.box.name}` did not say how the job ended",
            why=last_lines(answer.err or answer.out),
            exit_code=ExitCode.UNCERTAIN,
        )
    return replace(ended, run=name)


def _run_of(lines: Sequence[str], run: str) -> str:
    """Return the run that is cancelled: as the box names it, if `run` is `-`; "" if it does not."""
    named = [line.split()[1] for line in lines if re.fullmatch(r"run \S+", line.strip())]
    return named[0] if run == "-" and named else "" if run == "-" else run


def _elsewhere(box: str, run: str, lines: Sequence[str]) -> ToolkitError | None:
    """Make the error for a job that another host runs, with which this box shares the folder."""
    words = next((line.split() for line in lines if re.match(r"(elsewhere|unheard) \S", line.strip())), None)
    if words is None:
        return None
    what, host = f"run `{run}`", words[1]
    there = f"fab cancel --run {shlex.quote(run)} --host THE-BOX, with the box whose host name is {host}"
    if words[0] == "elsewhere":
        return ToolkitError(
            f"{what} is not cancelled: it runs on {host}, not on `{box}`",
            why=f"{host} shares the folder of `{box}`, and its processes cannot be reached from here",
            hint=there,
            exit_code=ExitCode.BUSY,
        )
    return ToolkitError(
        f"{what} is not cancelled: it ran on {host}, and whether it still does cannot be seen from `{box}`",
        why=f"{host} shares the folder of `{box}`; it is silent, and the job has no exit code",
        hint=f"{there}; if that box is gone, there is nothing to cancel",
        exit_code=ExitCode.UNCERTAIN,
    )


def read_cancel(text: str) -> Cancelled | None:
    """Parse the answer of `supervisor.sh cancel`; None if it does not say how the job ended."""
    lines = [line.strip().partition(" ") for line in text.splitlines()]
    words = {word for word, _, _ in lines}
    if not words & {"ended", "not_running"}:
        return None
    code = next((rest for word, _, rest in lines if word == "ended"), "")
    return Cancelled(
        "not running" if "not_running" in words else "killed" if "kill" in words else "by itself",
        int(code) if re.fullmatch(r"-?[0-9]{1,9}", code) else None,
        tuple(rest for word, _, rest in lines if word == "left"),
        tuple(rest for word, _, rest in lines if word == "gpu_held"),
    )
