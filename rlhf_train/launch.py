"""Starts the ranks, shows what they do, and ends with their exit code.

The launcher itself holds the rendezvous store, on a port that the system gave it: no port to
choose, none to be taken.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
import signal
import socket
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import FrameType
from typing import IO, Any

from jobs.errors import ExitCode, ToolkitError
from jobs.events import Error, EventWriter, RawEvent, Warning, read_events
from jobs.formatting import plural
from jobs.run_dir import RunDir
from jobs.spec import Job, save_job
from jobs.views import console
from rlhf_train import completion
from rlhf_train.plan import memory_fit
from rlhf_train.plan.placement import Placement
from rlhf_train.ranks.heartbeat import HeartbeatReader, RankSign
from rlhf_train.ranks.processes import GRACE_S, POLL_S, Rank, RankEnvironment, SpareRanks, end, libraries_of
from rlhf_train.worker import LastWords, Order

OTHERS_S = 3.0  # for the other ranks to end by themselves, when one has failed
END_S = 2.0  # of checkpoint.grace_s, for the launcher's own end
HANG_S = 300.0  # without a sign of life of any rank; a pass or a token takes seconds
# while libraries are imported, models fetched or written, and rows tokenised. PyTorch's collectives
# give up after 1800 s
PATIENT_HANG_S = 1500.0
TAIL_BYTES = 2**16  # of the log, which may be long
STACKS_S = 1.0  # for the ranks to write down their stacks
# before a step's last update the next step's ranks are started: imports take 5 s on a quiet core,
# 11 s on one machine with a GPU
SPARES_S = 20.0


@dataclass(frozen=True)
class _Call:
    """What the steps of one call share."""

    job: Job
    run: RunDir
    cache: Path
    lock: int
    log: IO[bytes]
    view: Any
    caught: list[int]  # signals that ask to stop
    spares: SpareRanks


def launch(
    job: Job, run: RunDir, steps: Sequence[int], placement: Placement, cache: Path, lock: int, spares: SpareRanks
) -> ExitCode:
    """Train `steps` with all ranks, which hold `lock` too; draws the run's events while they come.

    Raises ToolkitError with the first rank's error.

    Each step has processes of its own: DeepSpeed's engines do not give back all memory within one
    (seen on a GPU:
    16.8 GB of OPT-1.3b's step 1 were still held in step 2, and under ZeRO 3 also after
    `engine.destroy()`). Those of the next step are started while this one ends, so that it need not
    wait for their imports.
    """
    nccl = nccl_settings(placement, os.environ)
    if nccl:
        said = " and ".join(f"{name}={value}" for name, value in nccl.items())
        placement = replace(placement, notes=(*placement.notes, f"{said} for the ranks: {placement.no_peer_access}"))
    save_job(job, run.job_file)
    placement = memory_fit.fit(job, run, placement)
    with _stop_signals() as caught, run.log.open("ab", buffering=0) as log, console.view() as view:
        call = _Call(job, run, cache, lock, log, view, caught, spares)
        for step in steps:
            ended = _Ended(is_done=False)
            while not ended.is_done:
                view.feed({"kind": "progress", "step": step, "doing": f"starting {plural(placement.ranks, 'ranks')}"})
                ended = _train_step(call, step, [n for n in steps if n >= step], placement)
                if ended.no_memory is not None:
                    placement = _with_less_memory(job, run, step, placement, ended.no_memory)
                elif not ended.is_done:
                    return _code_of_stop(caught, run)
            if caught and step != steps[-1]:
                return _code_of_stop(caught, run)
    return ExitCode.OK


def _code_of_stop(caught: Sequence[int], run: RunDir) -> ExitCode:
    if caught and caught[0] == signal.SIGINT:
        return ExitCode.INTERRUPTED
    return ExitCode.CANCELLED if run.cancelled.exists() else ExitCode.PREEMPTED


@dataclass(frozen=True)
class _Ended:
    """How the ranks of a step have ended, if not by an error."""

    is_done: bool  # else they were stopped
    no_memory: LastWords | None = None


def _train_step(call: _Call, step: int, left: Sequence[int], placement: Placement) -> _Ended:
    """left: this step and those to be done after it."""
    job, run, caught = call.job, call.run, call.caught
    port, _store = _rendezvous(placement.ranks)
    order = Order(job.dump(), str(run.path), step, list(left), asdict(placement), str(call.cache), port)
    crew, watch = crew_of(job, placement, os.environ), HeartbeatReader(placement.ranks)
    offset = run.events.stat().st_size if run.events.exists() else 0

    def show() -> None:
        nonlocal offset
        events, offset = read_events(run.events, offset)
        for event in events:
            call.view.feed(event)
        if len(left) > 1 and not caught and any(map(_ends_soon, events)):
            call.spares.start(crew)

    hang: ToolkitError | None = None
    ranks = call.spares.take(crew)
    try:
        for number, rank in enumerate(ranks):
            rank.tell(order.for_rank(number), call.log.fileno(), watch.file, call.lock)
        life, asked_at = _Life(watch), math.inf
        while any(rank.poll() is None for rank in ranks) and not _failed(ranks):
            time.sleep(POLL_S)
            show()
            if caught and asked_at == math.inf:
                asked_at = time.monotonic()
                for rank in ranks:
                    rank.send_signal(signal.SIGTERM)
            is_late = time.monotonic() - asked_at > job.checkpoint.grace_s - END_S
            if caught and (
                is_late or not any(sign.has_trained for sign in watch.signs()) or caught.count(signal.SIGINT) > 1
            ):
                break
            if (silent_s := life.silent_s()) > (
                PATIENT_HANG_S if any(sign.is_patient or not sign.count for sign in watch.signs()) else HANG_S
            ):
                hang = _hang(ranks, watch.signs(), silent_s)
                break
    finally:
        failed = _failed(ranks)
        wait_s = 0.0 if caught or hang else OTHERS_S
        saving_s = 0.0 if caught or hang else max(OTHERS_S, job.checkpoint.grace_s - END_S)
        killed = end(ranks, wait_s, saving_s, lambda: ranks[0].poll() is None and watch.signs()[0].is_saving)
        watch.close()
        for rank in ranks:
            with suppress(OSError):  # the log's disk may be full
                call.log.write(rank.early_words())
    show()
    if hang is not None:
        raise _written(run, step, 0, hang)
    if caught:
        if failed and (words := _all_last_words(ranks)):  # while it saved: said, but the run was stopped and not broken
            _failure(run, step, ranks, list(words), words)
            show()
        return _Ended(is_done=all(rank.returncode == 0 for rank in ranks))
    if failed:
        failed += killed_by_others([rank.returncode for rank in ranks], {*failed, *killed})
        words = _all_last_words(ranks)
        first = min(words.values(), key=lambda said: said.at_s, default=None)
        if first is not None and first.out_of_memory and all(number in words for number in failed):
            return _Ended(is_done=False, no_memory=first)
        raise _failure(run, step, ranks, failed, words)
    return _Ended(is_done=all(rank.returncode == 0 for rank in ranks))


def _failed(ranks: Sequence[Rank]) -> list[int]:
    """Those that have ended by an error, in their order: not done, nor stopped as they were asked
    to.
    """
    return [number for number, rank in enumerate(ranks) if rank.poll() not in (None, ExitCode.OK, ExitCode.PREEMPTED)]


def killed_by_others(codes: Sequence[int | None], known: Collection[int]) -> list[int]:
    """Ranks that somebody, or the kernel, has ended by SIGKILL, besides those that are `known` to
    have failed or that we have ended.

    Such an end may be seen after the error of a rank that waited for it: a connection breaks
    immediately, a GPU is let go of later.
    """
    return [number for number, code in enumerate(codes) if code == -signal.SIGKILL and number not in known]


def _with_less_memory(job: Job, run: RunDir, step: int, placement: Placement, words: LastWords) -> Placement:
    """The placement to try next, remembered for this run.

    Raises ToolkitError when there is none.
    """
    now = placement.micro_batches[step - 1]
    less = memory_fit.smaller(job, step, placement)
    if less is None:
        from rlhf_train.plan.estimate import relief

        what = f"out of memory in step {step} with a micro batch of 1"
        raise _written(
            run,
            step,
            0,
            ToolkitError(what, why=words.why, hint=relief(job, step, placement), exit_code=ExitCode.TRAINING),
        )
    with suppress(OSError):  # a full disk is told by the next start
        memory_fit.remember(job, run, less)
    update = completion.goes_on_from(run, step)
    message = f"out of memory with a micro batch of {now}: continues with {less.micro_batches[step - 1]}, from update {update}"
    with suppress(OSError):
        EventWriter(run.events)(
            Warning(step=step, message=message, hint=f"the global batch stays; {run.fitted} remembers it")
        )
    return less


class _Life:
    """How long the ranks have given no sign of life."""

    def __init__(self, watch: HeartbeatReader) -> None:
        self._watch, self._counts, self._silent_s, self._seen_at = watch, [0], 0.0, time.monotonic()

    def silent_s(self) -> float:
        counts, now = [sign.count for sign in self._watch.signs()], time.monotonic()
        self._silent_s += min(now - self._seen_at, 1.0)  # a machine that was frozen, and we with it, has not hung
        self._seen_at = now
        if counts != self._counts:
            self._counts, self._silent_s = counts, 0.0
        return self._silent_s


def _hang(ranks: Sequence[Rank], signs: Sequence[RankSign], silent_s: float) -> ToolkitError:
    """Who keeps the others waiting: the rank that has come least far.

    Their stacks go to the log.
    """
    for rank in ranks:
        if rank.poll() is None:
            rank.send_signal(signal.SIGUSR2)
    time.sleep(STACKS_S)
    states = [process_state(rank.pid) for rank in ranks]
    fewest = min(sign.meetings for sign in signs)
    behind = [n for n, sign in enumerate(signs) if sign.meetings == fewest]
    away = [
        n for n in behind if states[n] in "TtDZX"
    ] or behind  # alike far, as in the midst of a pass: one that does not run at all
    host = socket.gethostname()
    names = " and ".join(f"rank {n}" for n in away)
    lines = [
        f"rank {n} on {host} (process {rank.pid}, {STATES.get(states[n], states[n])}): {signs[n].phase}"
        for n, rank in enumerate(ranks)
    ]
    return ToolkitError(
        f"{names} on {host} stays away: no rank has got further for {silent_s:.0f} s",
        why="\n".join(lines),
        hint="the stacks of all ranks are at the end of train.log; a GPU that hangs shows as Xid in `dmesg`, a disk in `df`;\n"
        "the same command resumes from the last checkpoint",
        exit_code=ExitCode.TRAINING,
    )


STATES = {
    "R": "running",
    "S": "waiting",
    "D": "waiting for a device or disk",
    "T": "stopped by a signal",
    "t": "traced",
    "Z": "dead",
    "X": "dead",
}


def process_state(process: int) -> str:
    """Of Linux' letters; "?" where it cannot be told."""
    try:
        return Path(f"/proc/{process}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return "?"


def _ends_soon(event: RawEvent) -> bool:
    """Whether the step that says this has its last update behind it, or SPARES_S before it as far
    as can be told.
    """
    return (
        event["kind"] == "metrics"
        and (event["updates"] - event["update"]) * event["elapsed_s"] / event["update"] <= SPARES_S
    )


def _rendezvous(ranks: int) -> tuple[int, Any]:
    """-> (port, the store that must stay alive). One rank needs none."""
    if ranks == 1:
        return 0, None
    from torch.distributed import TCPStore

    store = TCPStore("127.0.0.1", 0, ranks, is_master=True, wait_for_workers=False)
    return store.port, store


def crew_of(job: Job, placement: Placement, environ: Mapping[str, str]) -> RankEnvironment:
    nccl = tuple(nccl_settings(placement, environ).items())
    return RankEnvironment(placement.device, placement.ranks, placement.cpu_threads, nccl, libraries_of(job))


def nccl_settings(placement: Placement, environ: Mapping[str, str]) -> dict[str, str]:
    """NCCL's variables for the ranks: without peer access it would hang, or fail, on the way that
    it tries first. What the user has set stays as it is.
    """
    if not placement.no_peer_access:
        return {}
    # The level decides on peer access too: who set it has thought of it.
    owners = {"NCCL_P2P_DISABLE": {"NCCL_P2P_DISABLE", "NCCL_P2P_LEVEL"}, "NCCL_IB_DISABLE": {"NCCL_IB_DISABLE"}}
    return {name: "1" for name, taken in owners.items() if not any(environ.get(other) for other in taken)}


def _failure(
    run: RunDir, step: int, ranks: Sequence[Rank], failed: Sequence[int], words: Mapping[int, LastWords]
) -> ToolkitError:
    """The first error, also written to the events.

    `failed`: the ranks that had failed before the others were ended.
    """
    mute = next((number for number in failed if number not in words), None)
    if mute is not None:
        return _written(run, step, mute, _sudden_end(run, mute, ranks[mute].returncode))
    first = min(words, key=lambda number: words[number].at_s)
    said = words[first]
    return _written(
        run, step, first, ToolkitError(said.what, why=said.why, hint=said.hint, exit_code=ExitCode(said.exit_code))
    )


def _written(run: RunDir, step: int, rank: int, error: ToolkitError) -> ToolkitError:
    with suppress(OSError):  # the disk may be full, which then is the error
        run.path.stat()  # or gone: it is not made anew
        EventWriter(run.events)(
            Error(
                step=step,
                rank=rank,
                what=error.what,
                why=error.why or None,
                hint=error.hint or None,
                exit_code=int(error.exit_code),
            )
        )
    return error


def _all_last_words(ranks: Sequence[Rank]) -> dict[int, LastWords]:
    return {number: said for number, rank in enumerate(ranks) if (said := _last_words(rank))}


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
    likely = (
        "the kernel ends the largest process when memory runs out (dmesg tells)\n" if code == -signal.SIGKILL else ""
    )
    return ToolkitError(
        f"rank {number} was ended by {name}",
        why=f"{likely}the last lines of {run.log}:\n{_last_lines(run.log)}",
        hint="the same command resumes the run",
        exit_code=ExitCode.TRAINING,
    )


def _last_lines(log: Path) -> str:
    try:
        with log.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - TAIL_BYTES))
            return "\n".join(file.read().decode(errors="replace").splitlines()[-10:])
    except OSError as error:  # its disk may be gone
        return f"({error.strerror})"


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
    """Only one process trains in a run folder.

    Yields the lock's file descriptor, which the ranks inherit.

    A crash lets go of the lock, but not before the last rank is gone. Raises ToolkitError (busy).
    """
    run.lock.parent.mkdir(parents=True, exist_ok=True)
    with run.lock.open("a+") as file:
        deadline = time.monotonic() + GRACE_S
        while not _lock(file):
            file.seek(0)
            owner = file.read().strip()
            is_elsewhere = owner and not owner.endswith(f" on {socket.gethostname()}")  # in another container, say
            if is_elsewhere or _is_alive(owner) or time.monotonic() > deadline:  # else its ranks are just leaving
                raise _busy(run, owner)
            time.sleep(POLL_S)
        file.truncate(0)
        file.write(f"{os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield file.fileno()


def _busy(run: RunDir, owner: str) -> ToolkitError:
    what = f"run `{run.name}` is being trained by another process"
    if _is_alive(owner):
        return ToolkitError(
            what,
            why=f"process {owner} holds {run.lock}",
            hint="wait for it, or use another --run",
            exit_code=ExitCode.BUSY,
        )
    left = [f"process {process} ({command})" for process, command in holders(run.lock) if process != os.getpid()]
    if not left:  # in another container, or on another machine that shares the disk
        why = f"process {owner or '?'} holds {run.lock}, and is not among those seen from here"
        return ToolkitError(
            what,
            why=why,
            hint="look for it in other containers and machines that use this folder",
            exit_code=ExitCode.BUSY,
        )
    return ToolkitError(
        f"processes of an earlier call still hold run `{run.name}`",
        why=f"{' and '.join(left)} were left by process {owner or '?'}, which is gone",
        hint=f"kill -9 {' '.join(str(process) for process, _ in holders(run.lock) if process != os.getpid())}",
        exit_code=ExitCode.BUSY,
    )


def holders(path: Path) -> list[tuple[int, str]]:
    """(process, command) of those that have the file open; none where there is no /proc, or of
    other users' processes.
    """
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if any(os.path.samefile(link, path) for link in (folder / "fd").iterdir()):  # noqa: PTH121
                command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
                found.append((int(folder.name), command[:80]))
    return sorted(found)


def _lock(file: IO[str]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_alive(owner: str) -> bool:
    """owner: `123 on gpu-box`; of another machine or container nothing is known."""
    process, _, host = owner.partition(" on ")
    try:
        os.kill(int(process), 0)
    except (ValueError, ProcessLookupError):
        return False
    except PermissionError:  # somebody else's
        pass
    return host == socket.gethostname()
