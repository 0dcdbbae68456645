"""Read the scripts of remote/on_box as they are sent to a box.

Each is sent whole, since nothing of ours need be on the box yet. supervisor.sh and environment.sh
are not sent alone: they are on the box in the folder of our code, and read lib.sh next to them.
"""

from __future__ import annotations

from pathlib import Path

ON_BOX = Path(__file__).parent / "on_box"
READS_LIB = '. "$(dirname -- "$0")/lib.sh"\n'  # the line of a script that lib.sh replaces
GPU_COPY_CHECK = "@GPU_COPY_CHECK@\n"  # the line of probe.sh that gpu_copy_check.py replaces


def script(name: str) -> bytes:
    """Read one script with lib.sh in it, and probe.sh also with gpu_copy_check.py."""
    return _text(name).replace(READS_LIB, _text("lib.sh")).replace(GPU_COPY_CHECK, _text("gpu_copy_check.py")).encode()


def dispatch_script() -> str:
    """Read dispatch.sh without its comments, since it is sent with most calls."""
    return "\n".join(line for line in _text("dispatch.sh").splitlines() if not line.lstrip().startswith("#"))


def _text(name: str) -> str:
    return (ON_BOX / name).read_text(encoding="utf-8")
