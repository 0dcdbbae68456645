"""Signs of life: what a rank writes, the launcher reads."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from rlhf_train.ranks.heartbeat import SLOT_BYTES, Heartbeat, HeartbeatReader, RankSign, read_sign
from tests.tiny import CHECKOUT


@pytest.fixture
def watch() -> Iterator[HeartbeatReader]:
    watch = HeartbeatReader(3)
    yield watch
    watch.close()


def test_a_rank_counts_up_and_says_what_it_does(watch: HeartbeatReader) -> None:
    assert watch.signs() == [RankSign(0, 0, False, False, False, "")] * 3  # none has begun
    heartbeat = Heartbeat.of_rank(watch.file, 1, 3)
    assert watch.signs() == [
        RankSign(0, 0, False, False, False, ""),
        RankSign(1, 0, False, False, False, "starting"),
        RankSign(0, 0, False, False, False, ""),
    ]
    heartbeat.beat("update 7")
    heartbeat.beat()
    assert watch.signs()[1] == RankSign(3, 0, False, False, False, "update 7")  # no new phase: the old one stays
    heartbeat.has_trained = True
    heartbeat.beat("a")
    assert watch.signs()[1] == RankSign(4, 0, True, False, False, "a")  # nothing is left of the longer phase


def test_meetings_are_counted_apart(watch: HeartbeatReader) -> None:
    heartbeat = Heartbeat.of_rank(watch.file, 1, 3)
    for _ in range(2):
        heartbeat.meet()
    heartbeat.beat("update 1")
    assert watch.signs()[1] == RankSign(4, 2, False, False, False, "update 1")


def test_a_sign_is_written_at_once() -> None:
    """A reader must never see zeros: a rank without anything to save is killed immediately."""

    class Memory(bytearray):
        writes = 0

        def __setitem__(self, *written: Any) -> None:
            self.writes += 1
            super().__setitem__(*written)

    memory = Memory(3 * SLOT_BYTES)
    heartbeat = Heartbeat(memory, 2)
    heartbeat.beat("update 7")
    assert memory.writes == 2 and len(memory) == 3 * SLOT_BYTES
    assert read_sign(memory, 2) == RankSign(2, 0, False, False, False, "update 7")


def test_ranks_do_not_write_over_each_other(watch: HeartbeatReader) -> None:
    heartbeats = [Heartbeat.of_rank(watch.file, rank, 3) for rank in range(3)]
    for rank, heartbeat in enumerate(heartbeats):
        for _ in range(rank):
            heartbeat.beat(f"{rank}" * 200)
    assert [sign.count for sign in watch.signs()] == [1, 2, 3]
    assert [set(sign.phase) for sign in watch.signs()] == [set("starting"), {"1"}, {"2"}]


@pytest.mark.parametrize("phase", ["x" * 500, "ä" * 500, "x" + "ä" * 500, "xx" + "雪" * 500, "xx" + "😀" * 500])
def test_a_long_phase_is_cut(watch: HeartbeatReader, phase: str) -> None:
    """Bytes are counted; a character that is cut in two is shown as one that is unknown."""
    Heartbeat.of_rank(watch.file, 0, 3).beat(phase)
    (output, *others) = watch.signs()
    kept = output.phase.rstrip("\N{REPLACEMENT CHARACTER}")
    assert phase.startswith(kept) and SLOT_BYTES - 24 < len(kept.encode()) <= SLOT_BYTES
    assert others == [RankSign(0, 0, False, False, False, "")] * 2


@pytest.mark.parametrize(("phase", "read"), [("Schritt für 雪", "Schritt für 雪"), ("", ""), ("a \udcff b", "a ? b")])
def test_any_text_is_a_phase(watch: HeartbeatReader, phase: str, read: str) -> None:
    """Also one with a path that is not UTF-8."""
    Heartbeat.of_rank(watch.file, 2, 3).beat(phase)
    assert watch.signs()[2].phase == read


def test_another_process_is_seen(watch: HeartbeatReader) -> None:
    beat = "Heartbeat.of_rank(int(sys.argv[1]), 2, 3).beat('update 1')"
    code = f"import sys; from rlhf_train.ranks.heartbeat import Heartbeat; {beat}"
    command = [sys.executable, "-c", code, str(watch.file)]
    subprocess.run(
        command, pass_fds=[watch.file], check=True, cwd=CHECKOUT, env=os.environ | {"PYTHONPATH": str(CHECKOUT)}
    )
    assert watch.signs()[2] == RankSign(2, 0, False, False, False, "update 1")  # also after it is gone


def test_nobody_needs_to_watch() -> None:
    heartbeat = Heartbeat.unseen()
    heartbeat.beat("update 1")
    heartbeat.beat("x" * 500)
