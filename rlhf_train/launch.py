"""Starts the ranks, shows what they do, and ends with their exit code.

The launcher itself holds the rendezvous store, on a port that the system gave it: no port to choose, none to be taken.
"""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from pathlib import Path
from types import FrameType
from typing import IO, Any

from jobs import console
from jobs.errors import ExitCode, ToolkitError
from jobs.events import Error, EventWriter, read_events
from jobs.run_dir import RunDir
from jobs.spec import Job, save_job
from jobs.words import plural
from rlhf_train.plan import Placement
from rlhf_train.worker import LastWords, Order

POLL_S = 0.1
OTHERS_S = 3.0  # for the other ranks to end by themselves, when one has failed
GRACE_S = 10.0  # between SIGTERM and SIGKILL of a rank
CHECKOUT = Path(__file__).parents[1]

Rank = subprocess.Popen[bytes]


def launch(job: Job, run: RunDir, steps: Sequence[int], placement: Placement, cache: Path, lock: int) -> ExitCode:
    """Train `steps` with all ranks, which hold `lock` too; draws the run's events while they come. Raises ToolkitError with the first rank's error.

    Each step has processes of its own: DeepSpeed's engines do not give back all memory within one (seen on a GPU:
    16.8 GB of OPT-1.3b's step 1 were still held in step 2, and under ZeRO 3 also after `engine.destroy()`).
    """
    nccl = nccl_settings(placement, os.environ)
    if nccl:
        said = " and ".join(f"{name}={value}" for name, value in nccl.items())
        placement = replace(placement, notes=(*placement.notes, f"{said} for the ranks: {placement.no_peer_access}"))
    save_job(job, run.job_file)
    with run.log.open("ab") as log, _stop_signals() as caught, console.view() as view:
        for step in steps:
            view.feed({"kind": "progress", "step": step, "doing": f"starting {plural(placement.ranks, 'ranks')}"})
            _train_step(job, run, step, placement, cache, lock, log, caught, view)
            if caught:
                return ExitCode.INTERRUPTED if caught[0] == signal.SIGINT else ExitCode.CANCELLED
    return ExitCode.OK


def _train_step(job: Job, run: RunDir, step: int, placement: Placement, cache: Path, lock: int, log: Any, caught: list[int], view: Any) -> None:
    port, _store = _rendezvous(placement.ranks)
    order = Order(job.dump(), str(run.path), step, asdict(placement), str(cache), port)
    offset = run.events.stat().st_size if run.events.exists() else 0
    ranks: list[Rank] = []
    try:
        for number in range(placement.ranks):
            ranks.append(_start(order, number, placement, lock, log))
        while any(rank.poll() is None for rank in ranks) and not caught and not any(rank.poll() for rank in ranks):
            time.sleep(POLL_S)
            offset = _show(run, view, offset)
    finally:
        failed = [number for number, rank in enumerate(ranks) if rank.poll()]
        _end(ranks, wait_s=0.0 if caught else OTHERS_S)
    _show(run, view, offset)
    if failed and not caught:
        raise _failure(run, step, ranks, failed)


def _show(run: RunDir, view: Any, offset: int) -> int:
    events, offset = read_events(run.events, offset)
    for event in events:
        view.feed(event)
    return offset


def _rendezvous(ranks: int) -> tuple[int, Any]:
    """-> (port, the store that must stay alive). One rank needs none."""
    if ranks == 1:
        return 0, None
    from torch.distributed import TCPStore

    store = TCPStore("127.0.0.1", 0, ranks, is_master=True, wait_for_workers=False)
    return store.port, store


def nccl_settings(placement: Placement, environ: Mapping[str, str]) -> dict[str, str]:
    """NCCL's variables for the ranks: without peer access it would hang, or fail, on the way that it tries first. What the user
    has set stays as it is.
    """
    if not placement.no_peer_access:
        return {}
    # The level decides on peer access too: who set it has thought of it.
    owners = {"NCCL_P2P_DISABLE": {"NCCL_P2P_DISABLE", "NCCL_P2P_LEVEL"}, "NCCL_IB_DISABLE": {"NCCL_IB_DISABLE"}}
    return {name: "1" for name, taken in owners.items() if not any(environ.get(other) for other in taken)}


def environment_of(rank: int, placement: Placement, environ: Mapping[str, str]) -> dict[str, str]:
    environment = {
        **environ,
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(placement.ranks),
        "LOCAL_SIZE": str(placement.ranks),  # DeepSpeed on CPU asks numactl without it
        "DS_ACCELERATOR": placement.device,
        "PYTHONPATH": os.pathsep.join(filter(None, [str(CHECKOUT), environ.get("PYTHONPATH"), str(Path.cwd())])),  # the last: a rule beside a job
        "PYTHONSAFEPATH": "1",  # from Python 3.11 on: the folder that we are called from may hold a package `jobs`, too
        "PYTHONUNBUFFERED": "1",
        **nccl_settings(placement, environ),
    }
    if placement.device == "cpu":
        environment |= {
            "OMP_NUM_THREADS": str(placement.cpu_threads),
            # How long a waiting thread spins (libgomp). With its own 300,000, a busy neighbour made updates of the demo ten
            # times slower and more; not spinning at all cost a third of the speed on a quiet machine.
            "GOMP_SPINCOUNT": "3000",
            # glibc hands large blocks back to the kernel after each use; keeping them made updates 10 % faster.
            "MALLOC_MMAP_MAX_": "0",
            "MALLOC_TRIM_THRESHOLD_": str(16 * 2**30),
            "MALLOC_TOP_PAD_": str(256 * 2**20),
        }
    return environment


def _start(order: Order, rank: int, placement: Placement, lock: int, log: Any) -> Rank:
    # A session of its own: Ctrl-C reaches the launcher alone, which then ends the ranks in order.
    process = subprocess.Popen(
        [sys.executable, "-m", "rlhf_train.worker"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=log,
        env=environment_of(rank, placement, os.environ),
        pass_fds=[lock],
        start_new_session=True,
    )
    assert process.stdin is not None
    with suppress(BrokenPipeError):  # it has ended already, and will be found so
        process.stdin.write(order.for_rank(rank).encode() + b"\n")
        process.stdin.flush()
    return process


def _end(ranks: Sequence[Rank], wait_s: float) -> None:
    """All ranks are gone when this returns: asked first, killed after the grace."""
    deadline = time.monotonic() + wait_s
    while any(rank.poll() is None for rank in ranks) and time.monotonic() < deadline:
        time.sleep(POLL_S)
    for how, patience in ((signal.SIGTERM, GRACE_S), (signal.SIGKILL, GRACE_S)):
        for rank in ranks:
            if rank.poll() is None:
                rank.send_signal(how)
        deadline = time.monotonic() + patience
        while any(rank.poll() is None for rank in ranks) and time.monotonic() < deadline:
            time.sleep(POLL_S)


def _failure(run: RunDir, step: int, ranks: Sequence[Rank], failed: Sequence[int]) -> ToolkitError:
    """The first error, also written to the events. `failed`: the ranks that had failed before the others were ended."""
    words = {number: said for number, rank in enumerate(ranks) if (said := _last_words(rank))}
    mute = next((number for number in failed if number not in words), None)
    if mute is None:
        first = min(words, key=lambda number: words[number].at_s)
        said = words[first]
        error = ToolkitError(said.what, why=said.why, hint=said.hint, code=ExitCode(said.code))
    else:
        first, error = mute, _sudden_end(run, mute, ranks[mute].returncode)
    with suppress(OSError):  # the disk may be full, which then is the error
        EventWriter(run.events)(
            Error(step=step, rank=first, message=error.what, why=error.why or None, hint=error.hint or None, exit_code=int(error.code))
        )
    return error


def _last_words(rank: Rank) -> LastWords | None:
    """Why a rank that is gone has ended; None when it had no time to say."""
    assert rank.stdout is not None
    os.set_blocking(rank.stdout.fileno(), False)  # a child of the rank may still hold the pipe
    try:
        return LastWords(**json.loads(os.read(rank.stdout.fileno(), 2**16)))
    except (BlockingIOError, ValueError):
        return None


def _sudden_end(run: RunDir, number: int, code: int) -> ToolkitError:
    name = signal.Signals(-code).name if code < 0 else f"exit code {code}"
    likely = "the kernel ends the largest process when memory runs out (dmesg tells)\n" if code == -signal.SIGKILL else ""
    last = "\n".join(run.log.read_text(encoding="utf-8", errors="replace").splitlines()[-10:])
    return ToolkitError(
        f"rank {number} was ended by {name}",
        why=f"{likely}the last lines of {run.log}:\n{last}",
        hint="the same command goes on with the run",
        code=ExitCode.TRAINING,
    )


@contextmanager
def _stop_signals() -> Iterator[list[int]]:
    """Signals that ask to stop, in the order in which they came."""
    caught: list[int] = []

    def note(number: int, _frame: FrameType | None) -> None:
        caught.append(number)

    wanted = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.signal(number, note) for number in wanted}
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def locked(run: RunDir) -> Iterator[int]:
    """Only one process trains in a run folder. Yields the lock's file descriptor, which the ranks inherit.

    A crash lets go of the lock, but not before the last rank is gone. Raises ToolkitError (busy).
    """
    run.lock.parent.mkdir(parents=True, exist_ok=True)
    with run.lock.open("a+") as file:
        deadline = time.monotonic() + GRACE_S
        while not _lock(file):
            file.seek(0)
            owner = file.read().strip()
            if _is_alive(owner) or time.monotonic() > deadline:  # else its ranks are just leaving
                raise ToolkitError(
                    f"run `{run.name}` is being trained by another process",
                    why=f"process {owner or '?'} holds {run.lock}",
                    hint="wait for it, or use another --run",
                    code=ExitCode.BUSY,
                )
            time.sleep(POLL_S)
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield file.fileno()


def _lock(file: IO[str]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_alive(process: str) -> bool:
    try:
        os.kill(int(process), 0)
    except (ValueError, ProcessLookupError):
        return False
    except PermissionError:  # somebody else's
        pass
    return True
