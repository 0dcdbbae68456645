"""Rows one behind the other in one long row, and attention that keeps them apart: nothing is padded.

Everything else in a decoder looks at one token at a time. transformers (5 on) lets a model's attention be one of ours, which is handed
the rows' lengths with each call; called without them, as rollouts do, it is transformers' own SDPA. After the last attention no token
needs another one: the rest of OPT's last layer is computed for those that are asked of alone.
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
from rlhf_train.batch import Sequences, sent

NAME = "rows_apart"
# Their layers take position_ids, hand keywords on to attention, and look at all earlier tokens: no sliding window.
FAMILIES = ("opt", "llama")
# Where packed rows are quicker than rows padded to buckets. cpu, one core, forward and backward of 16 rows: OPT of 4 layers and 256
# units, 69 to 87 % of the padded tokens real: 1.07x to 1.4x; the demo's models, 96 to 98 % real: 0.97x to 1.02x.
DTYPES: dict[str, tuple[torch.dtype, ...]] = {"cpu": (torch.float32, torch.bfloat16), "cuda": (torch.float16, torch.bfloat16)}


@dataclass(frozen=True)
class Rows:
    """Where packed rows end, and which of their tokens are asked of."""

    lengths: tuple[int, ...]
    ends: Tensor  # int32 (B + 1,) on the device, from 0: cumulated lengths
    wanted: Tensor | None = None  # (n,) into the N packed tokens; None: all

    @classmethod
    def of(cls, lengths: np.ndarray, device: torch.device, wanted: Tensor | None = None) -> Rows:
        return cls(tuple(lengths.tolist()), sent(torch.from_numpy(np.cumsum([0, *lengths]).astype(np.int32)), device), wanted)


def can_pack(model: Any) -> bool:
    """A matter of versions, family, device and dtype alone, so all ranks agree."""
    if model.config.model_type not in FAMILIES or not compat.takes_own_attention() or model.dtype not in DTYPES[model.device.type]:
        return False
    head = getattr(model.config, "head_dim", None) or model.config.hidden_size // model.config.num_attention_heads
    return model.device.type == "cpu" or (compat.has_varlen_attention() and head % 8 == 0 and head <= 256)


def keep_rows_apart(model: Any) -> None:
    compat.register_attention(NAME, attend)
    model.set_attn_implementation(NAME)
    if model.config.model_type == "opt":
        layers = model.base_model.decoder.layers
        layers[-1].__class__ = _opt_last_layer()
        for layer in layers:
            if isinstance(layer.activation_fn, nn.ReLU):
                layer.activation_fn.inplace = True  # of a product, whose gradient does not need it


def leaves_out(model: Any) -> bool:
    """Whether hidden states come for the wanted tokens of packed rows alone."""
    return model.config.model_type == "opt" and isinstance(model.base_model.decoder.layers[-1], _opt_last_layer())


@cache
def _opt_last_layer() -> type:
    """A class, not a function put into the layer: a copy of the model must not call the layer that it was copied from."""
    from transformers.models.opt.modeling_opt import OPTDecoderLayer

    class LastLayer(OPTDecoderLayer):
        def forward(self, hidden_states: Tensor, *args: Any, rows: Rows | None = None, **kwargs: Any) -> Any:
            """(1, N, d) -> (1, n, d), n the wanted tokens. Otherwise as the class above, without dropout."""
            if rows is None or rows.wanted is None:
                return super().forward(hidden_states, *args, rows=rows, **kwargs)
            attention = self.self_attn
            y = self.self_attn_layer_norm(hidden_states) if self.do_layer_norm_before else hidden_states
            query, key, value = (
                part.unflatten(2, (attention.num_heads, attention.head_dim)).transpose(1, 2)
                for part in (attention.q_proj(y), attention.k_proj(y), attention.v_proj(y))
            )
            seen, _ = attend(attention, query, key, value, None, rows=rows, scaling=attention.scaling)
            x = hidden_states.index_select(1, rows.wanted) + attention.out_proj(seen.flatten(2).index_select(1, rows.wanted))
            if not self.do_layer_norm_before:
                x = self.self_attn_layer_norm(x)
            y = self.final_layer_norm(x) if self.do_layer_norm_before else x
            x = x + self.fc2(self.activation_fn(self.fc1(y)))
            return x if self.do_layer_norm_before else self.final_layer_norm(x)

    return LastLayer


def arguments(batch: Sequences, wanted: Tensor | None) -> dict[str, Any]:
    """What the model is called with besides the ids of packed rows."""
    device = batch.input_ids.device
    positions = np.concatenate([np.arange(length) for length in batch.host_lengths])
    return {
        "position_ids": sent(torch.from_numpy(positions), device)[None],
        "rows": Rows.of(batch.host_lengths, device, wanted),
        # A mask of four dimensions is taken as it is, and so none is made: it would have a bit for each two tokens.
        "attention_mask": torch.empty(1, 1, 1, 1, device=device),
    }


def attend(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, *, rows: Rows | None = None, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """Causal attention within each row. query: (1, H, N, D); key, value: (1, H or fewer, N, D). Returns (1, N, H, D)."""
    if rows is None:
        return compat.sdpa_attention(module, query, key, value, attention_mask, **kwargs)
    if (repeats := query.shape[1] // key.shape[1]) > 1:
        key, value = key.repeat_interleave(repeats, dim=1), value.repeat_interleave(repeats, dim=1)
    # Rows of one length are a batch, which needs no kernel for rows of any: OPT-1.3b's step 3 at full length was 4 % slower by that on an H200.
    apart = compat.varlen_attention if query.is_cuda and len(set(rows.lengths)) > 1 else run_by_run
    return apart(query, key, value, rows, kwargs["scaling"]), None


def run_by_run(query: Tensor, key: Tensor, value: Tensor, rows: Rows, scale: float) -> Tensor:
    """As many rows of one length at once as follow each other. All (1, H, N, D). Returns (1, N, H, D)."""
    runs = [(len(list(run)), length) for length, run in groupby(rows.lengths)]
    if len(runs) == 1:  # a batch: neither split nor joined
        return _batch(query[0], key[0], value[0], runs[0], scale)[None]
    # Split, not sliced run by run: the gradient of each slice would be as large as all rows together.
    parts = zip(*(tensor[0].split([count * length for count, length in runs], dim=1) for tensor in (query, key, value)), strict=True)
    return torch.cat([_batch(q, k, v, run, scale) for run, (q, k, v) in zip(runs, parts, strict=True)])[None]


def _batch(query: Tensor, key: Tensor, value: Tensor, run: tuple[int, int], scale: float) -> Tensor:
    """Rows of one length. run: how many, and the length. All (H, n, D). Returns (n, H, D)."""
    q, k, v = (tensor.unflatten(1, run).transpose(0, 1) for tensor in (query, key, value))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale).transpose(1, 2).flatten(0, 1)
