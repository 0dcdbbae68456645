from __future__ import annotations

import math

import pytest
import yaml

from jobs.errors import ToolkitError
from jobs.yaml12 import dump_yaml, load_yaml

pytestmark = pytest.mark.pinned


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-6", 0.000001), ("5E+3", 5000.0), ("1.", 1.0), (".5", 0.5), ("-2.5e1", -25.0), ("-.inf", -math.inf),
        ("10", 10), ("-3", -3), ("010", 10), ("-007", -7),
        ("true", True), ("FALSE", False), ("null", None), ("~", None), ("", None),
        ("on", "on"), ("off", "off"), ("yes", "yes"), ("No", "No"), ("y", "y"), ("tRue", "tRue"),
        ("22:22", "22:22"), ("1:30:00", "1:30:00"), ("0x10", "0x10"), ("0o17", "0o17"), ("0b1", "0b1"),
        ("1_000", "1_000"),
        ("2024-01-01", "2024-01-01"), ("=", "="), ("1e", "1e"), ("1.2.3", "1.2.3"),
        ("'3'", "3"), ('"1e-6"', "1e-6"), ("!!str 3", "3"), ("!!float 3", 3.0),
        ("[1, a, [2.5, on]]", [1, "a", [2.5, "on"]]), ("{a: {b: 1}, '2': on}", {"a": {"b": 1}, "2": "on"}),
        ("{on: 1}", {"on": 1}),
    ],
)  # fmt: skip
def test_words_and_numbers(text: str, value: object) -> None:
    found = load_yaml(text, "job")
    assert (found, type(found)) == (value, type(value))


def test_not_a_number() -> None:
    assert math.isnan(load_yaml(".nan", "job"))


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("a: 1\nb: 2\na: 3", "`a` occurs twice\n  at line 3, column 1"),
        ("s: {a: 1, a: 1}", "`a` occurs twice\n  at line 1, column 11"),
        ("1: 2", "a field's name is text, not 1\n"),
        ("{[1]: 2}", "a field's name is text, not [1]\n"),
        ("? {a: 1}\n: 2", "a field's name is text, not {'a': 1}\n"),
        ("a: [1", "expected ',' or ']'"),
        ("a:\n\tb: 1", "cannot start any token\n  at line 2, column 1"),
        ("a: 1\n---\nb: 2", "expected a single document"),
        ("a: \x00", "special characters are not allowed"),
        ("!!int abc", "`abc` cannot be read as int"),
        ("9" * 5000, "`99999999999999999999` cannot be read as int"),  # Python refuses more than 4300 digits
        ("!!bool maybe", "`maybe` cannot be read as bool"),
        ("!!timestamp abc", "timestamp"),
        ("!!python/object/apply:os.system [true]", "os.system"),
        ("&a [*a]", "recursive"),
        ("a: &a {b: *a}", "recursive"),
        ("[" * 5000, "nested too deeply"),
    ],
)
def test_what_is_refused(text: str, why: str) -> None:
    with pytest.raises(ToolkitError) as caught:
        load_yaml(text, "some.yaml")
    assert "some.yaml" in caught.value.what and why in caught.value.why
    assert "unicode string" not in str(caught.value)


WORDS = [
    "1e5",
    "1e-6",
    "22:22",
    "010",
    "10",
    "on",
    "no",
    "null",
    "~",
    "",
    "true",
    ".5",
    "0x10",
    "1_0",
    "2024-01-01",
    "=",
    "<<",
    "a: b",
    "é",
    " x",
    "- y",
]


@pytest.mark.parametrize("word", WORDS)
def test_a_word_stays_a_word(word: str) -> None:
    text = dump_yaml({"name": word, word: 1})
    assert load_yaml(text, "dump") == yaml.safe_load(text) == {"name": word, word: 1}


@pytest.mark.parametrize("number", [1e-6, 9.65e-6, 1e22, 0.1, 3.0, 1e16, -5, 0, 2**40])
def test_a_number_stays_that_number(number: float) -> None:
    text = dump_yaml([number])
    assert load_yaml(text, "dump") == yaml.safe_load(text) == [number]
    assert type(load_yaml(text, "dump")[0]) is type(number)
