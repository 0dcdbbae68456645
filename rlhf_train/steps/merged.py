"""Measure what will be saved: merge LoRA's adapters into the weights, and take them out again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from rlhf_train.engine.deepspeed_engine import gathered, replaced
from rlhf_train.models.adapters import adapted_layers, delta, keeps_enough, kept_and_total


@contextmanager
def merged(model: Any, settle: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Merge the adapters into the weights, in their dtype, for the length of the block.

    The block sees what `merge_lora` will save. If that will be float32, nothing changes: the block
    sees 16-bit weights with the adapters next to them, whose sum is rounded, so a small change
    shows less than in the saved model. settle: of the model's engine, whose ZeRO 3 may hold whole
    weights of before. All ranks take part. A model without adapters stays as it is.
    """
    settle()
    if not keeps_enough(kept_and_total(weight, change) for _, weight, change, _ in _changes(model)):
        yield
        return
    with replaced(_merged_values(model)):
        settle()
        yield
        settle()


def _merged_values(model: Any) -> Iterator[tuple[Any, Tensor]]:
    """Yield the merged weight of each adapted layer, and an adapter of zeros."""
    for parameter, weight, change, b in _changes(model):
        yield parameter, weight.float() + change
        yield b, torch.zeros(getattr(b, "ds_shape", b.shape), device=change.device)


def _changes(model: Any) -> Iterator[tuple[Any, Tensor, Tensor, Any]]:
    """Yield each adapted layer's weight, its whole value, its adapter's change and B."""
    for layer in adapted_layers(model).values():
        weight, a, b = layer.base_layer.weight, layer.lora_A["default"].weight, layer.lora_B["default"].weight
        with gathered(weight, a, b), torch.no_grad():
            value, change = weight.detach().clone(), delta(layer, a, b)
        yield weight, value, change, b
