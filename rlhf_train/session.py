"""What every step of a run is given, and the pieces of the story that all three share."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from jobs.errors import ExitCode, ToolkitError
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


def stop_if_not_finite(step: int, update: int, numbers: Mapping[str, float | None]) -> None:
    """Raises ToolkitError when training has gone to NaN or infinity: no later number would mean anything."""
    broken = [f"{name} is {value}" for name, value in numbers.items() if value is not None and not math.isfinite(value)]
    if broken:
        part = {1: "sft", 2: "reward", 3: "ppo"}[step]
        raise ToolkitError(
            f"step {step} diverged at update {update}",
            why=", ".join(broken),
            hint=f"lower the learning rate or {part}.max_grad_norm, raise {part}.warmup_updates, or look for broken rows in the data",
            code=ExitCode.TRAINING,
        )


class Clock:
    """Seconds since it was made."""

    def __init__(self) -> None:
        self._start = time.perf_counter()

    def __call__(self) -> float:
        return time.perf_counter() - self._start
