"""Test that step 3 without a critic learns the same after a kill, and on two ranks as on one.

The three runs are compared with each other; groups of 4 answers are dealt to both ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.integration.test_ranks import LEARNING_RATE, SAVES, curve
from tests.tiny import Trained, run, train, train_killed

JOB = ["sft.max_updates=2", "reward.max_updates=2", "ppo.max_updates=8", "ppo.ppo_epochs=2", "ppo.advantage=grpo"]
JOB += ["ppo.samples_per_prompt=4", "ppo.loss_mean=sequence", "ppo.missing_eos_penalty=1.0", "data.eval_rows=5"]
ONE, TWO = ["hardware.micro_batch=4"], ["hardware.micro_batch=2", "hardware.ranks=2"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Trained]:
    folder, runs = tmp_path_factory.mktemp("groups"), dict[str, Trained]()

    def get(name: str) -> Trained:
        if not runs:
            runs["begun"] = train(folder, "begun", JOB + ONE, steps=["1", "2"])
        if name == "killed" and name not in runs:  # between two updates of a rollout
            runs[name] = train_killed(folder, name, JOB + ONE + SAVES, at=[(3, 4)])
        elif name not in runs:
            how = ["--job", str(folder / "job.yaml"), "--run", name, "--from", "begun", "--step", "3"]
            runs[name] = run(folder, how, JOB + (ONE if name == "one" else TWO))
        return runs[name]

    return get


def numbers(done: Trained) -> list[dict[str, Any]]:
    return curve(done, 3)


def test_no_number_is_of_a_critic(trained: Callable[[str], Trained]) -> None:
    one = trained("one")
    *metrics, end = numbers(one)
    assert len(metrics) == 2 and end["kl_k3"] > 0.001
    of_a_critic = {"value_loss", "critic_grad_norm", "critic_learning_rate", "explained_variance"}
    assert not of_a_critic & {name for event in metrics for name in event}
    (line,) = (e["doing"] for e in one.events("progress", 3) if "without a critic" in e["doing"])
    assert line == (
        "grpo: 4 answers to each prompt are compared, without a critic; the KL penalty is a term of the loss (k3); "
        "not read: ppo.critic_learning_rate"
    )
    (plan,) = one.events("plan", 3)
    assert plan["updates"] == 8


def test_a_killed_run_ends_with_the_same_bits(trained: Callable[[str], Trained]) -> None:
    expected, found = trained("one"), trained("killed")
    assert any(event["from_update"] > 0 for event in found.events("resumed", 3))
    assert numbers(found) == numbers(expected)
    weights = found.weights(3)
    assert all(weights[key].equal(tensor) for key, tensor in expected.weights(3).items())


def test_two_ranks_learn_what_one_does(trained: Callable[[str], Trained]) -> None:
    one, two = trained("one"), trained("two")
    for expected, found in zip(numbers(one), numbers(two), strict=True):
        assert found == pytest.approx(expected, rel=1e-5, abs=1e-5)
    answers = [[(e["when"], e["prompt"], e["response"]) for e in done.events("sample", 3)] for done in (one, two)]
    assert answers[0] == answers[1]
    weights = two.weights(3)
    for key, tensor in one.weights(3).items():
        if not key.endswith("k_proj.bias"):  # its gradient is rounding alone
            assert (weights[key] - tensor).square().mean().sqrt() < 0.01 * LEARNING_RATE[3], key
