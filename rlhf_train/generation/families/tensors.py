"""Name a model's tensors as the static decoder has them. Nothing is copied."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rlhf_train.kernels.decoder_weights import Adapter, LinearWeights


class UnknownModel(Exception):
    """A model that the static decoder cannot generate with; it says why."""


def linear(module: Any) -> LinearWeights:
    adapter = None
    if hasattr(module, "lora_A"):
        a, b = (side["default"].weight.data for side in (module.lora_A, module.lora_B))
        adapter = Adapter(a, b, module.scaling["default"])
    return LinearWeights(module.weight.data, module.bias.data if module.bias is not None else None, adapter)


def joined(parts: Sequence[LinearWeights]) -> LinearWeights | None:
    """Join several products into one, if their weights and biases are adjacent in memory.

    DeepSpeed's flat 16-bit buffers have them so. All have a bias, or none.
    """
    if any(part.adapter is not None for part in parts):
        return None
    weight, bias = _adjacent([part.weight for part in parts]), _adjacent([part.bias for part in parts])
    if weight is None or (bias is None and any(part.bias is not None for part in parts)):
        return None
    return LinearWeights(weight, bias)


def _adjacent(tensors: Sequence[Tensor | None]) -> Tensor | None:
    """Return tensors that lie in one storage without gaps as one tensor; else None."""
    first, end, rows = tensors[0], 0, 0
    if first is None:
        return None
    storage = first.untyped_storage().data_ptr()
    for tensor in tensors:
        if tensor is None or not tensor.is_contiguous() or tensor.untyped_storage().data_ptr() != storage:
            return None
        if rows and tensor.data_ptr() != end:
            return None
        rows, end = rows + tensor.shape[0], tensor.data_ptr() + tensor.numel() * tensor.element_size()
    return torch.as_strided(first, (rows, *first.shape[1:]), first.stride(), first.storage_offset())
