"""What `fab logs` says when a connection ends."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from env.settings import Settings
from remote.inventory import Box
from remote.output import Sayer
from remote.runs.deployed import NOT_DEPLOYED
from remote.runs.job_state import JobState
from remote.runs.watch import Watched
from remote.ssh.connection import BoxConnection
from remote.verbs.base import VerbContext
from remote.verbs.following import code_of, refused
from tests.raw_events import event
from tests.remote.test_tasks import Laptop, entry

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
    error = refused(connection)(code, words)
    assert error is not None and error.what == what
    assert hint is None or error.hint == hint


@pytest.mark.parametrize(("step", "has_a_model_that_answers"), [(1, True), (2, False), (3, True)])
def test_after_a_job_the_next_commands_have_the_boxs_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], step: int, has_a_model_that_answers: bool
) -> None:
    connection = BoxConnection(Box(name="gpu-box", address="127.0.0.1"), tmp_path)
    job = JobState.of(["exit=0"])
    ended = Watched(done=True, stopped=False, job=job, last=event("end", step), offset=0)
    assert code_of(ended, VerbContext(Settings.from_environ({}), {}), connection, "kl 05", Sayer()) == 0
    lines = ["bring the results home: fab fetch --host gpu-box --run 'kl 05'"]
    lines += ["talk to it: fab chat --host gpu-box --run 'kl 05'"] if has_a_model_that_answers else []
    assert capsys.readouterr().err.splitlines() == lines


def test_what_may_pass_is_tried_again(tmp_path: Path) -> None:
    connection = BoxConnection(Box(name="gpu-box", address="127.0.0.1"), tmp_path)
    assert refused(connection)(255, "Connection reset by peer") is None


SUPERVISOR = """case $1 in
    where) printf 'root %s\\ncode 0123456789abcdef\\n' "$2" ;;
    start) cat >/dev/null; echo "started $4" ;;
    follow) printf 'job run=demo alive=0 exit=2\\nbeat 1\\ndone\\n' ;;
esac
"""


@pytest.mark.parametrize("settings", [(), ("MaxSessions 1",)], ids=["usual", "one session"])
def test_starting_and_watching_is_one_login(
    make_sshd: Callable[..., Any], tmp_path: Path, settings: tuple[str, ...]
) -> None:
    """Each login may ask for a password, a code, or the touch of a key."""
    server, root = make_sshd(*settings), tmp_path / "data" / "rlhf-box"
    supervisor = root / "code/0123456789abcdef/remote/on_box/supervisor.sh"
    supervisor.parent.mkdir(parents=True)
    supervisor.write_text(SUPERVISOR)
    (root / ".rlhf-box").touch()
    (root / "deployed").write_text("code 0123456789abcdef\n")
    laptop = Laptop(tmp_path / "laptop")
    (laptop.folder / "boxes.yaml").write_text(yaml.safe_dump({"gpu-box": entry(server, tmp_path / "data")}))
    ended = laptop.fab("train", "--host", "gpu-box", "--job", "demo", "--wait", code=2)
    # It started the job, followed its events, and then showed its output.
    assert "was started on gpu-box" in ended.stderr and "the job ended before it could train" in ended.stderr
    # Where a box allows one session, the last one may still be closing when the next one begins.
    assert server.log.count("Accepted publickey") <= (3 if settings else 1)
