"""OpenSSH and rsync: on the machine, or in CI put there."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from tests.apt import install

PROGRAMS = {"sshd": "openssh-server", "ssh": "openssh-client", "rsync": "rsync"}
SEARCH = f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin"


def missing() -> list[str]:
    """Packages."""
    return [package for program, package in PROGRAMS.items() if not shutil.which(program, path=SEARCH)]


@pytest.fixture(scope="session")
def sshd_program() -> str:
    """Its path; in CI, ssh and rsync are there too."""
    if missing() and os.environ.get("RLHF_CI") == "1":
        install(*missing())
    if "openssh-server" in missing():
        pytest.skip("needs sshd, of the package openssh-server")
    if os.geteuid() == 0:
        Path("/run/sshd").mkdir(exist_ok=True, mode=0o755)  # where it locks itself in
    return str(shutil.which("sshd", path=SEARCH))
