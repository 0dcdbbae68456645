"""Test what is said of a reward model that guesses."""

from __future__ import annotations

import pytest

from rlhf_train.steps.chance import warning_of_chance


@pytest.mark.parametrize(
    ("accuracy", "pairs", "said"),
    [
        (0.5, 100, "which a guess may do too: 40.0% to 60.0%"),
        (0.6, 100, "which a guess may do too"),  # two standard errors: 2 * 0.5 / 10
        (0.61, 100, None),
        (0.54, 400, "45.0% to 55.0%"),
        (0.56, 400, None),
        (0.3, 100, "fewer than a guess would"),
        (1.0, 1, "1 held-out pair right, which a guess may do too"),
    ],
)
def test_an_accuracy_within_two_standard_errors_of_chance(accuracy: float, pairs: int, said: str | None) -> None:
    warning = warning_of_chance(2, accuracy, pairs)
    assert (warning is None) == (said is None)
    if warning is not None and said is not None:
        assert said in warning.message and warning.step == 2 and warning.hint
