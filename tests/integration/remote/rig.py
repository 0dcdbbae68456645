"""The real parts of the end-to-end tests: two boxes, each with an sshd, a laptop, a slow network.

The box with Docker is this machine, with the engine of the tests. The bare box is a container with
sshd and Python 3.10 and nothing else. The laptop runs `fab`.
"""

from __future__ import annotations

import contextlib
import getpass
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from ipaddress import IPv4Interface, IPv4Network
from pathlib import Path
from typing import Any, TypeVar

import psutil  # type: ignore[import-untyped]
import yaml

from tests.docker import engine
from tests.docker.engine import Docker
from tests.docker.images import CHECKOUT, MIRROR
from tests.integration.remote.far_line import FarLine, far_line

BARE_IMAGE = "rlhf-box-tests/bare"
# libfaketime is for a clock that is off; rsync is left out, as rented containers do.
BARE = """
FROM {base}
RUN apt-get -qq update && DEBIAN_FRONTEND=noninteractive \
apt-get -qq install -y --no-install-recommends openssh-server libfaketime >/dev/null
RUN rm -f /etc/ssh/ssh_host_* && mkdir -p /run/sshd /rig \
&& for version in 3.10 3.12; do python$version -m compileall -q -x lib2to3/tests /usr/local/lib/python$version; done
"""
FAKETIME = "/usr/lib/x86_64-linux-gnu/faketime/libfaketime.so.1"
FAB_S = 300.0
HEARS_CTRL_C = (
    "env",
    "--default-signal=INT",
)  # what a script has started in the background ignores it, and hands that on
T = TypeVar("T")


# --- the laptop -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Done:
    words: tuple[str, ...]
    code: int
    out: str
    err: str
    seconds: float

    @property
    def all(self) -> str:
        call = shlex.join(["fab", *self.words])
        output = f"--- stdout\n{self.out}\n--- stderr\n{self.err}"
        return f"{call} -> {self.code} in {self.seconds:.1f} s\n{output}"


@dataclass
class Fab:
    """A `fab` that runs. Its output is in files, which can be read meanwhile."""

    words: tuple[str, ...]
    process: subprocess.Popen[bytes]
    folder: Path
    began: float = field(default_factory=time.monotonic)

    @property
    def out(self) -> str:
        return (self.folder / "out").read_text(errors="replace")

    @property
    def out_bytes(self) -> bytes:
        return (self.folder / "out").read_bytes()

    @property
    def err(self) -> str:
        return (self.folder / "err").read_text(errors="replace")

    def interrupt(self) -> None:
        """Ctrl-C: to all of the group, as a terminal does."""
        os.killpg(self.process.pid, signal.SIGINT)

    def wait(self, timeout_s: float = FAB_S) -> Done:
        try:
            code = self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(f"it does not end within {timeout_s:g} s\n{self._done(-1).all}") from None
        return self._done(code)

    def _done(self, code: int) -> Done:
        return Done(self.words, code, self.out, self.err, time.monotonic() - self.began)

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def says(self, text: str, timeout_s: float = 300) -> None:
        """Waits for it, on either stream."""
        until(
            lambda: text in self.out + self.err or self.process.poll() is not None,
            timeout_s,
            lambda: f"never said {text!r}\n{self._done(-1).all}",
        )
        assert text in self.out + self.err, self._done(self.process.returncode).all


@dataclass(frozen=True)
class Laptop:
    """A person's machine in one folder: a git checkout, a home, boxes.yaml, and `fab`'s memory."""

    folder: Path
    through: tuple[str, ...] = ()  # in front of each command: FarLine.through

    @classmethod
    def make(cls, folder: Path) -> Laptop:
        laptop = cls(folder)
        engine.copy_checkout(CHECKOUT, laptop.checkout, os.getuid())
        (laptop.checkout / "env/mirrors/tests.env").write_text(MIRROR)
        git = ("git", "-c", "user.name=tests", "-c", "user.email=tests@localhost", "-C", str(laptop.checkout))
        engine.shell(*git, "init", "--quiet")
        engine.shell(*git, "add", "--all")
        engine.shell(*git, "commit", "--quiet", "--message", "the checkout")
        for each in ("home", "state", "calls"):
            (folder / each).mkdir()
        make_key(laptop.key)
        laptop.boxes.write_text("{}\n")
        return laptop

    @property
    def checkout(self) -> Path:
        return self.folder / "rlhf-box"

    @property
    def key(self) -> Path:
        return self.folder / "key"

    @property
    def boxes(self) -> Path:
        return self.folder / "boxes.yaml"

    @property
    def runs(self) -> Path:
        return self.folder / "runs"

    def far(self, line: FarLine) -> Laptop:
        return replace(self, through=line.through)

    def other(self, name: str) -> Laptop:
        """Another laptop with the same key and the same boxes, which knows nothing else."""
        folder = self.folder / name
        folder.mkdir()
        for each in ("key", "key.pub", "boxes.yaml"):
            shutil.copy(self.folder / each, folder / each)
        for each in ("home", "state", "calls"):
            (folder / each).mkdir()
        (folder / "rlhf-box").symlink_to(self.checkout)
        return replace(self, folder=folder)

    def add(self, name: str, entry: Mapping[str, Any]) -> None:
        """Into boxes.yaml, in place of what has that name."""
        boxes = yaml.safe_load(self.boxes.read_text())
        boxes[name] = {"key": str(self.key), **entry}
        self.boxes.write_text(yaml.safe_dump(boxes))

    def start(self, *words: str, **variables: str) -> Fab:
        calls = self.folder / "calls"
        folder = calls / f"{len(list(calls.iterdir())):03d}-{words[0]}"
        folder.mkdir()
        fab = Path(sys.executable).with_name("fab")
        with (folder / "out").open("wb") as out, (folder / "err").open("wb") as err:
            process = subprocess.Popen(
                [*HEARS_CTRL_C, *self.through, str(fab), *words],
                cwd=self.checkout, env={**self._environment(), **variables}, stdin=subprocess.DEVNULL, stdout=out,
                stderr=err, start_new_session=True,
            )  # fmt: skip
        return Fab(words, process, folder)

    def fab(self, *words: str, code: int | None = 0, timeout_s: float = FAB_S, **variables: str) -> Done:
        """code: that it must end with; None: any."""
        done = self.start(*words, **variables).wait(timeout_s)
        assert code is None or done.code == code, f"wanted exit code {code}: {done.all}"
        return done

    def _environment(self) -> dict[str, str]:
        """Return the variables of this process that a person's machine may have.

        Without PYTHONDONTWRITEBYTECODE: there, Python compiles our files once.
        """
        kept = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("RLHF_", "HF_", "SSH_", "DOCKER_", "XDG_", "PYTEST_", "PYTHON"))
        }
        ours = {"HOME": "home", "XDG_STATE_HOME": "state", "RLHF_BOXES": "boxes.yaml", "RLHF_RUNS": "runs"}
        return kept | {name: str(self.folder / value) for name, value in ours.items()}


# --- boxes ----------------------------------------------------------------------------------------


@dataclass
class Box(ABC):
    """What a test does to a box behind fab's back."""

    name: str
    address: str
    port: int
    data_folder: str
    fields: Mapping[str, Any]  # more of its entry in boxes.yaml

    @property
    def root(self) -> str:
        return f"{self.data_folder}/rlhf-box"

    @property
    def entry(self) -> dict[str, Any]:
        return {
            "address": self.address,
            "port": self.port,
            "user": getpass.getuser(),
            "data_folder": self.data_folder,
            **self.fields,
        }

    @property
    @abstractmethod
    def server(self) -> psutil.Process:
        """The sshd that listens."""

    @abstractmethod
    def sh(self, script: str, *words: str, check: bool = True) -> str:
        """Run a command on the box, not by ssh, and return both output streams."""

    def sessions(self) -> list[psutil.Process]:
        """The server's processes for connections that are open."""
        return [process for process in self.server.children(recursive=True) if name_of(process) == "sshd"]

    def cut(self) -> int:
        """End every connection from the far side, and return how many processes that were."""
        ended = self.sessions()
        for process in ended:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        return len(ended)

    @contextlib.contextmanager
    def frozen(self) -> Iterator[None]:
        """sshd answers nobody, old or new; its machine goes on."""
        stopped = [self.server, *self.sessions()]
        for process in stopped:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.suspend()
        try:
            yield
        finally:
            for process in stopped:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.resume()

    def processes(self, *parts: str) -> list[psutil.Process]:
        """Those of this box whose command line holds all the parts."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied, OSError):
                line = "\0".join(process.cmdline())
                if all(part in line for part in parts) and self.is_here(process, line):
                    found.append(process)
        return found

    @abstractmethod
    def is_here(self, process: psutil.Process, line: str) -> bool:
        """Whether a process with this command line is one of this box."""

    def ls(self, path: str = "") -> list[str]:
        return self.sh('ls -A "$1" 2>/dev/null || true', f"{self.root}/{path}").split()

    def exists(self, path: str) -> bool:
        return self.sh('if [ -e "$1" ]; then echo yes; fi', f"{self.root}/{path}") == "yes\n"

    def read(self, path: str) -> str:
        return self.sh('cat "$1"', f"{self.root}/{path}")


@dataclass
class DockerBox(Box):
    """This machine, by way of an sshd on loopback whose sessions reach the engine."""

    docker: Docker
    folder: Path
    process: subprocess.Popen[bytes]

    @property
    def server(self) -> psutil.Process:
        return psutil.Process(self.process.pid)

    def sh(self, script: str, *words: str, check: bool = True) -> str:
        done = subprocess.run(
            ["sh", "-c", script, "sh", *words],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=dict(self.docker.environment),
            check=False,
        )
        assert not check or done.returncode == 0, done.stdout.decode(errors="replace")
        return done.stdout.decode(errors="replace")

    def is_here(self, process: psutil.Process, line: str) -> bool:
        return self.data_folder in line


@dataclass
class BareBox(Box):
    """A container: Debian, sshd, Python 3.10."""

    docker: Docker
    container: str

    @property
    def server(self) -> psutil.Process:
        return psutil.Process(int(self.docker("inspect", "--format", "{{.State.Pid}}", self.container).stdout))

    def sh(self, script: str, *words: str, check: bool = True) -> str:
        return self.docker("exec", self.container, "sh", "-c", script, "sh", *words, check=check).stdout

    def is_here(self, process: psutil.Process, line: str) -> bool:
        return Path(f"/proc/{process.pid}/ns/pid").readlink() == Path(f"/proc/{self.server.pid}/ns/pid").readlink()

    def restart(self) -> None:
        """All its processes end at once; its files stay."""
        self.docker("restart", "--time", "0", self.container)
        wait_for_ssh(self.address, self.port)

    @contextlib.contextmanager
    def another_sshd(self, *, host_key: str = "host_key", force: str = "") -> Iterator[dict[str, Any]]:
        """Run another sshd at another port, and return its entry in boxes.yaml.

        force: a shell script that gets each session's command as SSH_ORIGINAL_COMMAND.
        """
        port = 2222
        config = sshd_config(port, "/rig", host_key, {}) + ("ForceCommand exec sh /rig/force\n" if force else "")
        self.sh(
            'printf %s "$1" >/rig/force; printf %s "$2" >/rig/another; exec /usr/sbin/sshd -f /rig/another',
            force,
            config,
        )
        wait_for_ssh(self.address, port)
        try:
            yield {**self.entry, "port": port}
        finally:
            for process in self.processes("/rig/another"):
                process.kill()
            until(lambda: not self.processes("/rig/another"), 10)

    @contextlib.contextmanager
    def clock_off(self, offset: str) -> Iterator[dict[str, Any]]:
        """offset: as libfaketime has it, e.g.

        `-3h`. For all that a session starts, and for a job, which gets a provider's variables
        alone. Not for sshd itself, whose sandbox libfaketime does not survive. -> its entry in
        boxes.yaml
        """
        variables = f"export LD_PRELOAD={FAKETIME} FAKETIME={offset}"
        self.sh('echo "$1" >/etc/rp_environment', variables)
        try:
            with self.another_sshd(force=f'{variables}; exec sh -c "$SSH_ORIGINAL_COMMAND"') as entry:
                yield {**entry, "provider": "runpod"}
        finally:
            self.sh("rm /etc/rp_environment")


def sshd_config(
    port: int, folder: str, host_key: str, variables: Mapping[str, str], addresses: Sequence[str] = ()
) -> str:
    """variables: in each session; a shell that no login made has no others."""
    lines = [
        f"Port {port}",
        *(f"ListenAddress {address}" for address in addresses),
        f"HostKey {folder}/{host_key}",
        f"AuthorizedKeysFile {folder}/authorized_keys",
        *(
            "UsePAM no",
            "StrictModes no",
            "PasswordAuthentication no",
            "PidFile none",
            "MaxStartups 100",
            "Subsystem sftp internal-sftp",
        ),
        *([f"SetEnv {' '.join(f'{name}={value}' for name, value in variables.items())}"] if variables else []),
    ]
    return "\n".join(lines) + "\n"


@contextlib.contextmanager
def docker_box(
    docker: Docker, sshd: str, folder: Path, laptop: Laptop, build: Mapping[str, str], addresses: Sequence[str]
) -> Iterator[DockerBox]:
    """Run this machine as the box with Docker.

    sshd: the program. addresses: those on which it listens, the first one being the box's. build:
    the field of its entry in boxes.yaml.
    """
    port = free_port()
    for each in ("data", "home"):
        (folder / each).mkdir(parents=True)
    make_key(folder / "host_key")
    shutil.copy(f"{laptop.key}.pub", folder / "authorized_keys")
    engine_variables = {name: value for name, value in docker.environment.items() if name.startswith("DOCKER_")}
    # HOME: what a client of Docker writes at home is to be seen.
    variables = {"HOME": str(folder / "home"), **engine_variables}
    (folder / "sshd_config").write_text(sshd_config(port, str(folder), "host_key", variables, addresses))
    process = subprocess.Popen([sshd, "-D", "-f", str(folder / "sshd_config"), "-E", str(folder / "sshd.log")])
    box = DockerBox(
        "docker-box",
        addresses[0],
        port,
        str(folder / "data"),
        {"provider": "generic", "mirror": "tests", "build": dict(build)},
        docker,
        folder,
        process,
    )
    try:
        wait_for_ssh(addresses[0], port)
        yield box
    finally:
        for left in [*box.sessions(), psutil.Process(process.pid)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                left.kill()
        process.wait()
        _remove_containers(docker, box.data_folder)


def _remove_containers(docker: Docker, data_folder: str) -> None:
    """Those of jobs on this box alone: the engine may be a user's own."""
    label = "com.docker.compose.project.working_dir"
    listed = docker(
        "ps", "--all", "--filter", f"label={label}", "--format", f'{{{{.ID}}}} {{{{.Label "{label}"}}}}', check=False
    ).stdout
    for line in listed.splitlines():
        container, _, folder = line.partition(" ")
        if folder.startswith(data_folder):
            docker("rm", "--force", container, check=False)


@contextlib.contextmanager
def bare_box(
    docker: Docker,
    folder: Path,
    laptop: Laptop,
    base: str,
    network: Network,
    ca_bundle: Path,
    *,
    small: str = "size=8g,nr_inodes=2400",
) -> Iterator[BareBox]:
    """small: of a disk of its own at /small, with room for few files."""
    docker("build", "--tag", BARE_IMAGE, "-", stdin=BARE.format(base=base))
    folder.mkdir(parents=True)
    for each in ("host_key", "other_host_key"):
        make_key(folder / each)
    shutil.copy(f"{laptop.key}.pub", folder / "authorized_keys")
    (folder / "sshd_config").write_text(sshd_config(22, "/rig", "host_key", {}))
    name = f"rlhf-tests-bare-{os.getpid()}"
    where = [
        "--network",
        network.name,
        "--ip",
        str(network.address(2)),
        "--hostname",
        "bare-box",
        "--shm-size=1g",
        f"--tmpfs=/small:{small}",
    ]
    files = [
        f"--volume={folder / each}:/rig/{each}:ro"
        for each in ("host_key", "other_host_key", "authorized_keys", "sshd_config")
    ]
    docker(
        "run",
        "--detach",
        "--name",
        name,
        *where,
        *files,
        BARE_IMAGE,
        "/usr/sbin/sshd",
        "-D",
        "-e",
        "-f",
        "/rig/sshd_config",
    )
    build = {"TORCH": "torch-ci", "CA_BUNDLE": str(ca_bundle)}
    fields = {"provider": "generic", "mirror": "tests", "build": build}
    box = BareBox("bare-box", str(network.address(2)), 22, "/data", fields, docker, name)
    try:
        box.sh("mkdir -p /data")
        wait_for_ssh(box.address, box.port)
        yield box
    finally:
        docker("rm", "--force", "--volumes", name, check=False)


# --- the network ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Network:
    """A bridge of the engine, with this machine, the bare box and the far end in it."""

    name: str
    subnet: IPv4Network

    def address(self, number: int) -> object:
        return self.subnet[number]


@contextlib.contextmanager
def network(docker: Docker) -> Iterator[Network]:
    made = Network(f"rlhf{os.getpid()}", IPv4Network(f"10.{213 + os.getpid() % 40}.{os.getpid() // 40 % 256}.0/24"))
    bridge = ["--opt", f"com.docker.network.bridge.name={made.name}"]
    docker("network", "create", *bridge, "--subnet", str(made.subnet), "--gateway", str(made.address(1)), made.name)
    try:
        yield made
    finally:
        docker("network", "rm", made.name, check=False)


@contextlib.contextmanager
def line_through(network: Network) -> Iterator[FarLine]:
    with far_line(
        network.name, IPv4Interface(f"{network.address(3)}/{network.subnet.prefixlen}"), f"far{os.getpid()}"
    ) as connection:
        yield connection


# --- small things ---------------------------------------------------------------------------------


def make_key(file: Path) -> None:
    engine.shell("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "tests", "-f", str(file))


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def wait_for_ssh(address: str, port: int, timeout_s: float = 20) -> None:
    def speaks() -> bool:
        with contextlib.suppress(OSError), socket.create_connection((address, port), timeout=2) as connection:
            return connection.recv(4) == b"SSH-"
        return False

    until(speaks, timeout_s, lambda: f"no sshd at {address} port {port}")


def until(holds: Callable[[], T], timeout_s: float, why: Callable[[], str] | str = "") -> T:
    """Ask until the answer is true, and return it."""
    deadline = time.monotonic() + timeout_s
    while not (said := holds()):
        if time.monotonic() > deadline:
            raise AssertionError((why() if callable(why) else why) or f"not within {timeout_s:g} s")
        time.sleep(0.02)
    return said


def name_of(process: psutil.Process) -> str:
    try:
        return str(process.name())
    except psutil.NoSuchProcess:
        return ""
