"""Two deployers and one lock, with the real script behind a real sshd.

The holder of the lock is named, and a dead holder loses it.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from jobs.errors import ExitCode, ToolkitError
from remote.deploy import lock
from remote.deploy.lock import EXPIRES_S, Owner, is_gone, laptop_id, owner_of, release, take, unlock

CODE = "0123456789abcdef"


@pytest.fixture
def connection(sshd: Any, tmp_path: Path) -> Iterator[Any]:
    with sshd.connection(tmp_path / "state") as connection:
        yield connection


@pytest.fixture
def root(tmp_path: Path) -> str:
    return str(tmp_path / "data disk" / "rlhf-box")


def rewritten(root: str, **values: object) -> None:
    """The lock's file, with other values."""
    owner = Path(root) / "lock/owner"
    lines = [line for line in owner.read_text().splitlines() if line.split(" ")[0] not in values]
    owner.write_text("".join(f"{line}\n" for line in (*lines, *(f"{key} {value}" for key, value in values.items()))))


def test_it_is_taken_with_our_folder_and_given_back(connection: Any, root: str) -> None:
    held = take(connection, root, CODE, why="a 'test'\nof two lines; $(touch owned)", laptop="here")
    assert (Path(root) / ".rlhf-box").is_file() and (Path(root) / f"code/{CODE}.partial").is_dir()
    assert (Path(root) / "secrets").stat().st_mode & 0o777 == 0o700
    owner = lock.holder(connection, root)
    assert owner is not None
    assert (owner.why, owner.laptop, owner.pid, owner.token) == (
        "a 'test' of two lines; $(touch owned)",
        "here",
        os.getpid(),
        held.token,
    )
    assert abs(owner.expires - time.time() - EXPIRES_S) < 5 and abs(owner.when - time.time()) < 5
    release(connection, held)
    assert lock.holder(connection, root) is None and not (Path(root) / "lock").exists()


def test_a_second_deployer_is_told_who_has_it(connection: Any, root: str) -> None:
    take(connection, root, CODE, why="run ppo-0412", laptop="theirs")
    rewritten(root, who="lin@desk", when=int(time.time()) - 240)
    with pytest.raises(ToolkitError) as busy:
        take(connection, root, CODE, why="mine", laptop="here")
    assert busy.value.exit_code == ExitCode.BUSY
    assert str(busy.value).startswith(
        "error: cannot deploy to `gpu-box`: another deploy holds the lock\n"
        "  why: lin@desk (run ppo-0412), 4m00s ago; it expires in "
    )
    assert "fab unlock --host gpu-box" in busy.value.hint


def test_of_ten_at_once_one_gets_it(sshd: Any, tmp_path: Path, root: str) -> None:
    said: list[str] = []

    def one() -> None:
        with sshd.connection(tmp_path / "state") as connection:
            try:
                take(connection, root, CODE, why="race", laptop="here")
                said.append("got")
            except ToolkitError as error:
                said.append(error.exit_code.name)

    threads = [threading.Thread(target=one) for _ in range(10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(said) == ["BUSY"] * 9 + ["got"]


@pytest.mark.parametrize(
    ("values", "why"),
    [
        ({"expires": 1}, "it has expired"),
        ({"box": f"another-boot {socket.gethostname()}"}, "the box was restarted since"),
    ],
)
def test_a_stale_one_is_taken_over_and_said(connection: Any, root: str, values: dict[str, object], why: str) -> None:
    before = take(connection, root, CODE, why="dead", laptop="theirs")
    rewritten(root, who="lin@desk", **values)
    held = take(connection, root, CODE, why="alive", laptop="here")
    assert held.took_over == f"lin@desk: {why}"
    release(connection, before)  # the dead one wakes up: it is not his any more
    owner = lock.holder(connection, root)
    assert owner is not None and owner.token == held.token
    assert [path.name for path in Path(root).glob("lock*")] == ["lock"]


def test_one_of_another_host_that_shares_the_folder_is_not_taken_over(connection: Any, root: str) -> None:
    take(connection, root, CODE, why="alive there", laptop="theirs")
    rewritten(root, who="lin@desk", box="another-boot another-host")
    with pytest.raises(ToolkitError) as busy:
        take(connection, root, CODE, why="mine", laptop="here")
    assert busy.value.exit_code == ExitCode.BUSY and busy.value.why.startswith("lin@desk")


def test_a_sign_of_life_from_the_box_keeps_it(connection: Any, root: str) -> None:
    take(connection, root, CODE, why="makes the environment", laptop="theirs")
    rewritten(root, expires=1)
    (Path(root) / "lock/renewed").write_text(f"{int(time.time()) + 60}\n")
    with pytest.raises(ToolkitError) as busy:
        take(connection, root, CODE, why="mine", laptop="here")
    assert busy.value.exit_code == ExitCode.BUSY and "it expires in" in busy.value.why


def test_a_killed_deploy_of_this_laptop_is_taken_over_at_once_and_its_work_ended(connection: Any, root: str) -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    take(connection, root, CODE, why="killed", laptop="here")
    rewritten(root, pid=gone.pid)
    with subprocess.Popen(["sleep", "60"]) as worker:
        start = Path(f"/proc/{worker.pid}/stat").read_text().rsplit(") ", 1)[1].split()[19]
        (Path(root) / "lock/worker").write_text(f"{worker.pid} {start}\n")
        seen = lock.holder(connection, root)
        assert (
            seen is not None
            and seen.worker == worker.pid
            and is_gone(seen, "here")
            and not is_gone(seen, "another laptop")
        )
        held = take(connection, root, CODE, why="again", laptop="here", seen=seen)
        assert held.took_over.endswith(": its deploy was killed")
        assert worker.wait(5) == -15


def test_a_number_that_is_another_process_now_is_not_ended(connection: Any, root: str) -> None:
    take(connection, root, CODE, why="x", laptop="here")
    with subprocess.Popen(["sleep", "60"]) as innocent:
        (Path(root) / "lock/worker").write_text(f"{innocent.pid} 1\n")
        owner = unlock(connection, root)
        assert owner is not None and owner.worker == 0
        assert innocent.poll() is None
        innocent.kill()


def test_one_without_an_owner_is_somebody_who_is_just_taking_it(connection: Any, root: str) -> None:
    release(connection, take(connection, root, CODE, why="x", laptop="here"))
    bare = Path(root) / "lock"
    bare.mkdir()
    with pytest.raises(ToolkitError) as busy:
        take(connection, root, CODE, why="x", laptop="here")
    assert busy.value.exit_code == ExitCode.BUSY
    os.utime(bare, (1, 1))
    assert "nobody wrote down" in take(connection, root, CODE, why="x", laptop="here").took_over


def test_unlock_shows_whose_it_was(connection: Any, root: str) -> None:
    assert unlock(connection, root) is None
    take(connection, root, CODE, why="stuck", laptop="theirs")
    owner = unlock(connection, root)
    assert owner is not None and str(owner).endswith("(stuck)")
    assert unlock(connection, root) is None
    assert Path(root).is_dir()


def test_a_folder_of_somebody_else_is_left_alone(connection: Any, root: str) -> None:
    (Path(root) / "lock").mkdir(parents=True)
    (Path(root) / "code").mkdir()
    (Path(root) / "code/mine.partial").write_text("")
    with pytest.raises(ToolkitError, match="exists, and is not ours") as refused:
        take(connection, root, CODE, why="x", laptop="here")
    assert refused.value.exit_code == ExitCode.UNFIT
    assert unlock(connection, root) is None
    assert (Path(root) / "lock").is_dir() and (Path(root) / "code/mine.partial").exists()


def test_what_a_dead_deploy_left_half_goes_with_the_next(connection: Any, root: str) -> None:
    held = take(connection, root, "f" * 16, why="x", laptop="here")
    release(connection, held)
    (Path(root) / f"code/{'f' * 16}.partial/file").write_text("")
    take(connection, root, CODE, why="x", laptop="here")
    assert sorted(path.name for path in (Path(root) / "code").iterdir()) == [f"{CODE}.partial", f"{CODE}.temp"]


def test_a_laptop_has_one_name(tmp_path: Path) -> None:
    assert laptop_id(tmp_path / "a") == laptop_id(tmp_path / "a") != laptop_id(tmp_path / "b")


def test_a_torn_answer_names_nobody() -> None:
    assert owner_of(["busy", "clock 10"]) is None
    assert owner_of(["clock 1000", "lock who a\x1b[2J", "lock when x", "lock expires 1060"]) == Owner(
        who="a\\x1b[2J", expires=1060, now=1000
    )
