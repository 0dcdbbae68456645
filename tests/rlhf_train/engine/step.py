"""A step without a model, for tests of saving and of applying updates; a checkpoint's tensors."""

from __future__ import annotations

import random
from typing import Any

import torch
from torch import Tensor, nn

from jobs.events import Checkpoint, Event
from jobs.run_dir import RunDir
from jobs.spec import Job
from rlhf_train.engine.checkpoint_files import Saved
from rlhf_train.engine.deepspeed_engine import Ema
from rlhf_train.plan.placement import Placement
from rlhf_train.ranks.collectives import World
from rlhf_train.steps.context import StepContext, start_checkpoints
from tests import tiny

CPU = torch.device("cpu")


def tensors() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "a/weight": torch.randn(5, 3, generator=generator),
        "a/scalar": torch.tensor(-0.0),
        "loop/mask": torch.tensor([[True, False], [False, True]]),
        "loop/ids": torch.arange(7),
        "half": torch.randn(4, generator=generator).bfloat16(),
    }


def nobody(message: str) -> None:
    raise AssertionError(message)


class Step:
    """A step that adds 1 to a weight and draws a number at each update."""

    def __init__(
        self, run: RunDir, settings: dict[str, Any], updates: int = 6, saved: Saved | None = None, rows: str = "abc"
    ) -> None:
        job = Job.model_validate(tiny.job(run.path / "rows") | {"checkpoint": settings})
        self.events: list[Event] = []
        placement = Placement("cpu", "", 1, "float32", 0, 0, (4, 4, 4), 8, 1)
        self.context = StepContext(job, run, World(0, 1, CPU), placement, run.path, self.events.append, saved=saved)
        self.module = nn.Linear(2, 2)
        nn.init.zeros_(self.module.weight)
        nn.init.zeros_(self.module.bias)
        self.ema = Ema(self.module, 0.5)
        self.checkpointer, self.divergence = start_checkpoints(
            self.context, 1, updates, {"ema": self.ema}, rows=rows, model_bytes=100
        )
        self.seen: list[float] = []

    def update(self, number: int) -> None:
        with torch.no_grad():
            self.module.weight += 1
        self.ema.update()
        self.seen.append(random.random())
        self.checkpointer.after(number, {"seen": self.seen}, {"number": torch.tensor(number)})
        self.checkpointer._wait()  # else the next save would wait for it, and tests would see either

    def saved_updates(self) -> list[int]:
        return [event.update for event in self.events if isinstance(event, Checkpoint)]
