"""Host keys by name, and the user's key put on a box after one password.

Against a real sshd, and a server that asks for a password.
"""

from __future__ import annotations

import contextlib
import io
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import paramiko
import pytest

from jobs.errors import ExitCode, ToolkitError
from remote.inventory import Box, find
from remote.output import Sayer
from remote.ssh.host_keys import HostKey, HostKeyChanged, KnownHosts, install_key, trust
from tests.remote.conftest import Sshd, make_key


def key(letter: str = "a", sort: str = "ssh-ed25519") -> HostKey:
    return HostKey(sort, letter.encode() * 32)


# --- the file


def test_a_key_is_kept_once(tmp_path: Path) -> None:
    known = KnownHosts(tmp_path / "new folder" / "gpu-box", "gpu-box")
    assert not known.keys
    assert known.keep(key("a")) and known.keep(key("a"))
    assert not known.keep(key("b")) and not known.keep(key("b", "ssh-rsa"))
    assert known.keys == (key("a"),)
    known.replace(key("b"))
    assert known.keys == (key("b"),)
    assert [file.name for file in known.file.parent.iterdir()] == ["gpu-box"]
    assert known.file.parent.stat().st_mode & 0o77 == 0


def test_of_two_at_once_one_is_first(tmp_path: Path) -> None:
    known, kept, start = KnownHosts(tmp_path / "gpu-box", "gpu-box"), [], threading.Barrier(8)

    def keep(letter: str) -> None:
        start.wait()
        if known.keep(key(letter)):
            kept.append(letter)

    threads = [threading.Thread(target=keep, args=(letter,)) for letter in "abcdefgh"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [key(letter) for letter in kept] == list(known.keys)


def test_lines_that_are_none(tmp_path: Path) -> None:
    known = KnownHosts(tmp_path / "gpu-box", "gpu-box")
    known.file.write_text(
        f"# comment\n\ngpu-box\ngpu-box ssh-ed25519 not/base64!\nother ssh-ed25519 AAAA\n\xff\n"
        f"x,gpu-box ssh-rsa {'YWFh'} words\n"
    )
    assert known.keys == (HostKey("ssh-rsa", b"aaa"),)
    known.file.write_text("")
    assert known.keep(key())  # an empty file is no key


def test_a_fingerprint_is_that_of_ssh_keygen(tmp_path: Path, sshd: Sshd) -> None:
    offered = sshd.connection(tmp_path).offered_key()
    assert offered.fingerprint == sshd.host_key()
    known = KnownHosts(tmp_path / "file", "x")
    known.keep(offered)
    assert (
        sshd.host_key()
        in subprocess.run(["ssh-keygen", "-lf", known.file], capture_output=True, text=True, check=True).stdout
    )


# --- fab trust


def test_trust(own_sshd: Sshd, tmp_path: Path) -> None:
    one, two = own_sshd.host_key("one"), own_sshd.host_key("two")
    with own_sshd.connection(tmp_path) as connection:
        assert str(trust(connection)) == f"host key {one} (ssh-ed25519): new, kept from now on"
        assert str(trust(connection)) == f"host key {one} (ssh-ed25519): known"
        own_sshd.start(host_key="two")
        with pytest.raises(HostKeyChanged, match="has changed"):
            trust(connection)
        with pytest.raises(HostKeyChanged, match="shows another host key"):
            trust(connection, replace=True, host_key=one)
        with pytest.raises(HostKeyChanged):
            trust(connection, host_key=two)  # to know it is not to say that the old one may go
        assert [each.fingerprint for each in connection.known_hosts.keys] == [one]
        assert (
            str(trust(connection, replace=True, host_key=two)) == f"host key {two} (ssh-ed25519): replaced (was {one})"
        )
        connection.query(["true"])
        assert trust(connection, replace=True).status == "known"


def test_another_sort_of_key_is_replaced_too(own_sshd: Sshd, tmp_path: Path) -> None:
    with own_sshd.connection(tmp_path) as connection:
        trust(connection)
        own_sshd.start(host_key="other")
        with pytest.raises(HostKeyChanged):
            trust(connection)
        assert trust(connection, replace=True).status == "replaced"
        assert subprocess.run(connection.stream(["true"]), check=False).returncode == 0


def test_of_several_keys_the_known_one_is_asked_for(own_sshd: Sshd, tmp_path: Path) -> None:
    own_sshd.start(host_key="other")
    with own_sshd.connection(tmp_path) as connection:
        trust(connection)
    own_sshd.stop()
    own_sshd._settings = (f'HostKey "{own_sshd.folder}/host_one"',)
    own_sshd.start(host_key="other")
    with own_sshd.connection(tmp_path) as connection:
        assert trust(connection).status == "known"
        connection.query(["true"])
        assert subprocess.run(connection.stream(["true"]), check=False).returncode == 0


def test_a_key_may_be_known_before(sshd: Sshd, tmp_path: Path) -> None:
    with sshd.connection(tmp_path) as connection:
        with pytest.raises(HostKeyChanged) as raised:
            trust(connection, host_key=f"SHA256:{'x' * 43}")
        assert (raised.value.exit_code, connection.known_hosts.keys) == (ExitCode.UNREACHABLE, ())
        with pytest.raises(ToolkitError, match="is not a fingerprint"):
            trust(connection, host_key="MD5:1234")
        assert trust(connection, host_key=sshd.host_key()).status == "new"


def test_dry_run_keeps_nothing(own_sshd: Sshd, tmp_path: Path) -> None:
    with own_sshd.connection(tmp_path, dry_run=True) as connection:
        assert trust(connection).status == "new"
        assert connection.known_hosts.keys == ()
    with own_sshd.connection(tmp_path) as connection:
        trust(connection)
    own_sshd.start(host_key="two")
    with own_sshd.connection(tmp_path, dry_run=True) as connection:
        assert trust(connection, replace=True).status == "replaced"
        assert [each.fingerprint for each in connection.known_hosts.keys] == [own_sshd.host_key("one")]


def test_a_jump_host_is_trusted_by_its_own_name(sshd: Sshd, own_sshd: Sshd, tmp_path: Path) -> None:
    file = tmp_path / "config"
    file.write_text(
        f'Host bastion\n  HostName 127.0.0.1\n  Port {own_sshd.port}\n  IdentityFile "{own_sshd.key}"\n'
        f'Host inner\n  HostName 127.0.0.1\n  Port {sshd.port}\n  IdentityFile "{sshd.key}"\n  ProxyJump bastion\n'
    )
    with sshd.connection(tmp_path, box=find("inner", {}), ssh_config=file) as connection:
        assert trust(connection).key.fingerprint == sshd.host_key()
        own_sshd.start(host_key="two")
        with pytest.raises(HostKeyChanged, match="`bastion`"):
            trust(connection, replace=True)  # told for `inner` alone
    with sshd.connection(tmp_path, box=find("bastion", {}), ssh_config=file) as connection:
        assert trust(connection, replace=True).status == "replaced"
    with sshd.connection(tmp_path, box=find("inner", {}), ssh_config=file) as connection:
        connection.query(["true"])


# --- the user's key


class AsksForPassword(paramiko.ServerInterface):
    """A server that runs commands for whoever has the password or a key of authorized_keys.

    sshd does that only for root, by PAM.
    """

    def __init__(self, home: Path) -> None:
        self.home = home

    def get_allowed_auths(self, username: str) -> str:
        return "publickey,password"

    def check_auth_password(self, username: str, password: str) -> int:
        with (self.home / "asked").open("a") as asked:
            asked.write(f"{password}\n")
        return paramiko.AUTH_SUCCESSFUL if password == "right $(word)" else paramiko.AUTH_FAILED

    def check_auth_publickey(self, username: str, key: paramiko.PKey) -> int:
        with contextlib.suppress(OSError):
            if key.get_base64() in (self.home / ".ssh/authorized_keys").read_text():
                return paramiko.AUTH_SUCCESSFUL
        return paramiko.AUTH_FAILED

    def check_channel_request(self, kind: str, chanid: int) -> int:
        return paramiko.OPEN_SUCCEEDED

    def check_channel_exec_request(self, channel: paramiko.Channel, command: bytes) -> bool:
        def run() -> None:
            done = subprocess.run(
                ["/bin/sh", "-c", command],
                input=channel.makefile("rb").read(),
                env={"HOME": str(self.home), "PATH": os.defpath},
                capture_output=True,
                check=False,
            )
            channel.sendall(done.stdout)
            channel.sendall_stderr(done.stderr)
            channel.send_exit_status(done.returncode)
            channel.close()

        threading.Thread(target=run, daemon=True).start()
        return True


@contextmanager
def password_server(home: Path) -> Iterator[int]:
    transports: list[paramiko.Transport] = []
    host_key = paramiko.ECDSAKey.generate()
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            while True:
                try:
                    connection, _ = server.accept()
                except OSError:
                    return
                transport = paramiko.Transport(connection)
                transport.add_server_key(host_key)
                transports.append(transport)
                with contextlib.suppress(paramiko.SSHException, EOFError):
                    transport.start_server(server=AsksForPassword(home))

        threading.Thread(target=serve, daemon=True).start()
        yield server.getsockname()[1]
        server.shutdown(socket.SHUT_RDWR)
    for transport in transports:
        transport.close()


@pytest.fixture
def person(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Who types what stands in the file `password`."""
    (tmp_path / "ask").write_text(f'#!/bin/sh\necho "$1" >>"{tmp_path}/prompts"\ncat "{tmp_path}/password"\n')
    (tmp_path / "ask").chmod(0o700)
    (tmp_path / "password").write_text("right $(word)\n")
    monkeypatch.setenv("SSH_ASKPASS", str(tmp_path / "ask"))
    monkeypatch.setenv("SSH_ASKPASS_REQUIRE", "force")
    return tmp_path / "password"


def test_the_users_key_is_installed_after_one_password(sshd: Sshd, tmp_path: Path, person: Path) -> None:
    home, mine = tmp_path / "home", tmp_path / "my key"
    (home / ".ssh").mkdir(parents=True)
    authorized = home / ".ssh/authorized_keys"
    authorized.write_text("ssh-ed25519 AAAAsomebody else's")  # whose last line has no end
    make_key(mine)
    spoken = io.StringIO()
    with password_server(home) as port:
        box = Box(name="gpu-box", address="127.0.0.1", port=port, user="root", key=str(mine))
        with sshd.connection(tmp_path, box=box, say=Sayer(err=spoken), dry_run=True) as connection:
            assert install_key(connection).status == "shown"
            assert not (home / "asked").exists() and "ssh -F" in spoken.getvalue()
        with sshd.connection(tmp_path, box=box) as connection:
            assert str(install_key(connection)) == f"{mine}.pub was added to authorized_keys on the box"
            assert connection.query(["echo", "in"]).out == "in\n"
            assert install_key(connection).status == "there"
    public = Path(f"{mine}.pub").read_text()
    assert authorized.read_text() == f"ssh-ed25519 AAAAsomebody else's\n{public}"
    assert (home / "asked").read_text() == "right $(word)\n"
    assert (tmp_path / "prompts").read_text().count("\n") == 1


def test_a_wrong_password_is_asked_for_once(sshd: Sshd, tmp_path: Path, person: Path) -> None:
    home, mine = tmp_path / "home", tmp_path / "mine"
    home.mkdir()
    person.write_text("wrong\n")
    make_key(mine)
    with password_server(home) as port:
        box = Box(name="gpu-box", address="127.0.0.1", port=port, user="root", key=str(mine))
        with sshd.connection(tmp_path, box=box) as connection, pytest.raises(ToolkitError) as raised:
            install_key(connection)
    assert raised.value.exit_code == ExitCode.UNREACHABLE
    assert Path(f"{mine}.pub").read_text().strip() in raised.value.hint
    assert (home / "asked").read_text() == "wrong\n"
    assert not (home / ".ssh").exists()


WITHOUT_A_TERMINAL = """
import sys
from pathlib import Path
from remote.ssh.connection import BoxConnection
from remote.inventory import Box
from remote.ssh.host_keys import install_key
with BoxConnection(Box.model_validate_json(sys.argv[2]), Path(sys.argv[1]), ssh_config=Path(sys.argv[3])) as line:
    install_key(line)
"""


def test_without_a_terminal_nobody_is_asked_and_that_is_said(sshd: Sshd, tmp_path: Path) -> None:
    home, mine = tmp_path / "home", tmp_path / "mine"
    home.mkdir()
    make_key(mine)
    clean = {name: value for name, value in os.environ.items() if "ASKPASS" not in name and "DISPLAY" not in name}
    with password_server(home) as port:
        box = Box(name="gpu-box", address="127.0.0.1", port=port, user="root", key=str(mine))
        argv = [
            sys.executable,
            "-c",
            WITHOUT_A_TERMINAL,
            str(tmp_path),
            box.model_dump_json(),
            str(sshd.folder / "config"),
        ]
        root = Path(__file__).parents[3]
        done = subprocess.run(
            argv,
            cwd=root,
            env=clean,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            start_new_session=True,
            check=False,
        )
    assert (
        "there is no terminal on which to ask for its password" in done.stderr
        and Path(f"{mine}.pub").read_text().strip() in done.stderr
    )
    assert not (home / "asked").exists()  # not even an empty password, which would count as a wrong one


def test_only_trust_asks_for_a_password(sshd: Sshd, tmp_path: Path, person: Path) -> None:
    home, mine = tmp_path / "home", tmp_path / "mine"
    home.mkdir()
    make_key(mine)
    with password_server(home) as port:
        box = Box(name="gpu-box", address="127.0.0.1", port=port, user="root", key=str(mine))
        with sshd.connection(tmp_path, box=box) as connection:
            with pytest.raises(ToolkitError):
                connection.query(["true"])
            assert subprocess.run(connection.stream(["true"]), capture_output=True, check=False).returncode == 255
            assert (
                subprocess.run(
                    [*connection.rsync_shell(), "127.0.0.1", "true"], capture_output=True, check=False
                ).returncode
                == 255
            )
    assert not (home / "asked").exists() and not (tmp_path / "prompts").exists()


def test_a_key_that_is_there_already(sshd: Sshd, tmp_path: Path) -> None:
    before = (sshd.folder / "authorized_keys").read_text()
    with sshd.connection(tmp_path) as connection:
        assert install_key(connection).status == "there"
    assert (sshd.folder / "authorized_keys").read_text() == before


def test_there_is_no_key_to_install(sshd: Sshd, tmp_path: Path) -> None:
    make_key(tmp_path / "mine")
    private = (tmp_path / "mine").read_text()
    (tmp_path / "mine.pub").unlink()
    with sshd.connection(tmp_path, box=sshd.box(key=str(tmp_path / "mine"))) as connection:
        with pytest.raises(ToolkitError, match="no SSH key yet") as raised:
            install_key(connection)
        assert "ssh-keygen" in raised.value.hint
        with pytest.raises(ToolkitError, match="is not a public key") as private_one:
            install_key(connection, tmp_path / "mine")
    assert private.splitlines()[1] not in str(private_one.value)


@pytest.mark.parametrize("before", [None, "", "# {key}\n", 'command="x" {key}\n', "{key}"])
def test_a_line_of_authorized_keys_is_there_once(tmp_path: Path, before: str | None) -> None:
    from remote.ssh.host_keys import INSTALL

    words = ["ssh-ed25519", "AAAAC3NzaC1lZDI1NTE5AAAAIB" + "x" * 42, "me@here"]
    line, file = " ".join(words), tmp_path / "home/.ssh/authorized_keys"
    (tmp_path / "home").mkdir()
    if before is not None:
        file.parent.mkdir()
        file.write_text(before.format(key=line))
    argv = ["sh", "-c", INSTALL, "rlhf-box", line, words[1]]
    for _ in range(2):
        subprocess.run(argv, env={"HOME": str(tmp_path / "home"), "PATH": os.environ["PATH"]}, check=True)
    held = before is not None and words[1] in before.format(key=line) and not before.startswith("#")
    assert file.read_text() == (before or "").format(key=line) + ("" if held else f"{line}\n")
    assert file.stat().st_mode & 0o77 == 0 or before is not None
