"""Triton kernels of the log-probs over a vocabulary, for GPUs.

They read logits once forward and once backward, in the model's dtype. They are optional: without
Triton 3, rlhf_train/models/log_probs.py does the same in plain PyTorch. Tests compare the two in
Triton's interpreter, on a CPU.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf_train.kernels.decode_step import HAS_TRITON

BLOCK = 4096  # logits of a row in one read

if HAS_TRITON:
    import triton
    import triton.language as tl

    @triton.jit
    def _softmax_numbers(
        logits, labels, log_probs, normalizers, entropies, per_temperature, vocabulary,
        ENTROPY: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        row = tl.program_id(0).to(tl.int64)
        column = tl.arange(0, BLOCK)
        logits += row * vocabulary
        # Online softmax, separately for each column of the block. Beyond the row's end stands a
        # low, finite number: it makes no NaN.
        most = tl.zeros([BLOCK], tl.float32) - 1e30
        total = tl.zeros([BLOCK], tl.float32)
        weighted = tl.zeros([BLOCK], tl.float32)
        for start in range(0, vocabulary, BLOCK):
            z = tl.load(logits + start + column, start + column < vocabulary, -1e30).to(tl.float32) * per_temperature
            higher = tl.maximum(most, z)
            shrink, mass = tl.exp(most - higher), tl.exp(z - higher)
            total = total * shrink + mass
            if ENTROPY:
                weighted = weighted * shrink + mass * z
            most = higher
        highest = tl.max(most, 0)
        shrink = tl.exp(most - highest)
        mass = tl.sum(total * shrink, 0)
        normalizer = highest + tl.log(mass)
        z = tl.load(logits + tl.load(labels + row)).to(tl.float32) * per_temperature
        tl.store(log_probs + row, z - normalizer)
        tl.store(normalizers + row, normalizer)
        if ENTROPY:  # -sum p log p = log sum exp - sum p z
            tl.store(entropies + row, normalizer - tl.sum(weighted * shrink, 0) / mass)

    @triton.jit
    def _to_gradient(logits, labels, normalizers, gradient, per_temperature, vocabulary, BLOCK: tl.constexpr):
        row = tl.program_id(0).to(tl.int64)
        column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        place = logits + row * vocabulary + column
        z = tl.load(place, column < vocabulary, -1e30).to(tl.float32) * per_temperature
        hit = tl.where(column == tl.load(labels + row), 1.0, 0.0)
        out = (hit - tl.exp(z - tl.load(normalizers + row))) * tl.load(gradient + row) * per_temperature
        tl.store(place, out.to(logits.dtype.element_ty), column < vocabulary)


def softmax_numbers(
    logits: Tensor, labels: Tensor, temperature: float, with_entropy: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return what log_probs.softmax_numbers does. logits: (n, V), contiguous."""
    rows, vocabulary = logits.shape
    log_probs, normalizers = logits.new_empty(2, rows, dtype=torch.float32)
    entropies = logits.new_empty(rows if with_entropy else 0, dtype=torch.float32)
    if rows:
        _softmax_numbers[(rows,)](
            logits, labels, log_probs, normalizers, entropies, 1 / temperature, vocabulary,
            with_entropy, BLOCK, num_warps=8,
        )  # fmt: skip
    return log_probs, normalizers, entropies


def to_gradient_(logits: Tensor, labels: Tensor, normalizers: Tensor, gradient: Tensor, temperature: float) -> None:
    """Do what log_probs.to_gradient_ does. logits: (n, V), contiguous."""
    rows, vocabulary = logits.shape
    if rows:
        grid = (rows, triton.cdiv(vocabulary, BLOCK))
        _to_gradient[grid](
            logits, labels, normalizers, gradient.contiguous(), 1 / temperature, vocabulary, BLOCK, num_warps=8
        )
