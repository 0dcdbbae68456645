"""One rank of one step: `python -m rlhf_train.worker LIBRARY...`, started by processes.py and by
nobody else.

Its stdin is a socket, where its order comes as one JSON line, with open files of the launcher's:
maybe at once, maybe only when the step before has ended. The socket stays open then: its end means
that the launcher is gone. Its stdout is a pipe to the launcher for one thing, why it ended: that is
told even when the disk is full. All else goes to the log.
"""

from __future__ import annotations

import errno
import faulthandler
import gc
import importlib
import json
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from pathlib import Path
from queue import SimpleQueue
from typing import Any, NoReturn

from jobs.errors import ExitCode, ToolkitError, system_error
from jobs.events import Event, EventWriter, Resumed, Warning, read_events
from jobs.run_dir import RunDir
from jobs.spec import Job
from jobs.steps import STEPS
from jobs.views.console import console_on
from jobs.views.plain import Plain

COLLECTIVE_TIMEOUT = timedelta(minutes=30)
MOST_SAID = 4000  # characters, 12 bytes each at most: a pipe takes 64 KiB before somebody reads


@dataclass(frozen=True)
class Order:
    """What the launcher wants of every rank. Plain values: it travels as JSON."""

    job: dict[str, Any]
    run: str
    step: int
    left: list[int]  # this step and those to be done after it
    placement: dict[str, Any]
    cache: str
    store_port: int  # of the launcher's rendezvous store; 0 for a single rank
    rank: int = 0

    def for_rank(self, rank: int) -> str:
        return json.dumps(asdict(replace(self, rank=rank)))


@dataclass(frozen=True)
class LastWords:
    """Why a rank ended."""

    what: str
    why: str
    hint: str
    exit_code: int
    at_s: float  # on the clock that all processes of a machine share: the first error is the cause of the others
    out_of_memory: bool = False  # a smaller micro batch may help


Told = tuple[str, int, int]  # the order's line, and the log and the ranks' signs of life as open files


def main() -> int:
    pipe = os.dup(1)
    os.dup2(2, 1)
    faulthandler.register(signal.SIGUSR2)  # the launcher asks a rank that hangs for its stack
    told: SimpleQueue[Told] = SimpleQueue()
    threading.Thread(target=_listen, args=(told,), daemon=True).start()
    failure = _import_all(sys.argv[1:])
    line, log, heartbeat = told.get()
    _write_to(log)
    order = Order(**json.loads(line))
    run = RunDir(Path(order.run))
    try:
        if failure is not None:
            raise failure
        return _train(order, run, heartbeat)
    except Exception as error:  # the process ends here: say why, for the launcher to show
        report = explain(error)
        # While models are loaded, a smaller micro batch would not help.
        no_memory = is_out_of_memory(error) and getattr(error, "while_training", False)
        at_s = getattr(error, "at_s", time.monotonic())
        words = LastWords(
            report.what[:500], report.why[:MOST_SAID], report.hint, int(report.exit_code), at_s, no_memory
        )
        os.write(pipe, json.dumps(asdict(words)).encode())
        with suppress(OSError):  # the log's disk may be full
            traceback.print_exc()
        return report.exit_code


def _listen(told: SimpleQueue[Told]) -> None:
    """Hand on what the launcher tells, and leave with it: also before it has told anything, in the
    midst of an import.
    """
    launcher = socket.socket(fileno=0)
    _, files, _, _ = socket.recv_fds(launcher, 1, 3)
    line = launcher.makefile("r", encoding="utf-8").readline()
    if line.endswith("\n"):
        log, heartbeat, _ = files  # the third is the run's lock: to have it open is to hold it
        told.put((line, log, heartbeat))
        launcher.recv(1)
    os._exit(ExitCode.CANCELLED)


def _import_all(libraries: Sequence[str]) -> Exception | None:
    """What every step needs, and these: seconds, and none of them once the order is there.

    No GPU is touched: the card is another step's.
    What goes wrong is to be told later, since only then there is a log.
    """
    try:
        import transformers.models.opt.modeling_opt  # noqa: F401 (any family's would do: what they share takes two of the seconds)

        from rlhf_train.engine import checkpointer  # noqa: F401
        from rlhf_train.steps import ppo, reward, sft  # noqa: F401

        for library in libraries:
            importlib.import_module(library)
        # all that was imported stays: to look through it for cycles took Python 60 ms of each
        # update of step 3, a GPU idle
        gc.freeze()
    except Exception as error:
        return error
    return None


def _write_to(log: int) -> None:
    """From now on; with what was said before."""
    sys.stderr.flush()
    with suppress(OSError):  # its disk may be full
        os.write(log, os.pread(2, 2**20, 0))
    os.truncate(2, 0)
    for stream in (1, 2):
        os.dup2(log, stream)


def _train(order: Order, run: RunDir, heartbeat_file: int) -> ExitCode:
    import torch
    import torch.distributed as dist

    from rlhf_train import compat, completion
    from rlhf_train.engine import checkpoint_files
    from rlhf_train.engine.deepspeed_engine import connect
    from rlhf_train.plan.estimate import check_room
    from rlhf_train.plan.placement import Placement
    from rlhf_train.ranks.collectives import World
    from rlhf_train.ranks.heartbeat import Heartbeat
    from rlhf_train.steps import ppo, reward, sft
    from rlhf_train.steps.context import StepContext, Stopped, StopRequest

    stop = StopRequest()
    signal.signal(signal.SIGTERM, stop.ask)

    job = Job.model_validate(order.job)
    placement = Placement(**order.placement)
    if placement.device == "cuda":
        torch.cuda.set_device(order.rank)
        compat.without_cudnn_attention()
    else:
        torch.set_num_threads(placement.cpu_threads)
    device = torch.device("cuda", order.rank) if placement.device == "cuda" else torch.device("cpu")
    heartbeat = Heartbeat.of_rank(heartbeat_file, order.rank, placement.ranks)
    store = (
        dist.TCPStore("127.0.0.1", order.store_port, placement.ranks, is_master=False)
        if placement.ranks > 1
        else dist.HashStore()
    )
    dist.init_process_group(
        "nccl" if placement.device == "cuda" else "gloo",
        store=store,
        rank=order.rank,
        world_size=placement.ranks,
        timeout=COLLECTIVE_TIMEOUT,
    )
    needs_hosts = placement.device == "cuda" and placement.ranks > 1
    hosts = dist.new_group(backend="gloo", timeout=COLLECTIVE_TIMEOUT) if needs_hosts else None
    world = World(order.rank, placement.ranks, device, heartbeat.meet, hosts)
    connect(world, order.rank)

    emit = _emitter(run, world.is_main)
    inputs = completion.inputs_of(job, run, order.step)
    chosen = ""
    if world.is_main:
        complaints: list[str] = []
        goes_on = completion.begin_step(job, run, order.step)
        saved = None
        if goes_on:
            saved = checkpoint_files.latest(run.step(order.step), complaints.append, inputs, heartbeat.beat)
        if any(event.get("step") == order.step for event in read_events(run.events)[0]):
            emit(Resumed(step=order.step, from_update=saved.update if saved else 0))
        for message in (*complaints, *placement.notes):
            emit(Warning(step=order.step, message=message))
        chosen = str(saved.path) if saved else ""
    chosen = world.gather(chosen)[0]
    saved = checkpoint_files.Saved(Path(chosen)) if chosen else None
    context = StepContext(job, run, world, placement, Path(order.cache), emit, heartbeat, stop, saved, inputs)
    failure: Exception | None = None
    heartbeat.is_patient = True  # until all is loaded: see Checkpointer
    heartbeat.beat()  # which tells it: the hub, asked next, may be slow
    try:
        if world.is_main:
            check_room(job, run, order.left, placement)
        train = {"sft": sft.run, "reward": reward.run, "ppo": ppo.run}[STEPS[order.step].section]
        end = train(context)
    except Stopped:
        return ExitCode.PREEMPTED
    except Exception as error:
        error.at_s = time.monotonic()  # type: ignore[attr-defined]
        if is_out_of_memory(error):
            error.while_training = not heartbeat.is_patient  # type: ignore[attr-defined]
        if world.size > 1 or not is_out_of_memory(error):
            context.stop.finish_writing()
            raise
        failure = error.with_traceback(None)  # whose frames hold on to the tensors
        failure.__context__ = failure.__cause__ = None
    if failure is not None:
        # Alone, this rank can keep all whole updates; the launcher then starts it again with a
        # smaller micro batch.
        compat.free_gpu_memory()
        try:
            context.stop.leave(None)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
        raise failure
    context.emit(end)
    if world.is_main:
        completion.complete_step(run, order.step, asdict(end))
    dist.destroy_process_group()
    return ExitCode.OK


def _emitter(run: RunDir, is_main: bool) -> Callable[[Event], None]:
    """Rank 0: an event line and a plain line in the log. Others: silent."""
    if not is_main:
        return lambda event: None
    write, plain = EventWriter(run.events), Plain(console_on(sys.stdout))

    def emit(event: Event) -> None:
        line = write(event)
        with suppress(OSError):  # the log alone is worth no run
            plain.feed(line)
            sys.stdout.flush()

    return emit


def is_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, ImportError):  # of what we would ask, maybe
        return False
    from rlhf_train import compat

    return compat.is_out_of_memory(error)


def explain(error: Exception) -> ToolkitError:
    """Any exception as what happened, why, and what to do next."""
    if isinstance(error, ToolkitError):
        return error
    if is_out_of_memory(error) or isinstance(error, MemoryError):
        return ToolkitError(
            "out of memory",
            why=str(error).splitlines()[0] if str(error) else "an allocation failed",
            # The launcher lowers hardware.micro_batch by itself: what comes here needs too much
            # before that matters.
            hint="`--dry-run` tells what the models need; actor.lora, ZeRO 3 on more GPUs or a smaller model need less",
            exit_code=ExitCode.TRAINING,
        )
    if f"os error {errno.ENOSPC}" in str(error):  # safetensors and tokenizers, in exceptions of their own
        error = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    if isinstance(error, OSError) and error.errno is not None:
        return system_error(error, ExitCode.TRAINING)
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return ToolkitError(
        f"training stopped on {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}",
        why=f"raised in {Path(frame.filename).name}, line {frame.lineno}",
        hint="the whole traceback is at the end of train.log in the run folder",
        exit_code=ExitCode.TRAINING,
    )


def leave(code: int) -> NoReturn:
    """End this process without taking Python down.

    Threads of PyTorch's collectives may still live, and one that asks for the interpreter
    while that is being taken down ends in C++'s terminate(): seen once, under load, as SIGABRT of
    ranks that had done all their work.
    """
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):  # the log's disk may be full
            stream.flush()
    os._exit(code)


if __name__ == "__main__":
    leave(main())
