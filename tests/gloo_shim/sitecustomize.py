"""PyTorch 2.0's gloo lacks what DeepSpeed's ZeRO 1-3 asks for; with this folder on PYTHONPATH every
process has it.

For the tests on the pinned stack alone, on CPUs: there NCCL, which has all of it, cannot run.
Collectives in bfloat16 go through float32; the gather and the scatter of one flat tensor are made
of those that gloo has. What passes with it shows our own control flow and arithmetic, not NCCL's
communication.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class Done:
    """The handle of a collective that has already happened."""

    def wait(self, timeout: Any = None) -> bool:
        return True

    def is_completed(self) -> bool:
        return True


def in_float32(collective: Any) -> Any:
    """A collective that works on one tensor in place, bfloat16 taken through float32, which holds
    it exactly.
    """

    def shimmed(tensor: Tensor, *args: Any, async_op: bool = False, **kwargs: Any) -> Any:
        if tensor.dtype != torch.bfloat16:
            return collective(tensor, *args, async_op=async_op, **kwargs)
        wide = tensor.float()
        collective(wide, *args, **kwargs)
        tensor.data.copy_(wide)
        return Done() if async_op else None

    return shimmed


gloo_all_gather = dist.all_gather
dist.broadcast, dist.all_reduce, dist.reduce = (in_float32(f) for f in (dist.broadcast, dist.all_reduce, dist.reduce))


# The names of the arguments are PyTorch's: DeepSpeed passes some by name.
def all_gather_into_tensor(
    output_tensor: Tensor, input_tensor: Tensor, group: Any = None, async_op: bool = False
) -> Any:
    wide = torch.float32 if input_tensor.dtype == torch.bfloat16 else input_tensor.dtype
    parts = [torch.empty(input_tensor.numel(), dtype=wide) for _ in range(dist.get_world_size(group))]
    gloo_all_gather(parts, input_tensor.to(wide).reshape(-1), group=group)
    output_tensor.data.view(-1).copy_(torch.cat(parts))
    return Done() if async_op else None


def reduce_scatter_tensor(
    output: Tensor, input: Tensor, op: Any = dist.ReduceOp.SUM, group: Any = None, async_op: bool = False
) -> Any:
    whole = input.detach().float().clone()
    dist.all_reduce(whole, group=group)
    if op == dist.ReduceOp.AVG:
        whole /= dist.get_world_size(group)
    output.data.view(-1).copy_(whole.view(-1).chunk(dist.get_world_size(group))[dist.get_rank(group)])
    return Done() if async_op else None


def all_gather(outputs: list[Tensor], tensor: Tensor, group: Any = None, async_op: bool = False) -> Any:
    if tensor.dtype != torch.bfloat16:
        return gloo_all_gather(outputs, tensor, group=group, async_op=async_op)
    flat = torch.empty(len(outputs) * tensor.numel(), dtype=tensor.dtype)
    all_gather_into_tensor(flat, tensor, group)
    for output, part in zip(outputs, flat.chunk(len(outputs)), strict=True):
        output.data.view(-1).copy_(part)
    return Done() if async_op else None


dist.all_gather = all_gather
# DeepSpeed takes the newer names where they are, and the older ones else.
dist.all_gather_into_tensor = dist._all_gather_base = all_gather_into_tensor
dist.reduce_scatter_tensor = dist._reduce_scatter_base = reduce_scatter_tensor
