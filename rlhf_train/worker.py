"""`python -m rlhf_train.worker LIBRARY...` imports what ranks need, and forks them: importer.py.

Each is one rank of one step; only processes.py starts them. Its stdin is a socket, where its order
comes as one JSON line with open files of the launcher: maybe immediately, maybe only when the step
before has ended. The socket stays open after that; when it closes, the launcher is gone. A pipe to
the launcher carries only the reason why the rank ended, so the launcher gets it even when the disk
is full. All else goes to the log.
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
from rlhf_train.ranks.importer import end_with_the_launcher, link_to_the_launcher, serve

COLLECTIVE_TIMEOUT = timedelta(minutes=30)
# Characters of an error's text. One takes 12 bytes at most, and a pipe holds 64 KiB before somebody
# reads it.
MOST_SAID = 4000


@dataclass(frozen=True)
class Order:
    """What the launcher wants every rank to do: plain values, since it is sent as JSON."""

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
    # On the clock that all processes of a machine share: the first error causes the others.
    at_s: float
    out_of_memory: bool = False  # a smaller micro batch may help


Received = tuple[str, int, int]  # the order's line, and the open files of the log and the heartbeats


def main() -> NoReturn:
    end_with_the_launcher()
    link = link_to_the_launcher()
    faulthandler.register(signal.SIGUSR2)  # the launcher asks a rank that hangs for its stack
    failure = _import_all(sys.argv[1:])
    serve(link, lambda pipe: leave(_run(pipe, failure)))


def _run(pipe: int, failure: Exception | None) -> int:
    """Wait for the order and train.

    pipe: where this rank says why it ended. failure: of the imports.
    """
    received: SimpleQueue[Received] = SimpleQueue()
    threading.Thread(target=_listen, args=(received,), daemon=True).start()
    line, log, heartbeat = received.get()
    _write_to(log)
    order = Order(**json.loads(line))
    run = RunDir(Path(order.run))
    try:
        if failure is not None:
            raise failure
        return _train(order, run, heartbeat)
    except Exception as error:  # the process ends here; the launcher shows why
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


def _listen(received: SimpleQueue[Received]) -> None:
    """Receive the launcher's order, and end this process when the launcher ends."""
    launcher = socket.socket(fileno=0)
    _, files, _, _ = socket.recv_fds(launcher, 1, 3)
    line = launcher.makefile("r", encoding="utf-8").readline()
    if line.endswith("\n"):
        log, heartbeat, _ = files  # the third is the run's lock, which this rank holds by having it open
        received.put((line, log, heartbeat))
        launcher.recv(1)
    os._exit(ExitCode.CANCELLED)


def _import_all(libraries: Sequence[str]) -> Exception | None:
    """Import `libraries` and what every step needs, before the order comes: it takes seconds.

    No GPU is touched, since another step may be using it. An error is returned, to be reported when
    there is a log.
    """
    # The garbage collector took a quarter of the imports' time, and found nothing.
    gc.disable()
    try:
        # Any model family would do: what all families share takes two of the seconds.
        import transformers.models.opt.modeling_opt  # noqa: F401

        from rlhf_train.engine import checkpointer  # noqa: F401
        from rlhf_train.steps import ppo, reward, sft  # noqa: F401

        for library in libraries:
            importlib.import_module(library)
        # Imported objects stay for good. Garbage collection of them took 60 ms of each update of
        # step 3, in which a GPU was idle.
        gc.freeze()
    except Exception as error:
        return error
    finally:
        gc.enable()
    return None


def _write_to(log: int) -> None:
    """Send stdout and stderr to the log, with what was written to stderr before."""
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
    from rlhf_train.plan.model_checks import check_models
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
        saved = None
        if completion.begin_step(job, run, order.step):
            saved = checkpoint_files.latest(run.step(order.step), complaints.append, inputs, heartbeat.beat)
        if any(event.get("step") == order.step for event in read_events(run.events)[0]):
            emit(Resumed(step=order.step, from_update=saved.update if saved else 0))
        for message in (*complaints, *placement.notes):
            emit(Warning(step=order.step, message=message))
        chosen = str(saved.path) if saved else ""
    chosen = world.gather(chosen)[0]
    saved = checkpoint_files.Saved(Path(chosen)) if chosen else None
    context = StepContext(
        job, run, world, placement, Path(order.cache), emit, heartbeat, stop, saved, tuple(order.left), inputs
    )
    failure: Exception | None = None
    heartbeat.is_patient = True  # until all is loaded: see Checkpointer
    heartbeat.beat()  # it publishes `is_patient`, since the hub may be slow
    try:
        if world.is_main:
            check_models(job, run, order.left)
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
        failure = error.with_traceback(None)  # the traceback's frames hold on to the tensors
        failure.__context__ = failure.__cause__ = None
    if failure is not None:
        # A single rank can still save all whole updates. The launcher then starts it again with a
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
    """Make the function that writes events: on rank 0 to the run and the log, else to nowhere."""
    if not is_main:
        return lambda event: None
    write, plain = EventWriter(run.events), Plain(console_on(sys.stdout))

    def emit(event: Event) -> None:
        line = write(event)
        with suppress(OSError):  # a log that cannot be written does not end the run
            plain.feed(line)
            sys.stdout.flush()

    return emit


def is_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, ImportError):  # `compat` may be what cannot be imported
        return False
    from rlhf_train import compat

    return compat.is_out_of_memory(error)


def explain(error: Exception) -> ToolkitError:
    """Turn any exception into what happened, why, and what to do next."""
    if isinstance(error, ToolkitError):
        return error
    if is_out_of_memory(error) or isinstance(error, MemoryError):
        return ToolkitError(
            "out of memory",
            why=str(error).splitlines()[0] if str(error) else "an allocation failed",
            # The launcher lowers hardware.micro_batch by itself: an error that comes here is of
            # models that are too large.
            hint="`--dry-run` shows what the models need; actor.lora, ZeRO 3 on more GPUs or a smaller model need less",
            exit_code=ExitCode.TRAINING,
        )
    # safetensors and tokenizers report a full disk in exceptions of their own.
    if f"os error {errno.ENOSPC}" in str(error):
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
    """End this process without shutting the Python interpreter down.

    Threads of PyTorch's collectives may still live. If one asks for the interpreter during its
    shutdown, C++ calls terminate(): seen once, under load, as SIGABRT of ranks that had done all
    their work.
    """
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):  # the log's disk may be full
            stream.flush()
    os._exit(code)


if __name__ == "__main__":
    main()
