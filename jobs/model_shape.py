"""The shape of a model, from its config.json alone: parameters, and what a token costs in a layer.

Each family has a function that lists the linear layers of one block. What a config leaves out is
transformers' default. Tests compare the counts with transformers' own models, and the numbers that
a layer keeps with what PyTorch keeps.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from env.settings import load_families
from jobs.errors import ToolkitError
from jobs.spec import Lora

Config = Mapping[str, Any]


@dataclass(frozen=True)
class Kept:
    """Numbers that a layer keeps of each token for the backward pass.

    They are counted in multiples of the block's sizes.
    """

    width: float = 6.0  # two norms: their input, the normalised input, their output
    attention: float = 2.0  # queries, and what attention gives; a model of one fused product more
    key_value: float = 2.0  # keys and values
    feed: float = 4.0  # the feed-forward layer's: gate, its activation, up, and their product
    # Of each token before it and head, where attention is no fused kernel.
    scores: float = 0.0
    half_width: float = 2.0  # more in 16 bit, since norms compute in float32
    half_attention: float = 0.0
    half_scores: float = 0.0


@dataclass(frozen=True)
class Work:
    """What a layer does besides multiplying: kernels, and numbers of each token that they move.

    A number is moved when it is read or written. They are counted in multiples of the block's
    sizes, forward and backward together.
    """

    forward: int = 38  # kernels that are started, those that multiply among them
    backward: int = 71  # and one for each bias
    width: float = 13.0
    float_width: float = 70.0  # in float32 whatever the weights are: norms
    attention: float = 26.0
    key_value: float = 26.0
    float_attention: float = 0.0  # of queries and keys
    feed: float = 14.0
    scores: float = 0.0  # of each token before it and head, where attention is no fused kernel


@dataclass(frozen=True)
class Block:
    """One layer of a transformer, and what stands outside of the layers."""

    linear: Mapping[str, tuple[int, int]]  # name -> inputs and outputs
    bias: frozenset[str] = frozenset()  # the linear layers that have one
    small: int = 0  # parameters of norms
    outside: int = 0  # parameters of embeddings, projections and the last norm
    outside_matrices: int = 0  # of these, what every token is multiplied with
    kept: Kept = Kept()
    work: Work = Work()


@dataclass(frozen=True)
class Shape:
    """The sizes of a model that decide what it costs."""

    family: str
    layers: int
    width: int  # of the hidden states
    attention: int  # numbers of a token's queries
    key_value: int  # numbers of a token's keys; of its values as many
    feed: int
    heads: int
    vocabulary: int
    head_width: int  # of the states that the vocabulary head reads
    is_tied: bool  # the head is the embedding
    block: Block
    is_known: bool = True  # false: the family has no function here, and was taken for a LLaMA
    is_static: bool = False  # its answers come from the static decoder, not from its own forward

    @property
    def matrices(self) -> int:
        """Return the weights that a token is multiplied with, without the head."""
        return self.layers * sum(a * b for a, b in self.block.linear.values()) + self.block.outside_matrices

    @property
    def head(self) -> int:
        """Return the weights of the vocabulary head, which are the embedding's if it is tied."""
        return self.vocabulary * self.head_width

    @property
    def body(self) -> int:
        """Return the parameters without an untied head."""
        linear = self.block.linear
        biases = sum(linear[name][1] for name in self.block.bias)
        return self.layers * (sum(a * b for a, b in linear.values()) + biases + self.block.small) + self.block.outside

    @property
    def causal(self) -> int:
        """Return the parameters of the language model."""
        return self.body + (0 if self.is_tied else self.head)

    @property
    def scorer(self) -> int:
        """Return the parameters of a reward model: the same body, and a head of one row."""
        return self.body + self.head_width

    def adapters(self, lora: Lora) -> int:
        """Return the parameters of LoRA's adapters in the blocks."""
        return self.layers * sum(lora.rank * (a + b) for a, b in self.adapted(lora).values())

    def adapted(self, lora: Lora) -> dict[str, tuple[int, int]]:
        """Return the linear layers of a block that get an adapter."""
        targets = lora.target_modules
        if targets == "all-linear":
            return dict(self.block.linear)
        return {
            name: sizes
            for name, sizes in self.block.linear.items()
            if any(name == target or name.endswith(f".{target}") for target in targets)
        }

    def kept_by_layer(self, tokens_before: float, *, is_half: bool) -> float:
        """Return the numbers that one layer keeps of a token.

        tokens_before: in the mean, of the same row, itself included. is_half: in 16 bit.
        """
        kept = self.block.kept
        width = kept.width + (kept.half_width if is_half else 0.0)
        attention = kept.attention + (kept.half_attention if is_half else 0.0)
        scores = kept.scores + (kept.half_scores if is_half else 0.0)
        return (
            width * self.width
            + attention * self.attention
            + kept.key_value * self.key_value
            + kept.feed * self.feed
            + scores * self.heads * tokens_before
        )

    def kernels(self, lora: Lora | None = None) -> tuple[int, int]:
        """Return the kernels that one layer starts, forward and backward."""
        more = ADAPTER_KERNELS * len(self.adapted(lora)) if lora is not None else 0
        return self.block.work.forward + more, self.block.work.backward + len(self.block.bias) + more

    def moved_by_layer(self, tokens_before: float, weight_bytes: int, lora: Lora | None = None) -> float:
        """Return the bytes of a token that one layer reads and writes besides its products.

        That is forward and backward; tokens_before: as in `kept_by_layer`.
        """
        work = self.block.work
        numbers = (
            work.width * self.width
            + work.attention * self.attention
            + work.key_value * self.key_value
            + work.feed * self.feed
            + work.scores * self.heads * tokens_before
        )
        for inputs, outputs in self.adapted(lora).values() if lora is not None else ():
            numbers += ADAPTER_INPUTS * inputs + ADAPTER_OUTPUTS * outputs
        in_float32 = work.float_width * self.width + work.float_attention * (self.attention + self.key_value)
        return weight_bytes * numbers + 4 * in_float32

    @property
    def is_packed(self) -> bool:
        """Return whether rows are packed one behind the other, where that is quicker."""
        return self.family in PACKED


# Of an adapter: kernels, forward and again backward, and numbers moved for each input and output.
ADAPTER_KERNELS, ADAPTER_INPUTS, ADAPTER_OUTPUTS = 4, 4, 5
PACKED = (
    "opt",
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "smollm3",
    "granite",
)  # as in rlhf_train/models/packed_attention.py


def shape_of(config: Config) -> Shape:
    """Return the shape of the model that a config.json describes.

    Raises ToolkitError if the sizes are missing or do not fit each other.
    """
    family = str(config.get("model_type", ""))
    fields = {name: value for name, value in config.items() if value is not None}
    for theirs, ours in ALIASES.items():
        if theirs in fields:
            fields.setdefault(ours, fields[theirs])
    try:
        return _shape(family, {**DEFAULTS.get(family, {}), **fields})
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise ToolkitError(
            f"the size of a model of type {family!r} cannot be told from its config",
            why=f"{type(error).__name__}: {error}",
            hint="its config.json needs hidden_size, num_hidden_layers, num_attention_heads and vocab_size",
        ) from None


def _shape(family: str, c: Mapping[str, Any]) -> Shape:
    width, heads = int(c["hidden_size"]), int(c["num_attention_heads"])
    head_size = int(c.get("head_dim") or width // heads)
    key_value_heads = int(c.get("num_key_value_heads") or heads)
    feed = int(c.get(FEED_FIELDS.get(family, "intermediate_size")) or 4 * width)
    sizes = Sizes(width, heads * head_size, key_value_heads * head_size, feed, heads, head_size)
    block = BLOCKS.get(family, _unknown)(c, sizes)
    return Shape(
        family=family,
        layers=int(c["num_hidden_layers"]),
        width=width,
        attention=sizes.attention,
        key_value=sizes.key_value if family != "falcon" else _falcon_key_value(c, sizes),
        feed=feed,
        heads=heads,
        vocabulary=int(c["vocab_size"]),
        head_width=int(c.get("word_embed_proj_dim") or width),
        is_tied=bool(c.get("tie_word_embeddings", True)),
        block=block,
        is_known=family in BLOCKS,
        is_static=family in (families := load_families()) and families[family].static is not None,
    )


# --- families -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sizes:
    width: int
    attention: int
    key_value: int
    feed: int
    heads: int
    head_size: int


def _names(linear: Mapping[str, Any], wanted: object, *, but: Sequence[str] = ()) -> frozenset[str]:
    return frozenset(name for name in linear if name not in but) if wanted else frozenset()


def _opt(c: Config, s: Sizes) -> Block:
    linear = dict.fromkeys(("q_proj", "k_proj", "v_proj", "out_proj"), (s.width, s.width))
    linear |= {"fc1": (s.width, s.feed), "fc2": (s.feed, s.width)}
    projected = int(c.get("word_embed_proj_dim") or s.width)
    projections = 2 * s.width * projected if projected != s.width else 0
    norm = 2 * s.width if c["layer_norm_elementwise_affine"] else 0
    last_norm = norm if c["do_layer_norm_before"] and not c["_remove_final_layer_norm"] else 0
    positions = (int(c["max_position_embeddings"]) + 2) * s.width
    return Block(
        linear,
        _names(linear, c["enable_bias"]),
        2 * norm,
        int(c["vocab_size"]) * projected + positions + projections + last_norm,
        projections,
        Kept(width=4, attention=2, key_value=2, feed=1, half_width=0),  # ReLU's output is all it keeps
        Work(12, 20, width=33, float_width=0, attention=0, key_value=0, feed=6),
    )


def _gpt2(c: Config, s: Sizes) -> Block:
    linear = {
        "attn.c_attn": (s.width, 3 * s.width),
        "attn.c_proj": (s.width, s.width),
        "mlp.c_fc": (s.width, s.feed),
        "mlp.c_proj": (s.feed, s.width),
    }
    outside = (int(c["vocab_size"]) + int(c["max_position_embeddings"]) + 2) * s.width
    kept = Kept(width=4, feed=5, half_width=0)  # its GELU is written out, operation by operation
    work = Work(17, 25, width=33, float_width=0, attention=0, key_value=0, feed=47)
    return Block(linear, _names(linear, True), 4 * s.width, outside, 0, kept, work)


def _fused(s: Sizes, query_key_value: int) -> dict[str, tuple[int, int]]:
    return {
        "query_key_value": (s.width, query_key_value),
        "dense": (s.attention, s.width),
        "dense_h_to_4h": (s.width, s.feed),
        "dense_4h_to_h": (s.feed, s.width),
    }


def _gpt_neox(c: Config, s: Sizes) -> Block:
    linear = _fused(s, 3 * s.width)
    bias = _names(linear, True, but=() if c["attention_bias"] else ("query_key_value", "dense"))
    outside = (int(c["vocab_size"]) + 2) * s.width
    work = Work(23, 36, width=69, float_width=0, attention=0, key_value=0, feed=6)
    return Block(linear, bias, 4 * s.width, outside, 0, Kept(width=4, attention=4, feed=2, half_width=0), work)


def _bloom(c: Config, s: Sizes) -> Block:
    linear = _fused(s, 3 * s.width)
    outside = (int(c["vocab_size"]) + 4) * s.width  # two norms: behind the embedding, and the last
    kept = Kept(width=4, feed=2, scores=1, half_width=4)
    work = Work(27, 45, width=335, float_width=0, attention=0, key_value=0, feed=0, scores=24)
    return Block(linear, _names(linear, True), 4 * s.width, outside, 0, kept, work)


def _falcon_key_value(c: Config, s: Sizes) -> int:
    if c["new_decoder_architecture"]:
        return int(c.get("num_kv_heads") or s.heads) * s.head_size
    return s.head_size if c["multi_query"] else s.attention


def _falcon(c: Config, s: Sizes) -> Block:
    new = c["new_decoder_architecture"]
    linear = _fused(s, s.attention + 2 * _falcon_key_value(c, s))
    norms = 2 if (c.get("num_ln_in_parallel_attn") or 2) == 2 else 1
    if not new:
        norms = 1 if c["parallel_attn"] else 2
    outside = (int(c["vocab_size"]) + 2) * s.width
    kept = Kept(width=3, attention=4, feed=2, scores=0.25, half_width=5)
    work = Work(38, 47, width=60, float_width=30, attention=0, key_value=0, feed=5, scores=18)
    return Block(linear, _names(linear, c["bias"]), 2 * norms * s.width, outside, 0, kept, work)


def _gated(s: Sizes) -> dict[str, tuple[int, int]]:
    return {
        "q_proj": (s.width, s.attention),
        "k_proj": (s.width, s.key_value),
        "v_proj": (s.width, s.key_value),
        "o_proj": (s.attention, s.width),
        "gate_proj": (s.width, s.feed),
        "up_proj": (s.width, s.feed),
        "down_proj": (s.feed, s.width),
    }


def _llama(c: Config, s: Sizes) -> Block:
    linear = _gated(s)
    bias = _names(linear, c.get("attention_bias"), but=("gate_proj", "up_proj", "down_proj"))
    bias |= _names(linear, c.get("mlp_bias"), but=("q_proj", "k_proj", "v_proj", "o_proj"))
    # Its rows are packed, by layers of ours: norms keep input and output, gates theirs.
    kept = Kept(width=4, feed=3, half_width=0)
    outside = (int(c["vocab_size"]) + 1) * s.width
    return Block(linear, bias, 2 * s.width, outside, kept=kept, work=Work(40, 72, float_width=53, feed=16))


def _unknown(c: Config, s: Sizes) -> Block:
    return replace(_llama(c, s), kept=Kept(), work=Work())


def _granite(c: Config, s: Sizes) -> Block:
    return replace(_llama(c, s), work=Work(42, 74, width=21, float_width=53, feed=16))


def _qwen2(c: Config, s: Sizes) -> Block:
    return replace(_llama(c, s), bias=frozenset(("q_proj", "k_proj", "v_proj")))


def _qwen3(c: Config, s: Sizes) -> Block:
    block = _llama(c, s)
    kept = Kept(width=4, attention=4, key_value=4, feed=3, half_width=0, half_attention=1.5)  # queries', keys' norms
    work = Work(56, 104, float_width=53, attention=22, key_value=22, float_attention=35, feed=16)
    return replace(block, small=block.small + 2 * s.head_size, kept=kept, work=work)


def _gemma(c: Config, s: Sizes) -> Block:
    return replace(_llama(c, s), kept=Kept(half_width=4), work=Work(42, 73, width=0, float_width=84))


def _gemma2(c: Config, s: Sizes) -> Block:
    block = _llama(c, s)
    # Four norms. The cap on attention's scores needs them whole.
    kept = Kept(width=11, scores=2, half_width=8, half_scores=2)
    work = Work(75, 121, width=0, float_width=150, scores=45)
    return replace(block, small=4 * s.width, kept=kept, work=work)


def _phi3(c: Config, s: Sizes) -> Block:
    linear = {
        "qkv_proj": (s.width, s.attention + 2 * s.key_value),
        "o_proj": (s.attention, s.width),
        "gate_up_proj": (s.width, 2 * s.feed),
        "down_proj": (s.feed, s.width),
    }
    outside = (int(c["vocab_size"]) + 1) * s.width
    work = Work(38, 72, width=4, attention=44, key_value=52, feed=18)
    return Block(linear, frozenset(), 2 * s.width, outside, 0, Kept(attention=3, key_value=5), work)


BLOCKS: dict[str, Callable[[Config, Sizes], Block]] = {
    "opt": _opt,
    "gpt2": _gpt2,
    "gpt_neox": _gpt_neox,
    "bloom": _bloom,
    "falcon": _falcon,
    "llama": _llama,
    "mistral": _llama,
    "granite": _granite,
    "smollm3": _llama,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "gemma": _gemma,
    "gemma2": _gemma2,
    "phi3": _phi3,
}

# The feed-forward layers of these families have another field, or always four times the width.
FEED_FIELDS = {"falcon": "ffn_hidden_size", "bloom": ""}
ALIASES = {
    "n_embd": "hidden_size",
    "n_embed": "hidden_size",
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
    "n_inner": "intermediate_size",
    "n_positions": "max_position_embeddings",
    "ffn_dim": "intermediate_size",
    "num_kv_heads": "num_key_value_heads",
}


def _sizes(hidden: int, layers: int, heads: int, vocabulary: int, feed: int, **more: Any) -> dict[str, Any]:
    return {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "vocab_size": vocabulary,
        "intermediate_size": feed,
        **more,
    }


# What transformers' config classes take for a field that config.json leaves out.
UNTIED = {"tie_word_embeddings": False}
DEFAULTS: dict[str, dict[str, Any]] = {
    "opt": {
        **_sizes(768, 12, 12, 50272, 3072, max_position_embeddings=2048),
        "do_layer_norm_before": True,
        "_remove_final_layer_norm": False,
        "enable_bias": True,
        "layer_norm_elementwise_affine": True,
    },
    "gpt2": {
        "hidden_size": 768,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "vocab_size": 50257,
        "max_position_embeddings": 1024,
    },
    "gpt_neox": _sizes(6144, 44, 64, 50432, 24576, attention_bias=True, **UNTIED),
    "bloom": {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 8, "vocab_size": 250880},
    "falcon": {
        "hidden_size": 4544,
        "num_hidden_layers": 32,
        "num_attention_heads": 71,
        "vocab_size": 65024,
        "new_decoder_architecture": False,
        "multi_query": True,
        "parallel_attn": True,
        "bias": False,
    },
    "llama": _sizes(4096, 32, 32, 32000, 11008, **UNTIED),
    "mistral": _sizes(4096, 32, 32, 32000, 14336, num_key_value_heads=8, **UNTIED),
    "granite": _sizes(4096, 32, 32, 32000, 11008, **UNTIED),
    "smollm3": _sizes(2048, 36, 16, 128256, 11008, num_key_value_heads=4),
    "qwen2": _sizes(4096, 32, 32, 151936, 22016, num_key_value_heads=32, **UNTIED),
    "qwen3": _sizes(4096, 32, 32, 151936, 22016, num_key_value_heads=32, head_dim=128, **UNTIED),
    "gemma": _sizes(3072, 28, 16, 256000, 24576, num_key_value_heads=16, head_dim=256),
    "gemma2": _sizes(2304, 26, 8, 256000, 9216, num_key_value_heads=4, head_dim=256),
    "phi3": _sizes(3072, 32, 32, 32064, 8192, **UNTIED),
}
