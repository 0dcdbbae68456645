"""Test the networks' numbers on two responses, and how rows are cut into scoring passes."""

import numpy as np
import pytest
import torch

from rlhf_train.data.sequences import Sequences
from rlhf_train.steps.scoring import passes_of_all, score_batch, to_host, trainer_view

pytestmark = pytest.mark.pinned

CPU = torch.device("cpu")


def test_views_collect_what_the_networks_say():
    batch = Sequences.of([np.array([2, 5]), np.array([2])], [np.array([7, 3]), np.array([8])], 1, CPU)

    def actor(batch, temperature, with_entropy=False):
        return torch.tensor([-1.0, -2.0, -3.0]), torch.tensor([0.2, 0.4, 0.9])

    def score(batch, at):
        return torch.arange(8.0)[at], None  # two rows of 4

    frozen = score_batch(batch, reference=actor, reward_model=score, temperature=1.0)
    assert frozen["score"].tolist() == [3.0, 5.0]  # after the last real token
    assert frozen["ref_log_probs"].tolist() == [[-1.0, -2.0], [-3.0, 0.0]]
    assert "judge_score" not in frozen

    def judge(batch, at):
        return -torch.arange(8.0)[at], None

    judged = score_batch(batch, reference=actor, reward_model=score, judge=judge, temperature=1.0)
    assert judged["judge_score"].tolist() == [-3.0, -5.0] and judged["score"].tolist() == [3.0, 5.0]
    trained = trainer_view(batch, actor=actor, critic=score, temperature=1.0)
    assert trained["values"].tolist() == [[1.0, 2.0], [4.0, 0.0]]
    assert trained["entropy"].tolist() == pytest.approx([0.3, 0.9])


def test_numbers_reach_the_host_as_they_were():
    numbers = {
        "a": torch.tensor([[1.0, 2.0], [3.0, 4.0]]),
        "b": torch.tensor([5.0, 6.0]),
        "c": torch.tensor([[7.0], [8.0]], dtype=torch.bfloat16),
    }
    found = to_host(numbers)
    assert {name: array.tolist() for name, array in found.items()} == {
        "a": [[1, 2], [3, 4]],
        "b": [5, 6],
        "c": [[7], [8]],
    }


def test_all_ranks_make_as_many_passes():
    """At most 100 tokens a pass.

    By itself, the first rank would make one pass, and the second three.
    """
    lengths = [np.array([12, 11, 10, 9]), np.array([90, 60, 50])]
    for packed, expected in (
        (False, [slice(0, 1), slice(1, 2), slice(2, 4)]),
        (True, [slice(0, 1), slice(1, 2), slice(2, 4)]),
    ):
        assert passes_of_all(lengths, 100, packed=packed) == expected
    assert passes_of_all(lengths[:1], 100, packed=False) == [slice(0, 4)]
