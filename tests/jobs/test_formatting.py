import math

import pytest

from jobs.formatting import duration, fold, money, number, size, tail, visible


@pytest.mark.parametrize(
    ("value", "spec", "text"),
    [
        (0.01234, ".4f", "0.0123"),
        (-0.0, ".2f", "-0.00"),
        (0.000012, ".4f", "1.2e-05"),  # would look like nothing
        (-0.000012, ".4f", "-1.2e-05"),
        (0, ".3f", "0.000"),
        (123456789.0, ".4f", "1.23e+08"),
        (0.921, ".1%", "92.1%"),
        (math.nan, ".4f", "nan"),
        ("nan", ".4f", "nan"),
        ("-inf", ".1%", "-inf"),
        ("Infinity", ".0f", "inf"),
        ("much\x1b[1m", ".0f", "much\\x1b[1m"),
        (None, ".0f", "?"),
    ],
)
def test_number(value: object, spec: str, text: str) -> None:
    assert number(value, spec) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0s"),
        (42.4, "42s"),
        (59.6, "1m00s"),
        (190, "3m10s"),
        (3744, "1h02m"),
        (190_800, "2d05h"),
        (-3, "0s"),
        (math.nan, "?"),
        ("inf", "?"),
        (None, "?"),
    ],
)
def test_duration(seconds: object, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("size_bytes", "text"),
    [
        (0, "0 bytes"),
        (999, "999 bytes"),
        (1500, "1.5 kB"),
        (12_345_678, "12.3 MB"),
        (2_630_000_000, "2.63 GB"),
        (None, "nan GB"),
    ],
)
def test_size(size_bytes: object, text: str) -> None:
    assert size(size_bytes) == text


@pytest.mark.parametrize(
    ("amount", "currency", "text"),
    [
        (6.314, "¥", "¥6.31"),
        (6.314, "EUR", "6.31 EUR"),
        (6.314, "", "6.31"),
        (0.0, "$", "$0.00"),
        (0.00674, "$", "$0.0067"),
        (0.1, "$", "$0.10"),
        (1234.5, "元", "1234.50 元"),
    ],
)
def test_money(amount: float, currency: str, text: str) -> None:
    assert money(amount, currency) == text


@pytest.mark.parametrize(
    ("text", "cells", "end"),
    [
        ("short", 5, "short"),
        ("too long", 5, "…long"),
        ("调调调", 6, "调调调"),
        ("调调调调", 6, "…调调"),
        ("ab调", 3, "…调"),
        ("x", 0, "…"),
    ],
)
def test_tail(text: str, cells: int, end: str) -> None:
    assert tail(text, cells) == end


@pytest.mark.parametrize(
    ("text", "cells", "most", "lines"),
    [
        ("", 9, 3, [""]),
        ("one two three", 7, 3, ["one two", "three"]),
        ("one two three", 7, 1, ["one tw…"]),
        ("one  two", 3, 3, ["one", "two"]),
        ("a " + "x" * 9, 4, 9, ["a", "xxxx", "xxxx", "x"]),
        ("调调调调", 5, 9, ["调调", "调调"]),
        ("调调调调", 5, 1, ["调调…"]),
        ("one two", 9, 1, ["one two"]),
    ],
)
def test_fold(text: str, cells: int, most: int, lines: list[str]) -> None:
    assert fold(text, cells, most) == lines


@pytest.mark.parametrize(
    "unsafe",
    [
        *(chr(i) for i in range(32) if chr(i) not in "\n\t"),
        *(chr(i) for i in range(0x7F, 0xA0)),
        "\u2028",
        "\u202e",
        "\u2066",
        "\udc80",
    ],
)
def test_what_a_terminal_would_obey_is_spelt_out(unsafe: str) -> None:
    shown = visible(f"a{unsafe}b")
    assert shown.startswith("a\\") and shown.endswith("b") and shown.isprintable()


def test_harmless_text_stays_as_it_is() -> None:
    assert visible("Ünïcode 你好\n\t[bold] :smile: \\n") == "Ünïcode 你好\n\t[bold] :smile: \\n"
