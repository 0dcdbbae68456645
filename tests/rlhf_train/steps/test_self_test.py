"""Test that a resumed step 3 has the frozen networks that it began with."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from jobs.errors import ExitCode, ToolkitError
from rlhf_train.steps.self_test import check_frozen, weights_digest


@pytest.fixture
def folders(tmp_path: Path) -> tuple[str, str]:
    """A reference in two files, and a reward model as people had them."""
    sft, reward_model = tmp_path / "sft", tmp_path / "rm"
    sft.mkdir()
    reward_model.mkdir()
    (sft / "model-00001-of-00002.safetensors").write_bytes(b"one")
    (sft / "model-00002-of-00002.safetensors").write_bytes(b"two")
    (sft / "config.json").write_bytes(b"not weights")
    (reward_model / "pytorch_model.bin").write_bytes(b"three")
    return str(sft), str(reward_model)


def test_the_digest_is_of_all_weights_in_order(folders: tuple[str, str]) -> None:
    assert weights_digest(folders) == hashlib.sha256(b"onetwothree").hexdigest()
    assert weights_digest(folders[:1]) == hashlib.sha256(b"onetwo").hexdigest()


def test_weights_that_changed_since_are_refused(folders: tuple[str, str]) -> None:
    before = weights_digest(folders)
    check_frozen(before, before, folders)
    check_frozen("", before, folders)  # of a run that began before there was a digest
    Path(folders[1], "pytorch_model.bin").write_bytes(b"four")
    with pytest.raises(ToolkitError, match="the reference, the reward model or the judge is not the one") as caught:
        check_frozen(before, weights_digest(folders), folders)
    assert caught.value.why == f"the weights in {folders[0]} or {folders[1]} have changed since"
    assert caught.value.exit_code == ExitCode.USAGE
    with pytest.raises(ToolkitError, match="the reference is not the one"):
        check_frozen("other", weights_digest(folders[:1]), folders[:1])
