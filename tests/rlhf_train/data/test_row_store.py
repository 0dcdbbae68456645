"""Rows come back as they were, from memory or a file; groups are compared with a plain loop."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from rlhf_train.data import row_store
from rlhf_train.data.chat import Message
from rlhf_train.data.forms import Row
from rlhf_train.data.row_store import StoredRows

pytestmark = pytest.mark.pinned


def some_rows(count: int) -> list[Row]:
    asked = (Message("user", "Why?"), Message("assistant", "", ({"name": "f"},)))
    texts = [Row(f"q{i % 7 if i % 3 else i}é", f"c{i}", f"c{i}", "r") for i in range(count - 1)]
    return [*texts, Row(asked, Message("assistant", "So."), None, None)]


@pytest.mark.parametrize("in_memory_bytes", [row_store.IN_MEMORY_BYTES, 1])
@pytest.mark.parametrize("count", [1, 16, 17, 40])
def test_rows_come_back_in_their_order(count: int, in_memory_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_store, "BLOCK_ROWS", 8)
    monkeypatch.setattr(row_store, "IN_MEMORY_BYTES", in_memory_bytes)
    rows = some_rows(count)
    stored = StoredRows.of(rows)
    assert len(stored) == count and [*stored] == rows == [*stored]
    assert [*stored.between(7, 25)] == rows[7:25]
    odd = stored.pick(np.arange(1, count, 2))
    assert [*odd] == rows[1::2] and [*odd.pick(np.arange(1, len(odd)))] == rows[3::2]
    assert odd.prompt_keys.tolist() == stored.prompt_keys[1::2].tolist()


def test_rows_are_grouped_by_prompt_as_a_loop_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_store, "BLOCK_ROWS", 8)
    rows = some_rows(60)[::-1]
    groups: dict[object, list[int]] = {}
    for number, row in enumerate(rows):
        groups.setdefault(str(row.prompt), []).append(number)
    flat, ends = StoredRows.of(rows).by_prompt()
    assert [flat[start:end].tolist() for start, end in pairwise(ends)] == [*groups.values()]
    assert len(groups) < 60


def test_keys_tell_texts_apart_where_columns_meet() -> None:
    rows = [Row("a", "bc", "bc", "d"), Row("ab", "c", "c", "d"), Row("a", "bc", "bc", "d")]
    keys = StoredRows.of(rows).row_keys.tolist()
    assert keys[0] == keys[2] != keys[1]
