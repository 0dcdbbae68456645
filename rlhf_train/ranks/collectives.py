"""This process among the ranks of a run: its device, and the few collectives that the steps use."""

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
    # over CPUs, for what is in no GPU's memory; None: the default group is over CPUs
    host_group: dist.ProcessGroup | None = None

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def gpu_peak_bytes(self) -> int | None:
        """Most memory that tensors held on this GPU since the process began."""
        return torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else None

    def sum(self, numbers: Mapping[str, float | Tensor]) -> dict[str, float]:
        """Each number added up over all ranks."""
        local = torch.stack(
            [torch.as_tensor(value, dtype=torch.float64, device=self.device).detach() for value in numbers.values()]
        )
        if self.size > 1:
            self.meet()
            dist.all_reduce(local)
        return dict(zip(numbers, local.tolist(), strict=True))

    def any(self, flag: bool) -> bool:
        """Whether it is true on some rank. Waits for the other ranks, and for no GPU."""
        if self.size == 1:
            return flag
        told = torch.tensor(int(flag))
        self.meet()
        dist.all_reduce(told, op=dist.ReduceOp.MAX, group=self.host_group)
        return bool(told)

    def gather(self, value: Any) -> list[Any]:
        """Every rank's picklable value, in the order of ranks."""
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
