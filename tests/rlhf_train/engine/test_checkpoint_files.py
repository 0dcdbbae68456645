"""Checkpoints on disk: what is written is read, what is torn is not taken, and random states."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from jobs.run_dir import RunDir
from rlhf_train.engine import checkpoint_files
from rlhf_train.engine.checkpoint_files import Saved, latest, random_states, remove_others, set_random_states, write
from tests.limits import small_files
from tests.rlhf_train.engine.step import CPU, nobody, tensors

pytestmark = pytest.mark.pinned

NUMBERS = {"third": 1 / 3, "tiny": 5e-324, "words": ["a", None, True], "update": 7}


@pytest.mark.parametrize("shard_bytes", [1, 30, 2**29])
def test_what_is_written_is_read(run: RunDir, monkeypatch: pytest.MonkeyPatch, shard_bytes: int) -> None:
    monkeypatch.setattr(checkpoint_files, "SHARD_BYTES", shard_bytes)
    folder = run.step(1).checkpoint(7)
    size = write(folder, tensors().items(), NUMBERS)
    saved = latest(run.step(1), nobody)
    assert saved == Saved(folder) and saved.update == 7 and saved.state == NUMBERS
    for name, tensor in tensors().items():
        found = saved.tensor(name)
        assert found.dtype == tensor.dtype and found.equal(tensor) and found.signbit().equal(tensor.signbit())
    assert set(saved.tensors("loop")) == {"mask", "ids"}
    assert size == sum(file.stat().st_size for file in folder.iterdir() if file.name != "complete.json")
    # The tensors have 60, 4, 4, 56 and 8 bytes.
    assert len(list(folder.glob("*.safetensors"))) == {1: 5, 30: 3, 2**29: 1}[shard_bytes]


def spoil_nothing(folder: Path) -> None:
    pass


def change_a_byte(folder: Path) -> None:
    (file,) = folder.glob("*.safetensors")
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


def cut_the_state(folder: Path) -> None:
    file = folder / "state.json"
    file.write_bytes(file.read_bytes()[:-1])


def lose_a_file(folder: Path) -> None:
    next(folder.glob("*.safetensors")).unlink()


def lose_the_mark(folder: Path) -> None:
    (folder / "complete.json").unlink()


def empty_the_mark(folder: Path) -> None:
    (folder / "complete.json").write_bytes(b"")


def rename_as_before_the_end(folder: Path) -> None:
    folder.rename(folder.with_name(folder.name + ".partial"))


@pytest.mark.parametrize(
    ("spoil", "complaint"),
    [
        (change_a_byte, "tensors-000.safetensors"),
        (cut_the_state, "state.json"),
        (lose_a_file, "tensors-000.safetensors"),
        (lose_the_mark, ""),  # it was being written: no complaint
        (empty_the_mark, ""),
        (rename_as_before_the_end, ""),
    ],
)
def test_one_that_is_torn_or_damaged_is_not_taken(run: RunDir, spoil: Callable[[Path], None], complaint: str) -> None:
    step = run.step(1)
    for update in (9, 10):  # 10 is newer, though "9" > "10"
        write(step.checkpoint(update), tensors().items(), NUMBERS | {"update": update})
    assert latest(step, nobody) == Saved(step.checkpoint(10))
    spoil(step.checkpoint(10))
    complaints: list[str] = []
    assert latest(step, complaints.append) == Saved(step.checkpoint(9))
    expected = f"the checkpoint {step.checkpoint(10)} is damaged ({complaint}) and not used"
    assert complaints == ([expected] if complaint else [])
    spoil(step.checkpoint(9))
    assert latest(step, complaints.append) is None


def test_there_is_none(run: RunDir) -> None:
    assert latest(run.step(2), nobody) is None


def test_one_that_cannot_be_written_leaves_nothing_and_spares_the_last(run: RunDir) -> None:
    step = run.step(1)
    write(step.checkpoint(1), tensors().items(), {"update": 1})
    with small_files(60_000), pytest.raises(OSError, match="File too large"):
        write(step.checkpoint(2), [("large", torch.zeros(50_000))], {"update": 2})
    assert [folder.name for folder in step.checkpoints.iterdir()] == ["update-1"]
    assert latest(step, nobody) == Saved(step.checkpoint(1))


def test_one_that_cannot_be_marked_leaves_nothing(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, value: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint_files, "write_json", full)
    with pytest.raises(OSError, match="No space left"):
        write(run.step(1).checkpoint(2), tensors().items(), {"update": 2})
    assert list(run.step(1).checkpoints.iterdir()) == []


def test_the_others_are_removed(run: RunDir) -> None:
    step = run.step(1)
    for update in (1, 2, 3):
        write(step.checkpoint(update), [], {"update": update})
    (step.checkpoints / "update-4.partial").mkdir()
    (step.checkpoints / "update-4.partial" / "half").write_bytes(b"x")
    remove_others(step, step.checkpoint(2))
    assert [folder.name for folder in step.checkpoints.iterdir()] == ["update-2"]


def test_one_of_other_inputs_is_passed_over(run: RunDir) -> None:
    complaints: list[str] = []
    for update, inputs in ((8, {"1": "old"}), (2, {"1": "new"})):
        write(run.step(3).checkpoint(update), [], {"update": update, "inputs": inputs})
    assert latest(run.step(3), complaints.append, {"1": "new"}) == Saved(run.step(3).checkpoint(2))
    assert complaints == [
        f"the checkpoint {run.step(3).checkpoint(8)} is not used: the steps before this one were done again after it"
    ]


# --- random states ---


def draws() -> list[Any]:
    return [random.random(), random.gauss(0, 1), np.random.standard_normal(3).tolist(), torch.rand(3).tolist()]


def test_every_generator_resumes_where_it_was() -> None:
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(3)
    random.gauss(0, 1)  # it makes two numbers and keeps one for later
    np.random.standard_normal()
    states = json.loads(json.dumps(random_states(CPU)))
    expected = draws()
    assert draws() != expected
    set_random_states(states, CPU)
    assert draws() == expected
