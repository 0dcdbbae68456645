"""results.sh under the shells that boxes have, and what is made of its answers, without SSH."""

from __future__ import annotations

import hashlib
import io
import os
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from remote.results.manifest import ManifestReader, is_safe
from remote.results.run_contents import (
    FetchedCheckpoint,
    FetchedRun,
    FetchedStep,
    FinishedStep,
    NewestCheckpoint,
    Results,
    Run,
    Unfetched,
    how_to_fetch,
    parse_look,
    recall,
    recall_copies,
    remember,
    unfetched,
)
from remote.scripts import script
from tests.remote.box_folder import BoxFolder, content

SHELLS = [shell for shell in (["dash"], ["bash", "--posix"], ["busybox", "sh"]) if shutil.which(shell[0])] or [["sh"]]
A, B = "a" * 64, "b" * 64


def ask(*words: str, shell: list[str] = SHELLS[0], env: dict[str, str] | None = None) -> bytes:
    answer = subprocess.run(
        [*shell, "-s", "--", *words],
        input=script("results.sh"),
        capture_output=True,
        env={**os.environ, **(env or {})},
        check=False,
    )
    assert (answer.returncode, answer.stderr) == (0, b"")
    greeting, _, said = answer.stdout.partition(b"\nbegin\n")
    assert greeting == b""
    return said


def sha(data: bytes | Path) -> str:
    return hashlib.sha256(data if isinstance(data, bytes) else data.read_bytes()).hexdigest()


@pytest.fixture
def box(tmp_path: Path) -> BoxFolder:
    return BoxFolder(tmp_path / "a b" / "rlhf-box")


@pytest.mark.parametrize("shell", SHELLS, ids=lambda shell: shell[0])
def test_look(shell: list[str], box: BoxFolder) -> None:
    run = box.run()
    run.id.write_text("0123456789abcdef\n")
    box.step(run, 1, models=("model", "best"), size=1000)
    box.checkpoint(run, 2, 9, size=100)
    newest = box.checkpoint(run, 2, 11, shards=1, size=100)
    (run.step(2).checkpoint(12)).mkdir()  # not complete
    box.run("other")
    found = parse_look(ask("look", str(box.root), shell=shell).decode())
    event = run.events.stat().st_size
    tiny = Run(
        "tiny",
        event,
        {1: FinishedStep(sha(run.step(1).complete), 2006)},
        {2: NewestCheckpoint(11, sha(newest / "complete.json"), sum(path.stat().st_size for path in newest.iterdir()))},
        "0123456789abcdef",
    )
    assert found == Results(str(box.root), True, None, (Run("other", event), tiny))
    assert ask("look", f"{box.root}-not", shell=shell) == b"end\n"


@pytest.mark.parametrize("shell", SHELLS, ids=lambda shell: shell[0])
def test_manifest_and_send(shell: list[str], box: BoxFolder) -> None:
    run = box.run()
    box.step(run, 1, size=1000)
    box.checkpoint(run, 2, 9, shards=1, size=100)
    run.id.write_text("0123456789abcdef\n")
    run.log.write_bytes(b"0123456789")
    said = ask("manifest", str(box.root), "tiny", "checkpoints", shell=shell)
    manifest = ManifestReader(io.BytesIO(said)).read()
    assert (
        manifest is not None
        and manifest.steps == {1: sha(run.step(1).complete)}
        and manifest.checkpoints[2].update == 9
        and manifest.id == "0123456789abcdef"
        and manifest.first_event == sha(b'{"schema": 1, "kind": "plan"}\n')
    )
    assert {file.path: (file.size_bytes, file.sha256) for file in manifest.files} == {
        path.relative_to(run.path).as_posix(): (path.stat().st_size, sha(path))
        for path in run.path.rglob("*")
        if path.is_file()
    }
    weights = "step1/model/model.safetensors"
    answer = ask(
        "send",
        str(box.root),
        "tiny",
        "900",
        "1000",
        weights,
        "0",
        "5",
        "nowhere",
        "4",
        "7",
        "train.log",
        "0",
        "11",
        "train.log",
        shell=shell,
    )
    assert answer == b"bytes 0 100\n" + content((1, "model", ""), 1000)[900:] + b"gone 1\nbytes 2 3\n456gone 3\nend\n"


def test_hashes_are_made_once(box: BoxFolder) -> None:
    run = box.run()
    box.step(run, 1, size=1000)
    (cached,) = [box.root / "cache" / "results" / "tiny"]
    first, second = (ask("manifest", str(box.root), "tiny") for _ in range(2))
    assert b"hashing 1000 step1/model/model.safetensors" in first and b"hashing" not in second and cached.is_file()
    assert [line for line in first.splitlines() if not line.startswith(b"hashing")] == second.splitlines()
    weights = run.step(1).model / "model.safetensors"
    times = weights.stat()
    weights.write_bytes(b"x" * 1000)
    os.utime(
        weights, ns=(times.st_atime_ns, times.st_mtime_ns)
    )  # of the same size and time: the inode has changed nonetheless
    assert f"file 1000 {sha(weights)} step1/model/model.safetensors\n".encode() in ask(
        "manifest", str(box.root), "tiny"
    )
    shutil.rmtree(box.root / "cache")
    (box.root / "cache").write_text("no folder can be made here")
    assert b"hashing 1000" in ask("manifest", str(box.root), "tiny")


def test_links_are_not_followed(box: BoxFolder, tmp_path: Path) -> None:
    run = box.run()
    box.step(run, 1, size=10)
    (tmp_path / "secret").write_text("secret")
    (run.step(1).model / "link").symlink_to(tmp_path / "secret")
    run.job_file.unlink()
    run.job_file.symlink_to(tmp_path / "secret")
    said = ask("manifest", str(box.root), "tiny")
    assert b"link" not in said and b"job.yaml" not in said and b"step 1" in said
    run.log.unlink()
    run.log.symlink_to(tmp_path / "secret")
    assert ask("send", str(box.root), "tiny", "0", "6", "train.log") == b"gone 0\nend\n"


def test_a_manifest_that_is_torn_is_none() -> None:
    whole = f"\nbegin\nfile 3 {A} job.yaml\nstep 1 {B}\nend\n".encode()
    for length in range(len(whole)):
        assert ManifestReader(io.BytesIO(whole[:length])).read() is None
    read = ManifestReader(io.BytesIO(whole)).read()
    assert read is not None and [file.path for file in read.files] == ["job.yaml"]


def test_of_a_step_that_changed_nothing_is_taken() -> None:
    said = (
        f"begin\nfile 3 {A} step1/model/a\nfile 3 {A} step2/model/a\nfile 1 {B} step2/complete.json\nstep 2 {B}\n"
        f"changed 1\nend\n"
    )
    read = ManifestReader(io.BytesIO(said.encode())).read()
    assert (
        read is not None
        and read.changed == (1,)
        and [unit.path for unit in read.units()] == ["step2/model", "step2/complete.json"]
    )


@pytest.mark.parametrize(
    "path",
    [
        *(
            "/etc/passwd",
            "../x",
            "step1/model/../../../x",
            "step1/model/..",
            "step1/model/",
            "step1/model//x",
            "step1/model",
            ".ssh/x",
            "job/pid",
        ),
        *(
            "step4/model/x",
            "step1/x",
            "step1/model/a\nb",
            "step1/model/a\x1b[2J",
            "step1/model/\ufffd",
            "step1/checkpoints/update-x/a",
            "tokenizer",
        ),
        *(
            "step1/checkpoints/update-1/a/b",
            "step1/checkpoints/update-1",
            "step1/model/" + "x" * 256,
            "events.jsonl/x",
            ".fetched.json",
            "",
        ),
    ],
)
def test_a_box_cannot_name_a_file_that_no_run_has(path: str) -> None:
    assert not is_safe(path)
    read = ManifestReader(io.BytesIO(f"file 1 {A} {path}\nend\n".encode())).read()
    assert read is not None and read.files == ()


def test_names_that_are_odd_and_harmless() -> None:
    names = [
        "step1/model/a b",
        "step3/model_ema/-rf",
        "step1/model/..x/...",
        "tokenizer/$(x)",
        "step2/checkpoints/update-40/tensors-000.safetensors",
    ]
    assert all(map(is_safe, names))


def test_what_runs_is_seen(box: BoxFolder) -> None:
    run = box.run()
    box.job("tiny", "request-1", os.getpid())
    assert parse_look(ask("look", str(box.root)).decode()).running == "tiny"
    (box.root / "slot" / "start").write_text("1\n")  # another process has that number now
    assert parse_look(ask("look", str(box.root)).decode()).running is None
    shutil.rmtree(box.root / "slot")
    (run.path / "job" / "request").write_text("request-1\n")  # its supervisor was killed: its processes go on
    job = subprocess.Popen(["sleep", "60"], env={**os.environ, "RLHF_REQUEST": "request-1"})
    other = subprocess.Popen(
        ["sleep", "60"], env={**os.environ, "RLHF_REQUEST": "request-2", "NOT_RLHF_REQUEST": "request-1"}
    )
    try:
        assert parse_look(ask("look", str(box.root)).decode()).running == "tiny"
        job.kill()
        job.wait()
        assert parse_look(ask("look", str(box.root)).decode()).running is None
    finally:
        for each in (job, other):
            each.kill()
            each.wait()


# --- what would be lost ---


def test_what_was_fetched_is_remembered(tmp_path: Path) -> None:
    fetched = FetchedRun("/runs/x", 12.5, 7, {1: FetchedStep(A, B)}, {2: FetchedCheckpoint(40, A)})
    remember(tmp_path, "../box", "tiny", fetched)
    remember(tmp_path, "../box", "other", FetchedRun())
    assert recall(tmp_path, "../box") == {"tiny": fetched, "other": FetchedRun()} and recall(tmp_path, "box") == {}
    moved = replace(fetched, folder="/elsewhere/x", id="0123456789abcdef")
    remember(tmp_path, "../box", "tiny", moved)
    assert recall_copies(tmp_path, "../box")["tiny"] == [moved, fetched]
    remember(tmp_path, "../box", "tiny", fetched)
    assert recall_copies(tmp_path, "../box")["tiny"] == [fetched, moved]
    (file,) = (tmp_path / "fetched").iterdir()
    for damaged in (
        "",
        "{",
        "[]",
        '{"schema": 2, "runs": {}}',
        '{"schema": 1, "runs": {"a": {}}}',
        '{"schema": 1, "runs": []}',
    ):
        file.write_text(damaged)
        assert recall(tmp_path, "../box") == {}


@pytest.mark.parametrize(
    ("there", "here", "lost"),
    [
        (Run("r", 10), None, ["its events and its log, 10 bytes"]),
        (Run("r", 10), FetchedRun(events_bytes=10), []),
        (Run("r", 10), FetchedRun(events_bytes=4), ["events written since the last fetch, 6 bytes"]),
        (Run("r", 3), FetchedRun(events_bytes=4), ["events written since the last fetch, 3 bytes"]),
        (Run("r", 0, {1: FinishedStep(A, 2000)}), None, ["the models of step 1 (supervised fine-tuning), 2 kB"]),
        (Run("r", 0, {1: FinishedStep(A, 2000)}), FetchedRun(steps={1: FetchedStep(A, B)}), []),
        (
            Run("r", 0, {3: FinishedStep(A, 2)}),
            FetchedRun(steps={3: FetchedStep(B, B)}),
            ["the models of step 3 (PPO), trained again since it was fetched, 2 bytes"],
        ),
        (Run("r", 0, {}, {2: NewestCheckpoint(9, A, 5)}), None, ["the checkpoint of step 2, update 9, 5 bytes"]),
        (Run("r", 0, {}, {2: NewestCheckpoint(9, A, 5)}), FetchedRun(checkpoints={2: FetchedCheckpoint(9, A)}), []),
        (
            Run("r", 0, {}, {2: NewestCheckpoint(9, A, 5)}),
            FetchedRun(checkpoints={2: FetchedCheckpoint(7, B)}),
            ["the checkpoint of step 2, update 9 (fetched: update 7), 5 bytes"],
        ),
    ],
)
def test_what_lies_on_the_box_alone(there: Run, here: FetchedRun | None, lost: list[str]) -> None:
    found = unfetched(Results("/r", True, None, (there,)), {} if here is None else {"r": here})
    assert [str(each) for each in found] == [f"run `r`: {text}" for text in lost]


def test_the_commands_that_bring_it_home() -> None:
    lost = (Unfetched("a", "", 1), Unfetched("b", "", 1, is_checkpoint=True), Unfetched("b", "", 1))
    assert how_to_fetch("box", lost) == "fab fetch --host box --all --checkpoints"
    assert how_to_fetch("box", lost[:1]) == "fab fetch --host box --run a"
    hostile = (replace(lost[0], run="$(touch pwned);x"),)
    assert how_to_fetch("box", hostile) == "fab fetch --host box --run '$(touch pwned);x'"
