"""The importer imports what every rank needs, once, and forks the ranks of all steps.

It touches no GPU, starts no thread and computes nothing, so what it forks is as good as a process
that has imported all by itself. Its stdin is a pipe that closes when the launcher ends, and ends it
then, in the middle of an import too. Its stdout is a socket: the launcher sends a rank's number
with its three files, and is told which process that became, and how each ends.
"""

from __future__ import annotations

import fcntl
import os
import select
import signal
import socket
import struct
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

NUMBER = struct.Struct("<Q")
# A batch scheduler may send these to all of a job's processes: the launcher decides what they mean.
LEFT_TO_THE_LAUNCHER = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def end_with_the_launcher() -> None:
    """Let the kernel end this process (SIGIO) when the launcher's end of stdin closes."""
    fcntl.fcntl(0, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(0, fcntl.F_SETFL, fcntl.fcntl(0, fcntl.F_GETFL) | os.O_ASYNC)
    if select.select([0], [], [], 0)[0]:  # it has closed before
        os._exit(1)


def link_to_the_launcher() -> socket.socket:
    """Return the socket of stdout. What is printed goes to stderr from now on."""
    link = socket.socket(fileno=os.dup(1))
    os.dup2(2, 1)
    return link


def serve(link: socket.socket, run_rank: Callable[[int], NoReturn]) -> NoReturn:
    """Fork the ranks that the launcher asks for, until it closes the link.

    run_rank: what a rank does, with the file where it says why it ended.
    """
    for number in LEFT_TO_THE_LAUNCHER:
        signal.signal(number, signal.SIG_IGN)
    woken, wake = os.pipe()
    for end in (woken, wake):
        os.set_blocking(end, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(wake)
    with suppress(ConnectionError):
        while True:
            if woken in select.select([link.fileno(), woken], [], [])[0]:
                os.read(woken, 2**16)
                _tell_the_ended(link)
                continue
            message, files, _, _ = socket.recv_fds(link, NUMBER.size, 3)
            if not message:
                break
            (number,) = NUMBER.unpack(message)
            os.environ["RANK"] = os.environ["LOCAL_RANK"] = str(number)
            process = os.fork()
            if process == 0:
                for end in (woken, wake):
                    os.close(end)
                link.close()
                _become_rank(number, files)
                run_rank(files[1])
            for file in files:
                os.close(file)
            link.sendall(f"began {process}\n".encode())
    os._exit(0)


def _tell_the_ended(link: socket.socket) -> None:
    with suppress(ChildProcessError):  # there are no more
        while (ended := os.waitpid(-1, os.WNOHANG))[0]:
            link.sendall(f"ended {ended[0]} {os.waitstatus_to_exitcode(ended[1])}\n".encode())


def _become_rank(number: int, files: list[int]) -> None:
    """Make this forked process what a process would be that was started as a rank.

    files: its orders, where it says why it ended, and its output until it has the log.
    """
    os.setsid()
    signal.set_wakeup_fd(-1)
    for each in (*LEFT_TO_THE_LAUNCHER, signal.SIGCHLD):
        signal.signal(each, signal.default_int_handler if each == signal.SIGINT else signal.SIG_DFL)
    orders, _, output = files
    sys.stderr.flush()
    os.write(output, os.pread(2, 2**20, 0))  # what the imports wrote
    for file, stream in ((orders, 0), (output, 1), (output, 2)):
        os.dup2(file, stream)
    os.close(orders)
    os.close(output)
    with suppress(OSError):  # what `top` shows; Linux alone has it
        Path("/proc/self/comm").write_text(f"rank {number}", encoding="utf-8")
