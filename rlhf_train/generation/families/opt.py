"""Name the tensors of an OPT model for the static decoder. Nothing is copied.

A model family is one function that fills a `Network`. A LLaMA-like family would add its norms,
positions and gates there (rlhf_train/kernels/decoder_weights.py) and in
rlhf_train/generation/decoder.py. A model of another family generates by its own forward.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rlhf_train.kernels.decoder_weights import Adapter, Layer, LinearWeights, Network, Norm
from rlhf_train.models.head import transform_of


def network_of(model: Any) -> Network | None:
    """Return a model's tensors, or None if the static decoder cannot use them.

    It needs a family that is known here, and whole tensors: not those of ZeRO-3.
    """
    if getattr(model.config, "model_type", None) != "opt" or model.config.activation_function != "relu":
        return None
    if not getattr(model.config, "layer_norm_elementwise_affine", True):  # its norms have no weights
        return None
    if any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
        return None
    return opt(model)


def opt(model: Any) -> Network:
    """Return the tensors of an OPTForCausalLM; Zhang et al. 2022, arXiv:2205.01068.

    opt-350m norms after each sum and has a narrower embedding.
    """
    decoder, config = model.model.decoder, model.config
    norm_first = config.do_layer_norm_before
    blocks = list(decoder.layers)
    layers = []
    for block, following in zip(blocks, [*blocks[1:], None], strict=True):
        attention = block.self_attn
        query, key, value = (_linear(getattr(attention, f"{name}_proj")) for name in "qkv")
        if norm_first:
            after_attention = block.final_layer_norm
            after_mlp = decoder.final_layer_norm if following is None else following.self_attn_layer_norm
        else:
            after_attention, after_mlp = block.self_attn_layer_norm, block.final_layer_norm
        layers.append(
            Layer(
                query=query,
                key=key,
                value=value,
                joined=_joined([key, value, query]),
                output=_linear(attention.out_proj),
                after_attention=_norm(after_attention),
                up=_linear(block.fc1),
                down=_linear(block.fc2),
                after_mlp=_norm(after_mlp) if after_mlp is not None else None,
            )
        )
    tokens = transform_of(model).tokens
    return Network(
        token_embedding=decoder.embed_tokens.weight.data,
        position_embedding=decoder.embed_positions.weight.data,
        position_offset=decoder.embed_positions.offset,
        project_in=_linear(decoder.project_in) if decoder.project_in is not None else None,
        first_norm=_norm(blocks[0].self_attn_layer_norm) if norm_first else None,
        norm_first=norm_first,
        layers=tuple(layers),
        project_out=_linear(decoder.project_out) if decoder.project_out is not None else None,
        head=_linear(model.lm_head),
        heads=config.num_attention_heads,
        tokens=tokens if tokens is not None and tokens < model.lm_head.out_features else None,
    )


def _linear(module: Any) -> LinearWeights:
    adapter = None
    if hasattr(module, "lora_A"):
        a, b = (side["default"].weight.data for side in (module.lora_A, module.lora_B))
        adapter = Adapter(a, b, module.scaling["default"])
    return LinearWeights(module.weight.data, module.bias.data if module.bias is not None else None, adapter)


def _norm(module: nn.LayerNorm) -> Norm:
    return Norm(module.weight.data, module.bias.data, module.eps)


def _joined(parts: Sequence[LinearWeights]) -> LinearWeights | None:
    """Join several products into one, if their weights and biases are adjacent in memory.

    DeepSpeed's flat 16-bit buffers have them so.
    """
    if any(part.adapter is not None for part in parts):
        return None
    weight, bias = _adjacent([part.weight for part in parts]), _adjacent([part.bias for part in parts])
    return LinearWeights(weight, bias) if weight is not None and bias is not None else None


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
