"""Logins as OpenSSH makes them, whatever the user's ssh configuration says: against a real sshd."""

from __future__ import annotations

import getpass
import os
import pty
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from jobs.errors import ToolkitError
from remote.inventory import Box, find
from remote.ssh.host_keys import KeyRefused, install_key
from remote.ssh.login import LoginNotes, key_state
from tests.remote.conftest import Sshd, make_key
from tests.remote.ssh.test_connection import both_ways
from tests.remote.ssh.test_host_keys import password_server

ROOT = Path(__file__).parents[3]
MakeSshd = Callable[..., Sshd]


def accepted(server: Sshd) -> int:
    return server.log.count("Accepted publickey for ")


# --- one connection


def test_a_verb_logs_in_once_and_leaves_nothing(own_sshd: Sshd, tmp_path: Path) -> None:
    with own_sshd.connection(tmp_path / "state") as connection:
        connection.query(["true"])
        assert both_ways(connection) == ["$HOME a\n"] * 2
        rsync = [*connection.rsync_shell(), connection.target, "echo in"]
        assert subprocess.run(rsync, capture_output=True, check=True).stdout == b"in\n"
        folder = connection._folder
        assert folder is not None and folder.stat().st_mode & 0o777 == 0o700
    assert accepted(own_sshd) == 1
    assert not folder.exists() and not connection.is_open
    until = time.monotonic() + 10
    while len(own_sshd.processes()) > 1 and time.monotonic() < until:
        time.sleep(0.02)
    assert len(own_sshd.processes()) == 1  # the session's are gone


def test_a_stream_goes_on_without_a_kept_connection(own_sshd: Sshd, tmp_path: Path) -> None:
    """Made before the connection broke, started after."""
    with own_sshd.connection(tmp_path) as connection:
        connection.connect()
        argv = connection.stream(["echo", "in"])
        own_sshd.cut()
        assert subprocess.run(argv, capture_output=True, check=False).stdout == b"in\n"


# --- what a configuration may hold


def test_a_box_that_allows_one_session_for_each_connection(make_sshd: MakeSshd, tmp_path: Path) -> None:
    server = make_sshd("MaxSessions 1")
    with server.connection(tmp_path) as connection:
        connection.connect()
        argv, script = connection.script_stream(["sh", "-c", "echo begun; read -r _ <$0", str(tmp_path / "go")])
        os.mkfifo(tmp_path / "go")
        with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as stream:
            assert stream.stdin is not None and stream.stdout is not None
            stream.stdin.write(script)
            stream.stdin.close()
            assert stream.stdout.readline() == b"begun\n"
            assert connection.query(["echo", "one"]).out == "one\n"
            (tmp_path / "go").write_text("on\n")
        assert stream.returncode == 0
        assert connection.query(["echo", "two"]).out == "two\n"
    assert accepted(server) == 2


def test_a_configuration_that_only_ssh_can_read(sshd: Sshd, tmp_path: Path) -> None:
    """Bytes of Latin-1 and GBK, Match final, comments, a RemoteCommand, a shared connection."""
    key = os.fsencode(tmp_path) + b"/caf\xe9 key"
    make_key(tmp_path / "plain")
    (tmp_path / "plain").rename(os.fsdecode(key))
    with (sshd.folder / "authorized_keys").open("a") as keys:
        keys.write((tmp_path / "plain.pub").read_text())
    (tmp_path / "config").write_bytes(
        b"# caf\xe9 \xc4\xe3\xba\xc3\nHost far # the rented one\n  HostName 127.0.0.1\n  Port %d # for now\n"
        b"  RemoteCommand tmux\n  RequestTTY yes\n  ControlMaster auto\n  ControlPath %s/theirs\n  ControlPersist yes\n"
        b'Match final host 127.0.0.1\n  IdentityAgent none\n  IdentityFile "%s"\n'
        % (sshd.port, os.fsencode(tmp_path), key)
    )
    with sshd.connection(tmp_path / "state", box=find("far", {}), ssh_config=tmp_path / "config") as connection:
        assert both_ways(connection) == ["$HOME a\n"] * 2
        assert os.fsencode(connection.resolved.keys[-1]) == key
    assert not (tmp_path / "theirs").exists()


def test_a_configuration_that_would_keep_commands_from_running(sshd: Sshd, tmp_path: Path) -> None:
    """Or send them to the background, or without their input. OpenSSH 8.7 has these options."""
    config = tmp_path / "config"
    config.write_text(
        "Host *\n  IdentityAgent none\n  SessionType none\n  StdinNull yes\n  ForkAfterAuthentication yes\n"
    )
    with sshd.connection(tmp_path / "state", ssh_config=config) as connection:
        assert both_ways(connection) == ["$HOME a\n"] * 2
        for is_kept in (True, False):  # else it logs in by itself
            assert connection.is_open is is_kept
            sent = connection.local(connection.stream(["cat"]), changes=False, stdin=b"data", timeout_s=60)
            assert sent.out == "data"
            connection.close()


def test_a_jump_host_as_ssh_itself_takes_it(sshd: Sshd, hop: Sshd, tmp_path: Path) -> None:
    """Its name has tokens; and what is meant for a ProxyCommand is not for it."""
    config = tmp_path / "config"
    config.write_text(
        f"Host far\n  HostName 127.0.0.1\n  Port {sshd.port}\n  ProxyJump %r@%h:{hop.port}\n"
        f'Host *\n  IdentityAgent none\n  ProxyUseFdpass yes\n  IdentityFile "{sshd.key}"\n  IdentityFile "{hop.key}"\n'
    )
    with sshd.connection(tmp_path / "state", box=find("far", {}), ssh_config=config) as connection:
        assert both_ways(connection) == ["$HOME a\n"] * 2
    assert accepted(hop)


def test_a_key_whose_path_has_a_token(sshd: Sshd, tmp_path: Path) -> None:
    file = tmp_path / "100%d sure" / "key"
    file.parent.mkdir()
    file.write_bytes(sshd.key.read_bytes())
    file.chmod(0o600)
    with sshd.connection(tmp_path / "state", box=sshd.box(key=str(file))) as connection:
        assert both_ways(connection) == ["$HOME a\n"] * 2
    variable = file.rename(tmp_path / "${HOME} key")
    with (
        sshd.connection(tmp_path / "state", box=sshd.box(key=str(variable))) as connection,
        pytest.raises(ToolkitError, match=r"ssh cannot read a key file at .*HOME. key"),
    ):
        connection.query(["true"])


def test_a_temporary_folder_that_no_socket_can_be_in(
    sshd: Sshd, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(tempfile.gettempdir()) / f"it's ${{a}} 100%d {os.getpid()}"
    folder.mkdir()
    try:
        monkeypatch.setattr(tempfile, "tempdir", str(folder))
        with sshd.connection(tmp_path) as connection:
            assert both_ways(connection) == ["$HOME a\n"] * 2
        assert [*folder.iterdir()] == []
    finally:
        folder.rmdir()


def test_a_certificate(make_sshd: MakeSshd, tmp_path: Path) -> None:
    for name in ("authority", "mine"):
        make_key(tmp_path / name)
    sign = ["ssh-keygen", "-q", "-s", "authority", "-I", "me", "-n", getpass.getuser(), "mine.pub"]
    subprocess.run(sign, cwd=tmp_path, check=True)
    (tmp_path / "mine-cert.pub").rename(tmp_path / "elsewhere.pub")
    server = make_sshd(f"TrustedUserCAKeys {tmp_path}/authority.pub")
    text = f"  IdentityAgent none\n  CertificateFile {tmp_path}/elsewhere.pub\n"
    (tmp_path / "config").write_text(f"Host *\n{text}")
    box = server.box(key=str(tmp_path / "mine"))
    with server.connection(tmp_path / "state", box=box, ssh_config=tmp_path / "config") as connection:
        assert both_ways(connection) == ["$HOME a\n"] * 2


@contextmanager
def agent(folder: Path, keys: int, *options: str) -> Iterator[tuple[Path, list[Path]]]:
    """Yield the socket of an agent that holds so many new keys, and their files."""
    (folder / "ask").write_text(f'#!/bin/sh\necho "$1" >>"{folder}/prompts"\n')
    (folder / "ask").chmod(0o700)
    path = folder / "agent"
    environment = {**os.environ, "SSH_ASKPASS": str(folder / "ask"), "DISPLAY": ":0", "SSH_AUTH_SOCK": str(path)}
    process = subprocess.Popen(["ssh-agent", "-D", "-a", str(path)], stdout=subprocess.DEVNULL, env=environment)
    try:
        while not path.exists():
            time.sleep(0.01)
        files = [folder / f"key{number}" for number in range(keys)]
        for file in files:
            make_key(file)
            subprocess.run(["ssh-add", "-q", *options, file], env=environment, check=True, capture_output=True)
        yield path, files
    finally:
        process.terminate()
        process.wait()


def test_a_key_is_used_only_if_the_box_takes_it(sshd: Sshd, tmp_path: Path) -> None:
    """Each use of these keys asks a person, as a security key does by its touch: once a verb."""
    with agent(tmp_path, 4, "-c") as (socket, keys):
        with (sshd.folder / "authorized_keys").open("a") as known:
            known.write(Path(f"{keys[2]}.pub").read_text())
        (tmp_path / "config").write_text(f"Host *\n  IdentityAgent {socket}\n  IdentityFile /nowhere\n")
        given = sshd.box(key=None)
        with sshd.connection(tmp_path / "state", box=given, ssh_config=tmp_path / "config") as connection:
            assert both_ways(connection) == ["$HOME a\n"] * 2
    assert (tmp_path / "prompts").read_text().count("Allow use of key") == 1


def test_more_keys_than_the_box_allows_tries(sshd: Sshd, tmp_path: Path) -> None:
    """sshd allows six. A key that is named is offered first, as ssh does; else that is the hint."""
    with agent(tmp_path, 7) as (socket, keys):
        with (sshd.folder / "authorized_keys").open("a") as known:
            known.write(Path(f"{keys[6]}.pub").read_text())
        for line, works in ((f"IdentityFile {keys[6]}", True), ("IdentityFile /nowhere", False)):
            (tmp_path / "config").write_text(f"Host *\n  IdentityAgent {socket}\n  {line}\n")
            given = sshd.box(key=None)
            with sshd.connection(tmp_path / "state", box=given, ssh_config=tmp_path / "config") as connection:
                if works:
                    assert both_ways(connection) == ["$HOME a\n"] * 2
                    continue
                with pytest.raises(KeyRefused) as raised:
                    connection.query(["true"])
            assert "then the box ended the connection, since it allows only so many tries" in raised.value.why
            assert "IdentitiesOnly" in raised.value.hint and "fab trust" not in raised.value.hint


# --- what a box may want


def test_a_second_factor(make_sshd: MakeSshd, tmp_path: Path) -> None:
    """No key is missing there, so that `fab trust` says the same as any verb."""
    server = make_sshd("PasswordAuthentication yes", "AuthenticationMethods publickey,password")
    with server.connection(tmp_path) as connection:
        for call in (connection.connect, lambda: install_key(connection)):
            with pytest.raises(KeyRefused, match="`gpu-box` wants more than your key") as raised:
                call()
            assert raised.value.why == "besides the key it wants: password"
            assert "in a terminal" in raised.value.hint and "fab trust" not in raised.value.hint


def test_a_box_that_takes_no_keys(make_sshd: MakeSshd, tmp_path: Path) -> None:
    server = make_sshd("PasswordAuthentication yes", "PubkeyAuthentication no")
    with server.connection(tmp_path) as connection, pytest.raises(KeyRefused, match="takes no keys") as raised:
        connection.connect()
    assert raised.value.why == "it takes: password"
    assert "in a terminal" in raised.value.hint and "fab trust" not in raised.value.hint


def test_a_box_that_takes_keys_alone_gets_none_by_trust(sshd: Sshd, tmp_path: Path) -> None:
    make_key(tmp_path / "mine")
    with sshd.connection(tmp_path / "state", box=sshd.box(key=str(tmp_path / "mine"))) as connection:
        with pytest.raises(ToolkitError, match="cannot put your key on `gpu-box`: it takes no password") as raised:
            install_key(connection)
    assert (tmp_path / "mine.pub").read_text().strip() in raised.value.hint


ASKS = """
import sys
from pathlib import Path
from remote.inventory import Box
from remote.ssh.connection import BoxConnection
with BoxConnection(Box.model_validate_json(sys.argv[2]), Path(sys.argv[1]), ssh_config=Path(sys.argv[3])) as connection:
    print("answer", connection.query(["echo", "one"]).out, connection.query(["echo", "two"]).out)
"""


def in_a_terminal(box: Box, state: Path, config: Path, prompt: bytes, typed: bytes, *, program: str = ASKS) -> bytes:
    """Run a program with its own terminal, answer the first prompt, and return what was shown."""
    argv = [sys.executable, "-c", program, str(state), box.model_dump_json(), str(config)]
    unset = ("ASKPASS", "DISPLAY", "AUTH_SOCK")
    clean = {name: value for name, value in os.environ.items() if not any(part in name for part in unset)}
    pid, terminal = pty.fork()
    if not pid:
        os.chdir(ROOT)
        os.execve(sys.executable, argv, clean)
    shown, until, has_typed = b"", time.monotonic() + 120, False
    while time.monotonic() < until:
        if not select.select([terminal], [], [], 0.1)[0]:
            continue
        try:
            shown += os.read(terminal, 4096)
        except OSError:  # the other side is closed
            break
        if prompt in shown and not has_typed:
            has_typed = os.write(terminal, typed + b"\n") > 0
    assert os.waitpid(pid, 0)[1] == 0, shown.decode()
    return shown


def test_in_a_terminal_a_password_is_asked_for_once(sshd: Sshd, tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    make_key(tmp_path / "mine")
    with password_server(tmp_path / "home") as port:
        box = Box(name="gpu-box", address="127.0.0.1", port=port, user="root", key=str(tmp_path / "mine"))
        shown = in_a_terminal(box, tmp_path, sshd.folder / "config", b"password:", b"right $(word)")
    assert b"answer one\r\n two\r\n" in shown and shown.count(b"password:") == 1
    assert (tmp_path / "home/asked").read_text() == "right $(word)\n"


def test_in_a_terminal_a_key_is_unlocked(sshd: Sshd, tmp_path: Path) -> None:
    make_key(tmp_path / "mine", passphrase="open sesame")
    with (sshd.folder / "authorized_keys").open("a") as known:
        known.write((tmp_path / "mine.pub").read_text())
    box = sshd.box(key=str(tmp_path / "mine"))
    shown = in_a_terminal(box, tmp_path, sshd.folder / "config", b"Enter passphrase for key", b"open sesame")
    assert b"answer one\r\n two\r\n" in shown and shown.count(b"Enter passphrase") == 1


TUNNELS = """
import socket
import sys
from pathlib import Path
from remote.inventory import Box
from remote.ssh.connection import BoxConnection
from remote.verbs.tunnel import open_tunnel
box = Box.model_validate_json(sys.argv[2])
with socket.create_server(("127.0.0.1", 0)) as server:
    local = server.getsockname()[1]
with BoxConnection(box, Path(sys.argv[1]), ssh_config=Path(sys.argv[3])) as connection:
    way = [f"127.0.0.1:{local}:127.0.0.1:{box.port}"]
    argv, asking = (connection.stream(forward=way, asks=asks) for asks in (False, True))
tunnel = open_tunnel(argv, asking, local)
print("it is", tunnel.state)
tunnel.close()
"""


def test_in_a_terminal_a_tunnel_asks_for_what_it_needs(sshd: Sshd, tmp_path: Path) -> None:
    make_key(tmp_path / "mine", passphrase="open sesame")
    with (sshd.folder / "authorized_keys").open("a") as known:
        known.write((tmp_path / "mine.pub").read_text())
    with sshd.connection(tmp_path) as connection:
        connection.connect()  # so that the host's key is known
    box, prompt = sshd.box(key=str(tmp_path / "mine")), b"Enter passphrase for key"
    shown = in_a_terminal(box, tmp_path, sshd.folder / "config", prompt, b"open sesame", program=TUNNELS)
    assert b"it is open\r\n" in shown and shown.count(prompt) == 1


# --- what is read of ssh's notes and of key files


def test_the_notes_of_a_login() -> None:
    """As OpenSSH 9.2 wrote them."""
    text = """OpenSSH_9.2p1 Debian-2+deb12u10, OpenSSL 3.0.19
debug1: Connection established.
debug1: Remote protocol version 2.0, remote software version OpenSSH_9.2p1
debug1: Server host key: ssh-ed25519 SHA256:1cnrz667L2XIs9fkXrRrApQ/xuznYAZ+J2U/cQ2T6e8
debug1: Authentications that can continue: publickey,password
debug1: Offering public key: /home/a b/.ssh/id_ed25519 ED25519 SHA256:4XgQ explicit agent
debug1: Authentications that can continue: publickey,password
debug1: Offering public key: me@work ED25519-SK SHA256:7aaa agent
debug1: Server accepts key: me@work ED25519-SK SHA256:7aaa agent
Authenticated using "publickey" with partial success.
debug1: Authentications that can continue: keyboard-interactive
root@box: Permission denied (keyboard-interactive).
"""
    notes = LoginNotes.of(text.replace("\n", "\r\n"))
    assert (notes.connected, notes.spoke, notes.wants_more, notes.wants_touch, notes.was_ended) == (
        *(True, True, True, True),
        False,
    )
    assert (notes.host_key_sort, notes.host_key) == (
        "ssh-ed25519",
        "SHA256:1cnrz667L2XIs9fkXrRrApQ/xuznYAZ+J2U/cQ2T6e8",
    )
    assert notes.tried == ("/home/a b/.ssh/id_ed25519 of the agent", "me@work of the agent")
    assert notes.methods == ("keyboard-interactive",) and notes.can_be_asked_for
    assert notes.words == "root@box: Permission denied (keyboard-interactive)."
    empty = LoginNotes.of("")
    assert (empty.methods, empty.spoke, empty.can_be_asked_for, empty.words) == (None, False, False, "")


def test_what_is_wrong_with_a_key(tmp_path: Path) -> None:
    made = {"open": [], "locked": ["-N", "secret"], "pem": ["-m", "PEM", "-t", "ecdsa"]}
    made["locked pem"] = [*made["pem"], "-N", "secret"]
    for name, options in made.items():
        subprocess.run(["ssh-keygen", "-q", "-f", tmp_path / name, "-N", "", *options], check=True)
    (tmp_path / "putty").write_text("PuTTY-User-Key-File-3: ssh-ed25519\n")
    states = {file.name: key_state(file) for file in tmp_path.iterdir()}
    assert {name: state for name, state in states.items() if state} == {
        "locked": "locked",
        "locked pem": "locked",
        "putty": "unusable",
    }
    (tmp_path / "open").chmod(0o644)
    assert key_state(tmp_path / "open") == "open to others"
    assert key_state(tmp_path / "nothing") == ""
