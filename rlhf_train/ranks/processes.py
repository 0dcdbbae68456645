"""Rank processes start before they are needed, since imports take seconds, and get orders later.

One process imports, and forks the ranks of all steps: importer.py. A rank without an order is a
spare: it holds no lock, writes nothing and leaves the GPUs alone. Like all ranks, it ends when the
launcher ends, for whatever reason.
"""

from __future__ import annotations

import os
import re
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from jobs.spec import Job
from rlhf_train.ranks.importer import NUMBER

POLL_S = 0.1
GRACE_S = 10.0  # until a process is gone after SIGKILL, and then its lock
CHECKOUT = Path(__file__).parents[2]
GPU_FILES = (Path("/dev"), "nvidia[0-9]*")  # one for each card


@dataclass(frozen=True)
class RankEnvironment:
    """What rank processes are given when they start, since libraries read it only then."""

    device: str
    ranks: int
    cpu_threads: int
    nccl: tuple[tuple[str, str], ...] = ()  # its variables
    libraries: tuple[str, ...] = ()  # to be imported besides what every job needs

    def environment_of(self, environ: Mapping[str, str]) -> dict[str, str]:
        """Return all ranks' variables. Each also has its RANK and LOCAL_RANK."""
        # The current folder last: a rule may lie next to a job.
        paths = [str(CHECKOUT), environ.get("PYTHONPATH"), str(Path.cwd())]
        environment = {
            **environ,
            "WORLD_SIZE": str(self.ranks),
            "LOCAL_SIZE": str(self.ranks),  # DeepSpeed on CPU asks numactl without it
            "DS_ACCELERATOR": self.device,
            "PYTHONPATH": os.pathsep.join(filter(None, paths)),
            # From Python 3.11 on: the current folder may hold a package `jobs`, too.
            "PYTHONSAFEPATH": "1",
            "PYTHONUNBUFFERED": "1",
            **dict(self.nccl),
        }
        if self.ranks > 1:  # all are on one machine, whatever its name resolves to
            environment.setdefault("GLOO_SOCKET_IFNAME", loopback())
        if self.device == "cpu":
            environment |= {
                "OMP_NUM_THREADS": str(self.cpu_threads),
                # How long a waiting thread spins (libgomp). With libgomp's default of 300,000, a
                # busy neighbour made the demo's updates more than ten times slower; without
                # spinning, a quiet machine lost a third of its speed.
                "GOMP_SPINCOUNT": "3000",
                # By default glibc returns large blocks to the kernel after each use; keeping them
                # made updates 10 % faster.
                "MALLOC_MMAP_MAX_": "0",
                "MALLOC_TRIM_THRESHOLD_": str(2**34),
                "MALLOC_TOP_PAD_": str(2**28),
                # How many products oneDNN and its wrapper keep ready, each with its memory: packed
                # rows bring new shapes with each pass. With the default, 1024 each, 1600 shapes of
                # one 256 x 256 layer took 811 MiB; with 64 they took 79 MiB and were no slower.
                "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "64",
                "LRU_CACHE_CAPACITY": "64",
            }
        return environment


def likely_rank_environment(job: Job, environ: Mapping[str, str]) -> RankEnvironment:
    """Guess, without PyTorch, the rank environment that follows from `placement.place`.

    A wrong guess only costs the time that a right guess saves.
    """
    wish = job.hardware
    visible = environ.get("CUDA_VISIBLE_DEVICES")
    cards = len(list(GPU_FILES[0].glob(GPU_FILES[1]))) if visible is None else len(re.findall(r"[^,\s]+", visible))
    device = wish.device if wish.device != "auto" else "cuda" if cards else "cpu"
    ranks = wish.ranks if wish.ranks != "auto" else max(1, cards) if device == "cuda" else 1
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return RankEnvironment(device, ranks, cpu_threads(job, ranks, cores), libraries=libraries_of(job))


def cpu_threads(job: Job, ranks: int, cores: int) -> int:
    """Return how many threads each rank computes with on a CPU: at most one a core.

    Two threads on one core wait for each other: a short demo took 41.4 CPU seconds there, and 29.9
    with one thread.
    """
    wish = job.hardware.cpu_threads
    return max(1, cores // ranks) if wish == "auto" else min(wish, cores)


def libraries_of(job: Job) -> tuple[str, ...]:
    """Return `datasets`, whose import takes over a second, if the job has rows not in .jsonl files.

    See reading.py.
    """
    for name in job.data.names:
        found = next((place for place in (Path.cwd() / name, CHECKOUT / name) if place.exists()), None)
        if not name.endswith(".jsonl") and (found is None or not any(found.glob("*.jsonl"))):
            return ("datasets",)
    return ()


def loopback() -> str:
    """Return the interface's name: `lo` on Linux, `lo0` on macOS."""
    return next((name for _, name in socket.if_nameindex() if name in ("lo", "lo0")), "lo")


class Importer(subprocess.Popen[bytes]):
    """`python -m rlhf_train.worker LIBRARY...`: imports what every step needs, and forks ranks."""

    def __init__(self, environment: RankEnvironment, environ: Mapping[str, str]) -> None:
        self.environment = environment
        self._link, importer_end = socket.socketpair()
        self._link.setblocking(False)
        self._early = tempfile.TemporaryFile()  # noqa: SIM115 (open as long as the importer lives)
        self._wanted: list[Rank] = []  # not forked yet
        self._forked: dict[int, Rank] = {}
        self._said = b""
        with importer_end:
            super().__init__(
                [sys.executable, "-m", "rlhf_train.worker", *environment.libraries],
                stdin=subprocess.PIPE,  # closes when this process ends
                stdout=importer_end.fileno(),
                stderr=self._early.fileno(),
                env=environment.environment_of(environ),
                # Ctrl-C then reaches only the launcher, which ends the ranks in order.
                start_new_session=True,
            )

    def want(self, rank: Rank, number: int, files: Sequence[int]) -> None:
        self._wanted.append(rank)
        with suppress(BrokenPipeError, ConnectionResetError):  # it has ended, which `follow` sees
            socket.send_fds(self._link, [NUMBER.pack(number)], list(files))

    def follow(self, wait_s: float = 0.0) -> None:
        """Learn which ranks have begun and ended.

        wait_s: until there is something to learn.
        """
        has_ended = self.poll() is not None
        with suppress(ConnectionResetError):
            while select.select([self._link], [], [], 0.0 if has_ended else wait_s)[0]:
                if not (said := self._link.recv(2**16)):
                    break
                self._said, wait_s = self._said + said, 0.0
        *lines, self._said = self._said.split(b"\n")
        for line in lines:
            word, process, *code = line.split()
            if word == b"began":
                rank = self._wanted.pop(0)
                rank.pid = int(process)
                self._forked[rank.pid] = rank
            else:
                self._forked.pop(int(process)).returncode = int(code[0])
        if has_ended:
            assert self.returncode is not None
            for rank in self._wanted:
                rank.returncode = self.returncode
            for rank in self._forked.values():  # nobody would learn how they end
                with suppress(ProcessLookupError):
                    os.kill(rank.pid, signal.SIGKILL)
                rank.returncode = -signal.SIGKILL
            self._wanted, self._forked = [], {}

    def early_output(self) -> bytes:
        """Return what the imports wrote."""
        return os.pread(self._early.fileno(), 2**20, 0)

    def end(self) -> None:
        """End the importer, and with it the ranks that it has not forked yet."""
        self.kill()
        self.wait()
        self.follow()
        for file in (self._link, self._early, self.stdin):
            assert file is not None
            file.close()


class Rank:
    """One process that an importer forks, and that waits for its order; as subprocess.Popen."""

    def __init__(self, number: int, importer: Importer) -> None:
        self.pid = importer.pid  # until it is forked
        self.returncode: int | None = None
        self._importer = importer
        self._link, rank_end = socket.socketpair()
        # What the rank writes before it has the log; open as long as the rank lives.
        self._early = tempfile.TemporaryFile()  # noqa: SIM115
        said, say = os.pipe()
        self.stdout = os.fdopen(said, "rb", buffering=0)  # why it ended
        with rank_end, os.fdopen(say, "wb"):
            importer.want(self, number, [rank_end.fileno(), say, self._early.fileno()])

    def poll(self) -> int | None:
        if self.returncode is None:
            self._importer.follow()
        return self.returncode

    def wait(self, timeout: float) -> int:
        deadline = time.monotonic() + timeout
        while self.poll() is None:
            left = deadline - time.monotonic()
            if left <= 0:
                raise subprocess.TimeoutExpired(f"rank {self.pid}", timeout)
            self._importer.follow(min(left, POLL_S))
        assert self.returncode is not None
        return self.returncode

    def send_signal(self, number: int) -> None:
        # Before it is forked this reaches the importer, which has nothing else to do.
        if self.poll() is None:
            with suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def tell(self, order: str, log: int, heartbeat: int, lock: int) -> None:
        """Send the rank its order (one line of JSON) and the open files that it needs."""
        # A rank that has ended already is noticed elsewhere.
        with suppress(BrokenPipeError, ConnectionResetError):
            socket.send_fds(self._link, [b"\0"], [log, heartbeat, lock])
            self._link.sendall(order.encode() + b"\n")

    def early_output(self) -> bytes:
        """Return what the rank wrote to stderr if it ended before it had the log."""
        return (
            os.pread(self._early.fileno(), 2**20, 0)
            if self.pid != self._importer.pid
            else self._importer.early_output()
        )


class SpareRanks:
    """Ranks that wait for the next step, or for the first, while other work continues.

    A context manager: no spare is left when its block ends.
    """

    def __init__(self, environ: Mapping[str, str]) -> None:
        self._environ = environ
        self._importer: Importer | None = None
        self._ranks: list[Rank] = []

    def __enter__(self) -> SpareRanks:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end()
        self._end_importer()

    def start(self, environment: RankEnvironment) -> None:
        """Start the ranks if there are none; if that fails, `take` tries again and reports why."""
        if not self._ranks:
            with suppress(OSError):
                self._start(environment)

    def take(self, environment: RankEnvironment) -> list[Rank]:
        """Return the ranks for this environment, in their order: those that wait, else new ones.

        The caller has to end them.
        """
        if not self._fits(environment) or any(rank.poll() is not None for rank in self._ranks):
            self.end()
        if not self._ranks:
            self._start(environment)
        ranks, self._ranks = self._ranks, []
        return ranks

    def _fits(self, environment: RankEnvironment) -> bool:
        return self._importer is not None and self._importer.environment == environment

    def _start(self, environment: RankEnvironment) -> None:
        try:
            if not self._fits(environment) or (self._importer is not None and self._importer.poll() is not None):
                self._end_importer()
                self._importer = Importer(environment, self._environ)
            assert self._importer is not None
            for number in range(environment.ranks):
                self._ranks.append(Rank(number, self._importer))
        except OSError:
            self.end()
            raise

    def end(self) -> None:
        """End the ranks that wait."""
        ranks, self._ranks = self._ranks, []
        end(ranks)

    def _end_importer(self) -> None:
        importer, self._importer = self._importer, None
        if importer is not None:
            importer.end()


def end(
    ranks: Sequence[Rank], wait_s: float = 0.0, saving_s: float = 0.0, is_saving: Callable[[], bool] = lambda: False
) -> list[int]:
    """End all ranks, and return those that had to be killed.

    They have `wait_s` to end by themselves, or `saving_s` while rank 0 writes a checkpoint. Then
    they get SIGKILL: they answer SIGTERM with a checkpoint, and not at all while they wait for each
    other.
    """
    start = time.monotonic()
    while any(rank.poll() is None for rank in ranks):
        if time.monotonic() - start >= (saving_s if is_saving() else wait_s):
            break
        time.sleep(POLL_S)
    killed = [number for number, rank in enumerate(ranks) if rank.poll() is None]
    for number in killed:
        ranks[number].kill()
    deadline = time.monotonic() + GRACE_S
    for rank in ranks:
        with suppress(subprocess.TimeoutExpired):
            rank.wait(max(0.0, deadline - time.monotonic()))
    return killed
