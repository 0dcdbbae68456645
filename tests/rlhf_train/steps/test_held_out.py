import math

import numpy as np
import pytest

from rlhf_train.steps.ppo import sampled_updates
from rlhf_train.steps.reward import accuracy, histogram


@pytest.mark.parametrize(
    ("updates", "updates_per_rollout", "sampled"),
    [(400, 4, {100, 200, 300}), (10, 4, {4, 8}), (4, 2, {2}), (8, 8, set()), (1, 1, set()), (2, 1, {1})],
)
def test_answers_are_shown_before_the_first_rollout_of_each_quarter(
    updates: int, updates_per_rollout: int, sampled: set[int]
) -> None:
    assert sampled_updates(updates, updates_per_rollout, None) == sampled


def test_answers_are_shown_as_often_as_the_job_says() -> None:
    assert sampled_updates(20, 1, 6) == {6, 12, 18} and sampled_updates(20, 4, 6) == {8, 12}  # 18 waits for 20, the end
    assert sampled_updates(20, 4, 2) == {4, 8, 12, 16} and sampled_updates(20, 4, 50) == set()


def test_accuracy_and_histogram_of_margins() -> None:
    margins = np.array([-1.0, -0.5, 0.0, 0.25, 3.0])
    assert accuracy(margins) == 0.4  # equal scores are not right
    bars = histogram(margins)
    assert bars is not None and (bars["low"], bars["high"], len(bars["counts"])) == (-1.0, 3.0, 40)
    # Bars are 0.1 wide: -1.0 is in the first, -0.5 in the sixth, 0.0 in the 11th, 0.25 in the 13th.
    assert [place for place, count in enumerate(bars["counts"]) if count] == [0, 5, 10, 12, 39]
    assert math.isnan(accuracy(np.array([1.0, math.nan]))) and histogram(np.array([1.0, math.nan])) is None
