"""What every step of a run is given, and the pieces of the story that all three share."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from jobs.events import Event, Plan, Progress
from jobs.run_dir import RunDir
from jobs.spec import Data, Job, Scratch
from rlhf_train import data
from rlhf_train.batch import BatchPlan
from rlhf_train.engine import DTYPES
from rlhf_train.models import load_tokenizer, train_tokenizer
from rlhf_train.plan import Placement
from rlhf_train.world import World


@dataclass(frozen=True)
class Session:
    job: Job
    run: RunDir
    world: World
    placement: Placement
    cache: Path
    emit: Callable[[Event], None]  # rank 0 writes; others are silent

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.placement.precision]

    def doing(self, step: int, what: str) -> None:
        self.emit(Progress(step=step, doing=what))

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
        train_tokenizer(data.texts(session.job.data), session.job.actor.tokenizer_vocabulary).save_pretrained(str(partial))
        partial.replace(folder)
    session.world.barrier()
    return load_tokenizer(str(folder))


def corpus(session: Session, step: int, spec: Data, tokenizer: Any) -> data.Corpus:
    return data.prepare(
        spec, tokenizer, cache=session.cache, rank=session.world.rank, world_size=session.world.size, say=lambda what: session.doing(step, what)
    )


class Clock:
    """Seconds since it was made."""

    def __init__(self) -> None:
        self._start = time.perf_counter()

    def __call__(self) -> float:
        return time.perf_counter() - self._start


def as_numbers(event: Event) -> dict[str, float]:
    """The numbers of an event that are set, by name."""
    return {name: value for name, value in asdict(event).items() if isinstance(value, int | float)}
