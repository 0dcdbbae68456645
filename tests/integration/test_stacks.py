"""What one stack saves is the same model on the other one: logits, ids, chat template, stops.

The stacks are today's and the pinned one. In the image, STACKS names a folder with what was saved
outside of it in `outside`, and what is saved here goes into its `image`, for tests/docker/
test_pinned.py to read. Without it, this stack reads what it saved itself.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from rlhf_train.ranks.collectives import World
from tests import stacks

pytestmark = pytest.mark.pinned


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, _only_rank: World) -> Path:
    """The models that the other stack saved. This stack's are saved, too."""
    shared = os.environ.get("STACKS")
    own = Path(shared, "image") if shared else tmp_path_factory.mktemp("stacks")
    stacks.save_all(_only_rank, own)
    return Path(shared, "outside") if shared else own


@pytest.mark.parametrize("name", stacks.NAMES)
def test_plain_transformers_loads_the_same_model(folder: Path, name: str) -> None:
    expected = stacks.described(folder / name)
    assert stacks.differences(stacks.what_it_is(folder / name), expected) == []
    assert torch.tensor(expected["logits"]).std() > 0.1  # they are not all alike
    if name != "opt":
        assert "<|im_start|>user\nred cat's house" in expected["chat"]
        assert len(expected["stops"]) == 2


@pytest.mark.parametrize("name", stacks.SIZES)
def test_we_load_what_the_other_transformers_saved(folder: Path, name: str) -> None:
    """As a job's model, where only one spelling is there."""
    source = folder / f"{name}-source"
    assert stacks.differences(stacks.loaded_by_us(source), stacks.described(source)) == []
