"""Debian's packages, for tests that CI may install programs for: one process at a time."""

from __future__ import annotations

import fcntl
import os
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def apt_turn() -> Iterator[None]:
    """Wait until no other process of the tests uses apt, whose locks are not waited for."""
    with (Path(tempfile.gettempdir()) / f"rlhf-box-tests-{os.getuid()}.apt").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def apt(*words: str, cwd: Path | None = None) -> None:
    """Run apt-get, with the lists of packages as they are now."""
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    with apt_turn():
        for argv in (["apt-get", "-qq", "update"], ["apt-get", "-qq", *words]):
            done = subprocess.run(argv, cwd=cwd, env=environment, capture_output=True, text=True, check=False)
            assert done.returncode == 0, f"{' '.join(argv)}: {done.stdout[-1000:]}{done.stderr[-1000:]}"


def install(*packages: str) -> None:
    apt("install", "-y", "--no-install-recommends", *packages)


def unpack(package: str, folder: Path) -> None:
    """Put a package's files into a folder, for one that cannot be installed next to another."""
    folder.mkdir(parents=True)
    apt("-o", "APT::Sandbox::User=root", "download", package, cwd=folder)
    (file,) = folder.glob(f"{package}_*.deb")
    subprocess.run(["dpkg", "-x", file, folder], check=True)
