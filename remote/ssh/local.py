"""Processes on this machine: commands with a deadline, and the ProxyCommand of a connection."""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
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


class Proxy:
    """A ProxyCommand, as OpenSSH runs it, on a real socket.

    paramiko's own class reads one byte at a time, and leaves the process behind.
    """

    def __init__(self, command: str) -> None:
        self.socket, far = socket.socketpair()
        self._words: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 (closed by close)
        with far:
            argv = ["/bin/sh", "-c", f"exec {command}"]
            self._process = subprocess.Popen(
                argv, stdin=far.fileno(), stdout=far.fileno(), stderr=self._words, start_new_session=True
            )

    def last_words(self) -> str:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(1)
        self._words.seek(0)
        return "\n".join(self._words.read().decode(errors="replace").strip().splitlines()[-LAST_LINES:])

    def close(self) -> None:
        self.socket.close()
        _end_group(self._process, grace_s=1.0)
        self._words.close()


def _end_group(process: subprocess.Popen[bytes], grace_s: float) -> None:
    """End the process and its children, which are a group of their own."""
    for sign in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, sign)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(grace_s)
            return


def run_here(
    argv: Sequence[str], stdin: bytes, timeout_s: float | None, heard: Callable[[str], None] | None, *, own_group: bool
) -> CommandResult:
    started, late = time.monotonic(), threading.Event()
    pipe = subprocess.PIPE
    try:
        process = subprocess.Popen(
            argv, stdin=pipe if stdin else subprocess.DEVNULL, stdout=pipe, stderr=pipe, start_new_session=own_group
        )
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
    if stdin:
        helpers.append(threading.Thread(target=_feed, args=(process.stdin, stdin), daemon=True))
    deadline = threading.Timer(timeout_s, expire) if timeout_s is not None else None
    if deadline is not None:
        deadline.daemon = True
        helpers.append(deadline)
    for helper in helpers:
        helper.start()
    try:
        assert process.stdout is not None
        for line in process.stdout:
            out += line
            if heard is not None:
                heard(line.decode(errors="replace").rstrip("\r\n"))
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


def _drain(stream: IO[bytes], into: bytearray) -> None:
    for part in iter(lambda: stream.read1(TAKES), b""):  # type: ignore[attr-defined]
        into += part


def _feed(stream: IO[bytes], data: bytes) -> None:
    with contextlib.suppress(BrokenPipeError), stream:
        stream.write(data)
