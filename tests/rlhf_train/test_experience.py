"""From the networks' numbers to what PPO learns from, on two responses worked out by hand."""

import numpy as np
import pytest
import torch

from jobs.spec import Ppo
from rlhf_train.batch import Sequences
from rlhf_train.experience import Experience, Scored, judge, response_values, trainer_view

pytestmark = pytest.mark.pinned

CPU = torch.device("cpu")


def ppo(**changes):
    required = {"rollout_batch": 2, "global_batch": 2, "actor_learning_rate": 1e-3, "critic_learning_rate": 1e-3}
    return Ppo(**(required | {"gamma": 1.0, "lam": 1.0, "whiten_advantages": False} | changes))


def scored(response, log_probs, ref_log_probs, values, score, *, ended=True):
    return Scored(
        prompt=np.array([2, 5]), response=np.array(response), ended=ended, rollout_log_probs=np.array(log_probs), log_probs=np.array(log_probs),
        ref_log_probs=np.array(ref_log_probs), values=np.array(values), entropy=0.5, score=score,
    )  # fmt: skip


ROWS = [scored([7, 3], [-1.0, -2.0], [-1.5, -1.0], [0.5, 1.0], 2.0), scored([8], [-0.5], [-0.5], [0.25], 9.0, ended=False)]


def test_rewards_advantages_and_returns_by_hand():
    # Row 0: r = -0.1*0.5, -0.1*-1 + 2; returns are sums to the end: 2.05, 2.1; advantages: minus the values.
    # Row 1 did not end: 9 - 1 = 8, clipped to 5.
    made = Experience.of(ROWS, ppo(missing_eos_penalty=1.0), kl_coef=0.1)
    assert made.mask.tolist() == [[True, True], [True, False]]
    torch.testing.assert_close(made.returns, torch.tensor([[2.05, 2.1], [5.0, 0.0]]))
    torch.testing.assert_close(made.advantages, torch.tensor([[1.55, 1.1], [4.75, 0.0]]))
    torch.testing.assert_close(made.kl, torch.tensor([-0.5, 0.0]))
    assert made.lengths.tolist() == [4, 3]
    assert made.scores.tolist() == [2.0, 9.0]


def test_missing_eos_penalty_only_for_responses_that_did_not_end():
    low = [ROWS[0], scored([8], [-0.5], [-0.5], [0.25], 1.0, ended=False)]
    made = Experience.of(low, ppo(missing_eos_penalty=3.0), kl_coef=0.0)
    assert made.returns[1, 0].item() == pytest.approx(-2.0)
    assert made.returns[0, 1].item() == pytest.approx(2.0)


def test_advantages_are_whitened_over_the_whole_rollout():
    made = Experience.of(ROWS, ppo(whiten_advantages=True, missing_eos_penalty=1.0), kl_coef=0.1)
    raw = [1.55, 1.1, 4.75]
    mean, std = np.mean(raw), np.std(raw)
    assert made.advantages[made.mask].tolist() == pytest.approx([(a - mean) / std for a in raw], abs=1e-4)


def test_whitened_rewards_keep_their_mean():
    made = Experience.of(ROWS, ppo(whiten_rewards=True, missing_eos_penalty=1.0), kl_coef=0.1)
    raw = np.array([-0.05, 2.1, 5.0])
    expected = (raw - raw.mean()) / raw.std() + raw.mean()
    assert made.returns[1, 0].item() == pytest.approx(expected[2], abs=1e-4)
    assert made.returns[0, 0].item() == pytest.approx(expected[0] + expected[1], abs=1e-4)


def test_cut_takes_rows_and_trims_to_their_longest_response():
    made = Experience.of(ROWS, ppo(), kl_coef=0.1)
    batch, mask, old = made.cut(np.array([1]), 1, CPU)
    assert batch.input_ids.tolist() == [[2, 5, 8]]
    assert mask.tolist() == [[True]]
    assert old["old_log_probs"].tolist() == [[-0.5]]
    assert old["values"].tolist() == [[0.25]]


def test_values_are_read_before_each_response_token():
    batch = Sequences.of([np.array([2, 5, 6]), np.array([2])], [np.array([7, 3]), np.array([8, 9, 3])], 1, CPU)
    per_token = torch.arange(10.0)  # two rows of 5
    assert response_values(per_token, batch).tolist() == [[2, 3, 0], [5, 6, 7]]


def test_views_collect_what_the_networks_say():
    batch = Sequences.of([np.array([2, 5]), np.array([2])], [np.array([7, 3]), np.array([8])], 1, CPU)
    actor = lambda batch, temperature, with_entropy=False: (torch.tensor([-1.0, -2.0, -3.0]), torch.tensor([0.2, 0.4, 0.9]))  # noqa: E731
    scores = torch.arange(8.0)  # two rows of 4
    said = judge(batch, reference=actor, reward_model=lambda batch: (scores, None), temperature=1.0)
    assert said["score"].tolist() == [3.0, 5.0]  # after the last real token
    assert said["ref_log_probs"].tolist() == [[-1.0, -2.0], [-3.0, 0.0]]
    mine = trainer_view(batch, actor=actor, critic=lambda batch: (scores, None), temperature=1.0)
    assert mine["values"].tolist() == [[1.0, 2.0], [4.0, 0.0]]
    assert mine["entropy"].tolist() == pytest.approx([0.3, 0.9])
