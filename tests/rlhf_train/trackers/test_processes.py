"""The trackers' processes: they end with the launcher, and harm no run."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
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


class Refusal(BaseHTTPRequestHandler):
    """A server of Weights & Biases that knows no key."""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.send_response(401)
        self.end_headers()
        self.wfile.write(b'{"errors": [{"message": "wrong key"}]}')

    do_GET = do_POST

    def log_message(self, *_: Any) -> None: ...


def test_all_is_sent_before_the_end_and_with_a_wrong_key_it_is_kept(tmp_path: Path) -> None:
    server, key = ThreadingHTTPServer(("127.0.0.1", 0), Refusal), "0123456789" * 4
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    scene = Scene(tmp_path, WANDB_BASE_URL=url, WANDB_API_KEY=key, NO_PROXY="127.0.0.1")
    scene.update(1)
    scene.update(2)
    scene.close()
    server.shutdown()
    server.server_close()
    (said,) = scene.said
    assert said.startswith("wandb: ") and "error 401" in said
    kept = f"; its numbers are kept in {scene.run.wandb}, and `wandb sync` sends them"
    assert said.endswith(f"{kept} (the run does not need it; more in train.log)")
    assert "Traceback" in scene.run.log.read_text(encoding="utf-8")
    for path in (each for each in scene.run.path.rglob("*") if each.is_file()):
        assert key.encode() not in path.read_bytes()
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


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MB of its own."""
    folder = tmp_path / "disk"
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], capture_output=True, check=False)
    if done.returncode:
        pytest.skip(f"needs to mount a tmpfs: {done.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


def fill(disk: Path) -> None:
    with pytest.raises(OSError, match="No space left"):
        (disk / "of somebody else").write_bytes(bytes(2**21))


@pytest.mark.parametrize("when", ["before it starts", "while it sends"])
def test_a_full_disk_under_its_folder_is_said_once_and_harms_nothing(disk: Path, tmp_path: Path, when: str) -> None:
    """Of numbers that wandb loses there it says nothing itself."""
    if when == "before it starts":
        fill(disk)
    scene = Scene(tmp_path, WANDB_MODE="offline", WANDB_DIR=str(disk))
    scene.update(1)
    if when == "while it sends":
        wait_for(lambda: [*disk.glob("wandb/offline-run-*/*.wandb")])
        fill(disk)
    wait_for(lambda: scene.said or scene.update(2))
    scene.close()
    assert scene.said == [
        f"wandb: the disk of {disk} is full, so numbers are missing there (the run does not need it; more in train.log)"
    ]
    assert not scene.alive()
    scene.log.close()
    assert all(json.loads(line) for line in scene.run.events.read_text(encoding="utf-8").splitlines())


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
    assert raised.value.hint == f"{sys.executable} -m pip install trackio_of_tests, or --set 'track=[wandb]'"
    assert raised.value.exit_code == 2


def test_the_users_variables_win(tmp_path: Path) -> None:
    run = begun(tmp_path)
    ours = environment_of(run, {"A": "1"})
    assert (ours["WANDB_PROJECT"], ours["WANDB_DIR"], ours["A"]) == ("rlhf-box", str(run.path), "1")
    assert environment_of(run, {"WANDB_PROJECT": "mine"})["WANDB_PROJECT"] == "mine"
    assert ours["PYTHONPATH"] == str(processes.CHECKOUT)
