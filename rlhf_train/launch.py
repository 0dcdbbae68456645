"""The launcher starts the ranks, shows their events, and ends with their exit code.

It holds the rendezvous store itself, on a free port that the system chose: nobody has to choose a
port, and none can be taken.
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
from jobs.views.report.report_file import ReportFile
from rlhf_train import completion
from rlhf_train.host import holders
from rlhf_train.plan import memory_fit
from rlhf_train.plan.placement import Placement
from rlhf_train.ranks.heartbeat import HeartbeatReader, RankSign
from rlhf_train.ranks.processes import GRACE_S, POLL_S, Rank, RankEnvironment, SpareRanks, end, libraries_of
from rlhf_train.tensorboard import TensorBoardFile
from rlhf_train.trackers.processes import Trackers
from rlhf_train.worker import LastWords, Order

OTHERS_S = 3.0  # until the other ranks end by themselves, when one has failed
END_S = 2.0  # part of checkpoint.grace_s that the launcher needs for its own end
HANG_S = 300.0  # without a sign of life from any rank; a pass or a token takes seconds
# The same while libraries are imported, models fetched or written, and rows tokenised. PyTorch's
# collectives give up after 1800 s.
PATIENT_HANG_S = 1500.0
TAIL_BYTES = 2**16  # of the log, which may be long
STACKS_S = 1.0  # until the ranks have written their stacks
# The next step's ranks start this long before a step's last update: imports take 5 s on a quiet
# core, and took 11 s on one machine with a GPU.
SPARES_S = 20.0


@dataclass(frozen=True)
class _Call:
    """The things that the steps of one call share."""

    job: Job
    run: RunDir
    cache: Path
    lock: int
    log: IO[bytes]
    view: Any
    report: ReportFile
    board: TensorBoardFile
    trackers: Trackers
    caught: list[int]  # signals that ask to stop
    spares: SpareRanks


def launch(
    job: Job,
    run: RunDir,
    steps: Sequence[int],
    placement: Placement,
    cache: Path,
    lock: int,
    spares: SpareRanks,
    *,
    quiet: bool = False,
) -> ExitCode:
    """Train `steps` with all ranks, which hold `lock` too, and show the run's events as they come.

    quiet: show warnings and errors alone.

    Raises ToolkitError with the first rank's error.

    Each step has processes of its own, since DeepSpeed's engines do not free all their memory
    within a process (measured on a GPU: 16.8 GB of OPT-1.3b's step 1 were still held in step 2, and
    at ZeRO 3 also after `engine.destroy()`). The next step's processes start while this step ends,
    so that the next step need not wait for their imports.
    """
    nccl = nccl_settings(placement, os.environ)
    if nccl:
        variables = " and ".join(f"{name}={value}" for name, value in nccl.items())
        note = f"{variables} for the ranks: {placement.no_peer_access}"
        placement = replace(placement, notes=(*placement.notes, note))
    save_job(job, run.job_file)
    placement = memory_fit.fit(job, run, placement)
    with _stop_signals() as caught, run.log.open("ab", buffering=0) as log, console.view(quiet=quiet) as view:

        def warn(what: str) -> None:
            view.feed({"kind": "warning", "message": what})

        report, board = ReportFile(run, warn), TensorBoardFile(run, warn)
        trackers = Trackers(job.track, run, os.environ, log, warn)
        call = _Call(job, run, cache, lock, log, view, report, board, trackers, caught, spares)
        code = ExitCode.TRAINING
        try:
            code = _train_steps(call, steps, placement)
        except ToolkitError as error:
            code = error.exit_code
            raise
        finally:
            board.close()
            _end_trackers(call, steps)
            report.finish(code)
    return code


def _end_trackers(call: _Call, steps: Sequence[int]) -> None:
    """Let the trackers send what is left; a signal ends that, after Ctrl-C a second one."""
    signals = len(call.caught)

    def is_hurried() -> bool:
        return len(call.caught) > signals or call.caught.count(signal.SIGINT) > 1

    def tell(doing: str) -> None:
        call.view.feed({"kind": "progress", "step": steps[-1], "doing": doing})

    call.trackers.close(is_hurried, tell)


def _train_steps(call: _Call, steps: Sequence[int], placement: Placement) -> ExitCode:
    job, run, caught = call.job, call.run, call.caught
    for step in steps:
        ended = _Ended(is_done=False)
        while not ended.is_done:
            doing = _starting(placement)
            call.view.feed({"kind": "progress", "step": step, "doing": doing})
            ended = _train_step(call, step, [n for n in steps if n >= step], placement)
            if ended.no_memory is not None:
                placement = _with_less_memory(job, run, step, placement, ended.no_memory)
            elif not ended.is_done:
                return _code_of_stop(caught, run)
        if caught and step != steps[-1]:
            return _code_of_stop(caught, run)
    return ExitCode.OK


def _starting(placement: Placement) -> str:
    imports = "imports" if placement.ranks == 1 else "import"
    return f"starting {plural(placement.ranks, 'ranks')}, which {imports} libraries"


def _code_of_stop(caught: Sequence[int], run: RunDir) -> ExitCode:
    if caught and caught[0] == signal.SIGINT:
        return ExitCode.INTERRUPTED
    return ExitCode.CANCELLED if run.cancelled.exists() else ExitCode.PREEMPTED


@dataclass(frozen=True)
class _Ended:
    """How the ranks of a step ended, if not by an error."""

    is_done: bool  # else they were stopped
    no_memory: LastWords | None = None


def _train_step(call: _Call, step: int, left: Sequence[int], placement: Placement) -> _Ended:
    """Train one step with all ranks, and return how it ended.

    left: this step and those to be done after it. Raises ToolkitError with the first rank's error.
    """
    job, run, caught = call.job, call.run, call.caught
    port, _store = _rendezvous(placement.ranks)
    order = Order(job.dump(), str(run.path), step, list(left), asdict(placement), str(call.cache), port)
    environment, heartbeats = rank_environment(job, placement, os.environ), HeartbeatReader(placement.ranks)
    offset = run.events.stat().st_size if run.events.exists() else 0

    def show() -> None:
        nonlocal offset
        events, offset = read_events(run.events, offset)
        for event in events:
            call.view.feed(event)
            call.board.feed(event)
            call.trackers.feed(event)
        call.report.renew()
        call.trackers.renew()
        if len(left) > 1 and not caught and any(map(_ends_soon, events)):
            call.spares.start(environment)

    hang: ToolkitError | None = None
    ranks = call.spares.take(environment)
    try:
        for number, rank in enumerate(ranks):
            rank.tell(order.for_rank(number), call.log.fileno(), heartbeats.file, call.lock)
        silence, asked_at = _Silence(heartbeats), math.inf
        while any(rank.poll() is None for rank in ranks) and not _failed(ranks):
            time.sleep(POLL_S)
            show()
            if caught and asked_at == math.inf:
                asked_at = time.monotonic()
                call.trackers.end_before(asked_at + job.checkpoint.grace_s - END_S / 2)
                for rank in ranks:
                    rank.send_signal(signal.SIGTERM)
            signs = heartbeats.signs()
            is_late = time.monotonic() - asked_at > job.checkpoint.grace_s - END_S
            nothing_to_save = not any(sign.has_trained for sign in signs)
            if caught and (is_late or nothing_to_save or caught.count(signal.SIGINT) > 1):
                break
            silent_s = silence.measure_s()
            is_patient = any(sign.is_patient or not sign.count for sign in signs)
            if silent_s > (PATIENT_HANG_S if is_patient else HANG_S):
                hang = _hang(ranks, heartbeats.signs(), silent_s)
                break
    finally:
        failed = _failed(ranks)
        wait_s = 0.0 if caught or hang else OTHERS_S
        saving_s = 0.0 if caught or hang else max(OTHERS_S, job.checkpoint.grace_s - END_S)
        killed = end(ranks, wait_s, saving_s, lambda: ranks[0].poll() is None and heartbeats.signs()[0].is_saving)
        heartbeats.close()
        for rank in ranks:
            with suppress(OSError):  # the log's disk may be full
                call.log.write(rank.early_output())
    show()
    if hang is not None:
        raise _written(run, step, 0, hang)
    if caught:
        # A save failed: that is an event, but the run counts as stopped.
        if failed and (words := _all_last_words(ranks)):
            _failure(run, step, ranks, list(words), words)
            show()
        return _Ended(is_done=all(rank.returncode == 0 for rank in ranks))
    if failed:
        failed += killed_by_others([rank.returncode for rank in ranks], {*failed, *killed})
        words = _all_last_words(ranks)
        first = min(words.values(), key=lambda last: last.at_s, default=None)
        if first is not None and first.out_of_memory and all(number in words for number in failed):
            return _Ended(is_done=False, no_memory=first)
        raise _failure(run, step, ranks, failed, words)
    return _Ended(is_done=all(rank.returncode == 0 for rank in ranks))


def _failed(ranks: Sequence[Rank]) -> list[int]:
    """Return the ranks that ended by an error: neither done nor stopped as they were asked to."""
    return [number for number, rank in enumerate(ranks) if rank.poll() not in (None, ExitCode.OK, ExitCode.PREEMPTED)]


def killed_by_others(codes: Sequence[int | None], known: Collection[int]) -> list[int]:
    """Return the ranks that somebody else, or the kernel, ended by SIGKILL.

    known: ranks that are known to have failed, or that we have ended. The end of a killed rank may
    be seen after the error of a rank that waited for it: its connections break immediately, but it
    holds its GPU longer.
    """
    return [number for number, code in enumerate(codes) if code == -signal.SIGKILL and number not in known]


def _with_less_memory(job: Job, run: RunDir, step: int, placement: Placement, words: LastWords) -> Placement:
    """Return the placement with a smaller micro batch to try next, and remember it for this run.

    Raises ToolkitError when there is none.
    """
    now = placement.micro_batches[step - 1]
    less = memory_fit.with_smaller_micro_batch(job, step, placement)
    if less is None:
        from rlhf_train.plan.estimate import relief

        what = f"out of memory in step {step} with a micro batch of 1"
        hint = relief(job, step, placement)
        error = ToolkitError(what, why=words.why, hint=hint, exit_code=ExitCode.TRAINING)
        raise _written(run, step, 0, error)
    with suppress(OSError):  # the next start reports a full disk
        memory_fit.remember(job, run, less)
    update = completion.update_to_resume_from(run, step)
    smaller = less.micro_batches[step - 1]
    message = f"out of memory with a micro batch of {now}: continues with {smaller}, from update {update}"
    hint = f"the global batch stays; {run.fitted} remembers it"
    with suppress(OSError):
        EventWriter(run.events)(Warning(step=step, message=message, hint=hint))
    return less


class _Silence:
    """Measures for how long no rank has given a sign of life."""

    def __init__(self, heartbeats: HeartbeatReader) -> None:
        self._heartbeats, self._counts, self._silent_s, self._seen_at = heartbeats, [0], 0.0, time.monotonic()

    def measure_s(self) -> float:
        counts, now = [sign.count for sign in self._heartbeats.signs()], time.monotonic()
        # At most 1 s a call: if the whole machine was frozen, the ranks have not hung.
        self._silent_s += min(now - self._seen_at, 1.0)
        self._seen_at = now
        if counts != self._counts:
            self._counts, self._silent_s = counts, 0.0
        return self._silent_s


def _hang(ranks: Sequence[Rank], signs: Sequence[RankSign], silent_s: float) -> ToolkitError:
    """Make the error of a hang, which names the rank that keeps the others waiting.

    That is the rank with the fewest meetings. The stacks of all ranks go to the log.
    """
    for rank in ranks:
        if rank.poll() is None:
            rank.send_signal(signal.SIGUSR2)
    time.sleep(STACKS_S)
    states = [process_state(rank.pid) for rank in ranks]
    fewest = min(sign.meetings for sign in signs)
    behind = [n for n, sign in enumerate(signs) if sign.meetings == fewest]
    # Several may have the fewest, as in the middle of a pass: then those that do not run at all.
    stuck = [n for n in behind if states[n] in "TtDZX"] or behind
    host = socket.gethostname()
    names = " and ".join(f"rank {n}" for n in stuck)
    lines = [
        f"rank {n} on {host} (process {rank.pid}, {STATES.get(states[n], states[n])}): {signs[n].phase}"
        for n, rank in enumerate(ranks)
    ]
    return ToolkitError(
        f"{names} on {host} {'hangs' if len(stuck) == 1 else 'hang'}: no rank has made progress for {silent_s:.0f} s",
        why="\n".join(lines),
        hint="the stacks of all ranks are at the end of train.log; "
        "a GPU that hangs shows as Xid in `dmesg`, a disk in `df`;\n"
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
    """Return Linux' letter for the state of a process; "?" where it is not known."""
    try:
        text = Path(f"/proc/{process}/stat").read_text(encoding="utf-8", errors="replace")
        return text.rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return "?"


def _ends_soon(event: RawEvent) -> bool:
    """Return whether the step's last update is expected within SPARES_S, or is done."""
    if event["kind"] != "metrics":
        return False
    left = event["updates"] - event["update"]
    return left * event["elapsed_s"] / event["update"] <= SPARES_S


def _rendezvous(ranks: int) -> tuple[int, Any]:
    """Return (port, the store, which must stay alive). One rank needs no store."""
    if ranks == 1:
        return 0, None
    from torch.distributed import TCPStore

    store = TCPStore("127.0.0.1", 0, ranks, is_master=True, wait_for_workers=False)
    return store.port, store


def rank_environment(job: Job, placement: Placement, environ: Mapping[str, str]) -> RankEnvironment:
    nccl = tuple(nccl_settings(placement, environ).items())
    return RankEnvironment(placement.device, placement.ranks, placement.cpu_threads, nccl, libraries_of(job))


def nccl_settings(placement: Placement, environ: Mapping[str, str]) -> dict[str, str]:
    """Return NCCL's variables for the ranks.

    Without peer access NCCL would hang or fail on the transport that it tries first. Variables that
    the user has set stay as they are.
    """
    if not placement.no_peer_access:
        return {}
    # NCCL_P2P_LEVEL decides on peer access too: a user who set it has thought of that.
    owners = {"NCCL_P2P_DISABLE": {"NCCL_P2P_DISABLE", "NCCL_P2P_LEVEL"}, "NCCL_IB_DISABLE": {"NCCL_IB_DISABLE"}}
    return {name: "1" for name, variables in owners.items() if not any(map(environ.get, variables))}


def _failure(
    run: RunDir, step: int, ranks: Sequence[Rank], failed: Sequence[int], words: Mapping[int, LastWords]
) -> ToolkitError:
    """Return the first error, and write it to the events.

    failed: the ranks that had failed before the others were ended.
    """
    mute = next((number for number in failed if number not in words), None)
    if mute is not None:
        return _written(run, step, mute, _sudden_end(run, mute, ranks[mute].returncode or 0))
    first = min(words, key=lambda number: words[number].at_s)
    last = words[first]
    error = ToolkitError(last.what, why=last.why, hint=last.hint, exit_code=ExitCode(last.exit_code))
    return _written(run, step, first, error)


def _written(run: RunDir, step: int, rank: int, error: ToolkitError) -> ToolkitError:
    event = Error(
        step=step,
        rank=rank,
        what=error.what,
        why=error.why or None,
        hint=error.hint or None,
        exit_code=int(error.exit_code),
    )
    with suppress(OSError):  # the disk may be full, which then is the error
        run.path.stat()  # if the folder is gone, it is not made again
        EventWriter(run.events)(event)
    return error


def _all_last_words(ranks: Sequence[Rank]) -> dict[int, LastWords]:
    return {number: words for number, rank in enumerate(ranks) if (words := _last_words(rank))}


def _last_words(rank: Rank) -> LastWords | None:
    """Return why a rank ended; None when it had no time to report it."""
    assert rank.stdout is not None
    os.set_blocking(rank.stdout.fileno(), False)  # a child of the rank may still hold the pipe
    try:
        return LastWords(**json.loads(os.read(rank.stdout.fileno(), 2**16)))
    except (BlockingIOError, ValueError):
        return None


def _sudden_end(run: RunDir, number: int, code: int) -> ToolkitError:
    name = signal.Signals(-code).name if code < 0 else f"exit code {code}"
    likely = ""
    if code == -signal.SIGKILL:
        likely = "the kernel kills the largest process when memory runs out (see dmesg)\n"
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
    """Collect the signals that ask to stop, in the order in which they came."""
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
    """Hold the run folder's lock, so that only one process trains in it.

    Yields the lock's file descriptor, which the ranks inherit: after a crash the lock is free as
    soon as the last rank is gone. Raises ToolkitError (busy).
    """
    run.lock.parent.mkdir(parents=True, exist_ok=True)
    with run.lock.open("a+") as file:
        deadline = time.monotonic() + GRACE_S
        while not _lock(file):
            file.seek(0)
            owner = file.read().strip()
            is_elsewhere = owner and not owner.endswith(f" on {socket.gethostname()}")  # another container, say
            # Else the owner is gone, and its ranks are about to end.
            if is_elsewhere or _is_alive(owner, run.lock) or time.monotonic() > deadline:
                raise _busy(run, owner)
            time.sleep(POLL_S)
        file.truncate(0)
        file.write(f"{os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield file.fileno()


def _busy(run: RunDir, owner: str) -> ToolkitError:
    what = f"run `{run.name}` is being trained by another process"
    if _is_alive(owner, run.lock):
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


def _lock(file: IO[str]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_alive(owner: str, lock: Path) -> bool:
    """Return whether the owner is a living process that is seen from here.

    owner: `123 on gpu-box`. Two containers may share their process numbers and not the host name,
    so a process of that number which has the lock's file open is the owner, whatever its host.
    """
    process, _, host = owner.partition(" on ")
    if process == str(os.getpid()):  # the number of an owner that is gone
        return False
    if process in (str(number) for number, _ in holders(lock)):
        return True
    try:
        os.kill(int(process), 0)
    except (ValueError, ProcessLookupError):
        return False
    except PermissionError:  # somebody else's
        pass
    return host == socket.gethostname()
