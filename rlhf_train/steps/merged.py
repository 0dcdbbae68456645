"""Measure what will be saved: a model with LoRA's adapters merged, in the dtype of its file."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from rlhf_train.engine.deepspeed_engine import gathered, replaced
from rlhf_train.models.adapters import adapted_layers, delta, keeps_enough, kept_and_total
from rlhf_train.models.float32 import in_float32


@contextmanager
def merged(model: Any, settle: Callable[[], None] = lambda: None) -> Iterator[bool]:
    """Let a model compute what `merge_lora` will save, for the length of the block.

    If that will be in the model's own dtype, the adapters are merged into the weights, and taken
    out again. If it will be float32, the model computes in float32, and True is yielded. settle: of
    the model's engine, whose ZeRO 3 may hold whole weights of before. All ranks take part. A model
    without adapters stays as it is.
    """
    settle()
    if not keeps_enough(kept_and_total(weight, change) for _, weight, change, _ in _changes(model)):
        with in_float32(model):
            yield True
        return
    with replaced(_merged_values(model)):
        settle()
        yield False
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
