"""This module describes the machine that is measured, and what measured processes may use.

It imports nothing that takes long.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[1]
PACKAGES = ("torch", "transformers", "deepspeed", "accelerate", "numpy", "triton")
# Without these, glibc returns large blocks to the kernel and faults them in again: 9 to 17 % of an
# update. They are the same for every side, and for this process.
MALLOC = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "17179869184", "MALLOC_TOP_PAD_": "268435456"}


@dataclass(frozen=True)
class Where:
    """The processors that measured processes run on, the same for ours and for the peers."""

    device: str  # cpu or cuda
    threads: int  # of a rank, on a CPU
    ranks: int = 1
    cores: frozenset[int] = frozenset()  # cores that may be used; empty: nothing is pinned
    variables: tuple[tuple[str, str], ...] = ()  # further environment variables

    @property
    def environment(self) -> dict[str, str]:
        path = os.pathsep.join([str(CHECKOUT), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]).rstrip(os.pathsep)
        own = {"OMP_NUM_THREADS": str(self.threads), "PYTHONPATH": path, "TOKENIZERS_PARALLELISM": "false"}
        return {**os.environ, **MALLOC, **own, **dict(self.variables)}


def machine(where: Where) -> str:
    import torch

    parts = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if where.device == "cuda" else []
    parts += [
        f"{os.cpu_count()} CPUs ({processor()})",
        f"threads {where.threads}",
        f"{platform.system()} {platform.release()}",
    ]
    return ", ".join([*parts, f"load {os.getloadavg()[0]:.1f}"])


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.machine()
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.machine())


def versions() -> str:
    found = []
    for package in PACKAGES:
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            continue
    return f"Python {platform.python_version()}, {', '.join(found)}"


@contextmanager
def on_other_cores(cores: frozenset[int]) -> Iterator[None]:
    """Move this process to the others of `cores`, if there are any, inside the block.

    The processes that it has started stay on the cores that it was on.
    """
    measured = os.sched_getaffinity(0) if cores else cores
    if cores - measured:
        os.sched_setaffinity(0, cores - measured)
    try:
        yield
    finally:
        if cores:
            os.sched_setaffinity(0, measured)


def quietest_cores(cores: set[int], count: int) -> set[int]:
    """Return those of `cores` that are idle most during half a second."""

    def idle() -> dict[int, int]:
        lines = Path("/proc/stat").read_text(encoding="utf-8").splitlines()
        rows = [line.split() for line in lines if line.startswith("cpu")]
        return {int(row[0][3:]): int(row[4]) for row in rows if row[0] != "cpu"}

    before = idle()
    time.sleep(0.5)
    after = idle()
    return set(sorted(cores, key=lambda core: before[core] - after[core])[:count])
