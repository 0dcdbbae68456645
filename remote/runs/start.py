"""Starting a job on a box exactly once, over a connection that may break at any moment.

A request has an id. The box decides by making a folder of that name, so that for a start whose
answer was lost one more question tells whether it was started, and makes sure that it never will be
if it was not.
"""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from jobs.errors import ExitCode, ToolkitError
from jobs.formatting import one_line
from remote.runs.deployed import Deployment, last_lines
from remote.ssh.connection import BoxConnection

SETTLE_S = (0.0, 1.0, 2.0, 4.0, 8.0)  # pauses before the box is asked what became of a start
SECRET_NAME = re.compile(r"[A-Z][A-Z0-9_]*")


@dataclass(frozen=True)
class Request:
    """One start. `arguments`: rlhf-train's, without --job and --run, which the supervisor adds."""

    id: str
    run: str
    arguments: tuple[str, ...]
    job: bytes  # the job file as it is to lie on the box
    grace_s: float


@dataclass(frozen=True)
class Started:
    request: str
    again: bool = False  # it had been started before, by this very request


def start_command(deployed: Deployment, request: Request) -> list[str]:
    return deployed.supervisor(
        "start", request.run, request.id, deployed.code, f"{request.grace_s:g}", "--", *request.arguments
    )


def message(request: Request, secrets: Mapping[str, str]) -> bytes:
    """What `supervisor.sh start` reads on its standard input.

    Raises ToolkitError for a secret that does not travel.
    """
    for name, value in secrets.items():
        if not SECRET_NAME.fullmatch(name) or "\n" in value or "\0" in value:
            raise ToolkitError(
                f"the secret `{name}` cannot travel",
                why="its name is no variable's, or its value has more than one line",
            )
    lines = [f"secrets {len(secrets)}", *(f"{name}={value}" for name, value in secrets.items())]
    return (
        "".join(f"{line}\n" for line in [*lines, f"job {hashlib.sha256(request.job).hexdigest()[:16]}"]).encode()
        + request.job
    )


def start(
    connection: BoxConnection,
    deployed: Deployment,
    request: Request,
    secrets: Mapping[str, str],
    say: Callable[[str], None],
) -> Started:
    """Raises ToolkitError: busy with another job (5), refused there (3), not run for want of a
    connection (8), or not to be known (6).
    """
    try:
        answer = connection.change(
            start_command(deployed, request), stdin=message(request, secrets), timeout_s=60.0, check=False
        )
        words = _answer(answer.out, ("started", "already", "withdrawn", "busy", "refused"))
        if words is None and answer.code in (0, 255) and not answer.out.strip():
            raise ToolkitError(
                "the connection broke before the box answered", why=one_line(answer.err), exit_code=ExitCode.UNREACHABLE
            )
    except ToolkitError as error:
        if error.exit_code != ExitCode.UNREACHABLE:
            raise
        return _settle(connection, deployed, request, error, say)
    if words is None:
        host = connection.box.name
        raise ToolkitError(
            f"`{host}` did not start the job",
            why=last_lines(answer.err or answer.out),
            hint=f"fab deploy --host {host}",
        )
    return _started(connection.box.name, request, words)


def _started(host: str, request: Request, words: Sequence[str]) -> Started:
    if words[0] in ("started", "already"):
        return Started(request.id, again=words[0] == "already")
    if words[0] == "busy":
        raise busy(host, words[1] if len(words) > 1 else "?")
    raise ToolkitError(f"`{host}` did not start the job", why=" ".join(words[1:]) or words[0], exit_code=ExitCode.UNFIT)


def busy(host: str, run: str) -> ToolkitError:
    return ToolkitError(
        f"`{host}` is busy: run `{run}` is being trained there",
        why="a box runs one job at a time",
        hint=f"watch it with `fab logs --follow --host {host} --run {run}`, end it with `fab cancel --host {host} --run {run}`",
        exit_code=ExitCode.BUSY,
    )


def _settle(
    connection: BoxConnection, deployed: Deployment, request: Request, broke: ToolkitError, say: Callable[[str], None]
) -> Started:
    """The connection broke in the middle of a start: was it started? If not, it is made sure that
    it never will be.
    """
    say(f"the connection broke while the job was being started ({broke.what}); asking the box what became of it")
    for pause_s in SETTLE_S:
        time.sleep(pause_s)
        try:
            answer = connection.change(deployed.supervisor("withdraw", request.id), timeout_s=20.0, check=False)
        except ToolkitError as error:
            if error.exit_code != ExitCode.UNREACHABLE:
                raise
            continue
        words = _answer(answer.out, ("started", "not_run", "busy", "refused"))
        if words and words[0] == "not_run":
            what = "the job was not started, and will not be"
            raise ToolkitError(
                what, why=broke.what, hint="the same command again is safe", exit_code=ExitCode.UNREACHABLE
            )
        if words:
            started = _started(connection.box.name, request, words)
            say("it was started")
            return started
    raise ToolkitError(
        f"it is uncertain whether the job was started on `{connection.box.name}`",
        why=f"the connection broke while it was being started, and the box has not answered since: {broke.what}",
        hint=f"`fab ps --host {connection.box.name}` when it is back; a second `fab train` cannot start it twice: a box runs one job at a time",
        exit_code=ExitCode.UNCERTAIN,
    )


def _answer(text: str, known: Sequence[str]) -> list[str] | None:
    """The last line that begins with one of these words: a login may say something of its own
    before.
    """
    lines = [line.split() for line in text.splitlines()]
    return next((words for words in reversed(lines) if words and words[0] in known), None)
