"""The trackers' processes: they end with the launcher, and harm no run."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
import pytest

from jobs.errors import ToolkitError
from rlhf_train.trackers import processes
from rlhf_train.trackers.processes import Trackers, environment_of, refuse_missing
from tests.raw_events import SFT
from tests.rlhf_train.trackers.test_sender import begun
from tests.wandb_files import offline_runs, points

PATIENCE_S = 90.0


def wait_for(condition: Callable[[], Any]) -> Any:
    deadline = time.monotonic() + PATIENCE_S
    while not (found := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return found


class Scene:
    """A run whose updates are written, and fed to its trackers as the launcher does."""

    def __init__(self, folder: Path, **environ: str) -> None:
        self.run, self.said, self.told = begun(folder), [], []  # type: ignore[var-annotated]
        self.run.events.write_text(json.dumps(SFT | {"update": 9}) + "\n", encoding="utf-8")  # of an earlier call
        self.log = self.run.log.open("ab", buffering=0)
        environ = {"HOME": str(folder), **environ}
        self.trackers = Trackers(["wandb"], self.run, environ, self.log, self.said.append)

    def update(self, number: int) -> None:
        metrics = SFT | {"update": number, "loss": 4.0 / number}
        with self.run.events.open("a", encoding="utf-8") as file:
            file.write(json.dumps(metrics) + "\n")
        self.trackers.feed(metrics)
        self.trackers.renew()

    def close(self, *, is_hurried: bool = False) -> None:
        self.trackers.close(lambda: is_hurried, self.told.append)

    @staticmethod
    def alive() -> list[psutil.Process]:
        found = psutil.Process().children(recursive=True)
        return [each for each in found if any(word in " ".join(each.cmdline()) for word in ("sender", "wandb-core"))]


@pytest.fixture
def scene(tmp_path: Path) -> Iterator[Scene]:
    scene = Scene(tmp_path, WANDB_MODE="offline")
    yield scene
    scene.close(is_hurried=True)
    scene.log.close()


def test_all_is_sent_before_the_end_and_without_a_key_it_is_kept(tmp_path: Path) -> None:
    scene = Scene(tmp_path)  # not offline
    scene.update(1)
    scene.update(2)
    scene.close()
    assert scene.said == [
        "wandb: No API key configured. Use `wandb login` to log in; its numbers are kept in "
        f"{scene.run.wandb}, and `wandb sync` sends them (the run does not need it; more in train.log)"
    ]
    assert not scene.alive()
    scene.log.close()
    (records,) = offline_runs(scene.run.wandb)
    assert points(records, "step1/loss", "step1/update") == [(1, 4.0), (2, 2.0)]


def test_a_tracker_that_is_killed_is_said_once_and_leaves_nothing(scene: Scene) -> None:
    scene.update(1)
    started = wait_for(lambda: scene.alive() if len(scene.alive()) == 2 else None)
    next(each for each in started if "sender" in " ".join(each.cmdline())).kill()
    wait_for(lambda: not any(each.is_running() and each.status() != "zombie" for each in started))
    scene.update(2)
    scene.update(3)
    scene.close()
    assert scene.said == ["wandb: its process ended with -9 (the run does not need it; more in train.log)"]


def test_it_is_not_waited_for_after_the_time_to_stop(scene: Scene) -> None:
    scene.update(1)
    scene.trackers.end_before(time.monotonic())
    scene.close()
    assert scene.said == [
        "wandb: not all of the last numbers could be sent in time (the run does not need it; more in train.log)"
    ]
    assert not scene.alive()


def test_before_the_first_update_nothing_starts(scene: Scene) -> None:
    scene.trackers.feed({"kind": "progress"})
    scene.trackers.renew()
    assert not scene.alive() and scene.said == []


def test_where_no_process_can_be_made(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "nothing")
    scene.update(1)
    scene.update(2)
    assert scene.said == ["wandb gets no numbers: [Errno 2] No such file or directory: 'nothing'"]


def test_a_package_that_is_missing_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "trackio_of_tests").mkdir()  # a folder of that name is no package; wandb makes one named `wandb`
    refuse_missing([])
    refuse_missing(["wandb"])
    with pytest.raises(ToolkitError) as raised:
        refuse_missing(["wandb", "trackio_of_tests"])
    assert raised.value.what == "the job's field `track` names trackio_of_tests, which this Python has not"
    assert raised.value.hint == f"{sys.executable} -m pip install trackio_of_tests, or --set 'track=[]'"
    assert raised.value.exit_code == 2


def test_the_users_variables_win(tmp_path: Path) -> None:
    run = begun(tmp_path)
    ours = environment_of(run, {"A": "1"})
    assert (ours["WANDB_PROJECT"], ours["WANDB_DIR"], ours["A"]) == ("rlhf-box", str(run.path), "1")
    assert environment_of(run, {"WANDB_PROJECT": "mine"})["WANDB_PROJECT"] == "mine"
    assert ours["PYTHONPATH"] == str(processes.CHECKOUT)
