"""Test what is said of a step with few rows, and of a critic that would learn alone."""

from __future__ import annotations

import pytest

from jobs.errors import ToolkitError
from jobs.spec import Ppo, load_job
from rlhf_train.plan.few_rows import check_critic_warmup, rendered_before, too_few_to_measure, too_few_to_train


def test_a_step_with_fewer_rows_than_an_update_takes() -> None:
    job = load_job("demo")  # 32 sequences an update, 64 prompts a rollout
    expected = "31 rows are fewer than sft.global_batch (32): an update takes some more than once"
    assert too_few_to_train(job, 1, 31) == expected
    assert too_few_to_train(job, 1, 32) == "" == too_few_to_train(job, 2, 32)
    assert "63 prompts are fewer than ppo.rollout_batch (64)" in too_few_to_train(job, 3, 63)
    assert too_few_to_train(job, 3, 64) == "" == too_few_to_train(job, 1, 0)  # 0: not known
    groups = load_job("demo", ["ppo.advantage=grpo", "ppo.samples_per_prompt=4"])
    assert "15 prompts are fewer than ppo.rollout_batch / samples_per_prompt (16)" in too_few_to_train(groups, 3, 15)
    assert too_few_to_train(groups, 3, 16) == ""


def test_few_held_out_rows() -> None:
    assert too_few_to_measure(2, 1) == "the step is measured on 1 held-out pair, whose numbers say little"
    assert too_few_to_measure(1, 19) and not too_few_to_measure(1, 20)


def test_templates_that_were_rendered_before() -> None:
    assert rendered_before({"rows": 9}) == "" == rendered_before({"rendered_template": 0})
    assert rendered_before({"rendered_template": 1}).startswith("1 row of text holds what a chat template writes")
    assert rendered_before({"rendered_template": 7}).startswith("7 rows of text hold what a chat template writes")


def test_the_critic_may_not_learn_alone_to_the_end() -> None:
    rates = {"actor_learning_rate": 1e-5, "critic_learning_rate": 1e-5}
    spec = Ppo(rollout_batch=8, global_batch=8, critic_warmup_updates=4, **rates)
    check_critic_warmup(spec, 5)
    with pytest.raises(ToolkitError, match="critic_warmup_updates is 4, and step 3 has 4 updates"):
        check_critic_warmup(spec, 4)
