"""What every step of a run is given, and the code that all three steps share."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from jobs.errors import ToolkitError
from jobs.events import Event, Plan, Progress, Warning
from jobs.formatting import plural
from jobs.run_dir import RunDir
from jobs.spec import Data, Job, Scratch
from rlhf_train import compat
from rlhf_train.data import dataset
from rlhf_train.data.sequences import BatchPlan
from rlhf_train.disk import read_json, rename, sync_files, write_json
from rlhf_train.engine.checkpoint_files import Saved
from rlhf_train.engine.checkpointer import Checkpointer, RunSurroundings, Stateful
from rlhf_train.engine.deepspeed_engine import DTYPES
from rlhf_train.engine.divergence import Divergence
from rlhf_train.host import cpu_text, processor_name
from rlhf_train.models import spellings
from rlhf_train.models.networks import load_tokenizer, train_tokenizer
from rlhf_train.plan.estimate import expected_times
from rlhf_train.plan.few_rows import MESSAGES_INSTEAD, rendered_before, too_few_to_measure, too_few_to_train
from rlhf_train.plan.placement import Placement
from rlhf_train.ranks.collectives import World
from rlhf_train.ranks.heartbeat import Heartbeat


class Stopped(Exception):
    """Raised on all ranks together when the run was asked to end (SIGTERM).

    Its state is saved if there was time.
    """


class StopRequest:
    """Whether this process was asked to end, and what to do before it leaves."""

    def __init__(self) -> None:
        self.asked_at: float | None = None  # time.monotonic()
        self._leave: Callable[[float | None], None] = lambda grace_s: None
        self._finish_writing: Callable[[], None] = lambda: None

    def ask(self, *_signal: object) -> None:
        """Handle SIGTERM; a second one changes nothing."""
        if self.asked_at is None:
            self.asked_at = time.monotonic()

    def on_leaving(self, leave: Callable[[float | None], None], finish_writing: Callable[[], None]) -> None:
        """Set what is done before this process ends; by default it is nothing.

        leave: saves what can be saved in so many seconds (None: not limited), on all ranks
        together. finish_writing: waits for a checkpoint that this rank is writing.
        """
        self._leave = leave
        self._finish_writing = finish_writing

    def leave(self, grace_s: float | None) -> None:
        """Save what can be saved in `grace_s` seconds (None: not limited).

        All ranks call it together.
        """
        self._leave(grace_s)

    def finish_writing(self) -> None:
        """Wait for a checkpoint that this rank is writing."""
        self._finish_writing()


@dataclass(frozen=True)
class StepContext:
    """What every step is given."""

    job: Job
    run: RunDir
    world: World
    placement: Placement
    cache: Path
    emit: Callable[[Event], None]  # rank 0 writes; others are silent
    heartbeat: Heartbeat = field(default_factory=Heartbeat.unseen)
    stop: StopRequest = field(default_factory=StopRequest)
    saved: Saved | None = None  # the checkpoint that the step resumes from
    left: tuple[int, ...] = ()  # this step and those to be done after it
    inputs: Mapping[str, str] = field(default_factory=dict)  # what the step starts from: hashes of the steps before it

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.placement.precision]

    def model_of(self, step: int) -> str:
        """Return the folder or name of the model that `step` made, or that takes its place."""
        return self.job.own_models.get(step, str(self.run.step(step).model))

    def doing(self, step: int, what: str) -> None:
        self.heartbeat.beat(what)
        self.emit(Progress(step=step, doing=what))

    def stop_if_asked(self) -> None:
        """Raise Stopped on all ranks if one was asked to end, after a checkpoint if time allows."""
        if self.world.any(self.stop.asked_at is not None):
            waited_s = 0.0 if self.stop.asked_at is None else time.monotonic() - self.stop.asked_at
            self.stop.leave(self.job.checkpoint.grace_s - waited_s)
            raise Stopped

    def plan(self, step: int, plan: BatchPlan, *, updates: int, zero_stage: int, table: dataset.Table) -> None:
        """Emit the step's plan. table: its training rows, and those of the steps to come."""
        where = self.placement
        self.emit(
            Plan(
                step=step,
                updates=updates,
                rows=len(table.step_rows[step]),
                ranks=where.ranks,
                device=where.device,
                device_reason=where.device_reason,
                precision=where.precision,
                global_batch=plan.global_batch,
                micro_batch=plan.micro_batch,
                gradient_accumulation=plan.gradient_accumulation,
                zero_stage=zero_stage,
                data=table.row_counts,
                expected=expected_times(self.job, [n for n in self.left if n >= step], where, table),
                own_models=self.job.own_models_of(step) or None,
                hardware=hardware(where),
                versions=compat.versions(),
            )
        )


def hardware(where: Placement) -> str:
    """Describe what the ranks run on: `2 x NVIDIA H200`, or the processor and the threads of it."""
    if where.device == "cuda":
        return f"{where.ranks} x {torch.cuda.get_device_name()}"
    return f"{processor_name(cpu_text()) or 'CPU'}, {plural(where.ranks * where.cpu_threads, 'threads')}"


def actor_tokenizer(context: StepContext) -> Any:
    """Return the tokenizer of the actor that the run starts from.

    For a model from a config it is trained once, on the job's training rows.
    """
    model = context.job.actor_source
    if not isinstance(model, Scratch):
        return load_tokenizer(model)
    folder = context.run.tokenizer
    if context.world.is_main and not (folder / "tokenizer.json").exists():
        context.doing(1, "training a tokenizer on the job's rows")
        partial = folder.with_name("tokenizer.partial")
        tokenizer = train_tokenizer(dataset.texts(context.job.data), context.job.actor.tokenizer_vocabulary)
        tokenizer.save_pretrained(str(partial))
        spellings.write_both(partial)
        sync_files(partial)
        rename(partial, folder)
    context.world.barrier()
    return load_tokenizer(str(folder))


def corpus(context: StepContext, step: int, spec: Data, tokenizer: Any) -> dataset.Corpus:
    """Read, tokenise and split the rows of the job.

    Raises ToolkitError if an earlier step of this run has read other rows: what that step has
    learned from may be held out here.
    """
    tokens = dataset.prepare(
        spec,
        tokenizer,
        cache=context.cache,
        rank=context.world.rank,
        world_size=context.world.size,
        say=lambda what: context.doing(step, what),
        steps={step, *context.left},
    )
    for earlier in sorted({*range(1, step)} - {*context.job.own_models}):
        folder = context.run.step(earlier)
        if folder.complete.exists() and read_json(folder.rows) not in (None, tokens.digest):
            raise ToolkitError(
                f"run `{context.run.name}` did step {earlier} with other rows",
                why=f"the rows of {', '.join(spec.names)} have changed since",
                hint=f"bring the rows back, or `--redo --step {','.join(map(str, range(earlier, step + 1)))}` "
                "to do it again with these",
            )
    if context.world.is_main:
        write_json(context.run.step(step).rows, tokens.digest)
    trained, held_out = (len(table.step_rows[step]) for table in (tokens.train, tokens.held_out))
    for message, hint in (
        (too_few_to_train(context.job, step, trained), "lower it, or give the step more rows"),
        (too_few_to_measure(step, held_out), "give the job more rows, or a test split"),
        (rendered_before(tokens.train.row_counts), MESSAGES_INSTEAD),
    ):
        if message:
            context.emit(Warning(step=step, message=message, hint=hint))
    return tokens


def start_checkpoints(
    context: StepContext,
    step: int,
    updates: int,
    parts: Mapping[str, Stateful],
    *,
    rows: str,
    model_bytes: int,
) -> tuple[Checkpointer, Divergence]:
    """Make a step's checkpointer and divergence check, and let `context.stop` save before leaving.

    updates, parts, rows, model_bytes: as `Checkpointer` takes them. Raises ToolkitError if the disk
    is too small.
    """
    around = RunSurroundings(
        step,
        context.run,
        context.job.checkpoint,
        context.world,
        context.emit,
        context.heartbeat,
        context.stop_if_asked,
        context.saved,
        context.inputs,
    )
    checkpointer = Checkpointer(around, updates, parts, rows=rows, model_bytes=model_bytes)
    context.stop.on_leaving(checkpointer.leave, checkpointer.finish_writing)
    divergence = Divergence(step, updates, checkpointer.skips, emit=context.emit, last_good=checkpointer.last_good)
    return checkpointer, divergence


class Clock:
    """Seconds since it was made, plus `before`."""

    def __init__(self, before: float = 0.0) -> None:
        self._start = time.perf_counter() - before

    def __call__(self) -> float:
        return time.perf_counter() - self._start
