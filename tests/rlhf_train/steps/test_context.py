"""A run that is asked to stop, in what takes long besides updates."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from jobs.run_dir import RunDir
from jobs.spec import Job
from rlhf_train.data.dataset import Ragged, Table
from rlhf_train.data.sequences import Sequences
from rlhf_train.plan.placement import Placement
from rlhf_train.ranks.collectives import World
from rlhf_train.steps.context import StepContext, Stopped
from rlhf_train.steps.reward import accuracy
from rlhf_train.steps.sft import perplexity
from tests import tiny

ROWS = 20


@pytest.mark.parametrize("measure", [perplexity, accuracy])
@pytest.mark.parametrize(("asked_in", "batches"), [(1, 1), (3, 3), (99, 5)])
def test_an_evaluation_is_left_after_the_batch_in_which_it_is_asked(
    measure: Callable[..., float], asked_in: int, batches: int
) -> None:
    job, place = Job.model_validate(tiny.job(Path("rows"))), Placement("cpu", "", 1, "float32", 0, 0, (4, 4, 4), 64, 1)
    context = StepContext(
        job, RunDir(Path("run")), World(0, 1, torch.device("cpu")), place, Path("cache"), lambda event: None
    )
    tokens = Ragged.of([[5, 6]] * ROWS)
    table = Table(tokens, tokens, tokens, tokens, {}, {})
    seen: list[Sequences] = []

    def engine(batch: Sequences, at: torch.Tensor | None = None, **_: Any) -> tuple[torch.Tensor, None]:
        seen.append(batch)
        if len(seen) == asked_in:
            context.stop.ask()
        return torch.zeros(int(batch.response_lengths.sum()) if at is None else len(at)), None

    if asked_in == 99:
        measure(context, engine, table, np.arange(ROWS), 0)
    else:
        with pytest.raises(Stopped):
            measure(context, engine, table, np.arange(ROWS), 0)
    assert len(seen) == batches
