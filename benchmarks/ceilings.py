"""Ceilings are what the machine can do at best: matrix products and copies.

All shares and floors are computed from them.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from benchmarks.figures import Spread, Table
from benchmarks.machine import Where
from rlhf_train.kernels.cpu_matmul import product

REPEATS = 7
# (rows, out, in) of OPT-1.3b's products with 32 x 512 tokens.
TRAINING_SHAPES = (
    (16384, 6144, 2048),
    (16384, 8192, 2048),
    (16384, 2048, 8192),
    (16384, 50272, 2048),
)


@dataclass(frozen=True)
class Ceilings:
    """The measured rates of a machine.

    flops: per second. copy: bytes per second; on a GPU bytes read and written, on a CPU bytes read.
    """

    flops: Spread  # back to back for a second: training is compared with this
    burst: Spread  # one product after a pause
    copy: Spread
    shapes: dict[str, float]


def seconds(work: Callable[[], object], device: str, repeats: int = REPEATS, pause_s: float = 0.0) -> list[float]:
    """Return the seconds of each repeat, after one that does not count."""
    taken = []
    for _ in range(repeats + 1):
        time.sleep(pause_s)
        began = now(device)
        work()
        taken.append(now(device) - began)
    return taken[1:]


def now(device: str) -> float:
    """Return the time in seconds; on a CPU with one thread, the processor's own seconds.

    Other processes that share the processor then change the result little.
    """
    if device == "cuda":
        torch.cuda.synchronize()
    return time.process_time() if device == "cpu" and torch.get_num_threads() == 1 else time.perf_counter()


def clock_of(where: Where) -> str:
    """Name the clock of `now` and of an update's seconds in a table."""
    is_alone = where.device == "cuda" or where.threads * where.ranks > 1
    return "seconds of the clock" if is_alone else "seconds of the CPU: one thread, on processors that others may share"


def measure(device: str, repeats: int = REPEATS) -> Ceilings:
    """Measure in float32 on a CPU, with all of PyTorch's threads, and in bfloat16 on a GPU."""
    dtype, side = (torch.bfloat16, 8192) if device == "cuda" else (torch.float32, 1024)
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    out = torch.empty_like(a)
    flops = 2 * side**3

    def once() -> None:  # on a CPU by the product's own function
        torch.mm(a, b, out=out) if device == "cuda" else product(a, b)

    burst = [flops / s for s in seconds(once, device, 2 * repeats, pause_s=0.01)]
    times = max(1, int(1.0 / (flops / max(burst))))  # a second's worth

    def many() -> None:
        for _ in range(times):
            once()

    sustained = [flops * times / s for s in seconds(many, device, repeats if device == "cuda" else 3)]
    shapes = {}
    for rows, wide, deep in TRAINING_SHAPES if device == "cuda" else ():
        x, w = torch.randn(rows, deep, device=device, dtype=dtype), torch.randn(wide, deep, device=device, dtype=dtype)
        y = torch.empty(rows, wide, device=device, dtype=dtype)

        def shaped(x: torch.Tensor = x, w: torch.Tensor = w, y: torch.Tensor = y) -> None:
            for _ in range(20):
                torch.mm(x, w.t(), out=y)

        shapes[f"{rows} x {deep} x {wide}"] = max(2 * rows * wide * deep * 20 / s for s in seconds(shaped, device, 5))
        del x, w, y
    size = 2**32 if device == "cuda" else 2**26
    source = torch.ones(size // 4, device=device)
    target = torch.empty_like(source)  # kept: fresh memory is faulted in page by page
    moved = 2 * size if device == "cuda" else size
    copy = [moved / s for s in seconds(lambda: target.copy_(source), device, 2 * repeats)]
    return Ceilings(Spread.of(sustained), Spread.of(burst), Spread.of(copy), shapes)


def table(found: Ceilings, where: Where) -> Table:
    device = where.device
    kind = "bfloat16 8192^3" if device == "cuda" else f"float32 1024^3, {torch.get_num_threads()} threads"
    rows = [
        [f"matmul, {kind}, back to back", f"{scaled(found.flops, 1e9):.0f} GFLOP/s"],
        [f"matmul, {kind}, one after a pause", f"{scaled(found.burst, 1e9):.0f} GFLOP/s"],
    ]
    for shape, rate in found.shapes.items():
        rows.append([f"matmul, bfloat16 {shape}, back to back", f"{rate / 1e9:.0f} GFLOP/s"])
    copied = "copy, read + write" if device == "cuda" else "copy into kept memory, bytes copied"
    rows.append([copied, f"{scaled(found.copy, 1e9):.1f} GB/s"])
    return Table("ceilings", ["", "median (least-most)"], rows, [f"by {clock_of(where)}"], found)


def scaled(spread: Spread, unit: float) -> Spread:
    return Spread(spread.median / unit, spread.least / unit, spread.most / unit, spread.count)
