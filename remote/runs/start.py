"""Starting a job on a box exactly once, over a connection that may break at any moment.

Each request has an id. The box starts it by making a folder of that name, which succeeds once. If
the answer was lost, one more call (`withdraw`) tells whether the job was started. If it was not,
that call makes sure that it never will be.
"""

from __future__ import annotations

import hashlib
import re
import shlex
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from jobs.errors import ExitCode, ToolkitError
from jobs.formatting import one_line
from remote.runs.deployed import Deployment, last_lines
from remote.ssh.connection import BoxConnection

SETTLE_S = (0.0, 1.0, 2.0, 4.0, 8.0)  # pauses before the box is asked whether a job was started
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
    again: bool = False  # it was started before, by the same request


def start_command(deployed: Deployment, request: Request) -> list[str]:
    return deployed.supervisor(
        "start", request.run, request.id, deployed.code, f"{request.grace_s:g}", "--", *request.arguments
    )


def message(job: bytes, secrets: Mapping[str, str]) -> bytes:
    """Make the text that `supervisor.sh start` and `download` read on their standard input.

    Raises ToolkitError for a secret that cannot be sent.
    """
    for name, value in secrets.items():
        if not SECRET_NAME.fullmatch(name) or "\n" in value or "\0" in value:
            raise ToolkitError(
                f"the secret `{name}` cannot be sent",
                why="its name cannot name a variable, or its value has more than one line",
            )
    lines = [f"secrets {len(secrets)}", *(f"{name}={value}" for name, value in secrets.items())]
    lines.append(f"job {hashlib.sha256(job).hexdigest()[:16]}")
    return "".join(f"{line}\n" for line in lines).encode() + job


def start(
    connection: BoxConnection,
    deployed: Deployment,
    request: Request,
    secrets: Mapping[str, str],
    say: Callable[[str], None],
) -> Started:
    """Start the job on the box, exactly once, whatever the connection does.

    Raises ToolkitError: BUSY with another job; UNFIT if the box refused it; UNREACHABLE if it was
    not started for want of a connection; UNCERTAIN if nobody knows.
    """
    try:
        answer = connection.change(
            start_command(deployed, request), stdin=message(request.job, secrets), timeout_s=60.0, check=False
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
        raise busy(host, words[1] if len(words) > 1 else "?", words[3] if len(words) > 3 else "")
    why = " ".join(words[1:]) or words[0]
    raise ToolkitError(f"`{host}` did not start the job", why=why, exit_code=ExitCode.UNFIT)


def busy(host: str, run: str, elsewhere: str = "") -> ToolkitError:
    """Make the error of a box whose slot is taken.

    elsewhere: the host that has it, if that is another one than the box.
    """
    if elsewhere:
        return ToolkitError(
            f"the folder of `{host}` is in use: run `{run}` is being trained on {elsewhere}",
            why=f"{elsewhere} shares this folder, and one folder takes one job at a time",
            hint=f"wait for its end, or give `{host}` a folder of its own: data_folder in boxes.yaml, and fab deploy",
            exit_code=ExitCode.BUSY,
        )
    target = f"--host {shlex.quote(host)} --run {shlex.quote(run)}"
    return ToolkitError(
        f"`{host}` is busy: run `{run}` is being trained there",
        why="a box runs one job at a time",
        hint=f"watch it with `fab logs --follow {target}`, end it with `fab cancel {target}`",
        exit_code=ExitCode.BUSY,
    )


def _settle(
    connection: BoxConnection, deployed: Deployment, request: Request, broke: ToolkitError, say: Callable[[str], None]
) -> Started:
    """Find out whether a start whose connection broke was carried out, and if not, prevent it."""
    say(f"the connection broke while the job was being started ({broke.what}); asking the box whether it was started")
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
            what, hint = "the job was not started, and will not be", "the same command again is safe"
            raise ToolkitError(what, why=broke.what, hint=hint, exit_code=ExitCode.UNREACHABLE)
        if words:
            started = _started(connection.box.name, request, words)
            say("the job was started")
            return started
    host = connection.box.name
    raise ToolkitError(
        f"it is uncertain whether the job was started on `{host}`",
        why=f"the connection broke while it was being started, and the box has not answered since: {broke.what}",
        hint=f"run `fab ps --host {host}` when the box is back; "
        "a second `fab train` cannot start it twice: a box runs one job at a time",
        exit_code=ExitCode.UNCERTAIN,
    )


def _answer(text: str, known: Sequence[str]) -> list[str] | None:
    """Return the words of the last line that begins with one of `known`, or None.

    A login may print lines of its own before it.
    """
    lines = [line.split() for line in text.splitlines()]
    return next((words for words in reversed(lines) if words and words[0] in known), None)
