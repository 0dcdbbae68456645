"""Multiply float32 matrices on a CPU by the quicker of the two libraries that PyTorch carries.

PyTorch calls MKL, which uses at most AVX2 on AMD's processors. oneDNN uses AVX-512 if they have it:
one core of a Zen 5 EPYC does 105 to 115 GFLOP/s by MKL, and 170 to 260 by oneDNN. On any other
processor, and on a GPU, everything here is PyTorch's own product.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from rlhf_train import compat, host

# A product of fewer multiplications stays with PyTorch: there oneDNN's start costs what its kernels
# save. 2^20 are 16 rows by a matrix of 256 x 256.
LEAST = 2**20


def use_in(model: Any) -> Any:
    """Make all linear layers but the head use `linear`, also in copies; return the model."""
    if is_quicker_by_onednn():
        for module in model.base_model.modules():
            if type(module) is nn.Linear:
                module.__class__ = CpuLinear
    return model


class CpuLinear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Compute x W^T + b, with a gradient.

    x: (..., k); weight: (m, k); bias: (m,). Returns (..., m).
    """
    if not _suits(x, weight) or hasattr(weight, "ds_id"):  # ZeRO-3 frees weights between the two passes
        return F.linear(x, weight, bias)
    flat, multiply = x.flatten(0, -2), _Linear.apply if torch.is_grad_enabled() else compat.onednn_linear
    y: Tensor = multiply(flat, weight, bias)
    return y if x.ndim == 2 else y.view(*x.shape[:-1], len(weight))


def product(a: Tensor, b: Tensor) -> Tensor:
    """Compute A B^T, without a gradient. a: (n, k); b: (m, k). Returns (n, m)."""
    if not _suits(a, b):
        return a @ b.T
    # oneDNN copies a first operand that is not contiguous, never the second: logits are gigabytes.
    if len(a) > len(b) and not a.is_contiguous():
        return compat.onednn_linear(b, a, None).T.contiguous()
    return compat.onednn_linear(a, b, None)


@cache
def is_quicker_by_onednn() -> bool:
    """Return whether oneDNN beats MKL on this machine: an AMD processor with AVX-512."""
    text = host.cpu_text()
    return "AuthenticAMD" in text and "avx512f" in (host.cpu_flags(text) or ()) and compat.has_onednn_linear()


def _suits(a: Tensor, b: Tensor) -> bool:
    is_large = a.dtype == b.dtype == torch.float32 and not a.is_cuda and a.numel() * len(b) >= LEAST
    return is_large and is_quicker_by_onednn()


class _Linear(torch.autograd.Function):
    """x W^T + b by oneDNN, forward and backward.

    x (n, k), weight (m, k), bias (m,) or None -> (n, m).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        wants_x, wants_weight, _ = ctx.needs_input_grad
        ctx.save_for_backward(x if wants_weight else None, weight if wants_x else None)
        return compat.onednn_linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        wants_x, wants_weight, wants_bias = ctx.needs_input_grad
        return (
            product(gradient, weight.T) if wants_x else None,
            product(gradient.T, x.T) if wants_weight else None,
            gradient.sum(0) if wants_bias else None,
        )
