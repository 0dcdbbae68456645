"""Compute log-probs of labels under a vocabulary head, in little memory.

Logits are the largest tensors of training. If the head is a plain linear layer, they have the
model's own dtype, softmax is done in float32 for a few rows at a time (or in kernels, on a GPU),
and the backward pass writes the gradient of the logits over the logits. A head that is more than
its weight (it has an adapter, a bias, or ZeRO-3's partitions) is called as a module; if that takes
several chunks, it is called again in the backward pass.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from rlhf_train import compat
from rlhf_train.kernels import decode_step, softmax
from rlhf_train.kernels.cpu_matmul import product
from rlhf_train.models.head import IDENTITY, NEVER, LogitTransform

FLOAT32_BYTES = 64 * 2**20  # float32 softmax numbers of one piece of rows
MODULE_BYTES = 256 * 2**20  # float32 logits of one piece, if the head is called as a module
# Logits of one piece in the model's dtype. A single piece is kept for the backward pass; several
# are computed again there.
KEPT_BYTES = 2**31


def label_log_probs(
    states: Tensor,
    labels: Tensor,
    head: nn.Module,
    vocabulary: int,
    temperature: float = 1.0,
    with_entropy: bool = False,
    transform: LogitTransform = IDENTITY,
) -> tuple[Tensor, Tensor | None]:
    """Return log softmax(transform(head(states)) / temperature)[labels], in float32, and entropies.

    states: (N, d); labels: (N,); vocabulary: rows of the head. Returns (N,) and (N,); the entropies
    have no gradient, and are None without `with_entropy`.
    """
    if is_plain(head, states) and transform.cap is None:
        # softmax(scale x / T) is softmax(x / (T / scale)).
        rows: int = head.weight.shape[0]  # type: ignore[assignment,index]
        tokens = transform.tokens if transform.tokens is not None and transform.tokens < rows else None
        log_probs, entropies = _LabelLogProbs.apply(
            states,
            head.weight,
            labels,
            temperature / transform.scale,
            tokens,
            with_entropy,
            torch.is_grad_enabled(),
        )
    else:
        log_probs, entropies = _by_module(states, labels, head, vocabulary, temperature, with_entropy, transform)
    return log_probs, entropies if with_entropy else None


def is_plain(head: nn.Module, states: Tensor) -> bool:
    """Return whether the head is its weight and nothing else.

    ZeRO-3's weights have a ds_id, and have values only while their module runs.
    """
    return (
        type(head) is nn.Linear
        and getattr(head, "bias", None) is None
        and not hasattr(head.weight, "ds_id")
        and head.weight.dtype == states.dtype
    )


class _LabelLogProbs(torch.autograd.Function):
    """Log-probs under a plain head, piece by piece.

    states (N, d), weight (V, d), labels (N,) -> log-probs (N,), entropies (N,) or (0,).
    """

    @staticmethod
    def forward(
        ctx: Any,
        states: Tensor,
        weight: Tensor,
        labels: Tensor,
        temperature: float,
        tokens: int | None,
        with_entropy: bool,
        with_gradient: bool,
    ) -> tuple[Tensor, Tensor]:
        parts = pieces(len(labels), weight.shape[0] * weight.element_size(), KEPT_BYTES)
        numbers = []
        for part in parts:
            logits = _logits(states[part], weight, tokens)
            numbers.append(_softmax_numbers(logits, labels[part], temperature, with_entropy))
        log_probs, normalizers, entropies = (torch.cat(column) for column in zip(*numbers, strict=True))
        ctx.save_for_backward(states, weight, labels, normalizers)
        ctx.temperature, ctx.tokens, ctx.parts = temperature, tokens, parts
        ctx.kept = logits if with_gradient and len(parts) == 1 else None
        ctx.mark_non_differentiable(entropies)
        return log_probs, entropies

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        """Write the gradient over the logits that were kept; a second pass computes them again."""
        states, weight, labels, normalizers = ctx.saved_tensors
        kept, ctx.kept = ctx.kept, None
        of_states, of_weight = list[Tensor](), None
        for part in ctx.parts:
            logits = _logits(states[part], weight, ctx.tokens) if kept is None else kept
            _to_gradient_(logits, labels[part], normalizers[part], gradient[part], ctx.temperature)
            if ctx.needs_input_grad[0]:
                of_states.append(product(logits, weight.T))
            if ctx.needs_input_grad[1]:
                share = product(logits.T, states[part].T)
                if of_weight is None:
                    of_weight = share if len(ctx.parts) == 1 else share.float()
                else:
                    of_weight.add_(share)
        of_all_states = torch.cat(of_states) if of_states else None
        of_weight = None if of_weight is None else of_weight.to(weight.dtype)
        return of_all_states, of_weight, None, None, None, None, None


def _logits(states: Tensor, weight: Tensor, tokens: int | None) -> Tensor:
    """Return states times weight, (n, V); rows from `tokens` on have no probability."""
    logits = product(states, weight)
    if tokens is not None:
        logits[:, tokens:] = NEVER
    return logits


def pieces(rows: int, row_bytes: int, most_bytes: int) -> list[slice]:
    """Cut rows into pieces of at most `most_bytes`; there is at least one, which may be empty."""
    most = max(1, most_bytes // row_bytes)
    return [slice(start, min(start + most, rows)) for start in range(0, max(rows, 1), most)]


def _softmax_numbers(logits: Tensor, labels: Tensor, temperature: float, with_entropy: bool) -> tuple[Tensor, ...]:
    if logits.is_cuda and decode_step.run_here():
        return softmax.softmax_numbers(logits, labels, temperature, with_entropy)
    parts = pieces(len(labels), 4 * logits.shape[1], FLOAT32_BYTES)
    numbers = [softmax_numbers(logits[part], labels[part], temperature, with_entropy) for part in parts]
    return tuple(torch.cat(column) for column in zip(*numbers, strict=True))


def _to_gradient_(logits: Tensor, labels: Tensor, normalizers: Tensor, gradient: Tensor, temperature: float) -> None:
    if logits.is_cuda and decode_step.run_here():
        return softmax.to_gradient_(logits, labels, normalizers, gradient, temperature)
    for part in pieces(len(labels), 4 * logits.shape[1], FLOAT32_BYTES):
        to_gradient_(logits[part], labels[part], normalizers[part], gradient[part], temperature)


def softmax_numbers(
    logits: Tensor, labels: Tensor, temperature: float, with_entropy: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return log-probs (n,), log-sum-exps (n,) and entropies (n,) or (0,), in float32.

    logits: (n, V); labels: (n,).
    """
    scaled = logits.float() / temperature if temperature != 1.0 else logits.float()
    probabilities = scaled.softmax(-1)
    normalizers = scaled.amax(-1) - probabilities.amax(-1).log()  # the likeliest token has 1 / V at least
    log_probs = scaled.gather(-1, labels.unsqueeze(-1)).squeeze(-1) - normalizers
    if not with_entropy:
        return log_probs, normalizers, normalizers[:0]
    return log_probs, normalizers, normalizers - torch.bmm(probabilities.unsqueeze(1), scaled.unsqueeze(2)).flatten()


def to_gradient_(logits: Tensor, labels: Tensor, normalizers: Tensor, gradient: Tensor, temperature: float) -> None:
    """Write the gradient with respect to the logits (n, V) over them.

    gradient: (n,), that of their labels' log-probs.
    """
    scaled = logits.float()  # the same memory if the logits are float32
    if temperature != 1.0:
        scaled /= temperature
        gradient = gradient / temperature
    scaled.sub_(normalizers.unsqueeze(-1)).exp_().mul_(-gradient.unsqueeze(-1))
    scaled.scatter_add_(-1, labels.unsqueeze(-1), gradient.unsqueeze(-1))
    if logits.dtype != torch.float32:
        logits.copy_(scaled)


def token_log_probs(logits: Tensor, labels: Tensor) -> Tensor:
    """Return log softmax(logits)[labels], in float32.

    logits: (..., V); labels: (...). Returns (...).
    """
    logits = logits.float()
    return logits.gather(-1, labels.unsqueeze(-1)).squeeze(-1) - logits.logsumexp(-1)


def entropy(logits: Tensor) -> Tensor:
    """Return -sum p log p of softmax(logits), in nats. logits: (..., V). Returns (...)."""
    log_probs = logits.float().log_softmax(-1)
    return -(log_probs.exp() * log_probs).sum(-1)


def _by_module(
    states: Tensor,
    labels: Tensor,
    head: nn.Module,
    vocabulary: int,
    temperature: float,
    with_entropy: bool,
    transform: LogitTransform,
) -> tuple[Tensor, Tensor]:
    """Return log-probs and entropies under any head, by calling it as a module."""

    def chunk(states: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
        logits = transform(head(states).float())
        if temperature != 1.0:
            logits = logits / temperature
        with torch.no_grad():
            spread = entropy(logits) if with_entropy else wanted.new_empty(0, dtype=torch.float32)
        return token_log_probs(logits, wanted), spread

    parts = pieces(len(labels), 4 * vocabulary, MODULE_BYTES)
    if torch.is_grad_enabled() and len(parts) > 1:
        done = [
            checkpoint(chunk, states[part], labels[part], preserve_rng_state=False, **compat.checkpointing_arguments())
            for part in parts
        ]
    else:
        done = [chunk(states[part], labels[part]) for part in parts]
    log_probs, entropies = (torch.cat(column) for column in zip(*done, strict=True))
    return log_probs, entropies
