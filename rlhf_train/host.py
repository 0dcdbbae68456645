"""This module reads what the operating system reports: the processor, and the free memory.

What cannot be found out stays unknown.
"""

from __future__ import annotations

import re
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


def read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
