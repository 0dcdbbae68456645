"""What every step of a run is given, and the pieces of the story that all three share."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from jobs.events import Event, Plan, Progress
from jobs.run_dir import RunDir
from jobs.spec import Data, Job, Scratch
from rlhf_train.data import dataset
from rlhf_train.data.sequences import BatchPlan
from rlhf_train.disk import rename, sync_files
from rlhf_train.engine.checkpointer import Saved
from rlhf_train.engine.deepspeed_engine import DTYPES
from rlhf_train.models.networks import load_tokenizer, train_tokenizer
from rlhf_train.plan.placement import Placement
from rlhf_train.ranks.collectives import World
from rlhf_train.ranks.heartbeat import Pulse


class Stopped(Exception):
    """The run was asked to end (SIGTERM): all ranks leave together, their state saved if there was time."""


class Stop:
    """Whether this process was asked to end."""

    def __init__(self) -> None:
        self.asked_at: float | None = None  # time.monotonic()
        self.before_leaving: Callable[[float | None], None] = lambda grace_s: None  # all ranks together; see Keeper
        self.finish_writing: Callable[[], None] = lambda: None  # a checkpoint that this rank has begun; see Keeper

    def ask(self, *_signal: object) -> None:
        """Handles SIGTERM; a second one changes nothing."""
        if self.asked_at is None:
            self.asked_at = time.monotonic()


@dataclass(frozen=True)
class Session:
    job: Job
    run: RunDir
    world: World
    placement: Placement
    cache: Path
    emit: Callable[[Event], None]  # rank 0 writes; others are silent
    pulse: Pulse = field(default_factory=Pulse.unseen)
    stop: Stop = field(default_factory=Stop)
    saved: Saved | None = None  # what the step goes on from
    inputs: Mapping[str, str] = field(default_factory=dict)  # what the step starts from: hashes of the steps before it

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.placement.precision]

    def doing(self, step: int, what: str) -> None:
        self.pulse.beat(what)
        self.emit(Progress(step=step, doing=what))

    def stop_if_asked(self) -> None:
        """All ranks ask each other. Raises Stopped on all if one was asked to end, after a checkpoint if there is time for it."""
        if self.world.any(self.stop.asked_at is not None):
            waited_s = 0.0 if self.stop.asked_at is None else time.monotonic() - self.stop.asked_at
            self.stop.before_leaving(self.job.checkpoint.grace_s - waited_s)
            raise Stopped

    def plan(self, step: int, plan: BatchPlan, *, updates: int, rows: int, zero_stage: int, fates: dict[str, int]) -> None:
        where = self.placement
        self.emit(
            Plan(
                step=step,
                updates=updates,
                rows=rows,
                ranks=where.ranks,
                device=where.device,
                device_reason=where.device_reason,
                precision=where.precision,
                global_batch=plan.global_batch,
                micro_batch=plan.micro_batch,
                gradient_accumulation=plan.gradient_accumulation,
                zero_stage=zero_stage,
                data=fates,
            )
        )


def actor_tokenizer(session: Session) -> Any:
    """The tokenizer of `actor.model`; for a model from a config, trained once on the job's training rows."""
    model = session.job.actor.model
    if not isinstance(model, Scratch):
        return load_tokenizer(model)
    folder = session.run.tokenizer
    if session.world.is_main and not (folder / "tokenizer.json").exists():
        session.doing(1, "training a tokenizer on the job's rows")
        partial = folder.with_name("tokenizer.partial")
        train_tokenizer(dataset.texts(session.job.data), session.job.actor.tokenizer_vocabulary).save_pretrained(str(partial))
        sync_files(partial)
        rename(partial, folder)
    session.world.barrier()
    return load_tokenizer(str(folder))


def corpus(session: Session, step: int, spec: Data, tokenizer: Any) -> dataset.Corpus:
    return dataset.prepare(
        spec, tokenizer, cache=session.cache, rank=session.world.rank, world_size=session.world.size, say=lambda what: session.doing(step, what)
    )


class Clock:
    """Seconds since it was made, and `before`."""

    def __init__(self, before: float = 0.0) -> None:
        self._start = time.perf_counter() - before

    def __call__(self) -> float:
        return time.perf_counter() - self._start
