"""Rows one behind the other in one long row, and attention that keeps them apart: nothing is padded.

Everything else in a decoder looks at one token at a time. transformers (5 on) lets a model's attention be one of ours, which is handed
the rows' lengths with each call; called without them, as rollouts do, it is transformers' own SDPA.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from rlhf_train import compat
from rlhf_train.batch import Sequences

NAME = "rows_apart"
# Their layers take position_ids, hand keywords on to attention, and look at all earlier tokens: no sliding window.
FAMILIES = ("opt", "llama")
# Where packed rows are quicker than rows padded to buckets. cpu, one core, forward and backward of 16 rows: OPT of 4 layers and 256
# units, 69 to 87 % of the padded tokens real: 1.07x to 1.4x; the demo's models, 96 to 98 % real: 0.97x to 1.02x.
DTYPES: dict[str, tuple[torch.dtype, ...]] = {"cpu": (torch.float32, torch.bfloat16), "cuda": (torch.float16, torch.bfloat16)}


@dataclass(frozen=True)
class Rows:
    """Where packed rows end."""

    lengths: tuple[int, ...]
    ends: Tensor  # int32 (B + 1,) on the device, from 0: cumulated lengths

    @classmethod
    def of(cls, lengths: np.ndarray, device: torch.device) -> Rows:
        return cls(tuple(lengths.tolist()), torch.from_numpy(np.cumsum([0, *lengths]).astype(np.int32)).to(device))


def can_pack(model: Any) -> bool:
    """A matter of versions, family, device and dtype alone, so all ranks agree."""
    if model.config.model_type not in FAMILIES or not compat.takes_own_attention() or model.dtype not in DTYPES[model.device.type]:
        return False
    head = getattr(model.config, "head_dim", None) or model.config.hidden_size // model.config.num_attention_heads
    return model.device.type == "cpu" or (compat.has_varlen_attention() and head % 8 == 0 and head <= 256)


def keep_rows_apart(model: Any) -> None:
    compat.register_attention(NAME, attend)
    model.set_attn_implementation(NAME)


def arguments(batch: Sequences) -> dict[str, Any]:
    """What the model is called with besides the ids of packed rows."""
    device = batch.input_ids.device
    positions = np.concatenate([np.arange(length) for length in batch.host_lengths])
    return {
        "position_ids": torch.from_numpy(positions).to(device)[None],
        "rows": Rows.of(batch.host_lengths, device),
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
    # Split, not sliced run by run: the gradient of each slice would be as large as all rows together.
    parts = zip(*(tensor[0].split([count * length for count, length in runs], dim=1) for tensor in (query, key, value)), strict=True)
    done = []
    for run, part in zip(runs, parts, strict=True):
        q, k, v = (tensor.unflatten(1, run).transpose(0, 1) for tensor in part)
        done.append(F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale).transpose(1, 2).flatten(0, 1))
    return torch.cat(done)[None]
