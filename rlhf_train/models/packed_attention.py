"""Attention that keeps packed rows apart: one behind the other in one long row, without padding.

Everything else in a decoder works on each token alone. The layers of the families below get a
forward of ours, which is told the rows' lengths; transformers (5 on) hands keywords of a model's
call to its layers. Without lengths, as in rollouts, a layer runs transformers' own forward. After
the last attention no token needs another one, so the rest of the last layer is computed only for
the tokens that are asked for.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from itertools import groupby
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rlhf_train import compat
from rlhf_train.data.sequences import Sequences, sent
from rlhf_train.kernels import fused_layers

# Families whose layers have a forward here. LLAMA_LIKE differ in biases, norms of queries and keys,
# layers without positions, a window and a factor of the residual; those are read off the layer.
LLAMA_LIKE = ("llama", "mistral", "qwen2", "qwen3", "smollm3", "granite")
FAMILIES = ("opt", *LLAMA_LIKE)
# Devices and dtypes for which packed rows are quicker than rows padded to buckets. Measured on a
# CPU, one core, forward and backward of 16 rows: OPT of 4 layers and 256 units, 69 to 87 % of the
# padded tokens real: 1.07x to 1.4x; the demo's models, 96 to 98 % real: 0.97x to 1.02x.
DTYPES: dict[str, tuple[torch.dtype, ...]] = {
    "cpu": (torch.float32, torch.bfloat16),
    "cuda": (torch.float16, torch.bfloat16),
}


@dataclass(frozen=True)
class Rows:
    """Where packed rows end, and which of their tokens are asked for."""

    lengths: tuple[int, ...]
    ends: Tensor  # int32 (B + 1,) on the device, from 0: cumulated lengths
    wanted: Tensor | None = None  # (n,) into the N packed tokens; None: all

    @classmethod
    def of(cls, lengths: np.ndarray, device: torch.device, wanted: Tensor | None = None) -> Rows:
        ends = np.cumsum([0, *lengths]).astype(np.int32)
        return cls(tuple(lengths.tolist()), sent(torch.from_numpy(ends), device), wanted)


def can_pack(model: Any) -> bool:
    """Return whether a model can take packed rows.

    It depends on versions, family, device and dtype alone, so all ranks agree.
    """
    if model.config.model_type not in FAMILIES or not compat.hands_keywords_to_layers():
        return False
    if model.dtype not in DTYPES[model.device.type]:
        return False
    head = getattr(model.config, "head_dim", None) or model.config.hidden_size // model.config.num_attention_heads
    return model.device.type == "cpu" or (compat.has_varlen_attention() and head % 8 == 0 and head <= 256)


def keep_rows_apart(model: Any) -> None:
    """Give a model's layers the forward that takes packed rows; can_pack said that it may be."""
    layers, is_opt = _layers(model), model.config.model_type == "opt"
    for layer in layers:
        if not hasattr(layer, "is_last"):
            family: Any = type(layer)
            layer.__class__ = _opt_layer() if is_opt else _llama_like_layer(family)
        layer.is_last = layer is layers[-1]
        if is_opt and isinstance(layer.activation_fn, nn.ReLU):
            fused_layers.join_relu(layer)


def leaves_out(model: Any) -> bool:
    """Return whether a model computes hidden states only for the wanted tokens of packed rows."""
    return hasattr(_layers(model)[-1], "is_last")


def _layers(model: Any) -> Any:
    base = model.base_model
    return (base.decoder if model.config.model_type == "opt" else base).layers


@cache
def _opt_layer() -> type:
    """Return OPT's decoder layer for packed rows.

    It is a class, not a function put into the layer: a copy of the model must not call the layer
    that it was copied from.
    """
    from transformers.models.opt.modeling_opt import OPTDecoderLayer

    class PackedLayer(OPTDecoderLayer):
        is_last: bool

        def forward(self, hidden_states: Tensor, *args: Any, rows: Rows | None = None, **kwargs: Any) -> Any:
            """Compute what OPTDecoderLayer does, without dropout and in fewer passes over memory.

            (1, N, d) -> (1, N, d); of the last layer (1, n, d), n the wanted tokens.
            """
            if rows is None:
                return super().forward(hidden_states, *args, **kwargs)
            attention, x = self.self_attn, hidden_states.squeeze(0)  # two dimensions: see `linear_relu`
            norms_first = self.do_layer_norm_before
            x, y = fused_layers.add_norm(x, None, self.self_attn_layer_norm) if norms_first else (x, x)
            query, key, value = (
                part.unflatten(1, (attention.num_heads, attention.head_dim))
                for part in (attention.q_proj(y), attention.k_proj(y), attention.v_proj(y))
            )
            seen = within_rows(query, key, value, rows, attention.scaling, None).flatten(1)
            if self.is_last and rows.wanted is not None:
                x, seen = x.index_select(0, rows.wanted), seen.index_select(0, rows.wanted)
            x, y = fused_layers.add_norm(
                x, attention.out_proj(seen), self.final_layer_norm if norms_first else self.self_attn_layer_norm
            )
            grown = self.fc2(self.activation_fn(self.fc1(y)))
            out = x + grown if norms_first else fused_layers.add_norm(y, grown, self.final_layer_norm)[1]
            return out.unsqueeze(0)

    return PackedLayer


@cache
def _llama_like_layer(plain: Any) -> type:
    """Return a LLaMA-like family's decoder layer for packed rows. plain: the family's own."""
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    class PackedLayer(plain):
        is_last: bool

        def forward(self, hidden_states: Tensor, *args: Any, rows: Rows | None = None, **kwargs: Any) -> Any:
            """Compute what the family's layer does, without dropout, in fewer passes over memory.

            (1, N, d) -> (1, N, d); of the last layer (1, n, d), n the wanted tokens.
            """
            if rows is None:
                return super().forward(hidden_states, *args, **kwargs)
            attention, x = self.self_attn, hidden_states.squeeze(0)
            x, y = fused_layers.add_norm(x, None, self.input_layernorm)
            query, key, value = (
                part.unflatten(1, (-1, attention.head_dim))
                for part in (attention.q_proj(y), attention.k_proj(y), attention.v_proj(y))
            )
            if hasattr(attention, "q_norm"):
                query, key = attention.q_norm(query), attention.k_norm(key)
            if getattr(attention, "use_rope", True):
                cos, sin = (part.squeeze(0) for part in kwargs["position_embeddings"])
                query, key = apply_rotary_pos_emb(query, key, cos, sin)
            seen = within_rows(query, key, value, rows, attention.scaling, _window(attention)).flatten(1)
            if self.is_last and rows.wanted is not None:
                x, seen = x.index_select(0, rows.wanted), seen.index_select(0, rows.wanted)
            x, y = fused_layers.add_norm(x, self._share(attention.o_proj(seen)), self.post_attention_layernorm)
            return (x + self._share(fused_layers.gated(self.mlp, y))).unsqueeze(0)

        def _share(self, part: Tensor) -> Tensor:
            """Return what the residual gets of a result: Granite scales it."""
            factor: float | None = getattr(self, "residual_multiplier", None)
            return part if factor is None else part * factor

    return PackedLayer


def _window(attention: Any) -> int | None:
    """Return how many tokens a token sees, itself included; None: all before it."""
    found: int | None = getattr(attention, "sliding_window", None)
    if attention.config.model_type == "mistral":  # the others' configs have one also where no layer uses it
        found = attention.config.sliding_window
    return found


def arguments(batch: Sequences, wanted: Tensor | None) -> dict[str, Any]:
    """Return what the model is called with besides the ids of packed rows."""
    device = batch.input_ids.device
    positions = np.concatenate([np.arange(length) for length in batch.host_lengths])
    return {
        "position_ids": sent(torch.from_numpy(positions), device)[None],
        "rows": Rows.of(batch.host_lengths, device, wanted),
        # transformers takes a mask of four dimensions as it is, and so makes none of its own, which
        # would have an entry for every pair of tokens.
        "attention_mask": torch.empty(1, 1, 1, 1, device=device),
    }


def within_rows(query: Tensor, key: Tensor, value: Tensor, rows: Rows, scale: float, window: int | None) -> Tensor:
    """Attend causally within each row, to at most `window` tokens, itself included (None: to all).

    query: (N, H, D); key, value: (N, H or fewer, D). Returns (N, H, D).
    """
    longest = max(rows.lengths)
    window = None if window is None or window >= longest else window
    # Rows of one length are a batch, which is quicker without the kernel for rows of any length:
    # that made OPT-1.3b's step 3 at full length 4 % slower on an H200.
    is_batch = len(set(rows.lengths)) == 1 and window is None
    if query.is_cuda and query.dtype in DTYPES["cuda"] and not is_batch:
        return compat.varlen_attention(query, key, value, rows.ends, longest, scale, window)
    return run_by_run(query, key, value, rows, scale, window)


def run_by_run(
    query: Tensor, key: Tensor, value: Tensor, rows: Rows, scale: float, window: int | None = None
) -> Tensor:
    """Do what `within_rows` does, in one batch for each run of adjacent rows of the same length."""
    runs = [(len(list(run)), length) for length, run in groupby(rows.lengths)]
    if len(runs) == 1:  # a batch: neither split nor joined
        return _batch(query, key, value, runs[0], scale, window)
    # Split, not sliced run by run: each slice's gradient would be as large as all rows together.
    sizes = [count * length for count, length in runs]
    parts = zip(query.split(sizes), key.split(sizes), value.split(sizes), strict=True)
    return torch.cat([_batch(q, k, v, run, scale, window) for run, (q, k, v) in zip(runs, parts, strict=True)])


def _batch(query: Tensor, key: Tensor, value: Tensor, run: tuple[int, int], scale: float, window: int | None) -> Tensor:
    """Attend in rows of one length. run: how many, and the length; tensors as in `within_rows`."""
    q, k, v = (tensor.unflatten(0, run).transpose(1, 2) for tensor in (query, key, value))
    how: dict[str, Any] = {"is_causal": True}
    if window is not None and window < run[1]:
        seen = torch.ones(run[1], run[1], dtype=torch.bool, device=query.device)
        how = {"attn_mask": seen.tril().triu(1 - window)}
    out = F.scaled_dot_product_attention(q, k, v, scale=scale, enable_gqa=q.shape[1] != k.shape[1], **how)
    return out.transpose(1, 2).flatten(0, 1)
