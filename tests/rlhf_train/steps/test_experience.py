"""From the networks' numbers to what PPO learns from, on two responses worked out by hand."""

import math

import numpy as np
import pytest
import torch

from jobs.spec import Ppo
from rlhf_train.data.sequences import Sequences
from rlhf_train.ranks.collectives import World
from rlhf_train.steps.experience import (
    Experience,
    Scored,
    TrainerView,
    response_values,
    targets_of,
    whiten_update,
)
from rlhf_train.steps.losses import kl_k3

pytestmark = pytest.mark.pinned

CPU = torch.device("cpu")


def ppo(**changes):
    required = {"rollout_batch": 2, "global_batch": 2, "actor_learning_rate": 1e-3, "critic_learning_rate": 1e-3}
    return Ppo(**(required | {"gamma": 1.0, "lam": 1.0, "whiten_advantages": False} | changes))


def scored(response, log_probs, ref_log_probs, values, score, *, ended=True):
    return Scored(
        np.array([2, 5]), np.array(response), ended, score=score,
        rollout_log_probs=np.array(log_probs) + 0.25, ref_log_probs=np.array(ref_log_probs),
        trainer=TrainerView(np.array(log_probs), np.array(values), entropy=0.5),
    )  # fmt: skip


ROWS = [
    scored([7, 3], [-1.0, -2.0], [-1.5, -1.0], [0.5, 1.0], 2.0),
    scored([8], [-0.5], [-0.5], [0.25], 9.0, ended=False),
]


def test_rewards_advantages_and_returns_by_hand():
    # Row 0: r = -0.1*0.5, -0.1*-1 + 2; returns are sums to the end: 2.05, 2.1; advantages: minus
    # the values. Row 1 did not end: 9 - 1 = 8, clipped to 5.
    made = Experience.of(ROWS, ppo(missing_eos_penalty=1.0), kl_coef=0.1, on_policy=False)
    assert made.mask.tolist() == [[True, True], [True, False]]
    torch.testing.assert_close(made.targets["returns"], torch.tensor([[2.05, 2.1], [5.0, 0.0]]))
    torch.testing.assert_close(made.targets["advantages"], torch.tensor([[1.55, 1.1], [4.75, 0.0]]))
    torch.testing.assert_close(made.kl, torch.tensor([-0.5, 0.0]))
    # Clipped score - penalty - 0.1 KL; k3 of the ratios exp(-0.5) and exp(1).
    torch.testing.assert_close(made.objectives, torch.tensor([2.05, 5.0]))
    torch.testing.assert_close(
        kl_k3(made.old_log_probs, made.ref_log_probs, made.mask), torch.tensor([math.exp(-0.5) - 0.5 + math.e - 2, 0.0])
    )
    torch.testing.assert_close(made.targets["rewards_to_go"], torch.tensor([[2.05, 2.1], [5.0, 0.0]]))
    assert made.lengths.tolist() == [4, 3]
    assert made.scores.tolist() == [2.0, 9.0]


def test_rewards_to_go_are_discounted_and_see_no_value():
    made = Experience.of(ROWS, ppo(gamma=0.5, lam=0.25), kl_coef=0.1, on_policy=False)
    torch.testing.assert_close(made.targets["rewards_to_go"], torch.tensor([[-0.05 + 0.5 * 2.1, 2.1], [5.0, 0.0]]))


def test_missing_eos_penalty_only_for_responses_that_did_not_end():
    low = [ROWS[0], scored([8], [-0.5], [-0.5], [0.25], 1.0, ended=False)]
    made = Experience.of(low, ppo(missing_eos_penalty=3.0), kl_coef=0.0, on_policy=False)
    assert made.targets["returns"][1, 0].item() == pytest.approx(-2.0)
    assert made.targets["returns"][0, 1].item() == pytest.approx(2.0)


def test_advantages_are_whitened_over_the_whole_rollout():
    made = Experience.of(ROWS, ppo(whiten_advantages=True, missing_eos_penalty=1.0), kl_coef=0.1, on_policy=False)
    raw = [1.55, 1.1, 4.75]
    mean, std = np.mean(raw), np.std(raw)
    assert made.targets["advantages"][made.mask].tolist() == pytest.approx([(a - mean) / std for a in raw], abs=1e-4)


def test_whitened_rewards_keep_their_mean():
    made = Experience.of(ROWS, ppo(whiten_rewards=True, missing_eos_penalty=1.0), kl_coef=0.1, on_policy=False)
    raw = np.array([-0.05, 2.1, 5.0])
    expected = (raw - raw.mean()) / raw.std() + raw.mean()
    assert made.targets["returns"][1, 0].item() == pytest.approx(expected[2], abs=1e-4)
    assert made.targets["returns"][0, 0].item() == pytest.approx(expected[0] + expected[1], abs=1e-4)


def test_cut_takes_rows_and_trims_to_their_longest_response():
    made = Experience.of(ROWS, ppo(), kl_coef=0.1, on_policy=False)
    micro = made.make_pass(np.array([1]), 1, CPU)
    assert micro.batch.input_ids.tolist() == [[2, 5, 8]]
    assert micro.mask.tolist() == [[True]]
    assert micro.old_log_probs.tolist() == [[-0.5]]
    assert micro.targets["values"].tolist() == [[0.25]]


def test_on_policy_the_numbers_are_the_rollouts_and_the_targets_come_later():
    """ROWS' rollout log-probs are 0.25 above the trainer's, so each token costs 0.1 * 0.25 more."""
    spec = ppo(missing_eos_penalty=1.0)
    made = Experience.of(ROWS, spec, kl_coef=0.1, on_policy=True)
    torch.testing.assert_close(made.old_log_probs, torch.tensor([[-0.75, -1.75], [-0.25, 0.0]]))
    torch.testing.assert_close(made.kl, torch.tensor([0.0, 0.25]))
    torch.testing.assert_close(made.targets["rewards"], torch.tensor([[-0.075, 2.075], [4.975, 0.0]]))
    assert list(made.targets) == ["rewards"]
    micro = made.make_pass(np.array([0]), 1, CPU)
    micro.targets = targets_of(micro.targets["rewards"], torch.tensor([[0.5, 1.0]]), micro.mask, spec)
    torch.testing.assert_close(micro.targets["returns"], torch.tensor([[2.0, 2.075]]))
    torch.testing.assert_close(micro.targets["advantages"], torch.tensor([[1.5, 1.075]]))


def test_the_advantages_of_an_update_are_whitened_over_its_passes():
    made = Experience.of(ROWS, ppo(missing_eos_penalty=1.0), kl_coef=0.1, on_policy=False)
    passes = [made.make_pass(np.array([row]), 1, CPU) for row in (0, 1)]
    whiten_update(passes, World(0, 1, CPU))
    raw = [1.55, 1.1, 4.75]
    mean, std = np.mean(raw), np.std(raw)
    found = torch.cat([micro.targets["advantages"].flatten() for micro in passes])
    assert found.tolist() == pytest.approx([(a - mean) / std for a in raw], abs=1e-4)


def test_values_are_read_before_each_response_token():
    batch = Sequences.of([np.array([2, 5, 6]), np.array([2])], [np.array([7, 3]), np.array([8, 9, 3])], 1, CPU)
    per_token = torch.arange(10.0)  # two rows of 5
    assert response_values(lambda batch, at: (per_token[at], None), batch).tolist() == [[2, 3, 0], [5, 6, 7]]
