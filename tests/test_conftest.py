"""What a whole run of CI leaves to the images, and what it does not."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.conftest import left_to_the_images

BOTH = [("docker/test_modern.py", "docker"), ("docker/test_pinned.py", "docker")]


def item(place: str, mark: str, name: str = "test_it") -> Any:
    """What is asked of one of pytest's items."""
    path, nodeid = Path(__file__).parent / place, f"tests/{place}::{name}"
    return SimpleNamespace(path=path, nodeid=nodeid, get_closest_marker=lambda asked: asked == mark or None)


@pytest.mark.parametrize(
    ("place", "mark", "name", "is_left"),
    [
        ("rlhf_train/steps/test_losses.py", "pinned", "test_it", True),
        ("jobs/test_spec.py", "pinned", "test_it", True),
        ("integration/test_jobs.py", "pinned", "test_it", True),
        ("rlhf_train/steps/test_export.py", "pinned_gloo", "test_it", False),
        ("rlhf_train/steps/test_sft.py", "", "test_it", False),
        ("env/test_pins.py", "pinned", "test_it", False),  # no image runs it
        ("integration/remote/test_bare_box.py", "pinned", "test_it", False),
        ("rlhf_train/data/test_dataset.py", "pinned", "test_real_preference_data", False),
    ],
)
def test_what_both_images_run_is_left_to_them(place: str, mark: str, name: str, is_left: bool) -> None:
    one = item(place, mark, name)
    assert left_to_the_images([one, *(item(*each) for each in BOTH)]) == ([one] if is_left else [])


@pytest.mark.parametrize("there", [[], BOTH[:1], BOTH[1:]])
def test_nothing_is_left_where_one_of_the_images_does_not_run(there: list[tuple[str, str]]) -> None:
    marked = item("jobs/test_spec.py", "pinned")
    assert left_to_the_images([marked, *(item(*each) for each in there)]) == []
