"""Measure how long this host takes to start a kernel: `python -m rlhf_train.plan.kernel_start`.

Small models on a large card are as slow as the host, and hosts of the same card differ by half. It
is measured in a process of its own, since what uses a GPU keeps memory there until it ends.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LAYERS, WIDTH, ROWS, PASSES = 40, 64, 4, 20
# Of a layer below, forward and backward: 5 and 10, as PyTorch's profiler counted them on an H200.
KERNELS = 15
LIMIT_S = 60.0  # it takes about 6 s, most of it PyTorch's import


class _Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.down(F.gelu(self.up(self.norm(x))))
        return y


def kernel_start_s(device: str) -> float:
    """Return the seconds that a kernel takes in passes, forward and backward, of a tiny network.

    Its kernels have next to nothing to compute.
    """
    network = nn.Sequential(*(_Layer() for _ in range(LAYERS))).to(device, torch.bfloat16)
    x = torch.ones(ROWS, WIDTH, device=device, dtype=torch.bfloat16)
    wait: Callable[[], object] = torch.cuda.synchronize if device == "cuda" else lambda: None

    def pass_s() -> float:
        wait()
        start = time.perf_counter()
        network.zero_grad()
        network(x).sum().backward()
        wait()
        return time.perf_counter() - start

    pass_s()  # libraries are loaded
    return median(pass_s() for _ in range(PASSES)) / (LAYERS * KERNELS)


def in_another_process() -> float | None:
    """Return `kernel_start_s` of the GPU; None where it cannot be had."""
    try:
        done = subprocess.run([sys.executable, "-m", __name__], capture_output=True, timeout=LIMIT_S, check=True)
        return float(done.stdout)
    except (OSError, subprocess.SubprocessError, ValueError):
        return None


if __name__ == "__main__":
    print(kernel_start_s("cuda"))
