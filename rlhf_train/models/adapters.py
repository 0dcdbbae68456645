"""LoRA's adapters: which layers get one, how they merge into plain weights, how they are saved.

Hu et al. 2021, arXiv:2106.09685. PEFT injects the adapters; a layer then computes
W x + alpha / rank B A x.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from jobs.errors import ToolkitError
from jobs.spec import Lora
from rlhf_train.disk import read_json, write_json

ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
# Always written: what readers that are not PEFT ask for.
LORA_FIELDS = {"peft_type", "task_type", "base_model_name_or_path", "r", "lora_alpha", "lora_dropout", "target_modules"}
LORA_FIELDS |= {"bias", "fan_in_fan_out", "inference_mode"}
# The share of an adapter that must survive rounding; else the merged model is saved in float32.
# 38 % of the gain was left in bfloat16 after 5 updates at the recipe's rates, 97 % after 20.
KEPT_MIN = 0.95


def layers_to_adapt(model: nn.Module, lora: Lora) -> list[str]:
    """Return the full names of the layers that get an adapter.

    `all-linear` means each linear layer of the transformer's blocks, GPT-2's Conv1D too, but not
    the head. Raises ToolkitError for a name that matches no linear layer.
    """
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)]
    in_blocks = [name for name in linear if any(part.isdecimal() for part in name.split("."))]
    if lora.target_modules == "all-linear":
        return in_blocks
    chosen = {target: [name for name in linear if _ends_with(name, target)] for target in lora.target_modules}
    unknown = [target for target, names in chosen.items() if not names]
    if unknown:
        known = sorted({name.rsplit(".", 1)[-1] for name in linear})
        raise ToolkitError(
            "actor.lora.target_modules names no layer of the model",
            why=f"{', '.join(unknown)} matches no linear layer",
            hint=f"its linear layers are {', '.join(known)}; `all-linear` takes those of all blocks",
        )
    return sorted({name for names in chosen.values() for name in names}, key=linear.index)


def _ends_with(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


def add_lora(model: nn.Module, lora: Lora, seed: int) -> nn.Module:
    """Inject PEFT's adapters into `model` in place; only they are trained.

    The model's own class stays. Raises ToolkitError if a target matches no layer.
    """
    from peft import inject_adapter_in_model

    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it sets fan_in_fan_out for a Conv1D, as it should
        inject_adapter_in_model(_config(lora, layers_to_adapt(model, lora)), model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
    _try_merge(model)
    return model


def _try_merge(model: nn.Module) -> None:
    """Check, before hours of training, that each adapter has its weight's shape when merged."""
    for name, layer in adapted_layers(model).items():
        a, b = (side["default"].weight.to("meta") for side in (layer.lora_A, layer.lora_B))
        change, weight = delta(layer, a, b), layer.base_layer.weight
        if change.shape != weight.shape:
            raise ToolkitError(
                f"the adapter of {name} cannot be merged",
                why=f"it has the shape {tuple(change.shape)}, and the weight {tuple(weight.shape)}",
                hint="leave that layer out of actor.lora.target_modules",
            )


def _config(lora: Lora, layers: Collection[str], **more: Any) -> Any:
    from peft import LoraConfig

    settings: dict[str, Any] = {"r": lora.rank, "lora_alpha": lora.alpha, "lora_dropout": 0.0, "bias": "none"}
    return LoraConfig(**settings, target_modules=list(layers), **more)


def describe(model: nn.Module) -> str:
    """Say which layers of a model have adapters, e.g. `14 layers: k_proj, q_proj`."""
    adapted = list(adapted_layers(model))
    return f"{len(adapted)} layers: {', '.join(sorted({name.rsplit('.', 1)[-1] for name in adapted}))}"


def adapted_layers(model: nn.Module) -> dict[str, Any]:
    """Return the layers that have an adapter, by their full names."""
    return {name: module for name, module in model.named_modules() if hasattr(module, "lora_A")}


def delta(layer: Any, a: Tensor, b: Tensor) -> Tensor:
    """Return what an adapter adds to its layer's weight, in float32 and in the weight's shape.

    a: (rank, in); b: (out, rank), both whole.
    """
    product = layer.scaling["default"] * (b.float() @ a.float())
    return product.T if layer.fan_in_fan_out else product  # a Conv1D's weight is (in, out)


def merge_lora(state: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Return a plain model's state dict from that of a model with adapters.

    state: whole tensors, on the CPU. The sums are made in float32. They are rounded to the model's
    dtype if at least KEPT_MIN of the adapters' effect is left then; else all weights become
    float32.
    """
    layers, merged, numbers = adapted_layers(model), dict[str, Tensor](), list[tuple[float, float]]()
    for name, value in state.items():
        if ".lora_" in name:
            continue
        prefix, adapted, leaf = name.partition(".base_layer.")
        if not adapted:
            merged[name] = value
            continue
        if leaf == "weight":
            a, b = (state[f"{prefix}.lora_{side}.default.weight"] for side in "AB")
            change = delta(layers[prefix], a, b)
            merged[f"{prefix}.{leaf}"] = value.float() + change
            numbers.append(kept_and_total(value, change))
        else:
            merged[f"{prefix}.{leaf}"] = value
    dtype = next((value.dtype for name, value in state.items() if name.endswith(".base_layer.weight")), torch.float32)
    if not keeps_enough(numbers):
        return {name: value.float() if value.is_floating_point() else value for name, value in merged.items()}
    return {name: value.to(dtype) if value.is_floating_point() else value for name, value in merged.items()}


def kept_and_total(weight: Tensor, change: Tensor) -> tuple[float, float]:
    """Return how much of a change is left if it is added in the weight's dtype, and how much it is.

    Both are inner products with the change.
    """
    left = (weight.float() + change).to(weight.dtype).float() - weight.float()
    return float((left * change).sum()), float(change.square().sum())


def keeps_enough(changes: Iterable[tuple[float, float]]) -> bool:
    """Return whether the model's own dtype keeps KEPT_MIN of all changes together.

    changes: of all layers, as `kept_and_total` returns them.
    """
    kept, total = (sum(column) for column in zip((0.0, 0.0), *changes, strict=True))
    return kept >= KEPT_MIN * total


def save_adapter(state: Mapping[str, Tensor], model: nn.Module, lora: Lora, base: str, folder: Path) -> None:
    """Write the adapters as a PEFT folder, which PeftModel.from_pretrained(base, folder) loads."""
    folder.mkdir()
    # PEFT's names: the model it wraps, and no adapter's name.
    tensors = {
        f"base_model.model.{name.replace('.default.', '.')}": value.contiguous()
        for name, value in state.items()
        if ".lora_" in name
    }
    save_file(tensors, folder / ADAPTER_FILES[1], metadata={"format": "pt"})
    layers = adapted_layers(model)
    transposed = any(layer.fan_in_fan_out for layer in layers.values())
    config = _config(lora, layers, task_type="CAUSAL_LM", base_model_name_or_path=base, fan_in_fan_out=transposed)
    config.inference_mode = True
    config.save_pretrained(str(folder))
    _leave_out_defaults(folder / ADAPTER_FILES[0])


def _leave_out_defaults(file: Path) -> None:
    """Leave out of adapter_config.json what nobody has set: an older PEFT fails at new fields."""
    from peft import LoraConfig

    defaults, fields = LoraConfig().to_dict(), read_json(file)
    names = [name for name, value in fields.items() if name in LORA_FIELDS or value != defaults.get(name, value)]
    write_json(file, {name: fields[name] for name in names})
