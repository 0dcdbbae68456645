"""The tunnel to a port of a box: opened, tried, and watched until Ctrl-C."""

from __future__ import annotations

import contextlib
import selectors
import socket
import subprocess
import time
from collections.abc import Callable, Sequence
from typing import Literal

from jobs.errors import ExitCode, ToolkitError
from jobs.formatting import one_line

State = Literal["open", "forbidden", "nobody listens", "failed"]

LISTEN_S = 30.0  # until ssh has logged in and listens here
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
    """One ssh process that forwards `local` here to a port of the box."""

    def __init__(self, argv: Sequence[str], local: int) -> None:
        self._local = local
        self._process = subprocess.Popen(
            loud(argv), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        )
        self._words = b""

    def wait_until_it_listens(self) -> bool:
        deadline = time.monotonic() + LISTEN_S
        while time.monotonic() < deadline and self._process.poll() is None:
            with contextlib.suppress(OSError), socket.socket() as probe:
                probe.bind(("127.0.0.1", self._local))
                time.sleep(0.05)  # nobody has the port yet
                continue
            return True
        return False

    def try_it(self) -> State:
        """Connect once through the tunnel."""
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self._local), TRY_S) as trial:
            trial.settimeout(TRY_S)
            with contextlib.suppress(TimeoutError):
                if trial.recv(1):
                    return "open"
                # The connection was closed: by ssh, which then says why, or by who listens.
                self._hear(LAST_WORDS_S)
        self._hear(0)
        return state_of(self._words.decode(errors="replace")) or "open"

    def watch(self, changed: Callable[[State], None], state: State) -> int:
        """Wait for its end, and tell whenever the port can be reached or not; return ssh's code."""
        while self._hear(None):
            found = state_of(self._words.rpartition(b"\n")[0].rpartition(b"\n")[2].decode(errors="replace"))
            if found and found != state:
                changed(state := found)
        return self._process.wait()

    def _hear(self, seconds: float | None) -> bool:
        """Take more of ssh's words, waiting for them so long; False: there will be none."""
        stderr = self._process.stderr
        assert stderr is not None
        with selectors.DefaultSelector() as selector:
            selector.register(stderr, selectors.EVENT_READ)
            if not selector.select(seconds):
                return True
        more = stderr.read1(1 << 16)  # type: ignore[attr-defined]
        self._words = (self._words + more)[-8192:]
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


def forbidden(host: str) -> ToolkitError:
    return ToolkitError(
        f"`{host}` forbids tunnels",
        why="its sshd answers: administratively prohibited",
        hint="AllowTcpForwarding in its sshd_config, or what the rental page offers for ports",
        exit_code=ExitCode.UNFIT,
    )
