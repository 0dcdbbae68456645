"""This module finds a Docker engine for the tests, or installs one in CI on Debian.

An engine that it has installed is started and ended here. No image can be pulled in CI, so the base
is made with debootstrap, and a build image with nvcc 11.8 (Debian's) from it.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from tests.apt import apt, apt_turn

BASE, BUILD = "rlhf-box-tests/base", "rlhf-box-tests/build"
PYTHONS = ("3.10", "3.12")  # of env/flavours
# Shared libraries that CPythons of this machine are linked to, and what a base has anyway.
PACKAGES = "ca-certificates,libssl3,libffi8,libsqlite3-0,zlib1g,libbz2-1.0,liblzma5,libexpat1,libuuid1"
# Of CUDA only what compiles DeepSpeed's operators: its libraries are gigabytes more, and nothing is
# linked to the static ones.
CUDA = "nvidia-cuda-toolkit nvidia-cuda-dev libcudart11.0 libcurand10 libnvvm4 libthrust-dev libcub-dev libcu++-dev"
NVCC = """
FROM {base}
RUN sed -i 's/ main$/ main contrib non-free/' /etc/apt/sources.list && apt-get -qq update \
    && DEBIAN_FRONTEND=noninteractive apt-get -qq install -y --no-install-recommends g++-11 >/dev/null \
    && cd /tmp && apt-get -qq -o APT::Sandbox::User=root download {cuda} \
    && for package in *.deb; do \
        dpkg-deb --fsys-tarfile $package | tar -C / -x --keep-directory-symlink --exclude='*_static*.a'; rm $package; \
    done && apt-get clean && ldconfig
RUN for tool in gcc g++; do ln -s $tool-11 /usr/bin/$tool; done && ln -s g++-11 /usr/bin/c++ && nvcc --version
"""


@dataclass(frozen=True)
class Docker:
    """`docker("compose", "build", cwd=...)`. Output is text, stdout and stderr together."""

    environment: Mapping[str, str] = field(default_factory=lambda: dict(os.environ))

    def __call__(
        self,
        *arguments: str,
        cwd: Path | None = None,
        check: bool = True,
        timeout_s: float = 600,
        stdin: str | None = None,
        **variables: str,
    ) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            ["docker", *arguments],
            cwd=cwd, env={**self.environment, **variables}, input=stdin, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True,
            errors="replace", timeout=timeout_s, check=False,
        )  # fmt: skip
        if check and done.returncode:
            raise AssertionError(f"docker {' '.join(arguments)} ended with {done.returncode}:\n{done.stdout[-6000:]}")
        return done

    def answers(self) -> str:
        """Say why the engine cannot be used; "": it answers, with Compose and BuildKit."""
        for arguments in (["version"], ["compose", "version"], ["buildx", "version"]):
            try:
                done = self(*arguments, check=False, timeout_s=30)
            except (OSError, subprocess.TimeoutExpired) as error:
                return str(error)
            if done.returncode:
                output = done.stdout.strip()
                return f"docker {' '.join(arguments)}: {output.splitlines()[-1] if output else done.returncode}"
        return ""


def shell(*command: str, cwd: Path | None = None) -> None:
    done = subprocess.run(command, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if done.returncode:
        raise AssertionError(f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout[-3000:]}")


def distribution() -> str:
    """Return the mirror that this machine's apt uses."""
    for file in [*sorted(Path("/etc/apt").glob("sources.list*/*.sources")), Path("/etc/apt/sources.list")]:
        for line in file.read_text().splitlines() if file.is_file() else []:
            words = line.split()
            if words[:1] == ["URIs:"] or words[:1] == ["deb"]:
                return next(word for word in words if word.startswith("http"))
    raise AssertionError("no package source in /etc/apt")


@contextmanager
def installed_engine() -> Iterator[Docker]:
    """Install a Docker engine for the length of the block; it needs root on Debian.

    The engine is ended and its images are removed at the end; the packages stay.
    """
    if not shutil.which("dockerd") or not shutil.which("debootstrap"):
        os.environ["DEBIAN_FRONTEND"] = "noninteractive"
        apt("install", "-y", "docker.io", "iptables", "debootstrap")
    folder = Path(tempfile.mkdtemp(prefix="rlhf-box-docker-"))
    _install_plugins(folder)
    docker = Docker({**os.environ, "DOCKER_HOST": f"unix://{folder}/docker.sock", "DOCKER_BUILDKIT": "1"})
    with (folder / "dockerd.log").open("wb") as log:
        places = ["--data-root", f"{folder}/data", "--exec-root", f"{folder}/exec"]
        places += ["--pidfile", f"{folder}/pid", "--host", f"unix://{folder}/docker.sock"]
        engine = subprocess.Popen(["dockerd", *places], stdout=log, stderr=log, start_new_session=True)
    try:
        deadline = time.monotonic() + 60
        while docker.answers():
            if engine.poll() is not None or time.monotonic() > deadline:
                raise AssertionError(
                    f"dockerd does not answer: {docker.answers()}\n"
                    f"{(folder / 'dockerd.log').read_text(errors='replace')[-3000:]}"
                )
            time.sleep(0.5)
        yield docker
    finally:
        engine.terminate()
        engine.wait(timeout=60)
        subprocess.run(["umount", folder / "exec/netns/default"], capture_output=True, check=False)  # dockerd leaves it
        shutil.rmtree(folder, ignore_errors=True)


def _install_plugins(folder: Path) -> None:
    """Install Compose v2 and buildx.

    Debian 12 has neither; Debian 13's packages need nothing but its libc.
    """
    if (
        not Docker()("compose", "version", check=False).returncode
        and not Docker()("buildx", "version", check=False).returncode
    ):
        return
    source = folder / "next.list"
    source.write_text(f"deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] {distribution()} trixie main\n")
    (folder / "lists").mkdir()
    apt = [
        "apt-get",
        "-qq",
        "-o",
        f"Dir::Etc::SourceList={source}",
        "-o",
        "Dir::Etc::SourceParts=/dev/null",
        "-o",
        f"Dir::State::Lists={folder}/lists",
    ]
    shell(*apt, "update")
    shell(*apt, "-o", "APT::Sandbox::User=root", "download", "docker-compose", "docker-buildx", cwd=folder)
    with apt_turn():
        shell("dpkg", "-i", *map(str, folder.glob("*.deb")))


def make_base(docker: Docker) -> str:
    """Debian 12 with the Pythons of all flavours, about 400 MB."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "root"
        shell("debootstrap", "--variant=minbase", f"--include={PACKAGES}", "bookworm", str(root), distribution())
        for version in PYTHONS:
            _copy_python(version, root)
        for cache in [
            *(root / "var/lib/apt/lists").glob("*_*"),
            *(root / "var/cache/apt").rglob("*.deb"),
            *(root / "var/cache/apt").glob("*.bin"),
        ]:
            cache.unlink()
        shell("chroot", str(root), "ldconfig")
        for version in PYTHONS:
            shell("chroot", str(root), f"python{version}", "-c", "import ssl, ctypes, sqlite3, zlib, bz2, lzma")
        subprocess.run(
            f"tar -C {root} -c . | docker import - {BASE}",
            shell=True,
            env=dict(docker.environment),
            check=True,
            capture_output=True,
        )
    return BASE


def _copy_python(version: str, root: Path) -> None:
    """Copy a CPython of this machine, without its tests, to where a base image would have it."""
    python = _prefix_of(version)
    leave_out = shutil.ignore_patterns("test", "site-packages", "idlelib", "tkinter", "config-3*", "__pycache__")
    shutil.copytree(python / f"lib/python{version}", root / f"usr/local/lib/python{version}", ignore=leave_out)
    (root / f"usr/local/lib/python{version}/site-packages").mkdir()
    shutil.copytree(python / f"include/python{version}", root / f"usr/local/include/python{version}")
    shutil.copy(python / f"bin/python{version}", root / f"usr/local/bin/python{version}")
    for library in (python / "lib").glob(f"libpython{version}.so*"):
        shutil.copy(library, root / "usr/local/lib", follow_symlinks=False)


def _prefix_of(version: str) -> Path:
    """Find a CPython on this machine; version: 3.10."""
    pyenv = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv")
    found = [
        *pyenv.glob(f"versions/{version}*/bin/python{version}"),
        *([Path(which)] if (which := shutil.which(f"python{version}")) else []),
    ]
    for python in [Path(sys.executable), *found]:
        done = subprocess.run(
            [python, "-c", "import sys; print('%d.%d' % sys.version_info[:2], sys.base_prefix)"],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.stdout.startswith(f"{version} "):
            return Path(done.stdout.split(maxsplit=1)[1].strip())
    raise AssertionError(f"no Python {version} is on this machine, and the base image needs one: install it")


def make_build(docker: Docker, base: str) -> str | None:
    """Make the base with nvcc 11.8 and its C++ compiler; None if Debian has no package for it."""
    done = docker("build", "--tag", BUILD, "-", stdin=NVCC.format(base=base, cuda=CUDA), check=False)
    return BUILD if done.returncode == 0 else None


def copy_checkout(source: Path, target: Path, owner: int) -> None:
    """The files that git knows or would take, as a clone has them."""
    listing = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=source,
        capture_output=True,
        check=True,
    )
    names: Sequence[str] = [name for name in listing.stdout.decode().split("\0") if name and (source / name).is_file()]
    for name in names:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source / name, target / name)
    if os.getuid() == 0:
        for path in [target, *target.rglob("*")]:
            os.chown(path, owner, owner)
