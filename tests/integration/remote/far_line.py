"""A slow connection: a network namespace whose packets reach a bridge of this machine late.

Or not at all. It needs root. `tc netem` would do the same, but not every kernel has it. So a
program of our own stands between two taps, one in the namespace and one in the bridge, and passes
Ethernet frames on after a while:

    python far_line.py TAP TAP   on standard input: `delay SECONDS`, `rate BYTES_PER_SECOND` (each
    way; 0: as it comes), `cut`, `mend`;
                                 each is answered by `ok`
"""

from __future__ import annotations

import fcntl
import os
import selectors
import struct
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from ipaddress import IPv4Interface

TUNSETIFF, IFF_TAP, IFF_NO_PI = 0x400454CA, 0x0002, 0x1000
LONGEST_FRAME = 65536
QUEUE_FRAMES = 20_000  # of each way; more are lost, as on a real line


@dataclass(frozen=True)
class FarLine:
    namespace: str
    _process: subprocess.Popen[str]

    @property
    def through(self) -> tuple[str, ...]:
        """In front of a command that shall be at the far end."""
        return ("ip", "netns", "exec", self.namespace)

    def delay(self, each_way_s: float) -> None:
        self._say(f"delay {each_way_s}")

    def rate(self, bytes_per_s: int) -> None:
        """0: as fast as it goes."""
        self._say(f"rate {bytes_per_s}")

    def cut(self) -> None:
        """Nothing comes through any more, and nobody is told: no FIN, no RST, no ICMP."""
        self._say("cut")

    def mend(self) -> None:
        self._say("mend")

    def _say(self, words: str) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(f"{words}\n")
        self._process.stdin.flush()
        assert self._process.stdout.readline() == "ok\n"


@contextmanager
def far_line(bridge: str, address: IPv4Interface, name: str) -> Iterator[FarLine]:
    """Set up the far end of a slow connection.

    bridge: an interface of this machine; address: that of the far end, in the bridge's network.
    """
    here, there = f"{name}a", f"{name}b"
    process = subprocess.Popen(
        [sys.executable, __file__, here, there], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None and process.stdout.readline() == "ok\n", "no taps: is /dev/net/tun there?"
        for words in (
            f"netns add {name}",
            f"link set {there} netns {name}",
            f"link set {here} master {bridge} up",
            f"-n {name} addr add {address} dev {there}",
            f"-n {name} link set {there} up",
            f"-n {name} link set lo up",
        ):
            subprocess.run(["ip", *words.split()], check=True, capture_output=True, text=True)
        yield FarLine(name, process)
    finally:
        process.kill()  # the taps go with it
        process.wait()
        subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


# --- the program ----------------------------------------------------------------------------------


def tap(name: str) -> int:
    fd = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(fd, TUNSETIFF, struct.pack("16sH", name.encode(), IFF_TAP | IFF_NO_PI))
    return fd


@dataclass
class Way:
    target: int
    queue: deque[tuple[float, bytes]] = field(default_factory=deque)  # when it is due, the frame
    free_at: float = 0.0  # the last frame is on the line until then

    def take(self, frame: bytes, delay_s: float, rate: float) -> None:
        now = time.monotonic()
        self.free_at = max(self.free_at, now) + (len(frame) / rate if rate else 0.0)
        if len(self.queue) < QUEUE_FRAMES:
            self.queue.append((self.free_at + delay_s, frame))

    def pass_on(self) -> None:
        while self.queue and self.queue[0][0] <= time.monotonic():
            with suppress(OSError):  # a line that is full loses frames
                os.write(self.target, self.queue.popleft()[1])


def main(names: list[str]) -> None:
    one, other = (tap(name) for name in names)
    print("ok", flush=True)
    ways = {one: Way(other), other: Way(one)}
    delay_s, rate, is_cut, commands = 0.0, 0.0, False, b""
    with selectors.DefaultSelector() as selector:
        for fd in (0, one, other):
            selector.register(fd, selectors.EVENT_READ)
        while True:
            first = min((way.queue[0][0] for way in ways.values() if way.queue), default=None)
            ready = {
                key.fd for key, _ in selector.select(None if first is None else max(0.0, first - time.monotonic()))
            }
            if 0 in ready:
                read = os.read(0, 4096)
                if not read:
                    return
                *lines, commands = (commands + read).split(b"\n")
                for line in lines:
                    word, _, value = line.decode().partition(" ")
                    delay_s = float(value) if word == "delay" else delay_s
                    rate = float(value) if word == "rate" else rate
                    is_cut = word == "cut" or (is_cut and word != "mend")
                    print("ok", flush=True)
            for fd in ready & ways.keys():
                with suppress(OSError):  # nothing more for now; or the interface is not up yet
                    while True:
                        ways[fd].take(os.read(fd, LONGEST_FRAME), delay_s, rate)
            for way in ways.values():
                if is_cut:
                    way.queue.clear()
                way.pass_on()


if __name__ == "__main__":
    main(sys.argv[1:])
