"""This module reads what the operating system reports: the processor, memory, and open files.

What cannot be found out stays unknown.
"""

from __future__ import annotations

import os
import re
from contextlib import suppress
from pathlib import Path

CPU = Path("/proc/cpuinfo")
CGROUPS = Path("/sys/fs/cgroup")
# (limit, used) of this container, in cgroups of version 2 and 1.
MEMORY_LIMITS = [
    (CGROUPS / "memory.max", CGROUPS / "memory.current"),
    (CGROUPS / "memory/memory.limit_in_bytes", CGROUPS / "memory/memory.usage_in_bytes"),
]


def cpu_text() -> str:
    """Return the text of /proc/cpuinfo; "" where there is none."""
    return read(CPU)


def cpu_flags(text: str) -> tuple[str, ...] | None:
    """Return the flags of the first CPU in /proc/cpuinfo.

    None: the processor is not an x86, and the line has another name.
    """
    found = re.search(r"^flags\s*:(.*)$", text, flags=re.MULTILINE)
    return tuple(found[1].split()) if found else None


def processor_name(text: str) -> str:
    """Return the name of the first CPU in /proc/cpuinfo; "" where it has none."""
    found = re.search(r"^model name\s*:(.*)$", text, flags=re.MULTILINE)
    return found[1].strip() if found else ""


def free_memory_bytes() -> int:
    """Return the bytes of main memory that this process may still take; 0: not known.

    That is what the kernel or the container's limit leaves.
    """
    found = re.search(r"^MemAvailable:\s+([0-9]+) kB", read(Path("/proc/meminfo")), flags=re.MULTILINE)
    free = int(found[1]) * 1024 if found else 0
    for limit, used in MEMORY_LIMITS:
        most, now = read(limit).strip(), read(used).strip()
        if most.isdecimal() and now.isdecimal():
            # Pages of files that nobody uses count as used, but the kernel frees them when needed.
            statistics = read(limit.with_name("memory.stat"))
            cached = re.search(r"^(?:total_)?inactive_file ([0-9]+)", statistics, flags=re.MULTILINE)
            free = min(free, max(0, int(most) - int(now) + (int(cached[1]) if cached else 0)))
    return free


def holders(path: Path) -> list[tuple[int, str]]:
    """List (process, command) of the processes that have the file open.

    Other users' processes are not seen, and none where there is no /proc.
    """
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if any(os.path.samefile(link, path) for link in (folder / "fd").iterdir()):  # noqa: PTH121
                command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
                found.append((int(folder.name), command[:80]))
    return sorted(found)


def open_files(end: str) -> list[Path]:
    """List the files that processes have open and whose path has this end.

    Other users' processes are not seen, and none where there is no /proc.
    """
    found = set()
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # another user's process, or gone
            for link in (folder / "fd").iterdir():
                with suppress(OSError):  # closed meanwhile
                    if (path := str(link.readlink())).endswith(end):
                        found.add(Path(path))
    return sorted(found)


def resident_bytes(process: int) -> int:
    """Return the main memory that a process holds; 0: it is gone, or not seen."""
    found = re.search(r"^VmRSS:\s+([0-9]+) kB", read(Path(f"/proc/{process}/status")), flags=re.MULTILINE)
    return int(found[1]) * 1024 if found else 0


def tree_bytes(process: int) -> int:
    """Return the main memory of a process and of all below it; what they share counts once."""
    found = re.search(r"^Pss:\s+([0-9]+) kB", read(Path(f"/proc/{process}/smaps_rollup")), flags=re.MULTILINE)
    own = int(found[1]) * 1024 if found else 0
    return own + sum(map(tree_bytes, _children(process)))


def _children(process: int) -> list[int]:
    lists = (read(file) for file in Path(f"/proc/{process}/task").glob("*/children"))
    return [int(child) for text in lists for child in text.split()]


def read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
