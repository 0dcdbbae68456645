"""Residual sums, norms, ReLUs and gates of a decoder's layer, with gradients.

On a GPU they take few passes over memory. A residual sum and its norm are one kernel; the backward
kernel also adds the sum's own gradient. cuBLAS does a ReLU together with the product before it; the
ReLU's gradient and the bias's are one kernel, and so is a gate. The kernels are Triton 3's. Without
it, and on a CPU, layer norms and ReLUs are PyTorch's own; a root-mean-square norm and a gate, which
models write out operation by operation, are functions that keep less and write over what they can.
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


def add_norm(x: Tensor, residual: Tensor | None, norm: Any) -> tuple[Tensor, Tensor]:
    """Return x + residual and its norm. All (n, d); residual None: x and its norm.

    norm: a layer norm, or the root-mean-square norm of a LLaMA-like family.
    """
    if hasattr(norm, "variance_epsilon"):
        if _is_here(norm.weight) and norm.weight.dtype == x.dtype:
            total, normed = _AddRmsNorm.apply(x, residual, norm.weight, norm.variance_epsilon)
            return total, normed
    elif _suits(norm) and norm.weight.dtype == x.dtype and _by_kernels(x):
        total, normed = _AddNorm.apply(x, residual, norm.weight, norm.bias, norm.eps)
        return total, normed
    total = x if residual is None else x + residual
    return total, norm(total)


def _by_kernels(x: Tensor) -> bool:
    return x.is_cuda and decode_step.run_here()


def _suits(norm: nn.LayerNorm) -> bool:
    """Return whether the kernels can run a layer norm."""
    return norm.weight is not None and norm.bias is not None and _is_here(norm.weight)


def _is_here(weight: Tensor) -> bool:
    """Return whether a norm's weight has values, and is not too long.

    ZeRO-3's weights have a ds_id, and have values only while their module runs.
    """
    return not hasattr(weight, "ds_id") and len(weight) <= LONGEST


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
        gradient, of_weight, of_bias = of_total, None, None
        if of_normed is not None:
            gradient, of_weight, of_bias = layer_gradients.norm_gradient(
                total.contiguous(), weight, of_total, of_normed, ctx.eps
            )
        return _wanted(ctx, gradient, gradient, of_weight, of_bias, None)


class _AddRmsNorm(torch.autograd.Function):
    """A residual sum and its root-mean-square norm, rounded as LLaMA's.

    x (n, d), residual (n, d) or None, weight (d,), eps -> sum (n, d), its norm (n, d).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        if _by_kernels(x):
            residual = None if residual is None else residual.contiguous()
            total, normed = decode_step.add_norm(x.contiguous(), residual, Norm(weight, None, eps))
        else:
            total = x if residual is None else x + residual
            normed = (total.float() * _per_root(total, eps)).to(total.dtype).mul_(weight)
        ctx.save_for_backward(total, weight)
        ctx.eps = eps
        return total, normed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_total: Tensor | None, of_normed: Tensor | None) -> tuple[Tensor | None, ...]:
        total, weight = ctx.saved_tensors
        gradient, of_weight = of_total, None
        if of_normed is not None:
            by = layer_gradients.rms_gradient if _by_kernels(total) else rms_gradient
            gradient, of_weight = by(total.contiguous(), weight, of_total, of_normed, ctx.eps)
        return _wanted(ctx, gradient, gradient, of_weight, None)


def _wanted(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
    """Return the gradients of a function's inputs, None for those that nobody wants."""
    return tuple(each if is_wanted else None for each, is_wanted in zip(gradients, ctx.needs_input_grad, strict=True))


def _per_root(x: Tensor, eps: float) -> Tensor:
    """Return 1 / sqrt(mean x^2 + eps) of each row, (n, 1), in float32."""
    squares = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32).square_()
    return squares.div_(x.shape[-1]).add_(eps).rsqrt_()


def rms_gradient(
    x: Tensor, weight: Tensor, of_x: Tensor | None, of_normed: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Return what `layer_gradients.rms_gradient` does, by PyTorch.

    With h = x r, r = 1 / sqrt(mean x^2 + eps) and the gradient g of w h, the gradient of x is
    r (w g - h mean(w g h)), and that of w the sum of g h.
    """
    per_root, above, scales = _per_root(x, eps), of_normed.float(), weight.float()
    plain = x.float() * per_root
    buffer = above * plain
    of_weight, means = buffer.sum(0), (buffer @ scales).div_(x.shape[1])
    torch.mul(above, scales, out=buffer)
    buffer.addcmul_(plain, means.unsqueeze(1), value=-1).mul_(per_root)
    if of_x is not None:
        buffer.add_(of_x)
    return buffer.to(x.dtype), of_weight.to(weight.dtype)


# --- gate ----------------------------------------------------------------------------------------


def gated(mlp: Any, x: Tensor) -> Tensor:
    """Compute a LLaMA-like family's feed-forward layer, down(silu(gate(x)) up(x)). x: (n, d)."""
    if mlp.config.hidden_act not in ("silu", "swish"):
        out: Tensor = mlp(x)
        return out
    down: Tensor = mlp.down_proj(_Gate.apply(mlp.gate_proj(x), mlp.up_proj(x)))
    return down


class _Gate(torch.autograd.Function):
    """silu(gate) up. All (n, m). Only the two inputs are kept."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        gate, up = gate.contiguous(), up.contiguous()
        ctx.save_for_backward(gate, up)
        return decode_step.silu_times(gate, up) if _by_kernels(gate) else F.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, above: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        by = layer_gradients.gate_gradient if _by_kernels(gate) else gate_gradient
        return by(above, gate, up)


def gate_gradient(above: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Return what `layer_gradients.gate_gradient` does, by PyTorch."""
    return torch.ops.aten.silu_backward(above * up, gate), F.silu(gate).mul_(above)


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
