"""Boxes whose login shell is not bash, prints something, or runs another program: a real sshd.

sshd hands each command to the shell as a login would: `SHELL -c COMMAND`.
"""

from __future__ import annotations

import hashlib
import json
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from jobs.errors import ExitCode, ToolkitError
from remote.deploy.sync import send_whole, tree_of
from remote.runs.deployed import find_deployment
from remote.ssh import commands
from tests.remote.box_folder import BoxFolder
from tests.remote.conftest import Sshd
from tests.remote.ssh.test_connection import HOSTILE
from tests.shells import LOGIN_SHELLS, login_shell

SHOWS_WORDS = "import json, sys; print(json.dumps(sys.argv[1:]))"
GREETING = "echo welcome to the box; echo 'mail: none' >&2; "
ONE_LINE = [*(word for word in HOSTILE if "\n" not in word), "a!b!!", "\\'!\"", "=ls", "^x^y", "{a,b}", "''"]


def with_shell(make_sshd: Callable[..., Sshd], shell: list[str], before: str = "") -> Sshd:
    return make_sshd(f'ForceCommand {before}exec {shlex.join(shell)} -c "$SSH_ORIGINAL_COMMAND"')


@pytest.fixture(scope="session", params=LOGIN_SHELLS)
def shell_box(
    request: pytest.FixtureRequest, make_sshd: Callable[..., Sshd], tmp_path_factory: pytest.TempPathFactory
) -> Sshd:
    shell = login_shell(request.param, tmp_path_factory.getbasetemp() / request.param)
    return with_shell(make_sshd, shell, GREETING)


# --- any shell, also one that prints


def test_commands_of_each_kind(shell_box: Sshd, tmp_path: Path) -> None:
    """A command, one with data, a script, and streams: their words arrive as they are.

    What the login prints is no part of an answer.
    """
    words, data = [sys.executable, "-c", SHOWS_WORDS], bytes(range(256)) * 1000
    with shell_box.connection(tmp_path) as connection:
        answer = connection.query([*words, *HOSTILE])
        assert (json.loads(answer.out), answer.err) == (HOSTILE, "")
        argv = ["sh", "-c", 'sha256sum; echo "$1" >&2; exit 7', "a'b", "it's \\ !"]
        digest = connection.change(argv, stdin=data, check=False)
        assert digest.out.split()[0] == hashlib.sha256(data).hexdigest()
        assert (digest.code, digest.err) == (7, "it's \\ !\n")
        script = b"cat; printf '%s|' \"$@\"; exit 3\n"  # which reads its input, and would take its own rest for it
        read = connection.query(commands.sh_script(*HOSTILE[:6]), stdin=script, check=False)
        assert (read.code, read.out, read.err) == (3, "".join(f"{word}|" for word in HOSTILE[:6]), "")
        shown = subprocess.run(connection.stream([*words, *ONE_LINE]), capture_output=True, check=True)
        assert json.loads(shown.stdout.splitlines()[-1]) == ONE_LINE
        argv, sent = connection.script_stream(commands.sh_script("a b", "c\\d"), script)
        streamed = subprocess.run(argv, input=sent, capture_output=True, check=False)
        assert (streamed.returncode, streamed.stdout.splitlines()[-1]) == (3, b"a b|c\\d|")


def test_what_fab_exec_is_given_is_what_runs(shell_box: Sshd, tmp_path: Path) -> None:
    typed = r"""printf '%s\n' "a\\b" 'c\d' "it's" '!x' "$HOME" *nothing* """
    with shell_box.connection(tmp_path) as connection:
        answer = connection.change(["sh", "-c", typed])
    assert answer.out == f"a\\b\nc\\d\nit's\n!x\n{shell_box.home}\n*nothing*\n"


def test_files_are_sent_and_what_is_deployed_is_found(shell_box: Sshd, tmp_path: Path) -> None:
    """By rsync if it can: a greeting disturbs it, and tar goes on."""
    (tmp_path / "here").mkdir()
    (tmp_path / "here/a 'b'").write_text("sent")
    box = BoxFolder(tmp_path / "data dir/rlhf-box")
    (box.root / "code/0123456789abcdef/remote/on_box").mkdir(parents=True)
    (box.root / "code/0123456789abcdef/remote/on_box/supervisor.sh").touch()
    (box.root / "deployed").write_text("code 0123456789abcdef\nruntime bare\n")
    (box.root / "inputs").mkdir()
    given = shell_box.box(data_folder=str(tmp_path / "data dir"))
    with shell_box.connection(tmp_path / "state", box=given) as connection:
        tree = tree_of(tmp_path / "here", ["a 'b'"])
        send_whole(connection, tree, f"{box.root}/inputs/{tree.key}", rsync=shutil.which("rsync") or "")
        deployed = find_deployment(connection, {})
    assert (box.root / f"inputs/{tree.key}/a 'b'").read_text() == "sent"
    assert (deployed.root, deployed.code, deployed.inputs) == (str(box.root), "0123456789abcdef", {tree.key})


# --- another program in place of the shell


@pytest.mark.parametrize(
    ("program", "printed"),
    [
        (
            "echo This account is currently not available.; exit 1",
            "This account is currently not available. (exit code 1)",
        ),
        ("echo welcome; echo only backups here >&2; exit 0", "only backups here (exit code 0)"),
        ("exit 5", "it printed nothing (exit code 5)"),
        ("exec cat", "it took for its own what was meant for /bin/sh (exit code 0)"),
    ],
)
def test_a_box_that_runs_no_commands(
    make_sshd: Callable[..., Sshd], tmp_path: Path, program: str, printed: str
) -> None:
    """nologin, a forced command: one line with the cause, and nothing of our own command."""
    with make_sshd(f"ForceCommand {program}").connection(tmp_path) as connection:
        for argv, stdin in ((["true"], b""), (["cat"], b"data"), (commands.sh_script("look"), b"exit 0\n")):
            with pytest.raises(ToolkitError, match="`gpu-box` runs no commands") as raised:
                connection.change(argv, stdin=stdin)
            assert raised.value.exit_code == ExitCode.UNFIT
            assert stdin == b"data" or printed in raised.value.why
            assert "LINE_WAS_RUN" not in raised.value.why and len(raised.value.why.splitlines()) == 1
            assert ".bashrc" in raised.value.hint


@pytest.mark.parametrize("name", ["fish", "zsh", "tcsh", "dash", "bash"])
def test_a_login_file_that_becomes_another_shell(make_sshd: Callable[..., Sshd], tmp_path: Path, name: str) -> None:
    """That shell reads what we send, and would run data as commands: so nothing is sent."""
    shell = login_shell(name, tmp_path)
    with make_sshd(f"ForceCommand exec {shlex.join(shell)}").connection(tmp_path) as connection:
        with pytest.raises(ToolkitError, match="runs no commands"):
            connection.query(["touch", str(tmp_path / "ran")])
    assert not (tmp_path / "ran").exists()
