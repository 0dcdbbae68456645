"""What the verbs of jobs say when a connection ends."""

from __future__ import annotations

from pathlib import Path

import pytest

from remote.inventory import Box
from remote.runs.deployed import NOT_DEPLOYED
from remote.ssh.connection import BoxConnection
from remote.verbs.jobs import _refused

DENIED = "root@box: Permission denied (keyboard-interactive)."
BY_KEY_ALONE = "root@box: Permission denied (publickey)."


@pytest.mark.parametrize(
    ("code", "words", "was_asked", "what", "hint"),
    [
        (255, DENIED, False, "`gpu-box` refuses your key", "fab trust --host gpu-box"),
        (255, BY_KEY_ALONE.replace(")", ",password)"), False, "`gpu-box` refuses your key", "fab trust --host gpu-box"),
        (
            255,
            BY_KEY_ALONE,  # a password would not help, so `fab trust` would not
            False,
            "`gpu-box` refuses your key",
            "fab doctor --host gpu-box says which keys were offered",
        ),
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


def test_what_may_pass_is_tried_again(tmp_path: Path) -> None:
    connection = BoxConnection(Box(name="gpu-box", address="127.0.0.1"), tmp_path)
    assert _refused(connection)(255, "Connection reset by peer") is None
