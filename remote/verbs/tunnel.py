"""The tunnel to a port of a box: opened, tried, and watched until Ctrl-C."""

from __future__ import annotations

import os
import selectors
import socket
import subprocess
import time
from collections.abc import Callable, Sequence
from typing import Literal

from jobs.errors import ExitCode, ToolkitError
from jobs.formatting import one_line
from remote.ssh.openssh import BY_A_PERSON_S

State = Literal["open", "forbidden", "nobody listens", "failed"]

LISTEN_S = 30.0  # until ssh has logged in and listens here
AGAIN_S = 3.0  # until it is tried again whether somebody listens
TRY_S = 2.0  # until the box has refused to connect; if it says nothing, it has connected
LAST_WORDS_S = 0.3


def loud(argv: Sequence[str]) -> list[str]:
    """Let ssh say why it cannot connect to the port: by default that is hidden from us."""
    return [argv[0], "-o", "LogLevel=INFO", *argv[1:]]


def state_of(words: str) -> State | None:
    """Return what ssh's words say of the port on the box; None: nothing."""
    if "open failed" not in words and "forwarding disabled" not in words:
        return None
    if "administratively prohibited" in words or "forwarding disabled" in words:
        return "forbidden"
    return "nobody listens" if "refused" in words else "failed"


class Tunnel:
    """One ssh process that forwards `local` here to a port of the box.

    state: what it leads to; None: ssh has ended.
    """

    def __init__(self, argv: Sequence[str], local: int, *, wait_s: float = LISTEN_S) -> None:
        """Start ssh, and wait until it listens here, for `wait_s` at most."""
        self._local = local
        self._process = subprocess.Popen(
            loud(argv), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        )
        self._words = b""
        self.state = self._opened(wait_s)

    def _opened(self, wait_s: float) -> State | None:
        deadline = time.monotonic() + wait_s
        while time.monotonic() < deadline and self._process.poll() is None:
            if state := self._try():
                return state
            time.sleep(0.05)
        return None

    def _try(self) -> State | None:
        """Connect once through the tunnel; None: ssh does not listen."""
        heard = len(self._words)
        try:
            trial = socket.create_connection(("127.0.0.1", self._local), TRY_S)
        except OSError:
            return None
        with trial:
            trial.settimeout(TRY_S)
            try:
                if trial.recv(1):
                    return "open"
            except TimeoutError:
                pass
            except OSError:
                self._hear(LAST_WORDS_S)
            else:  # it was closed: by ssh, which then says why, or by who listens
                self._hear(LAST_WORDS_S)
        return state_of(self._words[heard:].decode(errors="replace")) or "open"

    def watch(self, changed: Callable[[State], None], state: State) -> int:
        """Wait for its end, and tell whenever the port can be reached or not; return ssh's code."""
        while True:
            heard = len(self._words)
            is_waiting = state == "nobody listens"
            goes_on = self._hear(AGAIN_S if is_waiting else None)
            found = state_of(self._words[heard:].decode(errors="replace"))
            if is_waiting and len(self._words) == heard and goes_on:
                found = self._try()
            if found and found != state:
                changed(state := found)
            if not goes_on:
                return self._process.wait()

    def _hear(self, seconds: float | None) -> bool:
        """Take more of ssh's words, waiting for them so long; False: there will be none."""
        stderr = self._process.stderr
        assert stderr is not None
        with selectors.DefaultSelector() as selector:
            selector.register(stderr, selectors.EVENT_READ)
            if not selector.select(seconds):
                return True
        more = os.read(stderr.fileno(), 1 << 16)
        self._words += more
        return bool(more)

    def last_words(self) -> str:
        self._hear(LAST_WORDS_S)
        return one_line(self._words.decode(errors="replace").strip().rpartition("\n")[2])

    def close(self) -> None:
        if self._process.poll() is None:
            self._process.terminate()
        self._process.wait()
        if self._process.stderr is not None:
            self._process.stderr.close()


def open_tunnel(argv: Sequence[str], asking: Sequence[str] | None, local: int) -> Tunnel:
    """Open a tunnel; where keys alone do not let us in, ssh asks on the terminal for what it needs.

    asking: the argv for an ssh that asks; None: there is no terminal.
    """
    tunnel = Tunnel(argv, local)
    if tunnel.state is not None or asking is None or "Permission denied" not in tunnel.last_words():
        return tunnel
    tunnel.close()
    return Tunnel(asking, local, wait_s=LISTEN_S + BY_A_PERSON_S)


def forbidden(host: str) -> ToolkitError:
    return ToolkitError(
        f"`{host}` forbids tunnels",
        why="its sshd answers: administratively prohibited",
        hint="AllowTcpForwarding in its sshd_config, or what the rental page offers for ports",
        exit_code=ExitCode.UNFIT,
    )
