"""Test the sizes that fitted into memory: halved, remembered, and used while they are valid."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from jobs.run_dir import RunDir
from jobs.spec import Job
from rlhf_train.disk import read_json
from rlhf_train.plan import memory_fit
from rlhf_train.plan.placement import Machine, Placement, place
from tests import tiny


def job(**hardware: Any) -> Job:
    """Global batches of 24, 12 and 8."""
    fields = tiny.job(Path("rows"))
    fields["sft"]["global_batch"], fields["reward"]["global_batch"] = 24, 12
    fields["hardware"] |= {"micro_batch": "auto"} | hardware
    return Job.model_validate(fields)


def placed(of: Job) -> Placement:
    return place(of, Machine(cores=1))


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    folder = RunDir(tmp_path / "run")
    folder.fitted.parent.mkdir(parents=True)
    return folder


@pytest.mark.parametrize(
    ("global_batch", "ranks", "sizes"),
    [
        (24, 1, [8, 4, 2, 1]),
        (8, 1, [8, 4, 2, 1]),
        (24, 2, [6, 3, 1]),  # of 12 a rank
        (10, 2, [5, 1]),  # 2 does not divide 5
        (14, 1, [7, 2, 1]),  # nor 3 divide 14
        (7, 1, [7, 1]),
    ],
)
def test_halves_that_divide(global_batch: int, ranks: int, sizes: list[int]) -> None:
    base = job(ranks=ranks)
    for_step_1 = base.model_copy(update={"sft": base.sft.model_copy(update={"global_batch": global_batch})})
    place_now: Placement | None = placed(for_step_1)
    found = []
    while place_now is not None:
        assert place_now.batch_plan(for_step_1, 1).global_batch == global_batch
        found.append(place_now.micro_batches[0])
        place_now = memory_fit.with_smaller_micro_batch(for_step_1, 1, place_now)
    assert found == sizes


def test_the_other_steps_keep_theirs() -> None:
    less = memory_fit.with_smaller_micro_batch(job(), 2, placed(job()))
    assert less == replace(placed(job()), micro_batches=(8, 3, 8))


def test_nothing_is_known_at_first(run: RunDir) -> None:
    assert memory_fit.fit(job(), run, placed(job())) == placed(job())


@pytest.mark.parametrize("torn", ["", "{", "null"])
def test_a_torn_file_says_nothing(run: RunDir, torn: str) -> None:
    run.fitted.write_text(torn, encoding="utf-8")
    assert memory_fit.fit(job(), run, placed(job())) == placed(job())


def test_what_is_remembered_is_taken_up(run: RunDir) -> None:
    placement = placed(job())
    memory_fit.remember(job(), run, replace(placement, micro_batches=(4, 6, 8)))
    assert memory_fit.fit(job(), run, placement) == replace(placement, micro_batches=(4, 6, 8))
    memory_fit.remember(job(), run, replace(placement, rollout_micro_batch=10))  # the smaller of both
    memory_fit.remember(job(), run, replace(placement, micro_batches=(8, 6, 4)))
    assert memory_fit.fit(job(), run, placement) == replace(placement, micro_batches=(4, 6, 4), rollout_micro_batch=10)
    smaller = replace(placement, micro_batches=(1, 1, 1), rollout_micro_batch=1)
    assert memory_fit.fit(job(), run, smaller) == smaller  # never larger than the wish


CHANGED: list[dict[str, Any]] = [
    {"micro_batch": 4},
    {"gradient_checkpointing": True},
    {"precision": "bfloat16"},
    {"ranks": 2},
]


@pytest.mark.parametrize("hardware", CHANGED)
def test_other_circumstances_are_tried_anew(run: RunDir, hardware: dict[str, Any]) -> None:
    memory_fit.remember(job(), run, replace(placed(job()), micro_batches=(1, 1, 1)))
    other = job(**hardware)
    assert memory_fit.fit(other, run, placed(other)) == placed(other)
    memory_fit.remember(other, run, replace(placed(other), micro_batches=(2, 2, 2)))
    assert read_json(run.fitted)["micro_batches"] == [2, 2, 2]  # sizes of other circumstances are no limit


def test_another_global_batch_can_be_shared_evenly(run: RunDir) -> None:
    """3 divides 24, and not 8."""
    memory_fit.remember(job(), run, replace(placed(job()), micro_batches=(3, 3, 8)))
    other = job()
    other = other.model_copy(update={"sft": other.sft.model_copy(update={"global_batch": 8})})
    assert memory_fit.fit(other, run, placed(other)).batch_plan(other, 1).global_batch == 8
