"""Processes on this machine: commands with a deadline, and those that speak with a box."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from subprocess import DEVNULL, PIPE, Popen
from typing import IO

from jobs.errors import ToolkitError
from remote.ssh.host_keys import unreachable

LINGER_S = 1.0  # to wait for processes that a command left behind, which may hold its output open
LAST_LINES = 10
TAKES = 32 * 1024


@dataclass(frozen=True)
class CommandResult:
    """The exit code and output of a command.

    Bytes that are not UTF-8 become U+FFFD; files are never sent this way.
    """

    code: int  # 255 if a signal ended the command on the box, as OpenSSH has it
    out: str
    err: str
    seconds: float


def short(argv: Sequence[str]) -> str:
    text = shlex.join(argv)
    return text if len(text) <= 200 else f"{text[:200]}..."


def _end_group(process: subprocess.Popen[bytes], grace_s: float) -> None:
    """End the process and its children, which are a group of their own."""
    for sign in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, sign)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(grace_s)
            return


def run_here(
    argv: Sequence[str],
    stdin: bytes | IO[bytes],
    timeout_s: float | None,
    heard: Callable[[str], None] | None,
    *,
    own_group: bool,
    line_end: bytes = b"\n",
) -> CommandResult:
    started, late = time.monotonic(), threading.Event()
    pipe = subprocess.PIPE
    try:
        source = (pipe if stdin else subprocess.DEVNULL) if isinstance(stdin, bytes) else stdin
        process = subprocess.Popen(argv, stdin=source, stdout=pipe, stderr=pipe, start_new_session=own_group)
    except OSError as error:
        raise ToolkitError(
            f"cannot run `{argv[0]}`", why=error.strerror or str(error), hint=f"install {argv[0]} on this machine"
        ) from None

    def end() -> None:
        if own_group:
            _end_group(process, grace_s=2.0)
        else:
            process.kill()

    def expire() -> None:
        late.set()
        end()

    out, err = bytearray(), bytearray()
    helpers = [threading.Thread(target=_drain, args=(process.stderr, err), daemon=True)]
    if stdin and isinstance(stdin, bytes):
        helpers.append(threading.Thread(target=_feed, args=(process.stdin, stdin), daemon=True))
    deadline = threading.Timer(timeout_s, expire) if timeout_s is not None else None
    if deadline is not None:
        deadline.daemon = True
        helpers.append(deadline)
    for helper in helpers:
        helper.start()
    try:
        assert process.stdout is not None
        for line in _lines(process.stdout, line_end):
            out += line
            if heard is not None:
                heard(line.decode(errors="replace").strip("\r\n"))
        code = process.wait()
    except BaseException:
        end()
        raise
    finally:
        if deadline is not None:
            deadline.cancel()
    for helper in helpers[:-1] if deadline is not None else helpers:
        helper.join(LINGER_S)
    if late.is_set():
        raise unreachable(f"`{argv[0]}` did not end within {timeout_s:g} s", why=short(argv), hint="try again")
    seconds = time.monotonic() - started
    return CommandResult(
        code if code >= 0 else 128 - code, out.decode(errors="replace"), bytes(err).decode(errors="replace"), seconds
    )


def start(argv: Sequence[str], stdin: bytes) -> Popen[bytes]:
    """Start a local ssh client, in a session of its own, and give it all of its standard input."""
    with tempfile.TemporaryFile() as file:
        file.write(stdin)
        file.seek(0)
        return Popen(argv, stdin=file, stdout=PIPE, stderr=PIPE, start_new_session=True)


class NotingSsh:
    """A local ssh that writes notes on standard error, as it logs in."""

    def __init__(self, argv: Sequence[str], *, has_terminal: bool = False) -> None:
        """Start it. has_terminal: it may ask there, so it stays in our session."""
        self.has_terminal, self.started = has_terminal, time.monotonic()
        with tempfile.NamedTemporaryFile(prefix="rlhf-", delete=False) as file:
            self._file = Path(file.name)
            self._process = Popen(argv, stdin=DEVNULL, stdout=DEVNULL, stderr=file, start_new_session=not has_terminal)

    def ended_within(self, seconds: float) -> int | None:
        """Return its exit code, for which it is waited so long; None: it has not ended."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self._process.wait(seconds)
        return None

    @property
    def notes(self) -> str:
        return self._file.read_text(encoding="utf-8", errors="replace")

    def close(self) -> None:
        """End it, if it has not ended, and remove its notes."""
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()
        self._file.unlink(missing_ok=True)


@dataclass(frozen=True)
class Exchange:
    """What a local ssh client said until its command on the box had ended."""

    code: int | None  # the client's; None if it had not ended by itself, though the answer was whole
    out: bytes
    err: bytes
    in_time: bool


def exchange(
    argv: Sequence[str],
    stdin: bytes,
    end: re.Pattern[bytes],
    timeout_s: float,
    heard: Callable[[bytes], None] | None = None,
) -> Exchange:
    """Run a local ssh client until both outputs have said `end`, or are closed, or time is over.

    What a command left behind on the box may hold its outputs open for ever, which is why `end` is
    waited for. end: matches the end of each output. heard: gets standard output as it comes.
    """
    process = Popen(argv, stdin=PIPE, stdout=PIPE, stderr=PIPE, start_new_session=True)
    assert process.stdin is not None and process.stdout is not None and process.stderr is not None
    outputs = [_Output(process.stdout, end, heard), _Output(process.stderr, end)]
    threads = [threading.Thread(target=output.read, daemon=True) for output in outputs]
    threads.append(threading.Thread(target=_feed, args=(process.stdin, stdin), daemon=True))
    until = time.monotonic() + timeout_s
    try:
        for thread in threads:
            thread.start()
        in_time = all(output.is_over.wait(max(until - time.monotonic(), 0.0)) for output in outputs)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(LINGER_S if in_time else 0)
    finally:
        code = process.poll()
        if code is None:
            process.kill()
            process.wait()
    for thread in threads:
        thread.join(LINGER_S)
    return Exchange(code, bytes(outputs[0].data), bytes(outputs[1].data), in_time)


class _Output:
    def __init__(self, stream: IO[bytes], end: re.Pattern[bytes], heard: Callable[[bytes], None] | None = None) -> None:
        self._stream, self._end, self._heard = stream, end, heard
        self.data, self.is_over = bytearray(), threading.Event()

    def read(self) -> None:
        with contextlib.suppress(ValueError, OSError), self._stream:
            while part := self._stream.read1(TAKES):  # type: ignore[attr-defined]
                self.data += part
                if self._heard is not None:
                    self._heard(part)
                if self._end.search(self.data, max(len(self.data) - 200, 0)):
                    self.is_over.set()
        self.is_over.set()


def _lines(stream: IO[bytes], end: bytes) -> Iterator[bytes]:
    """Yield lines as they come, with what ends them; `for line in stream` knows b"\\n" alone."""
    rest = b""
    while part := stream.read1(TAKES):  # type: ignore[attr-defined]
        *lines, rest = (rest + part).split(end)
        yield from (line + end for line in lines)
    if rest:
        yield rest


def _drain(stream: IO[bytes], into: bytearray) -> None:
    for part in iter(lambda: stream.read1(TAKES), b""):  # type: ignore[attr-defined]
        into += part


def _feed(stream: IO[bytes], data: bytes) -> None:
    with contextlib.suppress(BrokenPipeError), stream:
        stream.write(data)
