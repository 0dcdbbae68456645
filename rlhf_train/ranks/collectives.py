"""`World` is this process among a run's ranks: its device and the collectives that steps use."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class World:
    rank: int
    size: int
    device: torch.device
    meet: Callable[[], object] = lambda: None  # called before each collective
    # A group over CPUs, for values in main memory; None: the default group is over CPUs.
    host_group: dist.ProcessGroup | None = None

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def gpu_peak_bytes(self) -> int | None:
        """Return the most memory that tensors held on this GPU since the process began."""
        return torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else None

    def sum(self, numbers: Mapping[str, float | Tensor]) -> dict[str, float]:
        """Return the sum of each number over all ranks."""
        tensors = [torch.as_tensor(value, dtype=torch.float64, device=self.device) for value in numbers.values()]
        local = torch.stack([tensor.detach() for tensor in tensors])
        if self.size > 1:
            self.meet()
            dist.all_reduce(local)
        return dict(zip(numbers, local.tolist(), strict=True))

    def any(self, flag: bool) -> bool:
        """Return whether `flag` is true on any rank. It waits for all ranks, but for no GPU."""
        if self.size == 1:
            return flag
        flags = torch.tensor(int(flag))
        self.meet()
        dist.all_reduce(flags, op=dist.ReduceOp.MAX, group=self.host_group)
        return bool(flags)

    def gather(self, value: Any) -> list[Any]:
        """Return every rank's picklable value, in the order of ranks."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        self.meet()
        dist.all_gather_object(values, value, group=self.host_group)
        return values

    def barrier(self) -> None:
        if self.size > 1:
            self.meet()
            dist.barrier(group=self.host_group)
