"""Residual sums, layer norms and ReLUs of a decoder's layer, with gradients.

On a GPU they take few passes over memory. A residual sum and its norm are one kernel; the backward
kernel also adds the sum's own gradient. cuBLAS does a ReLU together with the product before it; the
ReLU's gradient and the bias's are one kernel. The kernels are Triton 3's. Without it, and on a CPU,
norms and gradients are PyTorch's own.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from rlhf_train.kernels import cpu_matmul, decode_step, layer_gradients
from rlhf_train.kernels.decoder_weights import Norm

LONGEST = 8192  # numbers of a row: a program of the norm's kernels holds a whole one

# --- sum and norm --------------------------------------------------------------------------------


def add_norm(x: Tensor, residual: Tensor | None, norm: nn.LayerNorm) -> tuple[Tensor, Tensor]:
    """Return x + residual and its layer norm. All (n, d); residual None: x and its norm."""
    if _suits(norm) and norm.weight.dtype == x.dtype and _by_kernels(x):
        total, normed = _AddNorm.apply(x, residual, norm.weight, norm.bias, norm.eps)
        return total, normed
    total = x if residual is None else x + residual
    return total, norm(total)


def _by_kernels(x: Tensor) -> bool:
    return x.is_cuda and decode_step.run_here()


def _suits(norm: nn.LayerNorm) -> bool:
    """Return whether the kernels can run a norm.

    ZeRO-3's weights have a ds_id, and have values only while their module runs.
    """
    has_parameters = norm.weight is not None and norm.bias is not None
    return has_parameters and not hasattr(norm.weight, "ds_id") and len(norm.weight) <= LONGEST


class _AddNorm(torch.autograd.Function):
    """A residual sum and its layer norm, with gradients.

    x (n, d), residual (n, d) or None, weight (d,), bias (d,), eps -> sum (n, d), its norm (n, d).
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        if residual is None:
            total, normed = x, F.layer_norm(x, weight.shape, weight, bias, eps)
        else:
            total, normed = decode_step.add_norm(x.contiguous(), residual.contiguous(), Norm(weight, bias, eps))
        ctx.save_for_backward(total, weight)
        ctx.eps = eps
        return total, normed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_total: Tensor | None, of_normed: Tensor | None) -> tuple[Tensor | None, ...]:
        total, weight = ctx.saved_tensors
        wants_x, wants_residual, wants_weight, wants_bias, _ = ctx.needs_input_grad
        gradient, of_weight, of_bias = of_total, None, None
        if of_normed is not None:
            gradient, of_weight, of_bias = layer_gradients.norm_gradient(
                total.contiguous(), weight, of_total, of_normed, ctx.eps
            )
        return (
            gradient if wants_x else None,
            gradient if wants_residual else None,
            of_weight if wants_weight else None,
            of_bias if wants_bias else None,
            None,
        )


# --- product and ReLU ---------------------------------------------------------------------------


def join_relu(layer: Any) -> None:
    """Make `fc1` of OPT's decoder layer also do the ReLU that follows.

    With an adapter on `fc1`, the ReLU writes over its input instead. Call this after adapters are
    added: an adapter on a LinearRelu would come after the ReLU.
    """
    if type(layer.fc1) in (nn.Linear, cpu_matmul.CpuLinear):
        layer.fc1.__class__, layer.activation_fn = LinearRelu, nn.Identity()
    else:
        layer.activation_fn.inplace = True


class LinearRelu(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return linear_relu(x, self.weight, self.bias)


def linear_relu(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Compute relu(x W^T + b), with a gradient.

    x: (..., k); weight: (m, k); bias: (m,). Returns (..., m).
    """
    if bias is None or hasattr(weight, "ds_id") or not _by_cublas(x):
        # In place: the product's gradient does not need its result. A product of more than two
        # dimensions is a view, and autograd would copy it.
        return F.relu(cpu_matmul.linear(x, weight, bias), inplace=x.ndim == 2)
    flat = x.flatten(0, -2)
    y: Tensor = _LinearRelu.apply(flat, weight, bias)
    return y if x.ndim == 2 else y.view(*x.shape[:-1], len(weight))


def _by_cublas(x: Tensor) -> bool:
    return x.is_cuda and hasattr(torch, "_addmm_activation")


class _LinearRelu(torch.autograd.Function):
    """relu(x W^T + b) by cuBLAS. x (n, k), weight (m, k), bias (m,) -> (n, m)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        wants_x, wants_weight, _ = ctx.needs_input_grad
        y = torch._addmm_activation(bias, x, weight.t())
        ctx.save_for_backward(x if wants_weight else None, weight if wants_x else None, y)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, above: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, y = ctx.saved_tensors
        wants_x, wants_weight, wants_bias = ctx.needs_input_grad
        if _by_kernels(y):
            gradient, of_bias = layer_gradients.relu_gradient(above, y)
        else:
            gradient = torch.ops.aten.threshold_backward(above, y, 0)
            of_bias = gradient.sum(0)
        return (
            gradient @ weight if wants_x else None,
            gradient.t() @ x if wants_weight else None,
            of_bias if wants_bias else None,
        )
