"""What a tracker is sent, read back from the files of its offline mode."""

from __future__ import annotations

import json
import os
import sqlite3
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from env.settings import Settings
from jobs.events import RawEvent
from jobs.run_dir import RunDir
from jobs.spec import load_job, save_job
from rlhf_train.trackers.processes import Trackers, environment_of
from rlhf_train.trackers.sender import send_all
from tests.disks import unmount
from tests.raw_events import PPO, SFT, event
from tests.wandb_files import offline_runs, points

ID = "0123456789abcdef"
PINS = Path(__file__).parents[3] / "env/pins"


def begun(folder: Path) -> RunDir:
    run = RunDir(folder / "demo")
    run.path.mkdir()
    run.id.write_text(f"{ID}\n", encoding="utf-8")
    save_job(load_job("demo"), run.job_file)
    return run


def sent(tracker: str, run: RunDir, events: Sequence[RawEvent]) -> list[str]:
    """Send new events of a run to its end, and return what was said."""
    offset = run.events.stat().st_size if run.events.exists() else 0
    with run.events.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(each) + "\n" for each in events)
    said: list[str] = []
    send_all(tracker, run, offset, has_ended=lambda: True, tell=said.append)
    return said


def test_a_resume_continues_the_same_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = begun(tmp_path)
    monkeypatch.setattr("os.environ", environment_of(run, {"HOME": str(tmp_path), "WANDB_MODE": "offline"}))
    damaged = SFT | {"update": 3, "loss": "much"}
    first = [SFT | {"loss": 3.5}, SFT | {"update": 2, "loss": "inf"}, damaged, event("progress", 1, doing="x"), PPO]
    assert sent("wandb", run, first) == []
    assert sent("wandb", run, [event("resumed", 1, from_update=1), SFT | {"update": 2, "loss": 2.5}]) == []
    one, two = offline_runs(run.wandb)
    assert points(one, "step1/loss", "step1/update") == [(1, 3.5), (2, float("inf"))]
    assert points(one, "step1/grad_norm", "step1/update") == [(1, 1.25), (2, 1.25), (3, 1.25)]
    assert points(one, "step3/kl", "step3/update") == [(120, pytest.approx(0.0321))]
    assert points(two, "step1/loss", "step1/update") == [(2, 2.5)]
    for records in (one, two):
        (started,) = [record.run for record in records if record.HasField("run")]
        assert (started.run_id, started.display_name, started.project) == (ID, "demo", "rlhf-box")
        config = {item.key: json.loads(item.value_json) for item in started.config.update}
        assert config["ppo"]["kl_coef"] == load_job("demo").ppo.kl_coef and config["name"] == "demo"
        axes = {record.metric.glob_name: record.metric.step_metric for record in records if record.metric.glob_name}
        assert axes == {"step1/*": "step1/update", "step2/*": "step2/update", "step3/*": "step3/update"}
    names = {path.name for path in run.wandb.rglob("*") if path.is_file()}
    assert not names & {"requirements.txt", "wandb-metadata.json", "output.log"}  # of this machine, nothing


def test_trackio_resumes_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where its package is not installed: a stand-in notes what trackio 0.43 would get."""
    calls: list[Any] = []

    class Run:
        def log(self, metrics: dict[str, float], step: int | None = None) -> None:
            calls.append((step, metrics["step1/loss"]))

        def finish(self) -> None:
            calls.append("finish")

    def init(
        project: str, name: str | None = None, config: dict[str, Any] | None = None, resume: str = "never",
        embed: bool = True, auto_log_gpu: bool | None = None, auto_log_cpu: bool | None = None,
    ) -> Run:  # fmt: skip
        assert config is not None
        calls.append((project, name, resume, config["name"], embed, auto_log_gpu, auto_log_cpu))
        return Run()

    stand_in = ModuleType("trackio")
    stand_in.init = init  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "trackio", stand_in)
    assert sent("trackio", begun(tmp_path), [SFT | {"loss": 3.5}, SFT | {"update": 2, "loss": 2.5}]) == []
    start = ("rlhf-box", "demo-01234567", "allow", "demo", False, False, False)
    assert calls == [start, (1, 3.5), (2, 2.5), "finish"]


@pytest.fixture(scope="module")
def trackio(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with trackio and those of its dependencies that the lock has not."""
    if not Settings.from_environ(os.environ).ci:
        pytest.skip("downloads trackio, 5 MB, into a folder of its own; CI does")
    folder = tmp_path_factory.mktemp("trackio")
    done = subprocess.run(
        [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", folder, "-r", PINS / "trackio.in"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return folder


def without_network(run: RunDir, trackio: Path, kept: Path) -> dict[str, str]:
    """kept: where trackio keeps its files."""
    nowhere = "http://127.0.0.1:9"
    own = {"HOME": str(run.path), "TRACKIO_DIR": str(kept), "PYTHONPATH": str(trackio), "HF_HUB_OFFLINE": "1"}
    return environment_of(run, own | {"HTTPS_PROXY": nowhere, "HTTP_PROXY": nowhere})


def test_trackio_on_a_full_disk_says_so_and_ends(trackio: Path, tmp_path: Path) -> None:
    run, disk, said = begun(tmp_path), tmp_path / "disk", list[str]()
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", disk], check=True)
    try:
        with pytest.raises(OSError, match="No space left"):
            (disk / "of somebody else").write_bytes(bytes(2**15))
        with run.log.open("ab", buffering=0) as log:
            trackers = Trackers(["trackio"], run, without_network(run, trackio, disk), log, said.append)
            with run.events.open("a", encoding="utf-8") as file:
                file.write(json.dumps(SFT) + "\n")
            trackers.feed(SFT)
            trackers.close(lambda: False, said.append)
    finally:
        unmount(disk)
    assert [line for line in said if "sending the last numbers" not in line] == [
        f"trackio: the disk of {disk} is full, so numbers are missing there "
        "(the run does not need it; more in train.log)"
    ]
    assert "disk is full" in run.log.read_text(encoding="utf-8")  # trackio's own word, while it sent


def test_trackio_keeps_the_numbers_in_its_folder(trackio: Path, tmp_path: Path) -> None:
    """Two calls of the real sender, without any network, continue one run of the real trackio."""
    run, kept = begun(tmp_path), tmp_path / "kept"
    environment = without_network(run, trackio, kept)
    offset = 0
    for updates in ({1: 3.5, 2: 3.0}, {2: 2.5}):
        with run.events.open("a", encoding="utf-8") as file:
            file.writelines(
                json.dumps(SFT | {"update": update, "loss": loss}) + "\n" for update, loss in updates.items()
            )
        done = subprocess.run(
            [sys.executable, "-m", "rlhf_train.trackers.sender", "trackio", run.path, str(offset)],
            env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False, timeout=300,
        )  # fmt: skip
        assert (done.returncode, done.stdout) == (0, ""), done.stderr[-2000:]
        offset = run.events.stat().st_size
    with sqlite3.connect(kept / "rlhf-box.db") as database:
        rows = database.execute("SELECT run_name, step, metrics FROM metrics ORDER BY id").fetchall()
        names = {row[0] for row in database.execute("SELECT run_name FROM configs")}
        (config,) = database.execute("SELECT config FROM configs LIMIT 1").fetchone()
    losses = [(name, step, json.loads(metrics)["step1/loss"]) for name, step, metrics in rows]
    assert losses == [("demo-01234567", 1, 3.5), ("demo-01234567", 2, 3.0), ("demo-01234567", 2, 2.5)]
    assert names == {"demo-01234567"} and json.loads(config)["ppo"]["kl_coef"] == load_job("demo").ppo.kl_coef
