"""Cancelling a job on a box, with the proof that nothing of it is left."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
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

    @property
    def is_proven(self) -> bool:
        return not self.left and not self.gpu_held

    def text(self) -> str:
        code = f", exit code {self.exit}" if self.exit is not None else ""
        ended = {
            "not running": "no job is running",
            "by itself": f"ended by itself{code}",
            "killed": f"killed, since it did not end by itself{code}",
        }
        proof = [f"still there: process {each}" for each in self.left] + [
            f"still in GPU memory: {each}" for each in self.gpu_held
        ]
        return "\n".join(
            [ended[self.how], *(proof or ["nothing of it is left, and no process of its holds GPU memory"])]
        )


def cancel(
    connection: BoxConnection, providers: Mapping[str, Provider], run: str, grace_s: str, say: Callable[[str], None]
) -> Cancelled:
    """TERM, time for a checkpoint, KILL, and the proof that nothing of it is left. run, grace_s:
    `-` for the job's own.

    Raises ToolkitError: nothing deployed, no such run; UNCERTAIN if the connection broke before the
    end was seen.
    """
    argv = dispatch(connection.box, providers, "cancel", run, grace_s)
    said: list[str] = []

    def heard(text: str) -> None:
        said.append(text)
        if text.strip() in ("term", "kill"):
            say("asked it to end" if text.strip() == "term" else "its time is over: killing it")

    # with our own words for what is wrong with the connection; what follows takes as long as the
    # job does
    connection.connect()
    answer = connection.local(connection.stream(argv), changes=True, check=False, heard=heard)
    if connection.dry_run:
        return Cancelled("not running")
    ended = read_cancel("\n".join(said))
    if ended is None and answer.code == 255:
        raise ToolkitError(
            f"the connection to `{connection.box.name}` broke while the job was ending",
            why=one_line(answer.err),
            hint="the same command again is safe, and says how it ended",
            exit_code=ExitCode.UNCERTAIN,
        )
    if ended is None:
        check(connection.box, answer)
        raise ToolkitError(
            f"`{connection.box.name}` did not say how the job ended",
            why=last_lines(answer.err or answer.out),
            exit_code=ExitCode.UNCERTAIN,
        )
    return ended


def read_cancel(text: str) -> Cancelled | None:
    """None: it did not come to its end."""
    said = [line.strip().partition(" ") for line in text.splitlines()]
    words = {word for word, _, _ in said}
    if not words & {"ended", "not_running"}:
        return None
    code = next((rest for word, _, rest in said if word == "ended"), "")
    return Cancelled(
        "not running" if "not_running" in words else "killed" if "kill" in words else "by itself",
        int(code) if re.fullmatch(r"-?[0-9]{1,9}", code) else None,
        tuple(rest for word, _, rest in said if word == "left"),
        tuple(rest for word, _, rest in said if word == "gpu_held"),
    )
