"""The tables' arithmetic, against numbers worked out by hand."""

from __future__ import annotations

import pytest

from benchmarks import decode, ppo, side_by_side, steps
from benchmarks.figures import Spread, Table, decode_floor_s, kv_bytes, matmul_share


def test_a_spread_is_the_median_with_the_ends() -> None:
    spread = Spread.of([3.0, 1.0, 2.5, 9.0])
    assert (spread.median, spread.least, spread.most, spread.count) == (2.75, 1.0, 9.0, 4)
    assert f"{spread:.1f}" == "2.8 (1.0-9.0)" and f"{Spread.of([2.0]):.0f}" == "2"


def test_the_floor_of_a_decode_step() -> None:
    # OPT-1.3b at batch 64 and 384 positions: 2 x 24 layers x 2048 x 2 bytes = 196,608 a token, 4.83
    # GB; 2.62 GB of weights; 4.24 TB/s.
    cache = kv_bytes(24, 2048, 64, 384, 2)
    assert cache == 64 * 384 * 196_608
    assert decode_floor_s(2.62e9, cache, 4.24e12) == pytest.approx(1.76e-3, rel=5e-3)
    assert decode_floor_s(1e9, 1e9, 1e12, flops=5e9, matmul_flops_s=1e12) == 5e-3  # arithmetic takes longer
    assert decode_floor_s(1e9, 1e9, 1e12, flops=1e9, matmul_flops_s=1e12) == 2e-3  # reading does


def test_the_share_of_the_matmul_rate() -> None:
    # 1.311e9 weights, 69,072 tokens a second, 672 TFLOP/s sustained.
    assert matmul_share(1_311_000_000, 69_072, 672e12) == pytest.approx(0.8085, abs=1e-4)


def test_a_row_of_step_2_counts_both_sequences_of_a_pair() -> None:
    step = steps.Step(2, "step 2", "reward", 16, 128)
    cells, numbers = steps.row_of(step, [0.4, 0.5, 0.6], 1_000_000, 1e12)
    assert numbers["tokens_s"] == 2 * 16 * 128 / 0.5 and numbers["samples_s"] == 32
    assert cells == ["step 2, 16 pairs", "0.500 (0.400-0.600)", "32.0", "8,192", "4.9%"]


def test_a_row_of_decode() -> None:
    found = {
        "batch": 64,
        "floor_s": 0.002,
        "step_s": 0.0025,
        "prefill_s": 0.1,
        "whole_s": 2.0,
        "longer": Spread.of([2.0]),
        "tokens": 50,
    }
    assert decode.row_of(found, 1.3, 50) == [
        "64",
        "2.00",
        "2.50",
        "1.25x",
        "1.3x: met",
        "25,600",
        "100",
        "2.000",
        "3,200",
    ]
    assert decode.row_of(found, 1.2, 50)[4] == "1.2x: MISSED"


def test_ours_is_held_against_the_faster_peer() -> None:
    def side(cpu_s: float, *seconds: float):
        return [{"total_s": s, "cpu_s": cpu_s, "generation_s": s / 2, "answer_tokens": 640} for s in seconds]

    sides = {
        "ours": side(3, 4, 4, 90),
        "slow": side(8, 9),
        "fast": side(3, 6, 5, 7),
        "generate": [{"generation_s": 1.0, "answer_tokens": 640}],
    }
    output = side_by_side.verdict(sides, 1.5, by_cpu=False)
    assert output == (
        "ours against the faster peer, fast: 1.50x by the clock (target 1.5x: met), 1.00x by seconds of the CPU"
    )
    output = side_by_side.verdict(sides, 1.5, by_cpu=True)  # 3 and 3 seconds of the CPU
    assert output.startswith(
        "ours against the faster peer, fast: 1.00x by seconds of the CPU (target 1.5x: MISSED), 1.50x by the clock"
    )
    assert ppo.row("generate", sides["generate"], 64) == ["generate", "1.00", "-", "-", "-", "-", "-", "640"]


def test_a_table_lines_its_columns_up() -> None:
    table = Table("t", ["", "x"], [["a", "1.0"], ["bb", "10.0"]], ["note"])
    assert str(table) == "t\n\n       x\n--------\na    1.0\nbb  10.0\n\nnote"
