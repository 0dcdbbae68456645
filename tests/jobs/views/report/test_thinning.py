import math

from jobs.views.report.thinning import thin


def test_a_short_curve_stays_as_it_is() -> None:
    assert thin([1.0, 2.0, 3.0], [5.0, math.nan, math.inf], 2) == ([1.0, 2.0, 3.0], [5.0, None, None])


def test_each_bucket_keeps_its_lowest_and_highest_point() -> None:
    # Three buckets of width 3: [0, 3), [3, 6), [6, 9].
    ys = [0.0, 4.0, 2.0, 3.0, 3.5, -1.0, 7.0, 6.0, 8.0, 7.5]
    assert thin([float(x) for x in range(10)], ys, 3) == ([0.0, 1.0, 4.0, 5.0, 7.0, 8.0, 9.0],
                                                          [0.0, 4.0, 3.5, -1.0, 6.0, 8.0, 7.5])  # fmt: skip


def test_a_spike_among_100000_points_keeps_place_and_height() -> None:
    ys = [math.sin(x / 1000) for x in range(100_000)]
    ys[33_333] = 97.5
    xs, thinned = thin([float(x) for x in range(100_000)], ys, 360)
    assert thinned[xs.index(33_333.0)] == 97.5 and len(xs) <= 722
    assert xs[0] == 0 and xs[-1] == 99_999 and xs == sorted(xs)


def test_what_is_not_finite_is_a_gap_only_where_nothing_else_is() -> None:
    ys = [1.0, math.nan, 2.0, math.nan, math.inf, math.nan, 3.0, 4.0, 5.0, 6.0]
    assert thin([float(x) for x in range(10)], ys, 3) == ([0.0, 2.0, 3.0, 6.0, 9.0], [1.0, 2.0, None, 3.0, 6.0])


def test_points_at_one_place() -> None:
    assert thin([2.0] * 6, [1.0, 5.0, 3.0, 0.0, 2.0, 4.0], 1) == ([2.0] * 4, [1.0, 5.0, 0.0, 4.0])
