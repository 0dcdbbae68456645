"""The processes of the ranks.

They are started before they are needed, since their imports take seconds, and told what to do when
it is known.

A rank that has not been told yet is a spare: it holds no lock, writes nothing and leaves the GPUs
alone. It ends with the launcher, however that ends, as all ranks do.
"""

from __future__ import annotations

import os
import re
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

POLL_S = 0.1
GRACE_S = 10.0  # for a process to be gone after SIGKILL, or its lock after it
CHECKOUT = Path(__file__).parents[2]
GPU_FILES = (Path("/dev"), "nvidia[0-9]*")  # one for each card


@dataclass(frozen=True)
class RankEnvironment:
    """What the ranks' processes are told when they start, since libraries read it only then."""

    device: str
    ranks: int
    cpu_threads: int
    nccl: tuple[tuple[str, str], ...] = ()  # its variables
    libraries: tuple[str, ...] = ()  # to be imported besides what every job needs

    def environment_of(self, rank: int, environ: Mapping[str, str]) -> dict[str, str]:
        environment = {
            **environ,
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(self.ranks),
            "LOCAL_SIZE": str(self.ranks),  # DeepSpeed on CPU asks numactl without it
            "DS_ACCELERATOR": self.device,
            "PYTHONPATH": os.pathsep.join(
                filter(None, [str(CHECKOUT), environ.get("PYTHONPATH"), str(Path.cwd())])
            ),  # the last: a rule beside a job
            # from Python 3.11 on: the folder that we are called from may hold a package `jobs`, too
            "PYTHONSAFEPATH": "1",
            "PYTHONUNBUFFERED": "1",
            **dict(self.nccl),
        }
        if self.ranks > 1:  # all on one machine, whatever its name resolves to, or does not
            environment.setdefault("GLOO_SOCKET_IFNAME", loopback())
        if self.device == "cpu":
            environment |= {
                "OMP_NUM_THREADS": str(self.cpu_threads),
                # How long a waiting thread spins (libgomp). With its own 300,000, a busy neighbour
                # made updates of the demo ten times slower and more; not spinning at all cost a
                # third of the speed on a quiet machine.
                "GOMP_SPINCOUNT": "3000",
                # glibc hands large blocks back to the kernel after each use; keeping them made
                # updates 10 % faster.
                "MALLOC_MMAP_MAX_": "0",
                "MALLOC_TRIM_THRESHOLD_": str(2**34),
                "MALLOC_TOP_PAD_": str(2**28),
                # Products that oneDNN and its wrapper keep ready, each with its memory: packed rows
                # bring new shapes with each pass. With 1024 of both, their own default, 1600 shapes
                # of one layer of 256 x 256 took 811 MiB; with 64, 79 MiB, no slower.
                "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "64",
                "LRU_CACHE_CAPACITY": "64",
            }
        return environment


def likely_crew(job: Job, environ: Mapping[str, str]) -> RankEnvironment:
    """What placement.place will choose, as far as that can be told without PyTorch.

    A wrong guess only costs the time that a right one saves.
    """
    wish = job.hardware
    visible = environ.get("CUDA_VISIBLE_DEVICES")
    cards = len(list(GPU_FILES[0].glob(GPU_FILES[1]))) if visible is None else len(re.findall(r"[^,\s]+", visible))
    device = wish.device if wish.device != "auto" else "cuda" if cards else "cpu"
    ranks = wish.ranks if wish.ranks != "auto" else max(1, cards) if device == "cuda" else 1
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = wish.cpu_threads if wish.cpu_threads != "auto" else max(1, cores // ranks)
    return RankEnvironment(device, ranks, threads, libraries=libraries_of(job))


def libraries_of(job: Job) -> tuple[str, ...]:
    """`datasets` takes a second and more, and reads all rows but those of .jsonl files: see
    dataset.py.
    """
    for name in job.data.datasets:
        found = next((place for place in (Path.cwd() / name, CHECKOUT / name) if place.exists()), None)
        if not name.endswith(".jsonl") and (found is None or not any(found.glob("*.jsonl"))):
            return ("datasets",)
    return ()


def loopback() -> str:
    """The interface's name: `lo` on Linux, `lo0` on macOS."""
    return next((name for _, name in socket.if_nameindex() if name in ("lo", "lo0")), "lo")


class Rank(subprocess.Popen[bytes]):
    """One process, `python -m rlhf_train.worker LIBRARY...`.

    It imports what every step needs, and waits to be told.
    """

    def __init__(self, number: int, crew: RankEnvironment, environ: Mapping[str, str]) -> None:
        self._link, theirs = socket.socketpair()
        self._early = tempfile.TemporaryFile()  # noqa: SIM115 (what it says before it knows the log; open as long as it lives)
        with theirs:
            super().__init__(
                [sys.executable, "-m", "rlhf_train.worker", *crew.libraries],
                stdin=theirs.fileno(),
                stdout=subprocess.PIPE,
                stderr=self._early.fileno(),
                env=crew.environment_of(number, environ),
                start_new_session=True,  # Ctrl-C reaches the launcher alone, which then ends the ranks in order
            )

    def tell(self, order: str, log: int, heartbeat: int, lock: int) -> None:
        """What to do: one line of JSON, and the open files that it is to have."""
        with suppress(BrokenPipeError, ConnectionResetError):  # it has ended already, and will be found so
            socket.send_fds(self._link, [b"\0"], [log, heartbeat, lock])
            self._link.sendall(order.encode() + b"\n")

    def early_words(self) -> bytes:
        """What it said, and did not write to the log itself: it ended before."""
        return os.pread(self._early.fileno(), 2**20, 0)


class SpareRanks:
    """Ranks that wait for the next step, or for the first, while something else goes on.

    None is left when the block ends.
    """

    def __init__(self, environ: Mapping[str, str]) -> None:
        self._environ = environ
        self._crew: RankEnvironment | None = None
        self._ranks: list[Rank] = []

    def __enter__(self) -> SpareRanks:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end()

    def start(self, crew: RankEnvironment) -> None:
        """If there are none yet, and the machine lets us: what needs them starts them, else, and
        says why not.
        """
        if not self._ranks:
            with suppress(OSError):
                self._start(crew)

    def take(self, crew: RankEnvironment) -> list[Rank]:
        """The ranks of such a crew, in their order: those that wait, else new ones.

        They are the caller's to end.
        """
        if self._crew != crew or any(rank.poll() is not None for rank in self._ranks):
            self.end()
        if not self._ranks:
            self._start(crew)
        ranks, self._ranks = self._ranks, []
        return ranks

    def _start(self, crew: RankEnvironment) -> None:
        self._crew = crew
        try:
            for number in range(crew.ranks):
                self._ranks.append(Rank(number, crew, self._environ))
        except OSError:
            self.end()
            raise

    def end(self) -> None:
        ranks, self._ranks = self._ranks, []
        end(ranks)


def end(
    ranks: Sequence[Rank], wait_s: float = 0.0, saving_s: float = 0.0, is_saving: Callable[[], bool] = lambda: False
) -> list[int]:
    """All ranks are gone when this returns -> those that were killed here.

    SIGKILL: to SIGTERM they answer with a checkpoint, and those
    that wait for each other not at all.

    They have `wait_s` to end by themselves, and `saving_s` as long as rank 0 writes a checkpoint.
    """
    start = time.monotonic()
    while any(rank.poll() is None for rank in ranks) and time.monotonic() - start < (
        saving_s if is_saving() else wait_s
    ):
        time.sleep(POLL_S)
    killed = [number for number, rank in enumerate(ranks) if rank.poll() is None]
    for number in killed:
        ranks[number].kill()
    deadline = time.monotonic() + GRACE_S
    for rank in ranks:
        with suppress(subprocess.TimeoutExpired):
            rank.wait(max(0.0, deadline - time.monotonic()))
    return killed
