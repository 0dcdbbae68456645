"""Small disks of a test's own."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path

PATIENCE_S = 20.0  # a process whose connection has ended is gone a moment later


def unmount(disk: Path) -> None:
    """As soon as no process has it open. Fails where one keeps it."""
    end = time.monotonic() + PATIENCE_S
    while (done := subprocess.run(["umount", disk], capture_output=True, text=True, check=False)).returncode:
        assert time.monotonic() < end, done.stderr
        time.sleep(0.05)
