"""The tensors of a decoder-only transformer, named by their use in the decode step.

They may belong to any model.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from rlhf_train.kernels import cpu_matmul


@dataclass(frozen=True)
class Adapter:
    """LoRA's product, which is added to that of a layer: scale B A x."""

    a: Tensor  # (rank, in)
    b: Tensor  # (out, rank)
    scale: float

    def __call__(self, x: Tensor) -> Tensor:
        return cpu_matmul.linear(cpu_matmul.linear(x, self.a, None), self.b, None) * self.scale


@dataclass(frozen=True)
class LinearWeights:
    weight: Tensor  # (out, in)
    bias: Tensor | None
    adapter: Adapter | None = None

    def __call__(self, x: Tensor) -> Tensor:
        y = cpu_matmul.linear(x, self.weight, self.bias)
        return y if self.adapter is None else y + self.adapter(x)


@dataclass(frozen=True)
class Norm:
    """A layer norm; without a bias an RMS norm: Zhang & Sennrich 2019, arXiv:1910.07467."""

    weight: Tensor
    bias: Tensor | None
    eps: float

    def __call__(self, x: Tensor) -> Tensor:
        if self.bias is not None:
            return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)
        # Rounded as LLaMA's own norm: the normed number first, then its product with the weight.
        wide = x.float()
        scale = wide.square().mean(-1, keepdim=True).add_(self.eps).rsqrt_()
        return (wide * scale).to(x.dtype) * self.weight


@dataclass(frozen=True)
class Layer:
    query: LinearWeights
    key: LinearWeights
    value: LinearWeights
    joined: LinearWeights | None  # all three as one product, where they are adjacent in memory
    joined_order: str  # in which order they are there, as "kvq"
    output: LinearWeights
    after_attention: Norm  # of the sum with the residual
    up: LinearWeights  # then ReLU; with a gate, silu(gate) is multiplied with it
    down: LinearWeights
    after_mlp: Norm | None
    gate: LinearWeights | None = None
    joined_gate: LinearWeights | None = None  # gate and up as one product, where they are adjacent
    query_norm: Norm | None = None  # of each head
    key_norm: Norm | None = None
    is_rotary: bool = False  # queries and keys are rotated by their positions
    window: int | None = None  # tokens that a token sees, itself included; None: all before it

    def query_key_value(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return query (n, H D), key and value (n, K D) of x (n, d), maybe views of one tensor."""
        if self.joined is None:
            return self.query(x), self.key(x), self.value(x)
        rows = {"q": len(self.query.weight), "k": len(self.key.weight), "v": len(self.value.weight)}
        parts = self.joined(x).split([rows[name] for name in self.joined_order], dim=-1)
        query, key, value = (parts[self.joined_order.index(name)] for name in "qkv")
        return query, key, value

    def gate_and_up(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the gate, before its silu, and what it is multiplied with: both (n, f)."""
        assert self.gate is not None
        if self.joined_gate is None:
            return self.gate(x), self.up(x)
        gate, up = self.joined_gate(x).chunk(2, dim=-1)
        return gate, up


@dataclass(frozen=True)
class Network:
    """A decoder-only transformer: as OPT, or as LLaMA with its relatives."""

    token_embedding: Tensor  # (V, e)
    layers: tuple[Layer, ...]
    head: LinearWeights
    heads: int  # H, of the queries
    key_heads: int  # K; H / K query heads share a head of keys and values
    head_size: int  # D
    attention_scale: float  # of the scores
    first_norm: Norm | None
    norm_first: bool  # what a layer reads is normed, and its residual is not
    position_embedding: Tensor | None = None
    position_offset: int = 0  # row of the first token
    frequencies: Tensor | None = None  # (D / 2,) of the rotation, in radians a token
    rotation_scale: float = 1.0  # of the rotation's cosine and sine
    most_tokens: int | None = None  # beyond these the frequencies are others
    project_in: LinearWeights | None = None  # (e -> d)
    project_out: LinearWeights | None = None
    embedding_scale: float = 1.0
    residual_scale: float = 1.0  # of what attention and feed-forward layer add
    logit_scale: float = 1.0
    tokens: int | None = None  # ids of the head from here on are never sampled

    @property
    def key_width(self) -> int:
        """Return the numbers of a token's keys in one layer; its values have as many."""
        return self.key_heads * self.head_size

    @property
    def groups(self) -> int:
        """Return how many query heads share a head of keys."""
        return self.heads // self.key_heads

    def addresses(self) -> tuple[int, ...]:
        """Return the addresses of all tensors.

        A captured graph reads there, whatever the model holds later.
        """
        return tuple(tensor.data_ptr() for tensor in _tensors(self))


def _tensors(part: Any) -> Iterator[Tensor]:
    if isinstance(part, Tensor):
        yield part
    elif isinstance(part, tuple):
        for inner in part:
            yield from _tensors(inner)
    elif is_dataclass(part):
        for each in fields(part):
            yield from _tensors(getattr(part, each.name))
