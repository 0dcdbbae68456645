"""README's pictures: drawn from events, small, and with nothing from elsewhere."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from benchmarks.pictures import COLUMNS, panel_lines, svg
from tests.raw_events import PLAN, PPO

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_a_panel_is_drawn_as_it_was_then() -> None:
    """Half of 480 updates, 192 s after the first: what came later is not seen."""
    rollouts = [PPO | {"update": update, "elapsed_s": 0.8 * update} for update in (120, 240, 360)]
    lines = panel_lines([PLAN, *rollouts], 0.5)
    assert re.search(r"PPO +240 of 480 +50% +3m12s", lines[0].plain)
    assert max(line.cell_len for line in lines) < COLUMNS
    picture = svg(lines, "the title")
    assert "240&#160;of&#160;480" in picture and "the&#160;title" in picture
    assert "@font-face" not in picture and 'viewBox="0 0 994 ' in picture  # 80 columns of 12.2, and its frame


@pytest.mark.parametrize("name", re.findall(r"\]\((docs/pictures/[^)]+)\)", README))
def test_a_picture_is_small_and_whole(name: str) -> None:
    content = (ROOT / name).read_bytes()
    assert len(content) < 150_000
    if name.endswith(".svg"):
        assert re.findall(rb"(?:url\(|href=|src=)['\"]?https?:", content) == []


def test_readme_has_panel_chat_and_report() -> None:
    assert sorted(path.stem for path in (ROOT / "docs/pictures").iterdir()) == ["chat", "panel", "report"]
    assert all(f"](docs/pictures/{path.name})" in README for path in (ROOT / "docs/pictures").iterdir())
