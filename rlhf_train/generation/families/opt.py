"""OPT, for the static decoder."""

from __future__ import annotations

from typing import Any

from torch import nn

from rlhf_train.generation.families.tensors import UnknownModel, joined, linear
from rlhf_train.kernels.decoder_weights import Layer, Network, Norm
from rlhf_train.models.head import transform_of


def network(model: Any) -> Network:
    """Return the tensors of an OPTForCausalLM; Zhang et al. 2022, arXiv:2205.01068.

    opt-350m norms after each sum and has a narrower embedding. Raises UnknownModel.
    """
    if model.config.activation_function != "relu":
        raise UnknownModel(f"its activation is {model.config.activation_function}, not relu")
    if not getattr(model.config, "layer_norm_elementwise_affine", True):
        raise UnknownModel("its norms have no weights")
    decoder, config = model.model.decoder, model.config
    norm_first = config.do_layer_norm_before
    blocks = list(decoder.layers)
    layers = []
    for block, following in zip(blocks, [*blocks[1:], None], strict=True):
        attention = block.self_attn
        query, key, value = (linear(getattr(attention, f"{name}_proj")) for name in "qkv")
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
                joined=joined([key, value, query]),
                joined_order="kvq",
                output=linear(attention.out_proj),
                after_attention=_norm(after_attention),
                up=linear(block.fc1),
                down=linear(block.fc2),
                after_mlp=_norm(after_mlp) if after_mlp is not None else None,
            )
        )
    tokens = transform_of(model).tokens
    return Network(
        token_embedding=decoder.embed_tokens.weight.data,
        position_embedding=decoder.embed_positions.weight.data,
        position_offset=decoder.embed_positions.offset,
        project_in=linear(decoder.project_in) if decoder.project_in is not None else None,
        first_norm=_norm(blocks[0].self_attn_layer_norm) if norm_first else None,
        norm_first=norm_first,
        layers=tuple(layers),
        project_out=linear(decoder.project_out) if decoder.project_out is not None else None,
        head=linear(model.lm_head),
        heads=config.num_attention_heads,
        key_heads=config.num_attention_heads,
        head_size=blocks[0].self_attn.head_dim,
        attention_scale=blocks[0].self_attn.head_dim ** -0.5,
        tokens=tokens if tokens is not None and tokens < model.lm_head.out_features else None,
    )


def _norm(module: nn.LayerNorm) -> Norm:
    return Norm(module.weight.data, module.bias.data, module.eps)
