"""BoxConnection against a real sshd: commands and answers, host keys, jump hosts and proxies."""

from __future__ import annotations

import hashlib
import io
import json
import os
import shlex
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
import pytest

from jobs.errors import ExitCode, ToolkitError
from remote.inventory import Box, find
from remote.output import Sayer
from remote.ssh.connection import BoxConnection, CommandFailed
from remote.ssh.host_keys import HostKeyChanged, KeyRefused
from tests.remote.conftest import Sshd, free_port, has_ipv6, make_key
from tests.remote.test_output import Terminal

HOSTILE = [
    "a b",
    "it's",
    'say "x"',
    "$(touch x)",
    "`id`",
    "two\nlines",
    "-n",
    "--",
    "*",
    "~",
    "\\",
    "",
    "größe 中",
    "a;b&c|d>e",
    "%h",
    "!x",
    "caf\udce9",
]


def code_of(connection: BoxConnection) -> ExitCode:
    with pytest.raises(ToolkitError) as raised:
        connection.query(["true"])
    return raised.value.exit_code


@contextmanager
def said(sshd: Sshd, state: Path, **options: Any) -> Iterator[tuple[BoxConnection, io.StringIO]]:
    spoken = io.StringIO()
    with sshd.connection(state, say=Sayer(err=spoken), **options) as connection:
        yield connection, spoken


@pytest.fixture
def connection(sshd: Sshd, tmp_path: Path) -> Iterator[BoxConnection]:
    with sshd.connection(tmp_path / "state") as opened:
        yield opened


# --- commands


def test_answer(connection: BoxConnection) -> None:
    answer = connection.query(["sh", "-c", "echo out; echo err >&2; exit 37"], check=False)
    assert (answer.code, answer.out, answer.err) == (37, "out\n", "err\n")
    assert 0 < answer.seconds < 20


def test_a_command_that_a_signal_ends(connection: BoxConnection) -> None:
    assert connection.query(["sh", "-c", "kill -9 $$"], check=False).code in (
        137,
        255,
    )  # by the shell there, or without one
    assert connection.query(["echo", "still there"]).out == "still there\n"


def test_a_failed_command_says_all(connection: BoxConnection) -> None:
    with pytest.raises(CommandFailed) as raised:
        connection.change(["sh", "-c", "seq 30 >&2; exit 3", "a b"])
    assert raised.value.what == "a command failed on `gpu-box` with exit code 3"
    assert raised.value.why.splitlines() == [
        *map(str, range(21, 31)),
        "the command: sh -c 'seq 30 >&2; exit 3' 'a b'",
    ]
    assert (raised.value.exit_code, raised.value.answer.code) == (ExitCode.INTERNAL, 3)


@pytest.mark.parametrize("way", ["command", "stream", "script stream"])
def test_arguments_arrive_as_they_are(connection: BoxConnection, way: str) -> None:
    argv = [sys.executable, "-c", "import json, sys; print(json.dumps(sys.argv[1:]))", *HOSTILE]
    shown: str | bytes = connection.query(argv).out if way == "command" else b""
    if way != "command":
        stream, script = connection.script_stream(argv) if way == "script stream" else (connection.stream(argv), b"")
        shown = subprocess.run(stream, input=script, capture_output=True, check=True).stdout
    assert json.loads(shown) == HOSTILE


def test_standard_input_is_exact(connection: BoxConnection) -> None:
    data = bytes(range(256)) * 12_000 + b"no end of line"  # 3 MB: more than any buffer in between
    assert connection.change(["sha256sum"], stdin=data).out.split()[0] == hashlib.sha256(data).hexdigest()


def test_both_sides_speak_at_once(connection: BoxConnection) -> None:
    text = "".join(f"{number}\n" for number in range(500_000))
    assert connection.query(["cat"], stdin=text.encode()).out == text


def test_input_that_nobody_reads(connection: BoxConnection) -> None:
    assert connection.query(["echo", "done"], stdin=bytes(8_000_000)).out == "done\n"


def test_output_that_is_no_text(connection: BoxConnection) -> None:
    answer = connection.query(["printf", r"a\377\000\303"])
    assert answer.out == "a\ufffd\x00\ufffd"


def test_what_is_left_behind_does_not_hold_the_answer(connection: BoxConnection) -> None:
    started = time.monotonic()
    assert connection.query(["sh", "-c", "sleep 30 & echo $!"]).code == 0
    assert time.monotonic() - started < 15


def test_dry_run(sshd: Sshd, tmp_path: Path) -> None:
    with said(sshd, tmp_path, dry_run=True) as (line, spoken):
        assert line.change(["touch", str(tmp_path / "a b")], stdin=b"hf_private").code == 0
        assert not line.is_open
        assert spoken.getvalue() == f"gpu-box$ touch '{tmp_path}/a b'  < 10 bytes\n"
        assert line.local(["touch", str(tmp_path / "a b")], changes=True).code == 0
        assert line.query(["echo", "asked"]).out == "asked\n"
        assert line.local(["echo", "asked"], changes=False).out == "asked\n"
    assert not (tmp_path / "a b").exists()
    assert spoken.getvalue().splitlines()[1:] == [
        f"here$ touch '{tmp_path}/a b'",
        "gpu-box$ echo asked",
        f"gpu-box: new host key {sshd.host_key()} (ssh-ed25519), kept from now on",
        "here$ echo asked",
    ]


# --- host keys


def test_a_host_key_is_said_once_and_kept(sshd: Sshd, tmp_path: Path) -> None:
    with said(sshd, tmp_path) as (connection, spoken):
        connection.query(["true"])
        assert subprocess.run(connection.stream(["true"]), check=False).returncode == 0
        assert connection.link.host_key == "new" and connection.link.fingerprint == sshd.host_key()
    with sshd.connection(tmp_path, say=Sayer(err=spoken)) as connection:
        connection.query(["true"])
        assert (connection.link.host_key, connection.link.fingerprint, connection.link.reached) == (
            "known",
            sshd.host_key(),
            True,
        )
    assert spoken.getvalue() == f"gpu-box: new host key {sshd.host_key()} (ssh-ed25519), kept from now on\n"
    assert (tmp_path / "known_hosts/gpu-box").read_text().startswith("gpu-box ssh-ed25519 AAAA")


def test_a_stream_alone_meets_a_box(sshd: Sshd, tmp_path: Path) -> None:
    with said(sshd, tmp_path) as (line, spoken):
        assert subprocess.run(line.stream(["true"]), check=False).returncode == 0
    assert spoken.getvalue().count(sshd.host_key()) == 1


@pytest.mark.parametrize("other", ["two", "other"])
def test_a_changed_host_key_stops_all(own_sshd: Sshd, tmp_path: Path, other: str) -> None:
    """Also one of another sort, which ssh's accept-new would take for new."""
    careless = own_sshd.folder / "careless"
    theirs = tmp_path / "theirs"  # takes any key for known: of the server as it is then
    theirs.write_text(f'#!/bin/sh\nssh-keyscan -p {own_sshd.port} 127.0.0.1 2>/dev/null | sed "s/^[^ ]*/$1/"\n')
    theirs.chmod(0o755)
    careless.write_text(
        f"Host *\n  StrictHostKeyChecking no\n  UserKnownHostsFile /dev/null\n  IdentityAgent none\n"
        f"  NoHostAuthenticationForLocalhost yes\n  KnownHostsCommand {theirs} %H\n"
    )
    with own_sshd.connection(tmp_path, ssh_config=careless) as connection:
        connection.query(["true"])
        argv = connection.stream(["touch", str(tmp_path / "was there")])
    own_sshd.start(host_key=other)
    with own_sshd.connection(tmp_path, ssh_config=careless) as connection:
        with pytest.raises(HostKeyChanged) as raised:
            connection.change(["touch", str(tmp_path / "was there")])
        assert (raised.value.what, raised.value.exit_code) == (
            "the host key of `gpu-box` has changed",
            ExitCode.UNREACHABLE,
        )
        assert own_sshd.host_key("one") in raised.value.why and own_sshd.host_key(other) in raised.value.why
        assert "fab trust --host gpu-box --replace" in raised.value.hint
        assert (connection.link.host_key, connection.link.reached, connection.link.fingerprint) == (
            "changed",
            False,
            own_sshd.host_key(other),
        )
    assert subprocess.run(argv, capture_output=True, check=False).returncode == 255
    assert not (tmp_path / "was there").exists()


def test_a_known_key_that_cannot_be_read_is_no_new_box(sshd: Sshd, tmp_path: Path) -> None:
    (tmp_path / "known_hosts").mkdir()
    (tmp_path / "known_hosts/gpu-box").write_text("gpu-box sk-ssh-ed25519@openssh.com AAAAGnNr\n")
    with sshd.connection(tmp_path) as connection, pytest.raises(HostKeyChanged):
        connection.query(["true"])


def test_openssh_keeps_no_key_by_itself(sshd: Sshd, tmp_path: Path) -> None:
    with sshd.connection(tmp_path) as connection:
        argv = connection.stream(["true"])
    connection.known_hosts.file.unlink()
    assert subprocess.run(argv, capture_output=True, check=False).returncode == 255
    assert not connection.known_hosts.keys


def test_a_host_key_belongs_to_a_name_not_to_an_address(sshd: Sshd, hop: Sshd, tmp_path: Path) -> None:
    for name, server in (("one", sshd), ("two", hop)):
        with server.connection(tmp_path, box=server.box(name)) as connection:
            connection.query(["true"])
    with hop.connection(tmp_path, box=hop.box("one")) as connection:
        assert code_of(connection) == ExitCode.UNREACHABLE
    with sshd.connection(tmp_path, box=sshd.box("one", address="localhost")) as connection:
        connection.query(["true"])


# --- what ssh -G knows


def config(folder: Path, text: str) -> Path:
    file = folder / "ssh config"
    file.write_text(f"Host *\n  IdentityAgent none\n{text}")
    return file


def host(name: str, sshd: Sshd, more: str = "") -> str:
    return f'Host {name}\n  HostName 127.0.0.1\n  Port {sshd.port}\n  IdentityFile "{sshd.key}"\n  {more}\n'


def both_ways(connection: BoxConnection) -> list[str]:
    """What a command says there, and what a stream does."""
    argv = ["echo", "$HOME a"]
    return [
        connection.query(argv).out,
        subprocess.run(connection.stream(argv), capture_output=True, text=True, check=False).stdout,
    ]


def test_a_name_of_an_included_file(sshd: Sshd, tmp_path: Path) -> None:
    (tmp_path / "more").write_text(host("rented", sshd))
    file = config(tmp_path, f'Include "{tmp_path}/more"\n')
    with sshd.connection(tmp_path, box=find("rented", {}), ssh_config=file) as connection:
        assert both_ways(connection) == ["$HOME a\n"] * 2
    assert (tmp_path / "known_hosts/rented").exists()


def test_boxes_yaml_comes_before_the_configuration(sshd: Sshd, tmp_path: Path) -> None:
    file = config(tmp_path, "Host 127.0.0.1\n  Port 1\n  User nobody\n  IdentityFile /nowhere\n")
    with sshd.connection(tmp_path, ssh_config=file) as connection:
        assert both_ways(connection) == ["$HOME a\n"] * 2


@pytest.mark.skipif(not has_ipv6(), reason="needs IPv6 on loopback")
def test_an_ipv6_address(sshd: Sshd, tmp_path: Path) -> None:
    with sshd.connection(tmp_path, box=sshd.box(address="::1")) as connection:
        assert both_ways(connection) == ["$HOME a\n"] * 2
        assert connection.target == "[::1]"


def test_rsync_goes_the_same_way(sshd: Sshd, hop: Sshd, tmp_path: Path) -> None:
    if shutil.which("rsync") is None:
        pytest.skip("needs rsync")
    (tmp_path / "it's here").mkdir()
    (tmp_path / "it's here/a b").write_text("sent")
    file = config(tmp_path, host("bastion", hop) + host("inner", sshd, "ProxyJump bastion"))
    boxes = [sshd.box(), find("inner", {}), *([sshd.box("six", address="::1")] if has_ipv6() else [])]
    for box in boxes:
        with sshd.connection(tmp_path / "st ate%", box=box, ssh_config=file) as connection:
            there = f"{connection.target}:{tmp_path}/there"
            connection.local(
                [
                    "rsync",
                    "-a",
                    "-s",
                    "-e",
                    shlex.join(connection.rsync_shell()),
                    f"{tmp_path}/it's here/",
                    f"{there} {box.name}",
                ],
                changes=True,
            )
        assert (tmp_path / f"there {box.name}/a b").read_text() == "sent"


def test_through_a_jump_host(sshd: Sshd, own_sshd: Sshd, tmp_path: Path) -> None:
    file = config(tmp_path, host("bastion", own_sshd) + host("inner", sshd, "ProxyJump bastion"))
    with said(sshd, tmp_path, box=find("inner", {}), ssh_config=file) as (connection, spoken):
        assert both_ways(connection) == ["$HOME a\n"] * 2
    assert sorted(spoken.getvalue().splitlines()) == [
        f"bastion, on the way to inner: new host key {own_sshd.host_key()} (ssh-ed25519), kept from now on",
        f"inner: new host key {sshd.host_key()} (ssh-ed25519), kept from now on",
    ]
    own_sshd.start(host_key="other")
    with sshd.connection(tmp_path, box=find("inner", {}), ssh_config=file) as connection:
        with pytest.raises(HostKeyChanged) as raised:
            connection.query(["true"])
        assert raised.value.what == "the host key of `bastion` has changed"
        assert "fab trust --host bastion --replace" in raised.value.hint
        argv = connection.stream(["true"])
    assert subprocess.run(argv, capture_output=True, check=False).returncode == 255
    own_sshd.stop()
    with sshd.connection(tmp_path, box=find("inner", {}), ssh_config=file) as connection:
        with pytest.raises(ToolkitError, match=r"`bastion`") as refused:
            connection.query(["true"])
        assert (refused.value.exit_code, "refuses" in refused.value.why) == (ExitCode.UNREACHABLE, True)


def test_through_two_jump_hosts(sshd: Sshd, hop: Sshd, own_sshd: Sshd, tmp_path: Path) -> None:
    """The second is reached through the first, whatever its own entry says."""
    words = f"outer,{own_sshd.user}@middle:{own_sshd.port}"
    text = f'Host middle\n  HostName 127.0.0.1\n  IdentityFile "{own_sshd.key}"\n  ProxyJump nowhere.invalid\n'
    file = config(tmp_path, host("outer", hop) + text + host("inner", sshd, f"ProxyJump {words}"))
    with said(sshd, tmp_path, box=find("inner", {}), ssh_config=file) as (connection, spoken):
        assert both_ways(connection) == ["$HOME a\n"] * 2
    assert spoken.getvalue().count("on the way to inner") == 2
    assert f"ssh://{own_sshd.user}@middle:{own_sshd.port}, on the way" in spoken.getvalue()
    with sshd.connection(
        tmp_path, box=find(f"ssh://{own_sshd.user}@middle:{own_sshd.port}", {}), ssh_config=file
    ) as connection:
        assert len(connection.known_hosts.keys) == 1  # `fab trust --host` of that name means the same file


def test_forwards_of_the_configuration_stay_away(sshd: Sshd, tmp_path: Path) -> None:
    """A second stream would fail for the port that the first one holds."""
    file = config(
        tmp_path,
        f"Host 127.0.0.1\n  LocalForward {sshd.port} localhost:1\n  ExitOnForwardFailure yes\n  RemoteCommand false\n",
    )
    with sshd.connection(tmp_path, ssh_config=file) as connection:
        assert both_ways(connection) == ["$HOME a\n"] * 2
        assert (
            subprocess.run(
                [*connection.rsync_shell(), connection.target, "true"], capture_output=True, check=False
            ).returncode
            == 0
        )


def test_jump_hosts_in_a_circle(sshd: Sshd, tmp_path: Path) -> None:
    file = config(tmp_path, "Host a\n  ProxyJump b\nHost b\n  ProxyJump a\n")
    with (
        sshd.connection(tmp_path, box=find("a", {}), ssh_config=file) as connection,
        pytest.raises(ToolkitError, match="circle"),
    ):
        connection.query(["true"])


PUMP = """
import os, socket, sys, threading
far = socket.create_connection((sys.argv[1], int(sys.argv[2])))
def pump(read, write, end):
    while data := read(65536):
        write(data)
    end()
threading.Thread(target=pump, args=(far.recv, lambda data: os.write(1, data), lambda: os._exit(0)), daemon=True).start()
pump(lambda size: os.read(0, size), far.sendall, lambda: os._exit(0))
"""


def test_a_proxy_command(sshd: Sshd, tmp_path: Path) -> None:
    """With tokens, quotes and a shell's words; the process is gone after."""
    (tmp_path / "a pump").write_text(PUMP)
    command = (
        f'sh -c \'echo "$PPID %% %r" >>"{tmp_path}/log"; exec {sys.executable} "{tmp_path}/a pump" "$@"\' pump '
        f"%h %p 2>&1"
    )
    file = config(tmp_path, host("inner", sshd, f"ProxyCommand {command}"))
    with sshd.connection(tmp_path, box=find("inner", {}), ssh_config=file) as connection:
        assert both_ways(connection) == ["$HOME a\n"] * 2
    assert [text.split(maxsplit=1)[1] for text in (tmp_path / "log").read_text().splitlines()] == [f"% {sshd.user}"]
    listing = subprocess.run(["ps", "-A", "-o", "args="], capture_output=True, text=True, check=True).stdout
    assert f"{tmp_path}/a pump" not in listing


def test_a_proxy_command_that_fails(sshd: Sshd, tmp_path: Path) -> None:
    file = config(tmp_path, host("inner", sshd, "ProxyCommand sh -c 'echo no way there >&2; exit 9'"))
    with (
        sshd.connection(tmp_path, box=find("inner", {}), ssh_config=file) as connection,
        pytest.raises(ToolkitError) as raised,
    ):
        connection.query(["true"])
    assert (raised.value.exit_code, "no way there" in raised.value.why) == (ExitCode.UNREACHABLE, True)


# --- keys


def test_no_agent_is_forwarded(sshd: Sshd, tmp_path: Path, agent: Path) -> None:
    file = config(tmp_path, "")
    file.write_text(f'Host *\n  IdentityAgent "{agent}"\n  ForwardAgent yes\n')
    with sshd.connection(tmp_path, ssh_config=file) as connection:
        argv = ["sh", "-c", "echo agent=$SSH_AUTH_SOCK"]
        assert connection.query(argv).out == "agent=\n"
        assert subprocess.run(connection.stream(argv), capture_output=True, check=True).stdout == b"agent=\n"


@pytest.fixture
def agent(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    path = tmp_path_factory.mktemp("agent") / "socket"
    process = subprocess.Popen(["ssh-agent", "-D", "-a", str(path)], stdout=subprocess.DEVNULL)
    until = time.monotonic() + 10
    while not path.exists() and time.monotonic() < until:
        time.sleep(0.01)
    yield path
    process.terminate()
    process.wait()


def locked_key(sshd: Sshd, folder: Path) -> Path:
    """One that the server takes, and that has a passphrase."""
    key = folder / "locked key"
    make_key(key, passphrase="open sesame")
    with (sshd.folder / "authorized_keys").open("a") as keys:
        keys.write(Path(f"{key}.pub").read_text())
    return key


def test_a_locked_key_without_an_agent(sshd: Sshd, tmp_path: Path) -> None:
    key = locked_key(sshd, tmp_path)
    with sshd.connection(tmp_path, box=sshd.box(key=str(key))) as connection, pytest.raises(KeyRefused) as raised:
        connection.query(["true"])
    assert raised.value.exit_code == ExitCode.UNREACHABLE
    assert raised.value.hint.startswith(f"ssh-add '{key}'")


@pytest.mark.parametrize("named", [True, False])
def test_a_locked_key_that_an_agent_holds(sshd: Sshd, tmp_path: Path, agent: Path, named: bool) -> None:
    """Named in boxes.yaml, or just one of the agent's."""
    key = locked_key(sshd, tmp_path)
    ask = tmp_path / "ask"
    ask.write_text("#!/bin/sh\necho open sesame\n")
    ask.chmod(0o700)
    environment = {
        **os.environ,
        "SSH_AUTH_SOCK": str(agent),
        "SSH_ASKPASS": str(ask),
        "SSH_ASKPASS_REQUIRE": "force",
        "DISPLAY": ":0",
    }
    subprocess.run(["ssh-add", str(key)], env=environment, check=True, capture_output=True)
    file = tmp_path / "config"
    file.write_text(f'Host *\n  IdentityAgent "{agent}"\n')
    with sshd.connection(tmp_path, box=sshd.box(key=str(key) if named else None), ssh_config=file) as connection:
        assert both_ways(connection) == ["$HOME a\n"] * 2


def test_a_login_that_was_begun_is_the_one_that_is_waited_for(make_sshd: MakeSshd, tmp_path: Path) -> None:
    server, heard = make_sshd(), io.StringIO()
    with server.connection(tmp_path, say=Sayer(err=heard)) as connection:
        connection.begin()
        connection.begin()
        assert connection.query(["echo", "here"]).out == "here\n"
        connection.begin()
        assert connection.query(["echo", "again"]).out == "again\n"
    assert server.log.count("Accepted publickey") == 1
    assert heard.getvalue() == f"gpu-box: new host key {server.host_key()} (ssh-ed25519), kept from now on\n"


def test_a_login_that_was_begun_ends_with_the_verb(own_sshd: Sshd, tmp_path: Path) -> None:
    own_sshd.freeze()
    children = psutil.Process().children  # of this process: ssh and nothing else
    before = {*children()}
    with own_sshd.connection(tmp_path) as connection:
        connection.begin()
        assert [each.name() for each in {*children()} - before] == ["ssh"]
    assert {*children()} == before


def test_a_refused_key(sshd: Sshd, tmp_path: Path) -> None:
    make_key(tmp_path / "stranger")
    with sshd.connection(tmp_path, box=sshd.box(key=str(tmp_path / "stranger"))) as connection:
        with pytest.raises(KeyRefused) as raised:
            connection.query(["true"])
        assert "fab trust" not in raised.value.hint  # the box takes no password with which to put a key there
        assert str(tmp_path / "stranger") in raised.value.why
        assert (connection.link.reached, connection.link.host_key) == (False, "known")


def test_a_box_that_ends_the_connection_at_a_key(make_sshd: MakeSshd, tmp_path: Path) -> None:
    server = make_sshd("MaxAuthTries 1")
    make_key(tmp_path / "mine")
    with (
        server.connection(tmp_path / "state", box=server.box(key=str(tmp_path / "mine"))) as connection,
        pytest.raises(ToolkitError) as caught,
    ):
        connection.connect()
    assert "then the box ended the connection" in caught.value.why and caught.value.hint.startswith(
        "run the same command again"
    )


def test_a_key_that_is_not_there(sshd: Sshd, tmp_path: Path) -> None:
    """ssh itself would try others."""
    with (
        sshd.connection(tmp_path, box=sshd.box(key=str(tmp_path / "nothing"))) as connection,
        pytest.raises(ToolkitError, match="does not exist") as raised,
    ):
        connection.query(["true"])
    assert str(tmp_path / "nothing") in raised.value.why


def test_a_key_that_is_none(sshd: Sshd, tmp_path: Path) -> None:
    (tmp_path / "key").write_text("no key\n")
    with (
        sshd.connection(tmp_path, box=sshd.box(key=str(tmp_path / "key"))) as connection,
        pytest.raises(KeyRefused) as raised,
    ):
        connection.query(["true"])
    assert f"cannot be read as a private key: {tmp_path}/key" in raised.value.why


def test_other_sorts_of_keys(sshd: Sshd, tmp_path: Path) -> None:
    """Old RSA keys in PEM, as clouds hand them out, too."""
    subprocess.run(
        ["ssh-keygen", "-q", "-t", "rsa", "-b", "2048", "-m", "PEM", "-N", "", "-f", tmp_path / "rsa"], check=True
    )
    make_key(tmp_path / "ecdsa", "ecdsa")
    for name in ("rsa", "ecdsa"):
        with (sshd.folder / "authorized_keys").open("a") as keys:
            keys.write((tmp_path / f"{name}.pub").read_text())
        with sshd.connection(tmp_path, box=sshd.box(key=str(tmp_path / name))) as connection:
            connection.query(["true"])


# --- faults


def test_nobody_listens(sshd: Sshd, tmp_path: Path) -> None:
    with sshd.connection(tmp_path, box=sshd.box(port=free_port())) as connection, pytest.raises(ToolkitError) as raised:
        connection.query(["true"])
    assert raised.value.exit_code == ExitCode.UNREACHABLE
    assert "refuses connections" in raised.value.why and "SSH port" in raised.value.hint


def test_without_openssh_there_is_no_way_to_a_box(sshd: Sshd, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with sshd.connection(tmp_path) as connection, pytest.raises(ToolkitError) as raised:
        connection.query(["true"])
    assert (raised.value.what, raised.value.hint) == ("there is no `ssh` on this machine", "install the OpenSSH client")


def test_there_is_no_such_host(sshd: Sshd, tmp_path: Path) -> None:
    with sshd.connection(tmp_path, box=Box(name="gone", address="no-such-host.invalid")) as connection:
        with pytest.raises(ToolkitError, match="no-such-host") as raised:
            connection.query(["true"])
        assert (connection.link.reached, raised.value.exit_code) == (False, ExitCode.UNREACHABLE)


def test_a_frozen_server(own_sshd: Sshd, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes connections and says nothing."""
    monkeypatch.setenv("TERM", "xterm")
    own_sshd.freeze()
    started = time.monotonic()
    err = Terminal()
    with own_sshd.connection(tmp_path, connect_s=2, say=Sayer(err=err)) as connection:
        assert code_of(connection) == ExitCode.UNREACHABLE
    assert time.monotonic() - started < 20
    assert err.getvalue().startswith("\r\x1b[2Kreaching gpu-box (")
    assert err.getvalue().endswith("s)\r\x1b[2K")
    own_sshd.thaw()
    with own_sshd.connection(tmp_path) as connection:
        connection.query(["true"])


def test_a_server_that_freezes_after_its_first_word(own_sshd: Sshd, tmp_path: Path) -> None:
    """In the middle of the handshake, and with a password's time to wait."""
    with speaks_first(b"SSH-2.0-OpenSSH_9.2\r\n") as port:
        started = time.monotonic()
        with (
            own_sshd.connection(tmp_path, box=own_sshd.box(port=port), connect_s=1) as connection,
            pytest.raises(ToolkitError, match="no answer"),
        ):
            connection.query(["true"])
        assert time.monotonic() - started < 5


def test_a_command_that_takes_too_long(connection: BoxConnection) -> None:
    connection.connect()
    started = time.monotonic()
    with pytest.raises(ToolkitError, match=r"no answer within 0\.5 s") as raised:
        connection.change(["sleep", "30"], timeout_s=0.5)
    assert (raised.value.exit_code, time.monotonic() - started < 5) == (ExitCode.UNREACHABLE, True)
    assert connection.query(["echo", "again"]).out == "again\n"


def test_a_server_that_freezes_in_a_command(own_sshd: Sshd, tmp_path: Path) -> None:
    with own_sshd.connection(tmp_path) as connection:
        connection.query(["true"])
        own_sshd.freeze()
        started = time.monotonic()
        with pytest.raises(ToolkitError, match="no answer within 1 s"):
            connection.change(["true"], timeout_s=1)
        with pytest.raises(ToolkitError, match="within 1 s"):
            connection.openssh = type(connection.openssh)(connection.openssh.state, connection.openssh.config, 1)
            connection.query(["true"])
        assert time.monotonic() - started < 10


def test_a_server_that_dies_in_a_command(own_sshd: Sshd, tmp_path: Path) -> None:
    with own_sshd.connection(tmp_path) as connection:
        connection.query(["true"])
        threading.Timer(0.5, own_sshd.stop).start()
        started = time.monotonic()
        with pytest.raises(ToolkitError, match="the connection to `gpu-box` broke") as raised:
            connection.change(["sleep", "30"])
        assert (raised.value.exit_code, time.monotonic() - started < 10) == (ExitCode.UNREACHABLE, True)
        assert "sleep 30" in raised.value.why


def test_a_line_that_was_cut_is_opened_again_for_a_question(own_sshd: Sshd, tmp_path: Path) -> None:
    with own_sshd.connection(tmp_path) as connection:
        connection.query(["true"])
        own_sshd.cut()
        assert connection.query(["echo", "back"]).out == "back\n"


@contextmanager
def dropping(first: int, port: int) -> Iterator[int]:
    """A port that drops so many connections before a word, and leads the later ones on."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def pump(read: socket.socket, write: socket.socket) -> None:
            try:
                while data := read.recv(65536):
                    write.sendall(data)
                write.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass

        def serve() -> None:
            number = 0
            while True:
                try:
                    near, _ = server.accept()
                except OSError:
                    return
                number += 1
                if number <= first:
                    near.close()
                    continue
                far = socket.create_connection(("127.0.0.1", port))
                for ends in ((near, far), (far, near)):
                    threading.Thread(target=pump, args=ends, daemon=True).start()

        threading.Thread(target=serve, daemon=True).start()
        yield server.getsockname()[1]
        server.shutdown(socket.SHUT_RDWR)


@contextmanager
def speaks_first(words: bytes) -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        kept: list[socket.socket] = []

        def serve() -> None:
            while True:
                try:
                    kept.append(server.accept()[0])
                    kept[-1].sendall(words)
                except OSError:
                    return

        threading.Thread(target=serve, daemon=True).start()
        yield server.getsockname()[1]
        server.shutdown(socket.SHUT_RDWR)
        for each in kept:
            each.close()


def test_one_dropped_connection_means_nothing(sshd: Sshd, tmp_path: Path) -> None:
    with dropping(1, sshd.port) as port, sshd.connection(tmp_path, box=sshd.box(port=port)) as connection:
        assert connection.query(["echo", "in"]).out == "in\n"
    with dropping(2, sshd.port) as port, sshd.connection(tmp_path, box=sshd.box(port=port)) as connection:
        with pytest.raises(ToolkitError, match="cannot reach `gpu-box`") as raised:
            connection.query(["true"])
        assert (raised.value.exit_code, "twice" in raised.value.why) == (ExitCode.UNREACHABLE, True)


def test_what_speaks_is_no_ssh(sshd: Sshd, tmp_path: Path) -> None:
    with (
        speaks_first(b"220 mail.example ESMTP\r\n" * 200) as port,
        sshd.connection(tmp_path, box=sshd.box(port=port), connect_s=2) as connection,
    ):
        assert code_of(connection) == ExitCode.UNREACHABLE


# --- commands here


def test_a_local_command(connection: BoxConnection) -> None:
    heard: list[str] = []
    script = "echo one; echo two >&2; cat; exit 5"
    answer = connection.local(
        ["sh", "-c", script], changes=True, stdin=b"\xff three\n", check=False, heard=heard.append
    )
    assert (answer.code, answer.out, answer.err, heard) == (5, "one\n\ufffd three\n", "two\n", ["one", "\ufffd three"])
    with pytest.raises(CommandFailed, match="exit code 5"):
        connection.local(["sh", "-c", script], changes=True)
    with pytest.raises(ToolkitError, match="cannot run `no-such-program`"):
        connection.local(["no-such-program"], changes=True)


def test_a_local_command_ends_in_time_with_its_children(connection: BoxConnection, tmp_path: Path) -> None:
    started = time.monotonic()
    with pytest.raises(ToolkitError, match="did not end") as raised:
        connection.local(["sh", "-c", f"sleep 60 & echo $! >'{tmp_path}/pid'; wait"], changes=True, timeout_s=0.5)
    assert (raised.value.exit_code, time.monotonic() - started < 10) == (ExitCode.UNREACHABLE, True)
    with pytest.raises(ProcessLookupError):
        for _ in range(500):
            os.kill(int((tmp_path / "pid").read_text()), 0)
            time.sleep(0.01)


def test_interrupted_it_leaves_no_child(connection: BoxConnection, tmp_path: Path) -> None:
    def stop(text: str) -> None:
        (tmp_path / "pid").write_text(text)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        connection.local(["sh", "-c", "echo $$; exec sleep 60"], changes=True, heard=stop)
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


# --- OpenSSH's argv


def test_forwards_and_a_terminal(connection: BoxConnection, sshd: Sshd) -> None:
    port = free_port()
    process = subprocess.Popen(
        connection.stream(forward=[f"127.0.0.1:{port}:127.0.0.1:{sshd.port}"]), stdin=subprocess.DEVNULL
    )
    try:
        for _ in range(1000):
            try:
                with socket.create_connection(("127.0.0.1", port), timeout=5) as tunnel:
                    assert tunnel.recv(4) == b"SSH-"
                break
            except ConnectionRefusedError:
                time.sleep(0.01)
        else:
            pytest.fail("the tunnel does not open")
    finally:
        process.terminate()
        process.wait()
    seen = subprocess.run(
        connection.stream(["test", "-t", "1"], tty=True), stdin=subprocess.DEVNULL, capture_output=True, check=False
    )
    assert seen.returncode == 0


def test_the_printed_words(sshd: Sshd, tmp_path: Path, connection: BoxConnection) -> None:
    """What guards a connection stands in every command, before all that a configuration may say."""
    connection.connect()
    connection.close()
    for argv in (connection.stream(["true"]), connection.rsync_shell(), connection.with_password(["true"])[0]):
        words = " ".join(argv)
        assert (
            "StrictHostKeyChecking=yes" in words
            and "ForwardAgent=no" in words
            and "HostKeyAlias=gpu-box" in words
            and "ControlPath=none" in words
        )
        assert ("BatchMode=yes" in words) == ("PubkeyAuthentication=no" not in words)


def test_a_state_folder_that_ssh_cannot_name(sshd: Sshd, tmp_path: Path) -> None:
    with sshd.connection(tmp_path / "${HOME}") as connection, pytest.raises(ToolkitError, match="XDG_STATE_HOME"):
        connection.stream(["true"])


def test_it_is_imported_quickly() -> None:
    """`fab` itself takes most of it; what this adds is loaded when it is needed."""
    script = (
        "import sys, fabric, remote.ssh.connection; print([*{'remote.survey.doctor', 'jobs.spec', "
        "'jobs.views.panel'} & {*sys.modules}])"
    )
    shown = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert shown == "[]\n"


MakeSshd = Callable[..., Sshd]


def test_a_server_that_wants_more_than_a_key(make_sshd: MakeSshd, tmp_path: Path) -> None:
    server = make_sshd("PasswordAuthentication yes", "AuthenticationMethods publickey,password")
    with server.connection(tmp_path) as connection, pytest.raises(KeyRefused) as raised:
        connection.query(["true"])
    assert "besides the key it wants: password" in raised.value.why
    server.stop()
