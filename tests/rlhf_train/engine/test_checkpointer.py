"""Checkpoints on disk, and the one who makes them; whole runs that are killed are in tests/faults."""

from __future__ import annotations

import json
import math
import random
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from jobs.errors import ToolkitError
from jobs.events import Checkpoint, Event, Progress, Warning
from jobs.run_dir import RunDir
from jobs.spec import Job
from rlhf_train.engine import checkpointer
from rlhf_train.engine.checkpointer import Keeper, Saved, latest, random_states, remove_others, set_random_states, write
from rlhf_train.engine.deepspeed_engine import Ema
from rlhf_train.plan.placement import Placement
from rlhf_train.ranks.collectives import World
from rlhf_train.steps.context import Session, Stopped
from tests import tiny
from tests.limits import small_files

pytestmark = pytest.mark.pinned

CPU = torch.device("cpu")
NUMBERS = {"third": 1 / 3, "tiny": 5e-324, "words": ["a", None, True], "update": 7}


def tensors() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "a/weight": torch.randn(5, 3, generator=generator),
        "a/scalar": torch.tensor(-0.0),
        "loop/mask": torch.tensor([[True, False], [False, True]]),
        "loop/ids": torch.arange(7),
        "half": torch.randn(4, generator=generator).bfloat16(),
    }


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    folder = RunDir(tmp_path / "run")
    folder.path.mkdir()
    return folder


def nobody(message: str) -> None:
    raise AssertionError(message)


# --- on disk ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shard_bytes", [1, 30, 2**29])
def test_what_is_written_is_read(run: RunDir, monkeypatch: pytest.MonkeyPatch, shard_bytes: int) -> None:
    monkeypatch.setattr(checkpointer, "SHARD_BYTES", shard_bytes)
    folder = run.step(1).checkpoint(7)
    size = write(folder, tensors().items(), NUMBERS)
    saved = latest(run.step(1), nobody)
    assert saved == Saved(folder) and saved.update == 7 and saved.state == NUMBERS
    for name, tensor in tensors().items():
        found = saved.tensor(name)
        assert found.dtype == tensor.dtype and found.equal(tensor) and found.signbit().equal(tensor.signbit())
    assert set(saved.tensors("loop")) == {"mask", "ids"}
    assert size == sum(file.stat().st_size for file in folder.iterdir() if file.name != "complete.json")
    assert len(list(folder.glob("*.safetensors"))) == {1: 5, 30: 3, 2**29: 1}[shard_bytes]  # of 60, 4, 4, 56 and 8 bytes


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
        (lose_the_mark, ""),  # it was being written: nothing to complain of
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

    monkeypatch.setattr(checkpointer, "write_json", full)
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


# --- random states ---------------------------------------------------------------------------------------------------


def draws() -> list[Any]:
    return [random.random(), random.gauss(0, 1), np.random.standard_normal(3).tolist(), torch.rand(3).tolist()]


def test_every_generator_goes_on_where_it_was() -> None:
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(3)
    random.gauss(0, 1)  # two are made at once, and one waits
    np.random.standard_normal()
    states = json.loads(json.dumps(random_states(CPU)))
    expected = draws()
    assert draws() != expected
    set_random_states(states, CPU)
    assert draws() == expected


# --- the keeper ------------------------------------------------------------------------------------------------------


class Step:
    """A step that adds 1 to a weight and draws a number at each update."""

    def __init__(self, run: RunDir, settings: dict[str, Any], updates: int = 6, saved: Saved | None = None, rows: str = "abc") -> None:
        job = Job.model_validate(tiny.job(run.path / "rows") | {"checkpoint": settings})
        self.events: list[Event] = []
        placement = Placement("cpu", "", 1, "float32", 0, 0, (4, 4, 4), 8, 1)
        self.session = Session(job, run, World(0, 1, CPU), placement, run.path, self.events.append, saved=saved)
        self.module = nn.Linear(2, 2)
        nn.init.zeros_(self.module.weight)
        nn.init.zeros_(self.module.bias)
        self.ema = Ema(self.module, 0.5)
        self.keeper = Keeper(self.session, 1, updates, {"ema": self.ema}, rows=rows, model_bytes=100)
        self.seen: list[float] = []

    def update(self, number: int) -> None:
        with torch.no_grad():
            self.module.weight += 1
        self.ema.update()
        self.seen.append(random.random())
        self.keeper.after(number, {"seen": self.seen}, {"number": torch.tensor(number)})
        self.keeper._wait()  # else the next save would wait for it, and tests would see either

    def saved_updates(self) -> list[int]:
        return [event.update for event in self.events if isinstance(event, Checkpoint)]


def test_every_so_many_updates_and_after_the_last(run: RunDir) -> None:
    step = Step(run, {"every_updates": 2, "every_minutes": None}, updates=5)
    for number in range(1, 6):
        step.update(number)
    step.keeper._wait()
    assert step.saved_updates() == [2, 4, 5]
    assert [folder.name for folder in run.step(1).checkpoints.iterdir()] == ["update-5"]  # one is kept
    (first, *_) = [event for event in step.events if isinstance(event, Checkpoint)]
    assert first.size_bytes > 4 * 6 and first.seconds >= first.held_up_s >= 0  # type: ignore[operator]
    said = next(event.doing for event in step.events if isinstance(event, Progress))
    assert said.startswith("a checkpoint has 24 bytes: 124 bytes are needed")


def test_by_the_clock_and_no_more_than_a_hundredth_of_the_time(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr(checkpointer.time, "monotonic", lambda: now)
    step = Step(run, {"every_minutes": 10.0}, updates=100)
    for number, minutes in enumerate((9, 2, 9, 2), start=1):
        now += 60 * minutes
        step.update(number)
    assert step.saved_updates() == [2, 4]
    step.keeper._held_up_s = 9.0  # a hundred times as long: 15 minutes
    for number, minutes in enumerate((14, 2), start=5):
        now += 60 * minutes
        step.update(number)
    assert step.saved_updates() == [2, 4, 6]


def test_it_goes_on_from_where_it_was(run: RunDir) -> None:
    random.seed(8)
    whole = Step(run, {"every_updates": 100})
    for number in range(1, 7):
        whole.update(number)

    random.seed(8)
    killed = Step(run, {"every_updates": 2})
    for number in (1, 2, 3):
        killed.update(number)
    random.seed(99)
    saved = latest(run.step(1), nobody)
    assert saved is not None and saved.update == 2
    assert {name: int(tensor) for name, tensor in saved.tensors("loop").items()} == {"number": 2}
    again = Step(run, {"every_updates": 2}, saved=saved)
    beats = again.session.pulse._count
    state = again.keeper.resume()
    assert state is not None
    assert again.session.pulse._count == beats + 3  # what it does, and each tensor: a slow disk is not taken for a hang
    again.seen = state["seen"]
    nn.init.constant_(again.module.weight, 2.0)
    for number in range(3, 7):
        again.update(number)
    assert again.seen == whole.seen
    assert all(one.equal(other) for (_, one), (_, other) in zip(again.ema.tensors(), whole.ema.tensors(), strict=True))


def test_without_a_checkpoint_it_starts_anew(run: RunDir) -> None:
    assert Step(run, {}).keeper.resume() is None


def test_asked_to_stop_it_saves_the_last_whole_update(run: RunDir) -> None:
    step = Step(run, {"every_minutes": None})
    step.update(1)
    step.session.stop.ask()
    asked_at = step.session.stop.asked_at
    step.session.stop.ask()  # a second time: nothing changes
    assert step.session.stop.asked_at == asked_at
    with pytest.raises(Stopped):
        step.update(2)
    assert step.saved_updates() == [2]
    assert latest(run.step(1), nobody) == Saved(run.step(1).checkpoint(2))


def test_what_is_saved_is_not_saved_again(run: RunDir) -> None:
    step = Step(run, {"every_updates": 2})
    for number in (1, 2):
        step.update(number)
    step.session.stop.ask()
    with pytest.raises(Stopped):
        step.session.stop_if_asked()
    assert step.saved_updates() == [2]


def test_it_is_not_saved_when_the_time_will_not_do(run: RunDir) -> None:
    step = Step(run, {"every_updates": 2, "grace_s": 5.0})
    for number in (1, 2, 3):
        step.update(number)
    step.keeper._seconds = 6.0
    step.session.stop.ask()
    with pytest.raises(Stopped):
        step.session.stop_if_asked()
    assert step.saved_updates() == [2]
    (warning,) = [event for event in step.events if isinstance(event, Warning)]
    assert warning.message == "no checkpoint of update 3: 5 s are left, and the last one took 6 s"
    assert warning.hint is not None and warning.hint.startswith("the last good checkpoint is that of update 2;")


def test_before_the_first_update_there_is_nothing_to_save(run: RunDir) -> None:
    step = Step(run, {})
    step.session.stop.ask()
    with pytest.raises(Stopped):
        step.session.stop_if_asked()
    assert step.saved_updates() == [] and not run.step(1).checkpoints.exists()


def test_updates_that_are_left_out(run: RunDir) -> None:
    step = Step(run, {"every_updates": 1}, updates=100)
    step.update(1)
    for number in range(2, 6):
        step.keeper.skipped(number, "its loss is not finite")
        step.update(number)
    assert step.saved_updates() == [1]  # what comes of it is not known to be good
    warnings = [event.message for event in step.events if isinstance(event, Warning)]
    assert warnings == [f"update {number} is left out: its loss is not finite ({number - 1} so far)" for number in range(2, 6)]
    with pytest.raises(ToolkitError, match="step 1 diverged at update 6") as raised:
        step.keeper.skipped(6, "its loss is not finite")
    assert raised.value.why == "its loss is not finite; 5 updates in a row were left out" and raised.value.exit_code == 4
    assert raised.value.hint.endswith("the last good checkpoint is that of update 1")


@pytest.mark.parametrize("scale_can_fall", [False, True])
def test_weights_that_are_spoiled_end_the_run(run: RunDir, scale_can_fall: bool) -> None:
    """Also beside another engine whose loss scale is the reason of its own norm."""
    step = Step(run, {"every_updates": 1})
    step.update(1)
    well, spoiled = (SimpleNamespace(step=lambda: math.inf, scale_can_fall=scale_can_fall, is_spoiled=bad, update=2) for bad in (False, True))
    with pytest.raises(ToolkitError, match="step 1 diverged at update 2") as raised:
        step.keeper.learn(well, spoiled)  # type: ignore[arg-type]
    assert raised.value.why == "its gradient norm is inf, and the weights have taken it"


@pytest.mark.parametrize(("scale_can_fall", "in_a_row"), [(True, 0), (False, 1)])
def test_a_norm_that_is_not_finite_counts_when_the_loss_scale_is_at_its_floor(run: RunDir, scale_can_fall: bool, in_a_row: int) -> None:
    step = Step(run, {})
    engine = SimpleNamespace(step=lambda: math.inf, scale_can_fall=scale_can_fall, is_spoiled=False, update=1)
    assert step.keeper.learn(engine) == [math.inf]  # type: ignore[arg-type]
    assert step.keeper.skipped_in_a_row == step.keeper.skipped_in_all == in_a_row
    warnings = [event.message for event in step.events if isinstance(event, Warning)]
    assert warnings == ["update 1 is left out: its gradient norm is inf (1 so far)"] * in_a_row


def test_too_many_are_left_out_in_all(run: RunDir) -> None:
    step = Step(run, {}, updates=1000)
    for number in range(1, checkpointer.MOST_SKIPPED):
        step.keeper.skipped(number, "why")
        step.keeper.skipped_in_a_row = 0  # as an update that went well does
    with pytest.raises(ToolkitError) as raised:
        step.keeper.skipped(99, "why")
    assert raised.value.why == "why; 50 updates were left out"


def test_the_best_is_kept(run: RunDir) -> None:
    step = Step(run, {"best_every_updates": 2}, updates=6)
    assert [number for number in range(1, 7) if step.keeper.wants_best(number)] == [2, 4, 6]
    kept: list[tuple[Path, int]] = []
    for number, value in ((2, 3.0), (4, 2.5), (6, 2.75)):
        step.keeper.offer(number, "perplexity", value, lower_is_better=True, save=lambda folder, number=number: kept.append((folder, number)))  # type: ignore[misc]
    assert kept == [(run.step(1).best, 2), (run.step(1).best, 4)]
    assert step.events[-1] == Progress(step=1, doing="held-out perplexity at update 6: 2.75 (best: 2.5 at update 4)")
    step.keeper.offer(8, "reward", 2.75, lower_is_better=False, save=lambda folder: kept.append((folder, 8)))
    assert kept[-1] == (run.step(1).best, 8)


def test_a_disk_that_is_too_small_is_refused_before_the_start(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpointer, "room", lambda folder: (40, 10_000))
    with pytest.raises(ToolkitError, match="the disk is too small") as raised:
        Step(run, {})
    assert raised.value.exit_code == 3
    monkeypatch.setattr(checkpointer, "room", lambda folder: (10**9, 10))
    with pytest.raises(ToolkitError, match="the disk is too small"):
        Step(run, {})


def test_a_save_that_fails_keeps_the_last_and_says_so(run: RunDir) -> None:
    step = Step(run, {"every_updates": 1})
    step.update(1)
    large = {"large": torch.zeros(50_000)}
    with small_files(60_000):
        step.keeper.after(2, {}, large)
        with pytest.raises(ToolkitError, match="the checkpoint of update 2 could not be written") as raised:
            step.keeper._wait()
    assert "the last good checkpoint is that of update 1" in raised.value.hint and "are free at" in raised.value.why
    assert latest(run.step(1), nobody) == Saved(run.step(1).checkpoint(1))


@pytest.mark.parametrize("memory", [0, 2**40])
def test_with_and_without_memory_for_a_copy(run: RunDir, monkeypatch: pytest.MonkeyPatch, memory: int) -> None:
    monkeypatch.setattr(checkpointer, "free_memory_bytes", lambda: memory)
    step = Step(run, {"every_updates": 1})
    step.keeper.after(1, {"seen": []})
    assert (step.keeper._writing is None) is (memory == 0)
    with torch.no_grad():
        step.ema._shadow[0].fill_(5.0)  # training goes on
    step.keeper._wait()
    saved = latest(run.step(1), nobody)
    assert saved is not None and saved.tensor("ema/0").max() < 5


@pytest.mark.parametrize("memory", [0, 2**40])
def test_a_save_frees_what_may_go_and_tries_again(run: RunDir, monkeypatch: pytest.MonkeyPatch, memory: int) -> None:
    """The first try fails; a leftover of another step makes room for the second."""
    left = run.step(2).checkpoint(3)
    write(left, tensors().items(), {"update": 3})
    run.step(2).complete.write_text("{}")
    kept = run.step(3).checkpoint(1)  # of a step that is not complete
    write(kept, [], {"update": 1})
    tried: list[bool] = []
    real = checkpointer.write

    def full_at_first(folder: Path, found: Any, *arguments: Any) -> int:
        tried.append(left.exists())
        if left.exists():
            next(iter(found))
            raise OSError(28, "No space left on device")
        return real(folder, found, *arguments)

    monkeypatch.setattr(checkpointer, "write", full_at_first)
    monkeypatch.setattr(checkpointer, "free_memory_bytes", lambda: memory)  # for a copy of the tensors, or not
    step = Step(run, {"every_updates": 1})
    step.update(1)
    assert tried == [True, False] and step.saved_updates() == [1] and kept.exists()
    saved = latest(run.step(1), nobody)
    assert saved is not None and saved.tensor("ema/0").shape == (2, 2) and saved.tensor("loop/number") == 1


def test_another_step_that_was_done_again(run: RunDir) -> None:
    """What a checkpoint was made from is in it."""
    step = Step(run, {"every_updates": 1})
    step.session = replace(step.session, inputs={"1": "abc"})
    step.keeper.session = step.session
    step.update(1)
    saved = latest(run.step(1), nobody)
    assert saved is not None and saved.state["inputs"] == {"1": "abc"}


def test_what_is_still_being_written_when_the_model_is_saved_is_given_up(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpointer, "SHARD_BYTES", 1)
    step = Step(run, {"every_updates": 1})
    at_a_file = threading.Event()

    def slow() -> None:
        at_a_file.set()
        deadline = time.monotonic() + 60
        while not step.keeper._is_abandoned and time.monotonic() < deadline:
            time.sleep(0.01)
        Keeper._beat(step.keeper)

    monkeypatch.setattr(step.keeper, "_beat", slow)
    step.keeper.after(1, {})
    assert at_a_file.wait(60)
    step.keeper.close()
    assert list(run.step(1).checkpoints.iterdir()) == [] and step.saved_updates() == []


def test_what_was_read_lets_go_of_its_files(run: RunDir) -> None:
    """As long as they are mapped, a removed checkpoint keeps its room on the disk."""
    step = Step(run, {"every_updates": 1})
    step.update(1)
    saved = latest(run.step(1), nobody)
    again = Step(run, {"every_updates": 1}, saved=saved)
    again.keeper.resume()
    assert int(again.keeper.loop_tensors["number"]) == 1
    again.update(2)
    assert [line for line in Path("/proc/self/maps").read_text().splitlines() if str(run.path) in line] == []


def test_what_a_killed_save_has_left_goes_at_the_start(run: RunDir) -> None:
    half = run.step(1).checkpoints / "update-3.partial"
    half.mkdir(parents=True)
    write(run.step(1).checkpoint(2), [], {"update": 2})
    Step(run, {}, saved=Saved(run.step(1).checkpoint(2)))
    assert [folder.name for folder in run.step(1).checkpoints.iterdir()] == ["update-2"]


def test_asked_to_stop_after_an_update_that_was_left_out(run: RunDir) -> None:
    """The weights are those of the update before: they are saved, and the older checkpoint is not removed for them."""
    step = Step(run, {"every_updates": 1})
    step.update(1)
    step.keeper.skipped(2, "its loss is not finite")
    step.session.stop.ask()
    with pytest.raises(Stopped):
        step.update(2)
    assert step.saved_updates() == [1, 2]
    assert sorted(folder.name for folder in run.step(1).checkpoints.iterdir()) == ["update-1", "update-2"]


def test_other_data_is_refused(run: RunDir) -> None:
    step = Step(run, {"every_updates": 1}, updates=5)
    step.update(1)
    with pytest.raises(ToolkitError, match="the data of step 1 has changed since it was stopped") as raised:
        Step(run, {}, updates=6, saved=latest(run.step(1), nobody)).keeper.resume()
    assert raised.value.why == "it has 6 updates now, and had 5"
    with pytest.raises(ToolkitError, match="the data of step 1 has changed since it was stopped") as raised:
        Step(run, {}, updates=5, rows="def", saved=latest(run.step(1), nobody)).keeper.resume()
    assert raised.value.why == "its rows, or the tokens that they become, are others"


def test_one_of_other_inputs_is_passed_over(run: RunDir) -> None:
    complaints: list[str] = []
    for update, inputs in ((8, {"1": "old"}), (2, {"1": "new"})):
        write(run.step(3).checkpoint(update), [], {"update": update, "inputs": inputs})
    assert latest(run.step(3), complaints.append, {"1": "new"}) == Saved(run.step(3).checkpoint(2))
    assert complaints == [f"the checkpoint {run.step(3).checkpoint(8)} is not used: the steps before this one were done again since"]


def test_room_is_made_before_a_save_and_little_room_is_said_once(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    left = run.step(2).checkpoint(3)
    write(left, [], {"update": 3})
    run.step(2).complete.write_text("{}")
    step = Step(run, {"every_updates": 1})
    monkeypatch.setattr(checkpointer, "room", lambda folder: (10, 10_000))  # of the 24 bytes that a checkpoint is thought to have
    for number in (1, 2):
        step.update(number)
    assert step.saved_updates() == [1, 2] and not left.exists()
    (warning,) = [event for event in step.events if isinstance(event, Warning)]
    assert warning.message == (
        f"the next checkpoint will not fit: 10 bytes and 10000 inodes are free at {run.path}, and it has 24 bytes in up to 64 files"
    )


def test_inodes_for_every_shard(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a model of some size there are more shards than all else has files."""
    monkeypatch.setattr(checkpointer, "SHARD_BYTES", 1)
    monkeypatch.setattr(checkpointer, "room", lambda folder: (10**9, 2 * (64 + 24) + 64 - 1))  # two checkpoints of 24 bytes, and a model
    with pytest.raises(ToolkitError, match="the disk is too small"):
        Step(run, {})
    monkeypatch.setattr(checkpointer, "room", lambda folder: (10**9, 2 * (64 + 24) + 64))
    step = Step(run, {"every_updates": 1})
    monkeypatch.setattr(checkpointer, "room", lambda folder: (10**9, 64 + 23))
    step.update(1)
    (warning,) = [event for event in step.events if isinstance(event, Warning)]
    assert warning.message.startswith("the next checkpoint will not fit: 1 GB and 87 inodes are free at ")
