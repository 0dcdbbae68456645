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


def test_difference_of_means() -> None:
    found = difference_of_means(1.0, 2.0, 0.3, 0.4)  # √(0.09 + 0.16) = 0.5
    assert (found.value, found.low, found.high) == pytest.approx((1.0, 1 - 0.979982, 1 + 0.979982))
    assert found.is_up and not found.is_down
    assert difference_of_means(1.0, -1.0, 0.3, 0.4).is_down
