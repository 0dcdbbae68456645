"""Starting a job on a box exactly once, over a line that may break at any moment; and what is asked of it afterwards.

A request has an id. The box decides by making a folder of that name, so that for a start whose answer was lost one more question tells
whether it was started, and makes sure that it never will be if it was not.
"""

from __future__ import annotations

import hashlib
import re
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from env.settings import Provider
from jobs.errors import ExitCode, ToolkitError
from jobs.words import one_line
from remote.runs.deployed import Deployed, check, there
from remote.ssh.connection import Line

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


def start_command(deployed: Deployed, request: Request) -> list[str]:
    return deployed.supervisor("start", request.run, request.id, deployed.code, f"{request.grace_s:g}", "--", *request.arguments)


def message(request: Request, secrets: Mapping[str, str]) -> bytes:
    """What `supervisor.sh start` reads on its standard input. Raises ToolkitError for a secret that does not travel."""
    for name, value in secrets.items():
        if not SECRET_NAME.fullmatch(name) or "\n" in value or "\0" in value:
            raise ToolkitError(f"the secret `{name}` cannot travel", why="its name is no variable's, or its value has more than one line")
    lines = [f"secrets {len(secrets)}", *(f"{name}={value}" for name, value in secrets.items())]
    return "".join(f"{line}\n" for line in [*lines, f"job {hashlib.sha256(request.job).hexdigest()[:16]}"]).encode() + request.job


def start(line: Line, deployed: Deployed, request: Request, secrets: Mapping[str, str], say: Callable[[str], None]) -> Started:
    """Raises ToolkitError: busy with another job (5), refused there (3), not run for want of a line (8), or not to be known (6)."""
    try:
        answer = line.do(start_command(deployed, request), stdin=message(request, secrets), timeout_s=60.0, check=False)
        words = _answer(answer.out, ("started", "already", "withdrawn", "busy", "refused"))
        if words is None and answer.code in (0, 255) and not answer.out.strip():
            raise ToolkitError("the line broke before the box answered", why=one_line(answer.err), code=ExitCode.UNREACHABLE)
    except ToolkitError as error:
        if error.code != ExitCode.UNREACHABLE:
            raise
        return _settle(line, deployed, request, error, say)
    if words is None:
        host = line.box.name
        raise ToolkitError(f"`{host}` did not start the job", why=_last_lines(answer.err or answer.out), hint=f"fab deploy --host {host}")
    return _started(line.box.name, request, words)


def _started(host: str, request: Request, words: Sequence[str]) -> Started:
    if words[0] in ("started", "already"):
        return Started(request.id, again=words[0] == "already")
    if words[0] == "busy":
        raise busy(host, words[1] if len(words) > 1 else "?")
    raise ToolkitError(f"`{host}` did not start the job", why=" ".join(words[1:]) or words[0], code=ExitCode.UNFIT)


def busy(host: str, run: str) -> ToolkitError:
    return ToolkitError(
        f"`{host}` is busy: run `{run}` is being trained there",
        why="a box runs one job at a time",
        hint=f"watch it with `fab logs --follow --host {host} --run {run}`, end it with `fab cancel --host {host} --run {run}`",
        code=ExitCode.BUSY,
    )


def _settle(line: Line, deployed: Deployed, request: Request, broke: ToolkitError, say: Callable[[str], None]) -> Started:
    """The line broke in the middle of a start: was it started? If not, it is made sure that it never will be."""
    say(f"the line broke while the job was being started ({broke.what}); asking the box what became of it")
    for pause_s in SETTLE_S:
        time.sleep(pause_s)
        try:
            answer = line.do(deployed.supervisor("withdraw", request.id), timeout_s=20.0, check=False)
        except ToolkitError as error:
            if error.code != ExitCode.UNREACHABLE:
                raise
            continue
        words = _answer(answer.out, ("started", "not_run", "busy", "refused"))
        if words and words[0] == "not_run":
            what = "the job was not started, and will not be"
            raise ToolkitError(what, why=broke.what, hint="the same command again is safe", code=ExitCode.UNREACHABLE)
        if words:
            started = _started(line.box.name, request, words)
            say("it was started")
            return started
    raise ToolkitError(
        f"it is uncertain whether the job was started on `{line.box.name}`",
        why=f"the line broke while it was being started, and the box has not answered since: {broke.what}",
        hint=f"`fab ps --host {line.box.name}` when it is back; a second `fab train` cannot start it twice: a box runs one job at a time",
        code=ExitCode.UNCERTAIN,
    )


def _answer(text: str, known: Sequence[str]) -> list[str] | None:
    """The last line that begins with one of these words: a login may say something of its own before."""
    lines = [line.split() for line in text.splitlines()]
    return next((words for words in reversed(lines) if words and words[0] in known), None)


def _last_lines(text: str) -> str:
    return "\n".join(text.strip().splitlines()[-10:])


# --- watching -------------------------------------------------------------------------------------------------------


def open_stream(line: Line, providers: Mapping[str, Provider]) -> Callable[[str, str, int], subprocess.Popen[bytes]]:
    """For remote.runs.watch.follow. The client is out of reach of Ctrl-C at the terminal, which is for us alone."""

    def opened(run: str, file: str, offset: int) -> subprocess.Popen[bytes]:
        argv = line.stream(there(line.box, providers, "follow", run or "-", file, str(offset)))
        return subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)

    return opened


# --- cancelling -----------------------------------------------------------------------------------------------------


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
        ended = {"not running": "no job is running", "by itself": f"ended by itself{code}", "killed": f"killed, since it did not end by itself{code}"}
        proof = [f"still there: process {each}" for each in self.left] + [f"still in GPU memory: {each}" for each in self.gpu_held]
        return "\n".join([ended[self.how], *(proof or ["nothing of it is left, and no process of its holds GPU memory"])])


def cancel(line: Line, providers: Mapping[str, Provider], run: str, grace_s: str, say: Callable[[str], None]) -> Cancelled:
    """TERM, time for a checkpoint, KILL, and the proof that nothing of it is left. run, grace_s: `-` for the job's own.

    Raises ToolkitError: nothing deployed, no such run; UNCERTAIN if the line broke before the end was seen.
    """
    argv = there(line.box, providers, "cancel", run, grace_s)
    said: list[str] = []

    def heard(text: str) -> None:
        said.append(text)
        if text.strip() in ("term", "kill"):
            say("asked it to end" if text.strip() == "term" else "its time is over: killing it")

    line.connect()  # with our own words for what is wrong with the line; what follows takes as long as the job does
    answer = line.local(line.stream(argv), changes=True, check=False, heard=heard)
    if line.dry_run:
        return Cancelled("not running")
    ended = read_cancel("\n".join(said))
    if ended is None and answer.code == 255:
        raise ToolkitError(
            f"the line to `{line.box.name}` broke while the job was ending",
            why=one_line(answer.err),
            hint="the same command again is safe, and says how it ended",
            code=ExitCode.UNCERTAIN,
        )
    if ended is None:
        check(line.box, answer)
        raise ToolkitError(f"`{line.box.name}` did not say how the job ended", why=_last_lines(answer.err or answer.out), code=ExitCode.UNCERTAIN)
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
