"""The shells that a box may have as login shell: on the machine, or in CI put there."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from tests.apt import install, unpack

# By name: the program's words, and the Debian package that has it.
LOGIN_SHELLS = {
    "bash": (["bash"], "bash"),
    "dash": (["dash"], "dash"),
    "zsh": (["zsh"], "zsh"),
    "tcsh": (["tcsh"], "tcsh"),
    "csh": (["bsd-csh"], "csh"),
    "fish": (["fish"], "fish"),
    "busybox": (["busybox", "sh"], "busybox"),
    # It differs: its `head -c` reads ahead. Debian has either the one or the other.
    "busybox-static": (["busybox", "sh"], "busybox-static"),
}


def login_shell(name: str, folder: Path) -> list[str]:
    """Return the words that start a shell. folder: for a package that cannot be installed."""
    words, package = LOGIN_SHELLS[name]
    unpacked = folder / "bin/busybox"
    if not (unpacked.exists() if name == "busybox-static" else shutil.which(words[0])):
        if os.environ.get("RLHF_CI") != "1":
            pytest.skip(f"needs {words[0]}, of the package {package}")
        if name == "busybox-static":
            unpack(package, folder)
        else:
            install(package)
    return [str(unpacked if name == "busybox-static" else shutil.which(words[0])), *words[1:]]
