from __future__ import annotations

from jobs.families_table import COLUMNS, PAGE, table, with_table


def test_the_page_has_the_table() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert with_table(page) == page, "env/families.toml has changed: `make docs` writes the table"
    assert table() in page


def test_a_row_names_the_flavours() -> None:
    lines = PAGE.read_text(encoding="utf-8").splitlines()
    assert "| Qwen 3 | `qwen3` | cu130 | `Qwen/Qwen3-...` |" in lines
    assert "| OPT | `opt` | cu118, cu130 | `facebook/opt-...` |" in lines


def test_an_old_table_is_replaced_and_nothing_else() -> None:
    page = PAGE.read_text(encoding="utf-8")
    old = page.replace(table(), f"| {' | '.join(COLUMNS)} |\n| old | row |\n")
    assert old != page and with_table(old) == page
