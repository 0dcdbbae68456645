"""Products of matrices by the quicker of the ways that PyTorch carries.

On a CPU, in float32, PyTorch calls MKL, whose kernels on AMD's processors stop at AVX2. Where these have AVX-512, oneDNN uses it: one core
of an EPYC of Zen 5 does 105 to 115 GFLOP/s by MKL, and by oneDNN 170 to 260. On a GPU a ReLU that follows is done by cuBLAS with the
product. Everywhere else all here is PyTorch's own product.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from rlhf_train import compat, machine

LEAST = 2**20  # multiplications of a product, below which oneDNN's start costs what its kernels save: 16 rows by a matrix of 256 x 256


def use_in(model: Any) -> Any:
    """The model, whose linear layers but the head are `linear` from now on. Copies of it are so, too."""
    if is_quicker_by_onednn():
        for module in model.base_model.modules():
            if type(module) is nn.Linear:
                module.__class__ = Linear
    return model


def join_relu(layer: Any) -> None:
    """OPT's decoder layer: its `fc1` does the ReLU that follows, too; or, with an adapter, the ReLU writes over what it has made."""
    if type(layer.fc1) in (nn.Linear, Linear):
        layer.fc1.__class__, layer.activation_fn = LinearRelu, nn.Identity()
    else:
        layer.activation_fn.inplace = True


class Linear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x W^T + b, with a gradient. x: (..., k); weight: (m, k); bias: (m,). Returns (..., m)."""
    if not _suits(x, weight) or hasattr(weight, "ds_id"):  # ZeRO-3 takes weights away between the two passes
        return F.linear(x, weight, bias)
    flat = x.flatten(0, -2)
    y: Tensor = _Linear.apply(flat, weight, bias) if torch.is_grad_enabled() else compat.onednn_linear(flat, weight, bias)
    return y if x.ndim == 2 else y.view(*x.shape[:-1], len(weight))


class LinearRelu(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return linear_relu(x, self.weight, self.bias)


def linear_relu(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """relu(x W^T + b), with a gradient. Shapes as `linear`'s."""
    if bias is None or not _has_epilogue(x, weight):
        return F.relu(linear(x, weight, bias), inplace=x.ndim == 2)  # of a product, whose gradient does not need it; else of a view of one
    flat = x.flatten(0, -2)
    y: Tensor = _LinearRelu.apply(flat, weight, bias) if torch.is_grad_enabled() else torch._addmm_activation(bias, flat, weight.t())
    return y if x.ndim == 2 else y.view(*x.shape[:-1], len(weight))


def product(a: Tensor, b: Tensor) -> Tensor:
    """A B^T, without a gradient. a: (n, k); b: (m, k). Returns (n, m)."""
    if not _suits(a, b):
        return a @ b.T
    if len(a) > len(b) and not a.is_contiguous():  # oneDNN would copy it, and not the second one: logits are gigabytes
        return compat.onednn_linear(b, a, None).T.contiguous()
    return compat.onednn_linear(a, b, None)


@cache
def is_quicker_by_onednn() -> bool:
    """On this machine."""
    text = machine.cpu_text()
    return "AuthenticAMD" in text and "avx512f" in (machine.cpu_flags(text) or ()) and compat.has_onednn_linear()


def _suits(a: Tensor, b: Tensor) -> bool:
    is_large = a.dtype == b.dtype == torch.float32 and not a.is_cuda and a.numel() * len(b) >= LEAST
    return is_large and is_quicker_by_onednn()


def _has_epilogue(x: Tensor, weight: Tensor) -> bool:
    return x.is_cuda and not hasattr(weight, "ds_id") and hasattr(torch, "_addmm_activation")


class _Linear(torch.autograd.Function):
    """x (n, k), weight (m, k), bias (m,) or None -> (n, m)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        wants_x, wants_weight, _ = ctx.needs_input_grad
        ctx.save_for_backward(x if wants_weight else None, weight if wants_x else None)
        return compat.onednn_linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return _gradients(ctx, gradient, *ctx.saved_tensors)


class _LinearRelu(torch.autograd.Function):
    """As _Linear, with the ReLU in the product's epilogue."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        wants_x, wants_weight, _ = ctx.needs_input_grad
        y = torch._addmm_activation(bias, x, weight.t())
        ctx.save_for_backward(x if wants_weight else None, weight if wants_x else None, y)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, y = ctx.saved_tensors
        return _gradients(ctx, torch.ops.aten.threshold_backward(gradient, y, 0), x, weight)


def _gradients(ctx: Any, gradient: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor | None, ...]:
    """Those of x W^T + b that are asked for, given that of the result."""
    wants_x, wants_weight, wants_bias = ctx.needs_input_grad
    return (
        product(gradient, weight.T) if wants_x else None,
        product(gradient.T, x.T) if wants_weight else None,
        gradient.sum(0) if wants_bias else None,
    )
