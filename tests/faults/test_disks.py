"""Test disks that fill, lose their inodes, turn read-only or go away under a run.

They are real file systems, mounted for each test.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from jobs.formatting import size
from jobs.run_dir import RunDir
from rlhf_train.engine import checkpoint_files
from tests.disks import unmount
from tests.faults.scene import Scene, curve, error_of, events, fault, when
from tests.tiny import Trained

Said = pytest.CaptureFixture[str]

ROOMY = "size=600m,nr_inodes=5000"  # more than every start needs; a tmpfs takes no memory before it is used
LEFT = 64 * 1024  # bytes: enough for some events, too little for a checkpoint of 0.4 MB


def mount(*words: str | Path) -> str:
    """-> what it complains of"""
    return subprocess.run(["mount", *words], capture_output=True, text=True, check=False).stderr.strip()


@pytest.fixture
def disk(scene: Scene) -> Iterator[Path]:
    """A file system of its own, where the runs are written."""
    folder = scene.runs
    folder.mkdir()
    complaint = mount("-t", "tmpfs", "-o", ROOMY, "tmpfs", folder)
    if complaint:
        pytest.skip(f"needs to mount a tmpfs: {complaint}")
    yield folder
    while folder.is_mount():
        subprocess.run(["umount", "--lazy", folder], check=True)


def leave(disk: Path, free_bytes: int) -> None:
    """Leave so much room, as if somebody else had written a file, but without using memory."""
    found = os.statvfs(disk)
    used = (found.f_blocks - found.f_bfree) * found.f_frsize
    assert mount("-o", f"remount,size={used + free_bytes}", disk) == ""


def while_it_waits(
    scene: Scene, run: RunDir, act: Callable[[], None], *, kind: str = "training", first: int = 7, kept: int = 2
) -> int:
    """Train, and do `act` while a rank waits in this pass; return the exit code.

    The checkpoint of update `kept` is complete then, and the only one. "start": before a rank does
    anything.
    """
    go = scene.folder / "go"

    def is_there() -> bool:
        folders = [path.name for path in run.step(1).checkpoints.glob("*")]
        return (
            run.log.exists()
            if kind == "start"
            else folders == [f"update-{kept}"] and (run.step(1).checkpoint(kept) / "complete.json").exists()
        )

    def act_and_go() -> None:
        try:
            act()
        finally:
            go.touch()

    thread = when(is_there, act_and_go)
    code = scene.train(
        run.name, "checkpoint.every_updates=1", met=fault("wait", kind, first=first, last=first, file=str(go))
    )
    thread.join()
    return code


def checkpoint_size(untroubled: Trained) -> str:
    """Weights and two moments of each parameter, in float32."""
    return size(3 * 4 * sum(tensor.numel() for tensor in untroubled.weights(1).values()))


def test_too_small_from_the_start(scene: Scene, disk: Path, untroubled: Trained, capsys: Said) -> None:
    run = scene.run("small")
    code = while_it_waits(scene, run, lambda: leave(disk, 700_000), kind="start")
    output = capsys.readouterr().err
    assert code == 3
    assert re.fullmatch(
        "error: the disk is too small for the models and checkpoints of step 1\n"
        "  why: they need [0-9.]+ MiB at the same time, "
        f"and [0-9.]+ MiB are free for them at {re.escape(str(run.path))}\n\n"
        "hint: make room, or choose an --output-dir on a larger disk; "
        "actor.lora makes checkpoints many times smaller\n",
        error_of(output),
    ), error_of(output)
    assert "Traceback" not in output and events(run, "metrics") == []


def test_without_inodes(scene: Scene, disk: Path, capsys: Said) -> None:
    run = scene.run("inodes")

    def leave_few() -> None:
        found = os.statvfs(disk)
        assert mount("-o", f"remount,nr_inodes={found.f_files - found.f_ffree + 100}", disk) == ""

    code = while_it_waits(scene, run, leave_few, kind="start")
    error = error_of(capsys.readouterr().err)
    assert code == 3
    assert error.startswith("error: the disk is too small for this step's checkpoints\n")
    found = re.search(r"MB and ([0-9]+) inodes are free", error)
    assert found is not None and int(found.group(1)) <= 100


def test_it_fills_while_a_run_trains(scene: Scene, disk: Path, untroubled: Trained, capsys: Said) -> None:
    run = scene.run("fills")
    code = while_it_waits(scene, run, lambda: leave(disk, LEFT))
    output = capsys.readouterr().err
    assert code == 4
    assert re.fullmatch(
        "error: the checkpoint of update 3 could not be written: the disk is full\n"
        "  why: No space left on device; "
        f"[0-9.]+ kB are free at {re.escape(str(run.path))}, and a checkpoint has {checkpoint_size(untroubled)}\n\n"
        "hint: the last good checkpoint is that of update 2; "
        "make room or mend the path, then the same command resumes\n",
        error_of(output),
    ), error_of(output)
    assert "Traceback" not in output
    the_last_is_good(run)

    assert mount("-o", "remount,size=600m", disk) == ""
    assert scene.train("fills", "checkpoint.every_updates=1") == 0
    assert [event["from_update"] for event in events(run, "resumed")] == [2]
    assert curve(run) == curve(untroubled.dir)
    weights, expected = Trained(run).weights(1), untroubled.weights(1)
    assert weights.keys() == expected.keys() and all(weights[name].equal(expected[name]) for name in expected)


def the_last_is_good(run: RunDir) -> None:
    """Check that the checkpoint of update 2 is there, and nothing else."""
    saved = checkpoint_files.latest(run.step(1), pytest.fail)
    assert saved is not None and saved.update == 2
    assert [path.name for path in run.step(1).checkpoints.iterdir()] == ["update-2"]


def test_it_turns_read_only(scene: Scene, disk: Path, tmp_path: Path, capsys: Said) -> None:
    run = scene.run("read-only")
    twin = tmp_path / "twin"
    twin.mkdir()

    def turn() -> None:
        # A read-only twin is laid over it: `remount,ro` is refused while a file is open for
        # writing, as it is not when the kernel finds a disk broken.
        assert mount("--bind", disk, twin) == ""
        assert mount("-o", "remount,ro,bind", twin) == ""
        assert mount("--bind", twin, disk) == ""
        unmount(twin)

    code = while_it_waits(scene, run, turn)
    output = capsys.readouterr().err
    partial = run.step(1).checkpoint(3).with_name("update-3.partial")
    assert code == 4
    assert error_of(output).startswith(
        f"error: the checkpoint of update 3 could not be written: cannot use {partial}\n  why: Read-only file system; "
    )
    assert error_of(output).endswith(
        "hint: the last good checkpoint is that of update 2; "
        "make room or mend the path, then the same command resumes\n"
    )
    assert "Traceback" not in output
    the_last_is_good(run)


GONE = (
    "error: the run folder {run} is gone\n"
    "  why: was its disk unmounted, or the folder moved or removed?\n\n"
    "hint: bring it back; the same command resumes it from its last checkpoint\n"
)
NOT_THERE = (
    "error: cannot use {run}/step1/model.partial\n"
    "  why: No such file or directory\n\n"
    "hint: make room or mend the path, then the same command resumes\n"
)


@pytest.mark.parametrize(
    ("kind", "first", "kept", "error"),
    [
        ("training", 7, 2, GONE),  # in update 3
        # When the held-out rows are judged for the second time: 5 passes compare the model's own
        # forward with ours, and 6 judged the rows before.
        ("judging", 13, 4, NOT_THERE),
    ],
)
def test_it_goes_away(scene: Scene, disk: Path, capsys: Said, kind: str, first: int, kept: int, error: str) -> None:
    run = scene.run("gone")

    def unmount() -> None:
        subprocess.run(["umount", "--lazy", disk], check=True)

    code = while_it_waits(scene, run, unmount, kind=kind, first=first, kept=kept)
    output = capsys.readouterr().err
    assert not disk.is_mount()
    assert list(disk.iterdir()) == []  # nothing is written into the bare folder below, as if it were the run's
    assert code == 4
    assert error_of(output) == error.format(run=run.path)
    assert "Traceback" not in output
