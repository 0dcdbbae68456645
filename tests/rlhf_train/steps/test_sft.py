"""The held-out perplexity with its error, also of a run that was begun before there was one."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from jobs.run_dir import RunDir
from jobs.spec import load_job
from rlhf_train.data.dataset import Table
from rlhf_train.data.ragged import Ragged
from rlhf_train.engine.checkpoint_files import Saved
from rlhf_train.ranks.collectives import World
from rlhf_train.steps.sft import loss_tokens, perplexity_of, sequences
from tests import in_process, tiny


def test_the_error_of_rows_of_one_length_is_that_of_their_means() -> None:
    """Two tokens a row, 1, 2 and 3 nats a token: s = 1, s / √3, and e² times it."""
    value, error = perplexity_of(np.array([2.0, 4.0, 6.0]), np.array([2, 2, 2]))
    assert value == pytest.approx(math.exp(2)) and error == pytest.approx(math.exp(2) / math.sqrt(3))


def test_a_longer_row_weighs_more() -> None:
    """By hand: m = 4/4 = 1, residuals 2 - 1 = 1 and 2 - 3 = -1, √(2/1 · 2) / 4 = 1/2."""
    value, error = perplexity_of(np.array([2.0, 2.0]), np.array([1, 3]))
    assert value == pytest.approx(math.e) and error == pytest.approx(math.e / 2)


def test_one_row_has_no_error_and_an_impossible_token_none_that_is_a_number() -> None:
    assert perplexity_of(np.array([3.0]), np.array([3])) == (pytest.approx(math.e), None)
    value, error = perplexity_of(np.array([math.inf, 1.0]), np.array([1, 1]))
    assert value == pytest.approx(math.exp(700.0)) and error is not None and math.isnan(error)


def test_as_many_tokens_are_counted_as_are_predicted() -> None:
    """Two rows: 4 tokens, of which two are learned, then 2; and 1 token, then 1."""
    prompt, response = Ragged.of([[4, 5, 6, 7], [4]]), Ragged.of([[8, 9], [8]])
    learned = Ragged.of([[0, 1, 0, 1], [0]])
    rows = np.array([0, 1])
    for more, on_prompt, counted in (
        ((), False, [2, 1]),
        ((prompt, learned), False, [4, 1]),
        ((prompt, learned), True, [5, 1]),
    ):
        table = Table(Ragged.of([[1], [2]]) if more else prompt, response, response, response, {}, {}, *more)
        job = load_job("demo", [f"sft.loss_on_prompt={str(on_prompt).lower()}"])
        assert loss_tokens(job, table, rows).tolist() == counted
        index, _ = sequences(table, rows, 0, torch.device("cpu")).predicted(from_prompt=on_prompt)
        assert len(index) == sum(counted)


def test_a_checkpoint_without_the_error_resumes(world: World, tmp_path: Path) -> None:
    tree = tiny.job(tiny.write_rows(tmp_path / "rows", train=24))
    tree["sft"] |= {"max_updates": 2}
    tree["checkpoint"] = {"every_updates": 1}
    whole = in_process.train(world, tmp_path / "run", tree, 1)
    assert whole.perplexity_error_before and whole.perplexity_error_after and whole.held_out_rows
    saved = Saved(RunDir(tmp_path / "run").step(1).checkpoint(1))
    again = in_process.train(world, tmp_path / "run", tree, 1, saved=saved)
    assert again.perplexity_error_before == whole.perplexity_error_before
    assert whole.perplexity_change_error is not None
    assert again.perplexity_change_error == pytest.approx(whole.perplexity_change_error)
    file = saved.path / "state.json"
    state = json.loads(file.read_text(encoding="utf-8"))
    del state["loop"]["error_before"], state["loop"]["before_nll"]
    file.write_text(json.dumps(state), encoding="utf-8")
    older = in_process.train(world, tmp_path / "run", tree, 1, saved=Saved(saved.path))
    assert older.perplexity_error_before is None and older.perplexity_change_error is None
    assert older.perplexity_error_after == pytest.approx(whole.perplexity_error_after)
