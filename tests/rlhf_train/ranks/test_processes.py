"""Test ranks that are started before they are needed: real processes with late orders, or none."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil  # type: ignore[import-untyped]
import pytest

from jobs.spec import Job, load_job
from rlhf_train import launch
from rlhf_train.plan.placement import Machine, place
from rlhf_train.ranks import processes
from rlhf_train.ranks.heartbeat import HeartbeatReader
from rlhf_train.ranks.processes import Importer, Rank, RankEnvironment, SpareRanks, likely_rank_environment
from rlhf_train.worker import Order
from tests import tiny
from tests.faults.scene import PATIENCE_S, ranks_here, until
from tests.tiny import CHECKOUT

CREW = RankEnvironment("cpu", 1, 1)


@pytest.fixture
def spares() -> Iterator[SpareRanks]:
    with SpareRanks(os.environ) as spares:
        yield spares
    assert ranks_here() == []


def forked(spares: SpareRanks) -> list[psutil.Process]:
    for rank in spares._ranks:
        rank.poll()
    return ranks_here()


# --- what waits, and for whom ---


def test_those_that_wait_are_taken_if_they_are_what_is_wanted(spares: SpareRanks) -> None:
    spares.start(CREW)
    (waiting,) = until(lambda: forked(spares))
    spares.start(RankEnvironment("cpu", 2, 1))  # there are some already
    assert ranks_here() == [waiting]
    (taken,) = spares.take(CREW)
    assert taken.pid == waiting.pid
    (other,) = spares.take(CREW)  # none waits
    until(lambda: len(ranks_here()) == 2)
    assert other.poll() is None and other.pid != taken.pid
    processes.end([taken, other])


def test_others_are_ended_and_made_anew(spares: SpareRanks) -> None:
    spares.start(CREW)
    first = spares._ranks
    two = spares.take(RankEnvironment("cpu", 2, 1))
    assert first[0].returncode == -signal.SIGKILL
    until(lambda: len(ranks_here()) == 2)
    assert [rank.poll() for rank in two] == [None, None]
    assert [psutil.Process(rank.pid).name() for rank in two] == ["rank 0", "rank 1"]
    processes.end(two)
    spares.start(RankEnvironment("cpu", 2, 1))
    until(lambda: len(forked(spares)) == 2)
    spares._ranks[1].kill()  # while it waited: memory ran out, say
    spares._ranks[1].wait(PATIENCE_S)
    again = spares.take(RankEnvironment("cpu", 2, 1))
    assert [rank.poll() for rank in again] == [None, None]
    processes.end(again)


@pytest.mark.parametrize(
    "job", [load_job("demo", []), Job.model_validate(tiny.job(Path("rows"))), load_job("demo", ["hardware.ranks=2"])]
)
def test_the_guess_is_what_is_chosen_later(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "GPU_FILES", (Path("/nowhere"), "*"))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert likely_rank_environment(job, os.environ) == launch.rank_environment(
        job, place(job, Machine.look(gpus=False)), os.environ
    )


@pytest.mark.parametrize(
    ("cards", "visible", "wish", "device", "count"),
    [
        (0, None, "auto", "cpu", 1),
        (8, None, "auto", "cuda", 8),
        (8, "0,1", "auto", "cuda", 2),
        (8, "", "auto", "cpu", 1),
        (8, None, "cpu", "cpu", 1),
        (0, None, "cuda", "cuda", 1),  # which will be refused
    ],
)
def test_a_guess_where_there_are_gpus(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cards: int, visible: str | None, wish: str, device: str, count: int
) -> None:
    for name in [*(f"nvidia{number}" for number in range(cards)), "nvidiactl", "nvidia-uvm"]:
        (tmp_path / name).touch()
    monkeypatch.setattr(processes, "GPU_FILES", (tmp_path, "nvidia[0-9]*"))
    job = load_job(
        "demo", [f"hardware.device={wish}", "hardware.ranks=auto", "hardware.precision=auto", "hardware.cpu_threads=1"]
    )
    assert likely_rank_environment(
        job, {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    ) == RankEnvironment(device, count, 1)


@pytest.mark.parametrize(
    ("names", "libraries"),
    [
        (["Dahoas/rm-static"], ("datasets",)),
        (["rows"], ()),
        (["rows/train.jsonl"], ()),
        (["rows", "parquet"], ("datasets",)),
        (["rlhf_train/demo/data"], ()),  # in the checkout
    ],
)
def test_what_reads_the_rows_is_imported_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, names: list[str], libraries: tuple[str, ...]
) -> None:
    tiny.write_rows(tmp_path / "rows")
    (tmp_path / "parquet").mkdir()
    (tmp_path / "parquet" / "train.parquet").touch()
    monkeypatch.chdir(tmp_path)
    job = load_job("demo", [f"data.datasets={json.dumps(names)}"])
    assert processes.libraries_of(job) == libraries
    (rank,) = SpareRanks(os.environ).take(RankEnvironment("cpu", 1, 1, libraries=libraries))
    # The kernel shows the new command line a moment after Popen returns.
    until(lambda: psutil.Process(rank.pid).cmdline()[2:] == ["rlhf_train.worker", *libraries])
    processes.end([rank])


# --- what is told, and what is said ---


def test_one_that_waits_leaves_with_the_launcher() -> None:
    """The launcher is killed, so it can end nobody, while the spare is importing its libraries."""
    start = "s = SpareRanks(os.environ); s.start(RankEnvironment('cpu', 1, 1)); print(s._ranks[0].pid, flush=True)"
    code = f"import os, time; from rlhf_train.ranks.processes import *; {start}; time.sleep(99)"
    launcher = subprocess.Popen([sys.executable, "-c", code], cwd=CHECKOUT, stdout=subprocess.PIPE, text=True)
    assert launcher.stdout is not None
    spare = psutil.Process(int(launcher.stdout.readline()))
    until(lambda: sum(spare.cpu_times()[:2]) > 0.3)  # it imports
    launcher.kill()
    launcher.wait()
    until(lambda: not spare.is_running())


def test_an_import_that_fails_is_told_when_there_is_a_log(tmp_path: Path) -> None:
    """What it printed before is in the log, too."""
    (tmp_path / "transformers.py").write_text(
        "print('a warning')\nraise ImportError('no such library')\n", encoding="utf-8"
    )
    watch = HeartbeatReader(1)
    importer = Importer(CREW, os.environ | {"PYTHONPATH": str(tmp_path)})
    rank = Rank(0, importer)
    until(lambda: rank.early_output() == b"a warning\n")
    until(ranks_here)
    assert rank.poll() is None and rank.pid != importer.pid
    order = Order({}, str(tmp_path / "run"), 1, [1], {}, str(tmp_path), 0)
    with (tmp_path / "log").open("ab") as log, tempfile.TemporaryFile() as lock:
        rank.tell(order.for_rank(0), log.fileno(), watch.file, lock.fileno())
        assert rank.wait(PATIENCE_S) == 4
    watch.close()
    words = launch._last_words(rank)
    assert words is not None and words.what == "training stopped on ImportError: no such library"
    output = (tmp_path / "log").read_text(encoding="utf-8")
    assert output.startswith("a warning\nTraceback ") and output.endswith("ImportError: no such library\n")
    assert rank.early_output() == b""
    importer.end()


# --- one process imports, and forks them ---


def test_the_ranks_of_all_steps_come_from_one_process_and_differ_in_their_number_alone(spares: SpareRanks) -> None:
    two = RankEnvironment("cpu", 2, 1)
    first = spares.take(two)
    until(lambda: len(ranks_here()) == 2 and [rank.poll() for rank in first] == [None, None])
    spares.start(two)
    until(lambda: len(forked(spares)) == 4)
    parents = {process.ppid() for process in ranks_here()}
    assert parents == {psutil.Process(rank.pid).ppid() for rank in first} and len(parents) == 1
    assert {os.getsid(process.pid) for process in ranks_here()} == {process.pid for process in ranks_here()}
    started = [rank.pid for rank in first]
    first[0].kill()
    first[1].send_signal(signal.SIGTERM)  # it has no order, so it keeps nothing
    assert [rank.wait(PATIENCE_S) for rank in first] == [-signal.SIGKILL, -signal.SIGTERM]
    assert all(not psutil.pid_exists(process) for process in started)


@pytest.mark.parametrize("is_forked", [False, True])
def test_when_the_importer_is_killed_its_ranks_are_too(spares: SpareRanks, is_forked: bool) -> None:
    spares.start(CREW)
    (rank,) = spares._ranks
    importer = rank.pid
    if is_forked:
        (process,) = until(lambda: forked(spares))
        assert rank.poll() is None and process.ppid() == importer != rank.pid
        os.kill(importer, signal.SIGTERM)  # a batch scheduler's, to all processes: the launcher decides
        time.sleep(0.2)
        assert rank.poll() is None
    os.kill(importer, signal.SIGKILL)
    assert rank.wait(PATIENCE_S) == -signal.SIGKILL
    until(lambda: ranks_here() == [])
    (again,) = spares.take(CREW)
    until(lambda: again.poll() is None and ranks_here())
    processes.end([again])
