"""The table of families in docs/models-and-data.md, made from env/families.toml.

`make docs` writes it into the page, and a test keeps the two equal.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path

from env.settings import Family, load_families

PAGE = Path(__file__).parents[1] / "docs/models-and-data.md"
BEGIN = "<!-- Made by `make docs` from env/families.toml. -->\n"

# The heading of a column, and what stands there for a family of this `model_type`.
COLUMNS: Mapping[str, Callable[[str, Family], str]] = {
    "family": lambda model_type, family: family.title,
    "`model_type`": lambda model_type, family: f"`{model_type}`",
    "flavours": lambda model_type, family: ", ".join(family.flavours),
    "known by its name on the hub": lambda model_type, family: ", ".join(f"`{begin}...`" for begin in family.hub),
}


def table() -> str:
    rows = [[cell(*row) for cell in COLUMNS.values()] for row in load_families().items()]
    lines = [list(COLUMNS), ["---"] * len(COLUMNS), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def with_table(page: str) -> str:
    """Return the page with the table as it is now, in place of the one after BEGIN."""
    return re.sub(rf"(?<={re.escape(BEGIN)})(\|.*\n)*", lambda _: table(), page, count=1)


if __name__ == "__main__":
    PAGE.write_text(with_table(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
