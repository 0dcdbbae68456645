"""The errors of changes, against a jackknife: the number without each row in turn."""

import math
from collections.abc import Callable

import numpy as np
import pytest

from rlhf_train.steps.change import mean_change_error, perplexity_change_error, share_of_both, standard_error
from rlhf_train.steps.sft import perplexity_of

ROWS = 400


def jackknife(value: Callable[[np.ndarray], float]) -> float:
    """√((n−1)/n Σ (v₋ᵢ − mean of v₋ᵢ)²). value: of the rows that are kept."""
    without = np.array([value(np.delete(np.arange(ROWS), row)) for row in range(ROWS)])
    return math.sqrt((ROWS - 1) / ROWS * float(((without - without.mean()) ** 2).sum()))


def test_standard_error() -> None:
    # Mean 3, squares 4 + 1 + 0 + 1 + 4 = 10, s² = 10/4, s/√5 = √0.5.
    assert standard_error([1.0, 2.0, 3.0, 4.0, 5.0]) == pytest.approx(math.sqrt(0.5))
    assert standard_error([1.0]) is None


def test_the_error_of_a_change_of_perplexity() -> None:
    """Rows of many lengths, each as hard after as it was before: the two samples are one."""
    random = np.random.default_rng(0)
    tokens = random.integers(1, 60, ROWS)
    before = tokens * random.gamma(4.0, 0.8, ROWS)
    after = 0.7 * before + tokens * random.normal(0.0, 0.1, ROWS)

    def change(kept: np.ndarray) -> float:
        one, two = (math.exp(float(nll[kept].sum() / tokens[kept].sum())) for nll in (after, before))
        return one - two

    found = perplexity_change_error(before.tolist(), after, tokens)
    assert found == pytest.approx(jackknife(change), rel=0.02)
    (_, error_before), (_, error_after) = perplexity_of(before, tokens), perplexity_of(after, tokens)
    assert error_before is not None and error_after is not None
    assert found < 0.8 * math.hypot(error_before, error_after)


def test_the_error_of_a_change_of_a_mean() -> None:
    random = np.random.default_rng(1)
    before = random.normal(0.0, 1.0, ROWS)
    after = before + random.normal(0.1, 0.2, ROWS)
    found = mean_change_error(before.tolist(), after.tolist())
    assert found == pytest.approx(jackknife(lambda kept: float(after[kept].mean() - before[kept].mean())))
    # By hand: differences 1, 2, 3: s = 1, over √3.
    assert mean_change_error([5.0, 0.0, 7.0], [6.0, 2.0, 10.0]) == pytest.approx(1 / math.sqrt(3))


def test_the_share_of_both() -> None:
    assert share_of_both([True, True, False, False], [True, False, True, False]) == 0.25


@pytest.mark.parametrize(("before", "after"), [(None, [1.0, 2.0]), ([1.0], [1.0, 2.0]), ([1.0, 2.0], None)])
def test_other_rows_or_none_have_no_error(before: list[float] | None, after: list[float] | None) -> None:
    assert mean_change_error(before, after) is None
    assert share_of_both(before and [True] * len(before), after and [True] * len(after)) is None
    if after is not None:
        assert perplexity_change_error(before, np.array(after), np.array([1, 1])) is None


def test_an_impossible_token_has_an_error_that_is_no_number() -> None:
    found = perplexity_change_error([1.0, 1.0], np.array([math.inf, 1.0]), np.array([1, 1]))
    assert found is not None and math.isnan(found)
