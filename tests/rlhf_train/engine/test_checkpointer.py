"""Test what makes a step's checkpoints and resumes from them.

Whole runs that are killed are in tests/faults.
"""

from __future__ import annotations

import random
import threading
import time
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from jobs.errors import ToolkitError
from jobs.events import Checkpoint, Progress, Warning
from jobs.run_dir import RunDir
from rlhf_train.engine import checkpoint_files, checkpointer
from rlhf_train.engine.checkpoint_files import Saved, latest, write
from rlhf_train.engine.checkpointer import Checkpointer
from rlhf_train.steps.context import Stopped
from tests.limits import small_files
from tests.rlhf_train.engine.step import Step, nobody, tensors

pytestmark = pytest.mark.pinned


def test_every_so_many_updates_and_after_the_last(run: RunDir) -> None:
    step = Step(run, {"every_updates": 2, "every_minutes": None}, updates=5)
    for number in range(1, 6):
        step.update(number)
    step.checkpointer._wait()
    assert step.saved_updates() == [2, 4, 5]
    assert [folder.name for folder in run.step(1).checkpoints.iterdir()] == ["update-5"]  # one is kept
    (first, *_) = [event for event in step.events if isinstance(event, Checkpoint)]
    assert first.size_bytes > 4 * 6 and first.seconds >= first.held_up_s >= 0  # type: ignore[operator]
    output = next(event.doing for event in step.events if isinstance(event, Progress))
    assert output.startswith("a checkpoint has 24 bytes: 124 bytes are needed")


def test_by_the_clock_and_no_more_than_a_hundredth_of_the_time(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr(checkpointer.time, "monotonic", lambda: now)
    step = Step(run, {"every_minutes": 10.0}, updates=100)
    for number, minutes in enumerate((9, 2, 9, 2), start=1):
        now += 60 * minutes
        step.update(number)
    assert step.saved_updates() == [2, 4]
    step.checkpointer._held_up_s = 9.0  # a hundred times as long: 15 minutes
    for number, minutes in enumerate((14, 2), start=5):
        now += 60 * minutes
        step.update(number)
    assert step.saved_updates() == [2, 4, 6]


def test_it_resumes_where_it_was(run: RunDir) -> None:
    random.seed(8)
    uninterrupted = Step(run, {"every_updates": 100})
    for number in range(1, 7):
        uninterrupted.update(number)

    random.seed(8)
    killed = Step(run, {"every_updates": 2})
    for number in (1, 2, 3):
        killed.update(number)
    random.seed(99)
    saved = latest(run.step(1), nobody)
    assert saved is not None and saved.update == 2
    assert {name: int(tensor) for name, tensor in saved.tensors("loop").items()} == {"number": 2}
    again = Step(run, {"every_updates": 2}, saved=saved)
    beats = again.context.heartbeat._count
    state = again.checkpointer.resume()
    assert state is not None
    # One for what it does, and one for each tensor: a slow disk is not taken for a hang.
    assert again.context.heartbeat._count == beats + 3
    again.seen = state["seen"]
    nn.init.constant_(again.module.weight, 2.0)
    for number in range(3, 7):
        again.update(number)
    assert again.seen == uninterrupted.seen
    assert all(
        found.equal(wanted)
        for (_, found), (_, wanted) in zip(again.ema.tensors(), uninterrupted.ema.tensors(), strict=True)
    )


@pytest.mark.parametrize(
    ("before", "message"),
    [
        ({}, None),  # of a checkpoint that does not say
        ({"torch": version("torch"), "a package that is gone": "1"}, None),
        ({"torch": "1.13.1"}, f"other libraries than before resume it: torch 1.13.1 -> {version('torch')}"),
    ],
)
def test_other_libraries_resume_it_and_it_says_so(run: RunDir, before: dict[str, str], message: str | None) -> None:
    step = Step(run, {"every_updates": 1})
    step.update(1)
    step.checkpointer._wait()
    saved = latest(run.step(1), nobody)
    assert saved is not None and saved.state["versions"]["torch"] == version("torch")
    saved.state["versions"] = before
    again = Step(run, {}, saved=saved)
    again.checkpointer.resume()
    warnings = [event.message for event in again.events if isinstance(event, Warning)]
    assert warnings == ([] if message is None else [message])


def test_without_a_checkpoint_it_starts_anew(run: RunDir) -> None:
    assert Step(run, {}).checkpointer.resume() is None


def test_asked_to_stop_it_saves_the_last_whole_update(run: RunDir) -> None:
    step = Step(run, {"every_minutes": None})
    step.update(1)
    step.context.stop.ask()
    asked_at = step.context.stop.asked_at
    step.context.stop.ask()  # a second time: nothing changes
    assert step.context.stop.asked_at == asked_at
    with pytest.raises(Stopped):
        step.update(2)
    assert step.saved_updates() == [2]
    assert latest(run.step(1), nobody) == Saved(run.step(1).checkpoint(2))


def test_what_is_saved_is_not_saved_again(run: RunDir) -> None:
    step = Step(run, {"every_updates": 2})
    for number in (1, 2):
        step.update(number)
    step.context.stop.ask()
    with pytest.raises(Stopped):
        step.context.stop_if_asked()
    assert step.saved_updates() == [2]


def test_it_is_not_saved_when_the_time_will_not_do(run: RunDir) -> None:
    step = Step(run, {"every_updates": 2, "grace_s": 5.0})
    for number in (1, 2, 3):
        step.update(number)
    step.checkpointer._seconds = 6.0
    step.context.stop.ask()
    with pytest.raises(Stopped):
        step.context.stop_if_asked()
    assert step.saved_updates() == [2]
    (warning,) = [event for event in step.events if isinstance(event, Warning)]
    assert warning.message == "no checkpoint of update 3: 5 s are left, and the last one took 6 s"
    assert warning.hint is not None and warning.hint.startswith("the last good checkpoint is that of update 2;")


def test_before_the_first_update_there_is_nothing_to_save(run: RunDir) -> None:
    step = Step(run, {})
    step.context.stop.ask()
    with pytest.raises(Stopped):
        step.context.stop_if_asked()
    assert step.saved_updates() == [] and not run.step(1).checkpoints.exists()


def test_the_best_is_kept(run: RunDir) -> None:
    step = Step(run, {"best_every_updates": 2}, updates=6)
    assert [number for number in range(1, 7) if step.checkpointer.wants_best(number)] == [2, 4, 6]
    kept: list[tuple[Path, int]] = []
    for number, value in ((2, 3.0), (4, 2.5), (6, 2.75)):
        step.checkpointer.offer(
            number,
            "perplexity",
            value,
            lower_is_better=True,
            save=lambda folder, number=number: kept.append((folder, number)),
        )  # type: ignore[misc]
    assert kept == [(run.step(1).best, 2), (run.step(1).best, 4)]
    assert step.events[-1] == Progress(step=1, doing="held-out perplexity at update 6: 2.75 (best: 2.5 at update 4)")
    step.checkpointer.offer(8, "reward", 2.75, lower_is_better=False, save=lambda folder: kept.append((folder, 8)))
    assert kept[-1] == (run.step(1).best, 8)
    step.checkpointer.offer(9, "reward_accuracy", 2.0, lower_is_better=False, save=lambda folder: None)
    assert step.events[-1] == Progress(step=1, doing="held-out accuracy at update 9: 2 (best: 2.75 at update 8)")


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
        step.checkpointer.after(2, {}, large)
        with pytest.raises(ToolkitError, match="the checkpoint of update 2 could not be written") as raised:
            step.checkpointer._wait()
    assert "the last good checkpoint is that of update 1" in raised.value.hint and "are free at" in raised.value.why
    assert latest(run.step(1), nobody) == Saved(run.step(1).checkpoint(1))


@pytest.mark.parametrize("memory", [0, 2**40])
def test_with_and_without_memory_for_a_copy(run: RunDir, monkeypatch: pytest.MonkeyPatch, memory: int) -> None:
    monkeypatch.setattr(checkpointer, "free_memory_bytes", lambda: memory)
    step = Step(run, {"every_updates": 1})
    step.checkpointer.after(1, {"seen": []})
    assert (step.checkpointer._writing is None) is (memory == 0)
    with torch.no_grad():
        step.ema._shadow[0].fill_(5.0)  # training continues
    step.checkpointer._wait()
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
    real = checkpoint_files.write

    def full_at_first(folder: Path, found: Any, *arguments: Any) -> int:
        tried.append(left.exists())
        if left.exists():
            next(iter(found))
            raise OSError(28, "No space left on device")
        return real(folder, found, *arguments)

    monkeypatch.setattr(checkpoint_files, "write", full_at_first)
    monkeypatch.setattr(checkpointer, "free_memory_bytes", lambda: memory)  # for a copy of the tensors, or not
    step = Step(run, {"every_updates": 1})
    step.update(1)
    assert tried == [True, False] and step.saved_updates() == [1] and kept.exists()
    saved = latest(run.step(1), nobody)
    assert saved is not None and saved.tensor("ema/0").shape == (2, 2) and saved.tensor("loop/number") == 1


def test_another_step_that_was_done_again(run: RunDir) -> None:
    """What a checkpoint was made from is in it."""
    step = Step(run, {"every_updates": 1})
    step.checkpointer.surroundings = replace(step.checkpointer.surroundings, inputs={"1": "abc"})
    step.update(1)
    saved = latest(run.step(1), nobody)
    assert saved is not None and saved.state["inputs"] == {"1": "abc"}


def test_what_is_still_being_written_when_the_model_is_saved_is_given_up(
    run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint_files, "SHARD_BYTES", 1)
    step = Step(run, {"every_updates": 1})
    at_a_file = threading.Event()

    def slow() -> None:
        at_a_file.set()
        deadline = time.monotonic() + 60
        while not step.checkpointer._is_abandoned and time.monotonic() < deadline:
            time.sleep(0.01)
        Checkpointer._beat(step.checkpointer)

    monkeypatch.setattr(step.checkpointer, "_beat", slow)
    step.checkpointer.after(1, {})
    assert at_a_file.wait(60)
    step.checkpointer.close()
    assert list(run.step(1).checkpoints.iterdir()) == [] and step.saved_updates() == []


def test_what_was_read_lets_go_of_its_files(run: RunDir) -> None:
    """As long as they are mapped, a removed checkpoint keeps its room on the disk."""
    step = Step(run, {"every_updates": 1})
    step.update(1)
    saved = latest(run.step(1), nobody)
    again = Step(run, {"every_updates": 1}, saved=saved)
    again.checkpointer.resume()
    assert int(again.checkpointer.loop_tensors["number"]) == 1
    again.update(2)
    assert [line for line in Path("/proc/self/maps").read_text().splitlines() if str(run.path) in line] == []


def test_what_a_killed_save_has_left_goes_at_the_start(run: RunDir) -> None:
    half = run.step(1).checkpoints / "update-3.partial"
    half.mkdir(parents=True)
    write(run.step(1).checkpoint(2), [], {"update": 2})
    Step(run, {}, saved=Saved(run.step(1).checkpoint(2)))
    assert [folder.name for folder in run.step(1).checkpoints.iterdir()] == ["update-2"]


def test_asked_to_stop_after_an_update_that_was_left_out(run: RunDir) -> None:
    """The weights of the update before are saved, and the older checkpoint stays."""
    step = Step(run, {"every_updates": 1})
    step.update(1)
    step.divergence.skip(2, "its loss is not finite")
    step.context.stop.ask()
    with pytest.raises(Stopped):
        step.update(2)
    assert step.saved_updates() == [1, 2]
    assert sorted(folder.name for folder in run.step(1).checkpoints.iterdir()) == ["update-1", "update-2"]


def test_other_data_is_refused(run: RunDir) -> None:
    step = Step(run, {"every_updates": 1}, updates=5)
    step.update(1)
    with pytest.raises(ToolkitError, match="the data of step 1 has changed since it was stopped") as raised:
        Step(run, {}, updates=6, saved=latest(run.step(1), nobody)).checkpointer.resume()
    assert raised.value.why == "it has 6 updates now, and had 5"
    with pytest.raises(ToolkitError, match="the data of step 1 has changed since it was stopped") as raised:
        Step(run, {}, updates=5, rows="def", saved=latest(run.step(1), nobody)).checkpointer.resume()
    assert raised.value.why == "its rows, or their tokens, are different"


def test_room_is_made_before_a_save_and_little_room_is_said_once(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    left = run.step(2).checkpoint(3)
    write(left, [], {"update": 3})
    run.step(2).complete.write_text("{}")
    step = Step(run, {"every_updates": 1})
    # A checkpoint is thought to have 24 bytes.
    monkeypatch.setattr(checkpointer, "room", lambda folder: (10, 10_000))
    for number in (1, 2):
        step.update(number)
    assert step.saved_updates() == [1, 2] and not left.exists()
    (warning,) = [event for event in step.events if isinstance(event, Warning)]
    assert warning.message == (
        "the next checkpoint will not fit: "
        f"10 bytes and 10000 inodes are free at {run.path}, and it has 24 bytes in up to 64 files"
    )


def test_inodes_for_every_shard(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a model of some size there are more shards than all else has files."""
    monkeypatch.setattr(checkpoint_files, "SHARD_BYTES", 1)
    # Two checkpoints of 24 bytes, and a model.
    monkeypatch.setattr(checkpointer, "room", lambda folder: (10**9, 2 * (64 + 24) + 64 - 1))
    with pytest.raises(ToolkitError, match="the disk is too small"):
        Step(run, {})
    monkeypatch.setattr(checkpointer, "room", lambda folder: (10**9, 2 * (64 + 24) + 64))
    step = Step(run, {"every_updates": 1})
    monkeypatch.setattr(checkpointer, "room", lambda folder: (10**9, 64 + 23))
    step.update(1)
    (warning,) = [event for event in step.events if isinstance(event, Warning)]
    assert warning.message.startswith("the next checkpoint will not fit: 1 GB and 87 inodes are free at ")
