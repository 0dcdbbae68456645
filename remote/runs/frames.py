"""The framed stream of `supervisor.sh follow`: frames, the place in the file, one connection.

A frame is a line of words. `bytes OFFSET LENGTH` is followed by that many raw bytes of the file. A
`beat` says that all that the file held by then was sent.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import IO

from jobs.formatting import duration, one_line

LONGEST_FRAME_LINE = 64 * 1024
PROGRESS = {"bytes", "beat", "done"}  # not `job`, which comes before anything was read


@dataclass(frozen=True)
class StreamTimeouts:
    silence_s: float = 10.0  # a `beat` comes each second
    connect_s: float = 30.0  # until the first byte of a connection: jump hosts and far boxes take their time
    first_pause_s: float = 0.1  # most often, a connection that broke can be opened again immediately
    longest_pause_s: float = 15.0
    tries: int | None = None  # connections in a row that brought nothing; None: for ever
    first_tries: int | None = None  # the same, until the box has answered for the first time


@dataclass(frozen=True)
class Frame:
    word: str
    args: tuple[str, ...] = ()
    data: bytes = b""  # for `bytes`: as much as has come; its offset is the first of `args`


class Framing:
    """Puts frames together from bytes that may be cut anywhere.

    The bytes of a `bytes` frame are handed on as they come, since they are the file's.
    """

    def __init__(self) -> None:
        self._line = bytearray()
        self._offset = self._left = 0

    def feed(self, data: bytes) -> Iterator[Frame]:
        while data:
            if self._left:
                chunk, data = data[: self._left], data[self._left :]
                frame = Frame("bytes", (str(self._offset),), chunk)
                self._offset, self._left = self._offset + len(chunk), self._left - len(chunk)
                yield frame
                continue
            line, newline, data = data.partition(b"\n")
            self._line += line
            if len(self._line) > LONGEST_FRAME_LINE:
                raise ConnectionLost("the answer is not the stream of a supervisor")
            if newline:
                words = self._line.decode("utf-8", "replace").split()
                self._line.clear()
                yield from self._frame(words)

    def _frame(self, words: list[str]) -> Iterator[Frame]:
        if not words:
            return
        word, args = words[0], tuple(words[1:])
        if word == "bytes":
            self._offset, self._left = counts(word, args, 2)
        else:
            yield Frame(word, args)


def counts(word: str, args: Sequence[str], count: int) -> list[int]:
    if len(args) < count or not all(arg.isascii() and arg.isdigit() for arg in args[:count]):
        raise ConnectionLost(f"a damaged frame: {one_line(' '.join([word, *args]))[:80]}")
    return [int(arg) for arg in args[:count]]


class ConnectionLost(Exception):
    """This connection can no longer be used."""


class Reread(Exception):
    """A line of the file must be read again."""


@dataclass
class Tail:
    """The place in the file that was reached: `offset` is the first byte not handed on."""

    by_lines: bool  # only whole lines are handed on
    offset: int = 0
    _begun: bytearray = field(default_factory=bytearray)  # the beginning of a line whose end has not come
    _is_torn: bool = False  # the file ended within that line
    _reread: int = -1  # the last offset that was read again

    @property
    def next(self) -> int:
        return self.offset + len(self._begun)

    def take(self, data: bytes) -> bytes:
        """Take the next bytes, and return what can be handed on now.

        Raises Reread if the file had ended within a line: its writer may have died there, and these
        bytes may come from a new writer that cut the torn line off.
        """
        if self._is_torn and self._reread != self.offset:
            self._reread = self.offset
            raise Reread
        if self.by_lines:
            lines, newline, rest = data.rpartition(b"\n")
            data = bytes(self._begun) + lines + newline if newline else b""
            self._begun = bytearray(rest) if newline else self._begun + rest
        self.offset += len(data)
        return data

    def beat(self) -> None:
        """Note that all of the file was sent.

        Lines are written whole, so a line without an end is now known to be torn.
        """
        self._is_torn = bool(self._begun)

    def drop_begun(self) -> None:
        """Forget a line without its end: a new connection sends it again."""
        self._begun.clear()
        self._is_torn = False

    def cut(self, size_bytes: int) -> None:
        """Note that the file was made shorter."""
        del self._begun[max(size_bytes - self.offset, 0) :]
        self._is_torn = self._is_torn and bool(self._begun)
        self.offset = min(size_bytes, self.offset)


def lines_of(data: bytes) -> list[bytes]:
    """Split into whole lines, with their ends.

    `splitlines` would also cut at a carriage return, which a damaged line may hold.
    """
    return [line + b"\n" for line in data.split(b"\n")[:-1]]


class FrameStream:
    """The frames of one process, until it ends (`code` is set) or falls silent."""

    def __init__(self, process: subprocess.Popen[bytes], limits: StreamTimeouts) -> None:
        self._process, self._limits = process, limits
        self.code: int | None = None
        self.has_progress = False
        self._errors = b""

    @property
    def last_words(self) -> str:
        return self._errors.decode("utf-8", "replace").strip()

    def frames(self) -> Iterator[Frame]:
        stdout, stderr, framing = self._process.stdout, self._process.stderr, Framing()
        assert stdout is not None
        with selectors.DefaultSelector() as selector:
            selector.register(stdout, selectors.EVENT_READ)
            if stderr is not None:
                selector.register(stderr, selectors.EVENT_READ)
            limit_s = self._limits.connect_s
            deadline = time.monotonic() + limit_s
            while True:
                ready = [key.fileobj for key, _ in selector.select(max(deadline - time.monotonic(), 0.0))]
                if stderr is not None and stderr in ready and not self._listen(stderr):
                    selector.unregister(stderr)
                if stdout in ready:
                    data = os.read(stdout.fileno(), 1 << 16)
                    if not data:
                        selector.unregister(stdout)
                        self._reap(selector)
                        ended = "the stream ended" if self.code is None else f"ssh ended with {self.code}"
                        raise ConnectionLost(one_line(self.last_words)[-200:] or ended)
                    for frame in framing.feed(data):
                        self.has_progress |= frame.word in PROGRESS
                        yield frame
                    # Counted from now: the caller may have taken long over the frames.
                    limit_s = self._limits.silence_s
                    deadline = time.monotonic() + limit_s
                elif time.monotonic() >= deadline:
                    raise ConnectionLost(f"nothing came for {duration(limit_s)}")

    def _listen(self, stderr: IO[bytes]) -> bool:
        data = os.read(stderr.fileno(), 1 << 16)
        self._errors = (self._errors + data)[-4096:]
        return bool(data)

    def _reap(self, selector: selectors.BaseSelector) -> None:
        """Get the exit code and last words of the process, without waiting for long."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.code = self._process.wait(1.0)
        stderr = self._process.stderr
        while selector.get_map() and selector.select(0.05) and stderr is not None and self._listen(stderr):
            pass

    def close(self) -> None:
        """End the process by SIGTERM, or by SIGKILL if it is frozen.

        This takes well under the 0.3 s that Ctrl-C may take.
        """
        if self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(0.1)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout, self._process.stderr):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()
