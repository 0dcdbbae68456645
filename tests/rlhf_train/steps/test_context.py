"""A run that is asked to stop, in what takes long besides updates; and rows that change."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from jobs.errors import ToolkitError
from jobs.run_dir import RunDir
from jobs.spec import Job
from rlhf_train.data.dataset import Ragged, Table
from rlhf_train.data.sequences import Sequences
from rlhf_train.models.networks import train_tokenizer
from rlhf_train.plan.placement import Placement
from rlhf_train.ranks.collectives import World
from rlhf_train.steps.context import StepContext, Stopped, corpus
from rlhf_train.steps.reward import held_out_margins
from rlhf_train.steps.sft import held_out_nll
from tests import tiny

ROWS = 20


@pytest.mark.parametrize("measure", [held_out_nll, held_out_margins])
@pytest.mark.parametrize(("asked_in", "batches"), [(1, 1), (3, 3), (99, 5)])
def test_an_evaluation_is_left_after_the_batch_in_which_it_is_asked(
    measure: Callable[..., object], asked_in: int, batches: int
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


def test_the_numbers_of_rows_come_in_the_order_of_the_rows() -> None:
    """Though passes take the longest rows first: each row is compared with itself later."""
    job, place = Job.model_validate(tiny.job(Path("rows"))), Placement("cpu", "", 1, "float32", 0, 0, (2, 2, 2), 64, 1)
    world = World(0, 1, torch.device("cpu"))
    context = StepContext(job, RunDir(Path("run")), world, place, Path("cache"), lambda event: None)
    answers = [[11], [12] * 3, [13] * 2, [14] * 5, [15]]
    chosen, ones = Ragged.of(answers), Ragged.of([[10]] * len(answers))
    table = Table(ones, chosen, chosen, ones, {}, {})

    def engine(batch: Sequences, at: torch.Tensor | None = None, **_: Any) -> tuple[torch.Tensor, None]:
        _, labels = batch.predicted()
        return (-labels.float() if at is None else batch.input_ids.flatten()[at].float()), None

    rows = np.array([3, 0, 2, 1])
    nll, counts = held_out_nll(context, engine, table, rows, 0)
    assert nll.tolist() == [70.0, 11.0, 26.0, 36.0] and counts.tolist() == [5, 1, 2, 3]
    assert held_out_margins(context, engine, table, rows, 0).tolist() == [4, 1, 3, 2]


def read_in(step: int, folder: Path, *, sft_model: str | None = None, eval_rows: int = 21) -> None:
    tree = tiny.job(folder / "rows")
    tree["actor"]["sft_model"], tree["data"]["eval_rows"] = sft_model, eval_rows
    job, place = Job.model_validate(tree), Placement("cpu", "", 1, "float32", 0, 0, (4, 4, 4), 64, 1)
    world, run = World(0, 1, torch.device("cpu")), RunDir(folder / "run")
    context = StepContext(job, run, world, place, folder / "cache", lambda event: None)
    run.step(step).path.mkdir(parents=True, exist_ok=True)
    corpus(context, step, job.data, train_tokenizer(tiny.WORDS * 20, 300))


def test_rows_that_changed_since_an_earlier_step_are_refused(tmp_path: Path) -> None:
    """That step may have learned from what would be held out now."""
    rows = tiny.write_rows(tmp_path / "rows") / "train.jsonl"
    read_in(1, tmp_path)
    before = rows.read_text(encoding="utf-8")
    rows.write_text(before.replace("cat", "bird", 1), encoding="utf-8")
    read_in(2, tmp_path)  # step 1 is not complete: it will begin again
    (tmp_path / "run/step1/complete.json").touch()
    with pytest.raises(ToolkitError, match="did step 1 with other rows") as caught:
        read_in(2, tmp_path)
    assert "--redo --step 1,2" in caught.value.hint
    read_in(2, tmp_path, sft_model="a/model")  # step 1's rows do not count: its model is not used
    rows.write_text(before, encoding="utf-8")
    read_in(2, tmp_path, eval_rows=5)
    (tmp_path / "run/step1/rows.json").unlink()  # of a run that did not keep them yet
    rows.write_text(before.replace("cat", "bird", 1), encoding="utf-8")
    read_in(2, tmp_path)
