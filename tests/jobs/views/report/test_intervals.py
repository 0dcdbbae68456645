import random as random_numbers

import pytest

from jobs.views.report.intervals import difference_of_means, difference_of_shares, wilson


@pytest.mark.parametrize(
    ("share", "rows", "low", "high"),
    [
        (0.8, 10, 0.4902, 0.9433),  # Wilson's interval of 8 of 10, as printed in tables
        (0.0, 10, 0.0, 0.2775),  # z²/(n + z²)
        (1.0, 10, 0.7225, 1.0),
    ],
)
def test_wilson(share: float, rows: int, low: float, high: float) -> None:
    found = wilson(share, rows)
    assert (found.low, found.high) == pytest.approx((low, high), abs=5e-5)


@pytest.mark.parametrize(
    ("before", "after", "low", "high"),
    [  # Newcombe 1998, table II, method 10: contrasts c and e, of 10 each
        (0.3, 0.9, 0.1705, 0.8090),
        (0.0, 1.0, 0.6075, 1.0),
    ],
)
def test_difference_of_shares(before: float, after: float, low: float, high: float) -> None:
    found = difference_of_shares(before, after, 10)
    assert (found.value, found.low, found.high) == pytest.approx((after - before, low, high), abs=5e-5)


def test_difference_of_shares_of_the_same_rows() -> None:
    """Against a bootstrap of 300 rows: 120 are true twice, 60 after alone, 30 before alone.

    Two samples of such shares have a wider interval.
    """
    rows, (a, b, c) = 300, (120, 60, 30)
    random = random_numbers.Random(0)
    changes = [1] * b + [-1] * c + [0] * (rows - b - c)
    drawn = sorted(sum(random.choices(changes, k=rows)) / rows for _ in range(4000))
    found = difference_of_shares((a + c) / rows, (a + b) / rows, rows, a / rows)
    assert (found.low, found.high) == pytest.approx((drawn[100], drawn[3899]), abs=0.008)
    wide = difference_of_shares((a + c) / rows, (a + b) / rows, rows)
    assert wide.high - wide.low > 1.2 * (found.high - found.low)


@pytest.mark.parametrize("both", [0.0, 0.5, 1.0])
def test_difference_of_shares_at_the_ends(both: float) -> None:
    """All or no rows changed in the same way: φ is not defined, or its correction is all of it."""
    found = difference_of_shares(both, both, 10, both)
    assert found.value == 0 and found.low <= 0 <= found.high and not found.is_up


def test_difference_of_means_of_the_same_rows() -> None:
    found = difference_of_means(1.0, 2.0, 0.3, 0.4, 0.1)  # 1.96 times 0.1
    assert (found.value, found.low, found.high) == pytest.approx((1.0, 0.804, 1.196), abs=1e-4)


def test_difference_of_means() -> None:
    found = difference_of_means(1.0, 2.0, 0.3, 0.4)  # √(0.09 + 0.16) = 0.5
    assert (found.value, found.low, found.high) == pytest.approx((1.0, 1 - 0.979982, 1 + 0.979982))
    assert found.is_up and not found.is_down
    assert difference_of_means(1.0, -1.0, 0.3, 0.4).is_down
