"""Let a 16-bit model compute in float32 without a second copy of it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn


@contextmanager
def in_float32(model: nn.Module) -> Iterator[None]:
    """Let a model compute in float32 for the length of the block: weights, activations, adapters.

    A module's weights become float32 only while it runs, so the most that is needed at a time is
    one module's, the head's for example. An adapter's product is added in float32, so the numbers
    are those of the model that `merge_lora` makes in float32. It also works on ZeRO-3's weights,
    which are whole while their module runs. Run it without gradients.
    """
    buffers = _float32_buffers(model)
    patched = [module for module in model.modules() if hasattr(module, "lora_A") or _has_tensors(module)]
    own_forwards = [vars(module).get("forward") for module in patched]
    for module in patched:
        if hasattr(module, "lora_A"):
            module.forward = partial(_adapted_forward, module)
        else:
            module.forward = partial(_float32_forward, module, module.forward, buffers.get(module, {}))
    try:
        yield
    finally:
        for module, own in zip(patched, own_forwards, strict=True):
            del module.forward
            if own is not None:
                module.forward = own


def _has_tensors(module: nn.Module) -> bool:
    return any(tensor is not None for tensor in (*module._parameters.values(), *module._buffers.values()))


def _float32_buffers(model: Any) -> dict[nn.Module, dict[str, Tensor]]:
    """Return buffers that are computed from the config, in float32, where the model's are rounded.

    Gemma's embeddings are times the root of their width, a buffer that no file holds. In bfloat16
    it is off by up to 0.4 %.
    """
    rounded = [
        (name, module, leaf)
        for name, module in model.named_modules()
        for leaf in sorted(module._non_persistent_buffers_set)
        if module._buffers[leaf] is not None and module._buffers[leaf].dtype in (torch.bfloat16, torch.float16)
    ]
    found = dict[nn.Module, dict[str, Tensor]]()
    if rounded:
        from accelerate import init_empty_weights  # here, since it takes time and only PEFT brings it

        with init_empty_weights(include_buffers=False):  # a model without weights
            twin = type(model)(copy.deepcopy(model.config))
        for name, module, leaf in rounded:
            buffer = twin.get_submodule(name.replace(".base_layer", ""))._buffers[leaf]
            found.setdefault(module, {})[leaf] = buffer.to(module._buffers[leaf].device)
    return found


def _adapted_forward(layer: Any, x: Tensor) -> Tensor:
    """Compute W x + alpha / rank B A x; PEFT's own forward casts x to the adapter's dtype."""
    y: Tensor = layer.base_layer(x)
    if layer.disable_adapters:
        return y
    return y + layer.scaling["default"] * layer.lora_B["default"](layer.lora_A["default"](x))


def _float32_forward(
    module: nn.Module, forward: Callable[..., Any], float32_buffers: Mapping[str, Tensor], *args: Any, **kwargs: Any
) -> Any:
    """Call a module's forward with float32 copies of its own parameters and buffers."""
    parameters, buffers = module._parameters, module._buffers
    # The mappings are replaced, not the parameters' data, to which DeepSpeed's hooks belong.
    module._parameters = _float32(parameters)
    module._buffers = _float32(buffers) | dict(float32_buffers)
    try:
        return forward(*args, **kwargs)
    finally:
        module._parameters, module._buffers = parameters, buffers


def _float32(tensors: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: tensor.float() if tensor is not None and tensor.is_floating_point() else tensor
        for name, tensor in tensors.items()
    }
