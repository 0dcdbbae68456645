"""A real sshd on loopback, for this user, with keys of its own: the far end of every line.

Ready in a tenth of a second.
"""

from __future__ import annotations

import contextlib
import getpass
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from remote.inventory import Box
from remote.output import Sayer

KEY_SORTS = {"one": "ed25519", "two": "ed25519", "other": "ecdsa"}  # host keys by name


class Sshd:
    """One server with its folder.

    `start` again with another `host_key` is another machine at the same address.
    """

    def __init__(self, program: str, folder: Path, *settings: str) -> None:
        """settings: lines for sshd_config."""
        self.folder, self.home, self._program, self._settings = folder, folder / "home", program, settings
        self.port, self.user, self.key = free_port(), getpass.getuser(), folder / "key"
        self._process: subprocess.Popen[bytes] | None = None
        self.home.mkdir(parents=True, exist_ok=True)
        make_key(self.key)
        shutil.copy(f"{self.key}.pub", folder / "authorized_keys")
        (folder / "config").write_text(
            "Host *\n  IdentityAgent none\n"
        )  # the laptop's ssh_config: nothing of this machine's

    @property
    def log(self) -> str:
        return (self.folder / "log").read_text(errors="replace")

    def host_key(self, name: str = "one") -> str:
        """Its fingerprint, as ssh-keygen shows it."""
        shown = subprocess.run(["ssh-keygen", "-lf", self._host_key(name)], capture_output=True, text=True, check=True)
        return shown.stdout.split()[1]

    def _host_key(self, name: str) -> Path:
        file = self.folder / f"host_{name}"
        if not file.exists():
            make_key(file, KEY_SORTS[name])
        return file

    def start(self, host_key: str = "one") -> None:
        self.stop()
        lines = [
            *self._settings,  # the first word for a setting is the one that holds
            f'SetEnv "HOME={self.home}"',  # not the user's own, whose shell may also take its time to start
            *(f"Port {self.port}", "ListenAddress 127.0.0.1", *(["ListenAddress ::1"] if has_ipv6() else [])),
            *(
                f'HostKey "{self._host_key(host_key)}"',
                f'AuthorizedKeysFile "{self.folder}/authorized_keys"',
                "StrictModes no",
                "UsePAM no",
            ),
            *(
                "PasswordAuthentication no",
                "KbdInteractiveAuthentication no",
                "PidFile none",
                "LogLevel VERBOSE",
                "MaxStartups 100",
            ),
            *("AllowAgentForwarding yes", "AllowTcpForwarding yes", "PrintMotd no", "Subsystem sftp internal-sftp"),
        ]
        (self.folder / "sshd_config").write_text("\n".join(lines) + "\n")
        argv = [self._program, "-D", "-f", str(self.folder / "sshd_config"), "-E", str(self.folder / "log")]
        self._process = subprocess.Popen(
            argv, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        until = time.monotonic() + 10
        while not self._speaks():
            if time.monotonic() > until or self._process.poll() is not None:
                raise RuntimeError(f"sshd does not start: {self.log}")
            time.sleep(0.01)

    def _speaks(self) -> bool:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), timeout=5) as connection:
            return connection.recv(4) == b"SSH-"
        return False

    def processes(self) -> list[int]:
        """The server and all that it started."""
        process = self._process
        if process is None or process.poll() is not None:
            return []
        table = subprocess.run(["ps", "-A", "-o", "pid=,ppid="], capture_output=True, text=True, check=True).stdout
        parents = [tuple(map(int, line.split())) for line in table.splitlines()]
        found = [process.pid]
        for parent in found:
            found += [pid for pid, its_parent in parents if its_parent == parent and pid not in found]
        return found

    def _signal(self, number: int) -> None:
        for pid in self.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def freeze(self) -> None:
        """It is there, and says nothing: the kernel still takes connections."""
        self._signal(signal.SIGSTOP)

    def thaw(self) -> None:
        self._signal(signal.SIGCONT)

    def cut(self) -> None:
        """The connections end; the server goes on."""
        for pid in self.processes()[1:]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def stop(self) -> None:
        """At once, with all connections."""
        self._signal(signal.SIGKILL)
        process, self._process = self._process, None
        if process is not None:
            process.wait(10)

    # --- the laptop's side

    def box(self, name: str = "gpu-box", **fields: Any) -> Box:
        return Box(
            **{
                "name": name,
                "address": "127.0.0.1",
                "port": self.port,
                "user": self.user,
                "key": str(self.key),
                **fields,
            }
        )

    def connection(self, state: Path, *, box: Box | None = None, **options: Any) -> Any:
        """A remote.ssh.connection.BoxConnection to it, not yet opened."""
        from remote.ssh.connection import BoxConnection  # fabric takes its time, and not every test here needs it

        return BoxConnection(
            box or self.box(), state, **{"say": Sayer(), "ssh_config": self.folder / "config", **options}
        )


def make_key(file: Path, sort: str = "ed25519", passphrase: str = "") -> None:
    subprocess.run(
        ["ssh-keygen", "-q", "-t", sort, "-N", passphrase, "-C", f"{file.name}@test", "-f", file], check=True
    )


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def has_ipv6() -> bool:
    with contextlib.suppress(OSError), socket.create_server(("::1", 0), family=socket.AF_INET6):
        return True
    return False


@pytest.fixture(scope="session")
def make_sshd(sshd_program: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Sshd]]:
    """A started server of one's own, with lines for its sshd_config."""
    started: list[Sshd] = []

    def make(*settings: str) -> Sshd:
        server = Sshd(sshd_program, tmp_path_factory.mktemp("sshd") / "a b", *settings)
        started.append(server)
        server.start()
        return server

    yield make
    for server in started:
        server.stop()


@pytest.fixture(scope="session")
def sshd(make_sshd: Callable[..., Sshd]) -> Sshd:
    """For tests that do not disturb it."""
    return make_sshd()


@pytest.fixture(scope="session")
def hop(make_sshd: Callable[..., Sshd]) -> Sshd:
    """A jump host."""
    return make_sshd()


@pytest.fixture
def own_sshd(make_sshd: Callable[..., Sshd]) -> Iterator[Sshd]:
    """To be frozen, cut, stopped, and started again with another host key."""
    server = make_sshd()
    yield server
    server.stop()
