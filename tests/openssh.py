"""OpenSSH and rsync: on the machine, or in CI put there."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

PROGRAMS = {"sshd": "openssh-server", "ssh": "openssh-client", "rsync": "rsync"}
SEARCH = f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin"


def missing() -> list[str]:
    """Packages."""
    return [package for program, package in PROGRAMS.items() if not shutil.which(program, path=SEARCH)]


@pytest.fixture(scope="session")
def sshd_program() -> str:
    """Its path; in CI, ssh and rsync are there too."""
    if missing() and os.environ.get("RLHF_CI") == "1":
        for argv in (
            ["apt-get", "-qq", "update"],
            ["apt-get", "-qq", "install", "-y", "--no-install-recommends", *missing()],
        ):
            done = subprocess.run(
                argv,
                capture_output=True,
                text=True,
                check=False,
                env={**os.environ, "DEBIAN_FRONTEND": "noninteractive"},
            )
            assert done.returncode == 0, f"{' '.join(argv)}: {done.stdout[-1000:]}{done.stderr[-1000:]}"
    if "openssh-server" in missing():
        pytest.skip("needs sshd, of the package openssh-server")
    if os.geteuid() == 0:
        Path("/run/sshd").mkdir(exist_ok=True, mode=0o755)  # where it locks itself in
    return str(shutil.which("sshd", path=SEARCH))
