"""Attention that keeps packed rows apart: one behind the other in one long row, without padding.

Everything else in a decoder works on each token alone. transformers (5 on) accepts an attention
function of ours, which gets the rows' lengths with each call. Without lengths, as in rollouts, it
is transformers' own SDPA. After the last attention no token needs another one, so the rest of OPT's
last layer is computed only for the tokens that are asked for.
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

NAME = "rows_apart"
# Families whose layers take position_ids, pass keywords on to attention, and look at all earlier
# tokens (no sliding window).
FAMILIES = ("opt", "llama")
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
    if model.config.model_type not in FAMILIES or not compat.takes_own_attention():
        return False
    if model.dtype not in DTYPES[model.device.type]:
        return False
    head = getattr(model.config, "head_dim", None) or model.config.hidden_size // model.config.num_attention_heads
    return model.device.type == "cpu" or (compat.has_varlen_attention() and head % 8 == 0 and head <= 256)


def keep_rows_apart(model: Any) -> None:
    compat.register_attention(NAME, attend)
    model.set_attn_implementation(NAME)
    if model.config.model_type == "opt":
        for layer in model.base_model.decoder.layers:
            layer.__class__, layer.is_last = _opt_layer(), layer is model.base_model.decoder.layers[-1]
            if isinstance(layer.activation_fn, nn.ReLU):
                fused_layers.join_relu(layer)


def leaves_out(model: Any) -> bool:
    """Return whether a model computes hidden states only for the wanted tokens of packed rows."""
    return model.config.model_type == "opt" and isinstance(model.base_model.decoder.layers[-1], _opt_layer())


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
            seen = within_rows(query, key, value, rows, attention.scaling).flatten(1)
            if self.is_last and rows.wanted is not None:
                x, seen = x.index_select(0, rows.wanted), seen.index_select(0, rows.wanted)
            x, y = fused_layers.add_norm(
                x, attention.out_proj(seen), self.final_layer_norm if norms_first else self.self_attn_layer_norm
            )
            grown = self.fc2(self.activation_fn(self.fc1(y)))
            out = x + grown if norms_first else fused_layers.add_norm(y, grown, self.final_layer_norm)[1]
            return out.unsqueeze(0)

    return PackedLayer


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


def attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    rows: Rows | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attend for transformers, which calls this.

    query: (1, H, N, D); key, value: (1, H or fewer, N, D). Returns (1, N, H, D).
    """
    if rows is None:
        return compat.sdpa_attention(module, query, key, value, attention_mask, **kwargs)
    # Squeezed, not indexed: an index's gradient is a copy into zeros.
    query, key, value = (tensor.squeeze(0).transpose(0, 1) for tensor in (query, key, value))
    return within_rows(query, key, value, rows, kwargs["scaling"]).unsqueeze(0), None


def within_rows(query: Tensor, key: Tensor, value: Tensor, rows: Rows, scale: float) -> Tensor:
    """Attend causally within each row.

    query: (N, H, D); key, value: (N, H or fewer, D). Returns (N, H, D).
    """
    if (repeats := query.shape[1] // key.shape[1]) > 1:
        key, value = key.repeat_interleave(repeats, dim=1), value.repeat_interleave(repeats, dim=1)
    # Rows of one length are a batch, which is quicker without the kernel for rows of any length:
    # that made OPT-1.3b's step 3 at full length 4 % slower on an H200.
    if query.is_cuda and query.dtype in DTYPES["cuda"] and len(set(rows.lengths)) > 1:
        return compat.varlen_attention(query, key, value, rows.ends, max(rows.lengths), scale)
    return run_by_run(query, key, value, rows, scale)


def run_by_run(query: Tensor, key: Tensor, value: Tensor, rows: Rows, scale: float) -> Tensor:
    """Attend in one batch for each run of adjacent rows of the same length. All (N, H, D)."""
    runs = [(len(list(run)), length) for length, run in groupby(rows.lengths)]
    if len(runs) == 1:  # a batch: neither split nor joined
        return _batch(query, key, value, runs[0], scale)
    # Split, not sliced run by run: each slice's gradient would be as large as all rows together.
    sizes = [count * length for count, length in runs]
    parts = zip(query.split(sizes), key.split(sizes), value.split(sizes), strict=True)
    return torch.cat([_batch(q, k, v, run, scale) for run, (q, k, v) in zip(runs, parts, strict=True)])


def _batch(query: Tensor, key: Tensor, value: Tensor, run: tuple[int, int], scale: float) -> Tensor:
    """Attend in rows of one length. run: how many, and the length. All (n, H, D)."""
    q, k, v = (tensor.unflatten(0, run).transpose(1, 2) for tensor in (query, key, value))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale).transpose(1, 2).flatten(0, 1)
