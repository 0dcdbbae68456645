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
    weight: Tensor
    bias: Tensor
    eps: float

    def __call__(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)


@dataclass(frozen=True)
class Layer:
    query: LinearWeights
    key: LinearWeights
    value: LinearWeights
    joined: LinearWeights | None  # key, value and query as one product, where they lie so in memory
    output: LinearWeights
    after_attention: Norm  # of the sum with the residual
    up: LinearWeights  # then ReLU
    down: LinearWeights
    after_mlp: Norm | None

    def query_key_value(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return query, key and value of x (n, d): three (n, d), maybe views of one (n, 3 d)."""
        if self.joined is not None:
            key, value, query = self.joined(x).chunk(3, dim=-1)
            return query, key, value
        return self.query(x), self.key(x), self.value(x)


@dataclass(frozen=True)
class Network:
    """A decoder-only transformer with learned positions and ReLU."""

    token_embedding: Tensor  # (V, e)
    position_embedding: Tensor
    position_offset: int  # row of the first token
    project_in: LinearWeights | None  # (e -> d)
    first_norm: Norm | None
    norm_first: bool  # what a layer reads is normed, and its residual is not
    layers: tuple[Layer, ...]
    project_out: LinearWeights | None
    head: LinearWeights
    heads: int
    tokens: int | None = None  # ids of the head from here on are never sampled

    @property
    def width(self) -> int:
        return int(self.position_embedding.shape[1])

    @property
    def head_size(self) -> int:
        return self.width // self.heads

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
