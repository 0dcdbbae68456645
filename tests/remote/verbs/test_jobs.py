"""What the verbs of jobs say when a connection ends."""

from __future__ import annotations

from pathlib import Path

import pytest

from env.settings import Settings
from remote.inventory import Box
from remote.output import Sayer
from remote.runs.deployed import NOT_DEPLOYED
from remote.runs.job_state import JobState
from remote.runs.watch import Watched
from remote.ssh.connection import BoxConnection
from remote.verbs.base import VerbContext
from remote.verbs.jobs import _code_of, _refused
from tests.raw_events import event

DENIED = "root@box: Permission denied (keyboard-interactive)."


@pytest.mark.parametrize(
    ("code", "words", "was_asked", "what", "hint"),
    [
        (255, DENIED, False, "`gpu-box` refuses your key", "fab trust --host gpu-box"),
        (
            255,
            DENIED,
            True,
            "the connection to `gpu-box` broke, and only you can log in there",
            "the job is not affected; to watch it again: fab logs --follow --host gpu-box",
        ),
        (255, "Host key verification failed.", True, "`gpu-box` shows another host key", None),
        (NOT_DEPLOYED, "", False, "nothing is deployed on `gpu-box`", "fab deploy --host gpu-box"),
    ],
)
def test_why_it_is_useless_to_try_again(
    tmp_path: Path, code: int, words: str, was_asked: bool, what: str, hint: str | None
) -> None:
    connection = BoxConnection(Box(name="gpu-box", address="127.0.0.1"), tmp_path)
    connection.was_asked = was_asked
    error = _refused(connection)(code, words)
    assert error is not None and error.what == what
    assert hint is None or error.hint == hint


@pytest.mark.parametrize(("step", "has_a_model_that_answers"), [(1, True), (2, False), (3, True)])
def test_after_a_job_the_next_commands_have_the_boxs_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], step: int, has_a_model_that_answers: bool
) -> None:
    connection = BoxConnection(Box(name="gpu-box", address="127.0.0.1"), tmp_path)
    job = JobState.of(["exit=0"])
    ended = Watched(done=True, stopped=False, job=job, last=event("end", step), offset=0)
    assert _code_of(ended, VerbContext(Settings.from_environ({}), {}), connection, "kl 05", Sayer()) == 0
    lines = ["bring the results home: fab fetch --host gpu-box --run 'kl 05'"]
    lines += ["talk to it: fab chat --host gpu-box --run 'kl 05'"] if has_a_model_that_answers else []
    assert capsys.readouterr().err.splitlines() == lines


def test_what_may_pass_is_tried_again(tmp_path: Path) -> None:
    connection = BoxConnection(Box(name="gpu-box", address="127.0.0.1"), tmp_path)
    assert _refused(connection)(255, "Connection reset by peer") is None
