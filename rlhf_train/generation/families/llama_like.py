"""LLaMA and the families built like it, for the static decoder.

LLaMA 1 to 3, Qwen2 (biases), Qwen3 (norms of each head's query and key), Mistral (a window), SmolLM
(3: layers without positions), Granite (factors of its own). What a model does is read off its own
modules, in transformers 4 and 5. A module or a setting that is not known here is refused, so a
model that does more generates by its own forward.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from rlhf_train.generation.families.tensors import UnknownModel, joined, linear
from rlhf_train.kernels.decoder_weights import Layer, Network, Norm
from rlhf_train.models.head import transform_of

# The modules of a model and of its parts. transformers 4 has rotary_emb in each attention.
IN_BODY = {"embed_tokens", "layers", "norm", "rotary_emb"}
IN_LAYER = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
IN_ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm", "rotary_emb"}
IN_MLP = {"gate_proj", "up_proj", "down_proj", "act_fn"}
# How frequencies are scaled: in all of these they depend on the config alone; in `dynamic` only up
# to the model's number of positions.
SCALINGS = ("default", "linear", "dynamic", "llama3", "yarn")


def network(model: Any) -> Network:
    """Return the tensors of a causal model; Touvron et al. 2023, arXiv:2302.13971.

    Raises UnknownModel.
    """
    body, config = model.model, model.config
    blocks = list(body.layers)
    _check_modules(body, IN_BODY, "the model")
    first = blocks[0].self_attn
    rotary = getattr(body, "rotary_emb", None) or first.rotary_emb
    scaling, head_size = getattr(rotary, "rope_type", "default"), first.head_dim
    if scaling not in SCALINGS:
        raise UnknownModel(f"its rotary positions are scaled by `{scaling}`")
    frequencies = rotary.original_inv_freq if scaling == "dynamic" else rotary.inv_freq
    if 2 * len(frequencies) != head_size:
        raise UnknownModel(f"it rotates {2 * len(frequencies)} of the {head_size} numbers of a head")
    transform = transform_of(model)
    if transform.cap is not None:
        raise UnknownModel("it caps its logits")
    following = [block.input_layernorm for block in blocks[1:]] + [body.norm]
    layers = [
        _layer(model, number, block, norm) for number, (block, norm) in enumerate(zip(blocks, following, strict=True))
    ]
    rows = len(model.lm_head.weight)
    return Network(
        token_embedding=body.embed_tokens.weight.data,
        layers=tuple(layers),
        head=linear(model.lm_head),
        heads=first.q_proj.out_features // head_size,
        key_heads=first.k_proj.out_features // head_size,
        head_size=head_size,
        first_norm=_norm(blocks[0].input_layernorm),
        norm_first=True,
        frequencies=frequencies,
        rotation_scale=float(getattr(rotary, "attention_scaling", 1.0)),
        most_tokens=config.max_position_embeddings if scaling == "dynamic" else None,
        attention_scale=getattr(first, "scaling", head_size**-0.5),
        embedding_scale=getattr(body, "embedding_multiplier", 1.0),
        residual_scale=getattr(blocks[0], "residual_multiplier", 1.0),
        logit_scale=transform.scale,
        tokens=transform.tokens if transform.tokens is not None and transform.tokens < rows else None,
    )


def _layer(model: Any, number: int, block: Any, following: nn.Module) -> Layer:
    attention, mlp = block.self_attn, block.mlp
    for module, known, what in (
        (block, IN_LAYER, "a layer"),
        (attention, IN_ATTENTION, "an attention"),
        (mlp, IN_MLP, "a feed-forward layer"),
    ):
        _check_modules(module, known, what)
    if model.config.hidden_act not in ("silu", "swish"):
        raise UnknownModel(f"its activation is {model.config.hidden_act}, not silu")
    query, key, value = (linear(getattr(attention, f"{name}_proj")) for name in "qkv")
    gate, up = linear(mlp.gate_proj), linear(mlp.up_proj)
    has_norms = hasattr(attention, "q_norm")
    return Layer(
        query=query,
        key=key,
        value=value,
        joined=joined([query, key, value]),
        joined_order="qkv",
        output=linear(attention.o_proj),
        after_attention=_norm(block.post_attention_layernorm),
        gate=gate,
        up=up,
        joined_gate=joined([gate, up]),
        down=linear(mlp.down_proj),
        after_mlp=_norm(following),
        query_norm=_norm(attention.q_norm) if has_norms else None,
        key_norm=_norm(attention.k_norm) if has_norms else None,
        is_rotary=bool(getattr(attention, "use_rope", True)),
        window=_window(model.config, number),
    )


def _window(config: Any, number: int) -> int | None:
    """Return how many tokens a layer's token sees, itself included; None: all before it.

    transformers 5 makes a layer's mask by its `layer_types`; where a config has none, Mistral's and
    Qwen2's `sliding_window` is that of all layers. LLaMA and Granite have no window, whatever their
    config says.
    """
    if config.model_type in ("llama", "granite"):
        return None
    kinds = None if config.model_type == "mistral" else getattr(config, "layer_types", None)
    kind = kinds[number] if kinds is not None else "sliding_attention"
    if kind not in ("full_attention", "sliding_attention"):
        raise UnknownModel(f"it has layers of the type {kind}")
    window = getattr(config, "sliding_window", None) if kind == "sliding_attention" else None
    return int(window) if window is not None else None


def _check_modules(module: nn.Module, known: set[str], what: str) -> None:
    unknown = sorted({name for name, _ in module.named_children()} - known)
    if unknown:
        raise UnknownModel(f"{what} has `{unknown[0]}`")


def _norm(module: Any) -> Norm:
    return Norm(module.weight.data, None, module.variance_epsilon)
