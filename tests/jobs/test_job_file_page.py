from __future__ import annotations

from pathlib import Path

from jobs.job_file_page import page, rows_of
from jobs.spec import Job

PAGE = Path(__file__).parents[2] / "docs/job-file.md"


def test_the_page_is_what_the_fields_say() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), "a field has changed: `make docs` writes the page"


def test_every_field_has_a_meaning_and_its_steps() -> None:
    rows = list(rows_of(Job))
    assert len(rows) > 80
    assert [row.path for row in rows if not row.meaning] == []
    assert [row.path for row in rows if not row.steps] == []


def test_a_field_has_the_steps_of_its_section_unless_it_says_so() -> None:
    steps = {row.path: tuple(row.steps) for row in rows_of(Job)}
    expected = {
        "sft.epochs": (1,),
        "actor.lora.rank": (1, 3),
        "critic.model": (2, 3),
        "hardware.ranks": (1, 2, 3),
        "hardware.critic_zero_stage": (2, 3),
        "hardware.rollout_micro_batch": (3,),
    }
    assert {path: steps[path] for path in expected} == expected


def test_a_row_shows_unit_default_and_meaning() -> None:
    lines = PAGE.read_text(encoding="utf-8").splitlines()
    assert (
        "| `data.max_prompt_tokens` | tokens | `256` | rows with a longer prompt are left out, and counted | 1, 2, 3 |"
        in lines
    )
    assert "| `sft.betas` |  | `[0.9, 0.95]` | AdamW's two averages: how much of the old value stays | 1 |" in lines
    assert "| `actor.lora` |  | not set | set: train low-rank adapters instead of all weights | 1, 3 |" in lines
    assert any(line.startswith("| `sft.learning_rate` |  | must be there |") for line in lines)
