"""Whole steps of a run in this process, without a launcher: for tests of many models."""

from __future__ import annotations

import gc
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from jobs.events import End, Event
from jobs.run_dir import RunDir
from jobs.spec import Job
from rlhf_train.engine.checkpoint_files import Saved
from rlhf_train.plan.placement import Placement
from rlhf_train.ranks.collectives import World
from rlhf_train.steps import ppo, reward, sft
from rlhf_train.steps.context import StepContext
from tests import ranks

STEPS = (sft, reward, ppo)


def train(
    world: World,
    folder: Path,
    tree: Mapping[str, Any],
    *steps: int,
    events: list[Event] | None = None,
    saved: Saved | None = None,
) -> End:
    """Run steps of a job on one rank, and return the last one's end event. folder: of the run.

    events: gets what the steps emit. saved: the checkpoint that the step resumes from.
    """
    job, run, seen = Job.model_validate(tree), RunDir(folder), list[Event]() if events is None else events
    precision, micro_batch = tree["hardware"]["precision"], tree["hardware"]["micro_batch"]
    stage = 0 if precision == "float32" else 1
    placement = Placement("cpu", "", 1, precision, stage, stage, (micro_batch,) * 3, 16, 1)
    context = StepContext(job, run, world, placement, folder.parent / "cache", seen.append, saved=saved)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in ranks.environment(0, 1).items():
            patch.setenv(name, value)  # DeepSpeed reads them for each engine
        for step in steps:
            run.step(step).path.mkdir(parents=True, exist_ok=True)
            end = STEPS[step - 1].run(context)
            gc.collect()  # an engine refers to itself; of a real model it has gigabytes
    return end
