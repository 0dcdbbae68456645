"""Fetching a job's models and data onto a box before the job runs (`fab deploy --job`).

The box does it in the environment that is deployed, with or without a GPU, and only as long as this
connection lasts. It is no run: it has no place in `fab ps`, and a job may train next to it.
"""

from __future__ import annotations

import re
import secrets as tokens
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from jobs.errors import ExitCode, ToolkitError, error_of_text
from jobs.formatting import one_line
from jobs.spec import Job
from remote.deploy.sync import send_whole
from remote.output import waiting
from remote.runs.deployed import Deployment, last_lines
from remote.runs.inputs import JobInput, job_on_box
from remote.runs.start import message
from remote.ssh.connection import BoxConnection
from remote.survey.doctor import hub_names

Say = Callable[[str], None]


@dataclass(frozen=True)
class Prefetched:
    said: tuple[str, ...]  # what the box said of each model and data set
    seconds: float


def send_inputs(
    connection: BoxConnection, deployed: Deployment, inputs: Sequence[JobInput], *, say: Say, now: Say
) -> None:
    """Send the local data sets and models of a job that the box does not have yet."""
    for each in inputs:
        if each.tree.key not in deployed.inputs:
            say(f"sending `{each.name}`: {each.tree}")
            send_whole(connection, each.tree, each.folder(deployed.root), what=f"sending `{each.name}`", now=now)


def prefetch(
    connection: BoxConnection,
    deployed: Deployment,
    job: Job,
    inputs: Sequence[JobInput],
    secrets: Mapping[str, str],
    *,
    say: Say,
    now: Say,
) -> Prefetched:
    """Send what of the job is local, and let the box fetch all else, verified.

    now: gets the passing state of a download, and "" at the end. Raises ToolkitError: what a run
    would say of the hub or the disk; UNREACHABLE if the connection broke.
    """
    local = {each.name for each in inputs}
    names = ", ".join(each for each in hub_names(job) if each not in local)
    send_inputs(connection, deployed, inputs, say=say, now=now)
    if connection.dry_run:
        say(f"download: would fetch {names}" if names else "download: the job needs nothing from a hub")
    elif names:
        say(f"download: {names} ...")
    name, began = connection.box.name, time.monotonic()
    argv = deployed.supervisor("download", tokens.token_hex(8), deployed.code, "--")
    output = _Output(say, now)
    connection.connect()
    try:
        sent = message(job_on_box(job, inputs, deployed.root), secrets)
        answer = connection.long_change(argv, output, stdin=sent)
    finally:
        now("")
    seconds = time.monotonic() - began
    if connection.dry_run:
        return Prefetched((), seconds)
    if output.code == ExitCode.OK:
        return Prefetched(tuple(output.lines), seconds)
    if output.code is None and answer.code == 255:
        raise ToolkitError(
            f"the connection to `{name}` broke while models and data were fetched",
            why=one_line(answer.err),
            hint="the same command resumes, and keeps what has come",
            exit_code=ExitCode.UNREACHABLE,
        )
    raise output.error(name, answer.err)


class _Output:
    """Shows what the download on the box says as it comes, and keeps what follows from it."""

    def __init__(self, say: Say, now: Say) -> None:
        self._say, self._now = say, now
        self._has_begun, self._state, self._began = False, "", time.monotonic()
        self.lines: list[str] = []
        self.code: int | None = None
        self.refused = ""

    def __call__(self, text: str) -> None:
        if not self._has_begun:  # a login may say something, too
            self._has_begun = text == "begun"
            self.refused = one_line(text.removeprefix("refused ")) if text.startswith("refused ") else self.refused
        elif found := re.fullmatch(r"ended (\d+)", text):
            self.code = int(found[1])
        elif text == "beat":
            self._now(waiting("download", time.monotonic() - self._began, self._state or "begins"))
        elif text.startswith("downloading "):
            self._state = one_line(text.removeprefix("downloading "))
        else:
            self.lines.append(text)
            if not self._is_in_error:
                self._say(f"download: {one_line(text)}")

    @property
    def _is_in_error(self) -> bool:
        return any(line.startswith(("error: ", "Traceback ")) for line in self.lines)

    def error(self, box: str, stderr: str) -> ToolkitError:
        """Make the error of a download that did not end well, as the box said it."""
        if self.refused:
            return ToolkitError(f"`{box}` fetched nothing", why=self.refused, exit_code=ExitCode.UNFIT)
        text = "\n".join(self.lines)
        known = {int(code): code for code in ExitCode}
        code = known.get(self.code if self.code is not None else -1, ExitCode.INTERNAL)
        if (said := error_of_text(text, code)) is not None:
            return ToolkitError(f"`{box}`: {said.what}", why=said.why, hint=said.hint, exit_code=code)
        ended = "" if self.code is None else f" (exit code {self.code})"
        return ToolkitError(
            f"`{box}` did not fetch all that the job needs{ended}",
            why=last_lines(text or stderr),
            hint="the same command resumes, and keeps what has come",
            exit_code=code,
        )
