"""What is at home now, after a real fetch and whatever happened to its folder since."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from remote.results.at_home import at_home
from remote.results.local_run import LocalRun
from remote.results.manifest import Manifest, RemoteFile
from remote.results.run_contents import read_results, recall, recall_copies, unfetched
from remote.results.transfer import FetchSelection, _remember, fetch
from tests.remote.box_folder import BoxFolder

if TYPE_CHECKING:
    from tests.remote.conftest import Sshd

MODELS, CHECKPOINT, EVENTS = "models of step 1", "checkpoint of step 2", "events"


def damage(home: Path) -> None:
    weights = home / "step1/model/model.safetensors"
    data = bytearray(weights.read_bytes())
    data[7] ^= 1
    weights.write_bytes(data)


def copied(home: Path) -> None:
    shutil.copytree(home, home.with_name("copy"))
    shutil.rmtree(home)
    home.with_name("copy").rename(home)
    (home / ".fetched.json").unlink()


def other_words(home: Path) -> None:
    """As many bytes, others."""
    events = home / "events.jsonl"
    events.write_bytes(b"x" * events.stat().st_size)


def in_its_place(home: Path) -> None:
    """Another run's results, by hand."""
    (home / "id").write_text("ffff\n")


@pytest.mark.parametrize(
    ("happens", "lost"),
    [
        (lambda home: None, []),
        (lambda home: (home / "step1" / "notes.txt").write_text("mine"), []),
        (copied, []),  # all is there, with other times and without fetch's notes
        (shutil.rmtree, [MODELS, CHECKPOINT, EVENTS]),
        (in_its_place, [MODELS, CHECKPOINT, EVENTS]),
        (lambda home: shutil.rmtree(home / "step1" / "model"), [MODELS]),
        (lambda home: (home / "step1/complete.json").unlink(), [MODELS]),
        (damage, [MODELS]),
        (lambda home: shutil.rmtree(home / "step2"), [CHECKPOINT]),
        (lambda home: next((home / "step2").rglob("tensors-*")).unlink(), [CHECKPOINT]),
        (lambda home: os.truncate(home / "events.jsonl", 3), [EVENTS]),
        (other_words, [EVENTS]),
        (lambda home: (home / "train.log").unlink(), [EVENTS]),
        (lambda home: (home / "job.yaml").write_text("name: mine\n"), [EVENTS]),
    ],
    ids=["nothing", "notes", "copied", "removed", "another", "model", "mark", "damage", "step2", "shard", "events",
         "words", "log", "job"],
)  # fmt: skip
def test_only_what_lies_there_now_counts(
    sshd: Sshd, tmp_path: Path, happens: Callable[[Path], object], lost: list[str]
) -> None:
    box, state, home = BoxFolder(tmp_path / "rlhf-box"), tmp_path / "state", tmp_path / "home" / "tiny"
    run = box.run()
    run.id.write_text("0123456789abcdef\n")
    box.step(run, 1, size=1000)
    box.checkpoint(run, 2, 7, size=1000)
    with sshd.connection(state) as connection:
        fetch(connection, str(box.root), "tiny", home, state=state, what=FetchSelection(checkpoints=True))
        happens(home)
        found = read_results(connection, str(box.root))
    known = at_home(found, recall_copies(state, "gpu-box"))
    assert [any(word in each.what for each in unfetched(found, known)) for word in (MODELS, CHECKPOINT, EVENTS)] == [
        word in lost for word in (MODELS, CHECKPOINT, EVENTS)
    ]


def test_any_of_several_copies_counts_and_none_of_another_run(sshd: Sshd, tmp_path: Path) -> None:
    box, state = BoxFolder(tmp_path / "rlhf-box"), tmp_path / "state"

    def lost() -> list[str]:
        with sshd.connection(state) as connection:
            found = read_results(connection, str(box.root))
        return [each.what for each in unfetched(found, at_home(found, recall_copies(state, "gpu-box")))]

    for run_id in ("aaaa", "bbbb"):  # the second one on a box that was set up again
        shutil.rmtree(box.root / "runs" / "tiny", ignore_errors=True)
        run = box.run()
        run.id.write_text(f"{run_id}\n")
        box.step(run, 1, size=1000, seed=run_id)
        assert len(lost()) == 2
        for copy in (1, 2):
            with sshd.connection(state) as connection:
                fetch(connection, str(box.root), "tiny", tmp_path / f"{run_id}-{copy}", state=state)
        assert lost() == []
    shutil.rmtree(tmp_path / "bbbb-2")
    assert lost() == []
    shutil.rmtree(tmp_path / "bbbb-1")
    assert len(lost()) == 2


def test_events_whose_log_did_not_come_are_not_at_home(tmp_path: Path) -> None:
    """A connection that broke between the two; the events have their name by then."""
    texts = {"events.jsonl": b"{}\n", "train.log": b"hello"}
    manifest = Manifest(
        tuple(RemoteFile(name, len(text), hashlib.sha256(text).hexdigest()) for name, text in texts.items())
    )
    known = []
    for name, text in texts.items():
        (tmp_path / name).write_bytes(text)
        _remember(LocalRun(tmp_path), manifest, tmp_path / "state", "gpu-box", "tiny")
        known.append(recall(tmp_path / "state", "gpu-box")["tiny"].events_bytes)
    assert known == [0, 3]
