"""The table of wrong lines fits the code: each right line stands once in its file."""

from __future__ import annotations

import ast

import pytest

from tests.mutants import CHECKOUT, MUTANTS, TESTS, place


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_a_mutants_line_stands_once_in_the_code(mutant) -> None:
    text = place(mutant, CHECKOUT)
    assert mutant.old not in text or mutant.new != mutant.old
    ast.parse(text)


def test_each_mutant_has_a_name_and_tests_of_its_own() -> None:
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS) >= 40
    assert {mutant.file for mutant in MUTANTS} == set(TESTS)
    named = {test.split("::")[0] for tests in TESTS.values() for test in tests}
    assert [name for name in named if not (CHECKOUT / name).is_file()] == []
