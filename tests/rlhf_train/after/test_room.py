"""Test where a model may be held next to runs that train: by hand, and by real locks."""

from __future__ import annotations

import fcntl
import json
import os
from pathlib import Path

import pytest
import torch

from jobs.errors import ExitCode, ToolkitError
from jobs.run_dir import RunDir
from rlhf_train.after import room
from rlhf_train.after.room import Training, Weights, check_memory, dtype_on_gpu, free_gpus
from rlhf_train.host import resident_bytes
from tests.rlhf_train.after import models

pytestmark = pytest.mark.pinned

GB = 2**30


@pytest.mark.parametrize(
    ("ranks", "used", "expected"),
    [
        ([], None, [0, 1, 2, 3]),
        ([0], [0] * 4, [0, 1, 2, 3]),  # a run on the CPU
        ([2], [30 * GB, 30 * GB, 0, GB // 2], [2, 3]),
        ([2], [0, 0, 30 * GB, 0], [3]),  # the run numbers its GPUs otherwise
        ([2], [0, 0, None, None], []),  # nvidia-smi cannot tell
        ([2], None, []),
        ([None], [0] * 4, []),  # it has just begun
        ([1, 3], [0] * 4, [3]),
    ],
)
def test_only_gpus_that_no_run_can_need(ranks: list[int | None], used: list[int | None], expected: list[int]) -> None:
    assert free_gpus(4, [Training("a", each, GB) for each in ranks], used) == expected


@pytest.mark.parametrize(
    ("held", "free", "fits"),
    [
        (None, 8 * GB, True),  # 3 + half of 8
        (None, 5 * GB, False),  # 3 + half of 5 = 5.5
        (4 * GB, 7 * GB, True),  # the run may double
        (4 * GB, 7 * GB - 1, False),
        (0, 5 * GB, True),  # 2 are left to it in any case
        (0, 5 * GB - 1, False),
        (4 * GB, 0, True),  # not known
    ],
)
def test_a_run_keeps_the_memory_that_it_may_need(held: int | None, free: int, fits: bool) -> None:
    trainings = [Training("demo", 0, held)]
    if fits:
        return check_memory(3 * GB, free, trainings)
    with pytest.raises(ToolkitError, match="while run `demo` trains here") as caught:
        check_memory(3 * GB, free, trainings)
    assert caught.value.exit_code == ExitCode.UNFIT and "chat needs 3.22 GB" in caught.value.why


def test_without_a_run_all_free_memory_may_be_taken() -> None:
    check_memory(3 * GB, 3 * GB, [])
    with pytest.raises(ToolkitError, match="no room for the model in memory"):
        check_memory(3 * GB, 3 * GB - 1, [])


def test_the_dtype_is_the_one_that_was_saved() -> None:
    assert dtype_on_gpu({"bfloat16"}, True) == "bfloat16" and dtype_on_gpu({"float16"}, False) == "float16"
    assert dtype_on_gpu({"bfloat16"}, False) == "float32" == dtype_on_gpu({"bfloat16", "float32"}, True)
    assert Weights(100, "bfloat16").bytes_in("float32") == 200


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """No process of this machine trains, though other tests may run."""
    monkeypatch.setattr(room, "open_files", lambda end: [])
    monkeypatch.setattr(room, "folders_of_this_machine", list)


@pytest.mark.usefixtures("alone")
def test_a_run_that_trains_is_seen_by_its_lock(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "demo")
    run.lock.parent.mkdir(parents=True)
    assert room.trainings_in([tmp_path]) == [] == room.trainings_in([tmp_path / "nowhere"])
    plan = {"schema": 1, "seq": 1, "time": "2026-01-01T00:00:00Z", "kind": "plan", "step": 1, "ranks": 2}
    with run.lock.open("a") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        (tmp_path / "link").symlink_to(tmp_path)
        [training] = room.trainings_in([tmp_path, tmp_path / "nowhere", tmp_path / "link"])  # once
        assert (training.name, training.ranks) == ("demo", None)
        assert training.held_bytes == pytest.approx(resident_bytes(os.getpid()), rel=0.1)
        for device, ranks in (("cpu", 0), ("cuda", 2)):
            run.events.write_text(json.dumps(plan | {"device": device}) + "\n")
            assert room.trainings_in([tmp_path])[0].ranks == ranks
    assert room.trainings_in([tmp_path]) == []


def test_a_run_in_a_folder_that_nobody_names_is_seen_by_its_process(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "elsewhere" / f"demo-of-{os.getpid()}")
    run.lock.parent.mkdir(parents=True)
    with run.lock.open("a") as held:
        assert run.name not in [training.name for training in room.trainings_in([])]  # open alone is no lock
        fcntl.flock(held, fcntl.LOCK_EX)
        assert [training.name for training in room.trainings_in([])].count(run.name) == 1
        assert [training.name for training in room.trainings_in([run.path.parent])].count(run.name) == 1


def test_the_folders_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """./runs, and those of a box: next to our code there, and in the data folders of providers."""
    monkeypatch.setenv("HOME", "/home/lin")
    found = room.folders_of_this_machine()
    assert found[0] == Path("runs") and len(set(found)) == len(found)
    assert {Path("/home/lin/rlhf-box/runs"), Path("/root/autodl-tmp/rlhf-box/runs")} <= set(found)
    monkeypatch.setattr(room, "CHECKOUT", Path("/data/rlhf-box/code/0123"))
    assert set(room.folders_of_this_machine()) == {*found, Path("/data/rlhf-box/runs")}


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize(("free", "expected"), [(2 * GB, "cuda:1"), (GB, "cpu")])
def test_on_a_gpu_free_memory_decides_whoever_holds_the_rest(
    free: int, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first of two is so full that it cannot even be asked. The model has under a megabyte."""
    folder = models.save(tmp_path / "model")
    chosen: list[int] = []

    def mem_get_info(gpu: int) -> tuple[int, int]:
        if gpu == 0:
            raise torch.cuda.OutOfMemoryError("CUDA error: out of memory")
        return free, 24 * GB

    for name, value in {
        "is_available": lambda: True, "device_count": lambda: 2, "get_device_capability": lambda gpu: (8, 6),
        "mem_get_info": mem_get_info, "set_device": chosen.append,
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, value)
    found = room.find_room([str(folder)], [tmp_path])
    assert str(found.device) == expected and found.dtype == torch.float32
    assert chosen == ([1] if expected == "cuda:1" else [])
    assert found.note == ("" if expected == "cuda:1" else "on the CPU: no GPU has 1.07 GB free")


@pytest.mark.usefixtures("alone")
def test_a_models_size_is_known_before_it_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = models.save(tmp_path / "model")
    weights = room.weights_of(str(folder))
    assert weights == Weights((folder / "model.safetensors").stat().st_size, "float32")
    found = room.find_room([str(folder)], [tmp_path])
    assert (found.device.type, found.dtype, found.note) == ("cpu", torch.float32, "")
    monkeypatch.setattr(room, "free_memory_bytes", lambda: GB)
    with pytest.raises(ToolkitError, match="no room for the model"):
        room.find_room([str(folder)], [tmp_path])
