"""Triton kernels of training's passes through a decoder's layers, for GPUs.

Each does in one pass over memory what PyTorch does in several. They are optional: without Triton 3,
PyTorch does the same, in rlhf_train/kernels/fused_layers.py. Tests compare the two in Triton's
interpreter, on a CPU. What OPT needs forward is in rlhf_train/kernels/decode_step.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf_train.kernels.decode_step import HAS_TRITON

# Programs of a norm's gradient: they share the rows, and each adds up its part of the gradients of
# weight and bias. Measured on an H200, 16384 rows, in us for the kernel and for the sums after it,
# by 1024, 512 and 256 programs: rows of 2048: 99 and 18, 97 and 26, 149 and 17; rows of 1024: 53
# and 15, 77 and 25, 133 and 17.
PROGRAMS = 1024
ROWS, COLUMNS = 8, 512  # of a tile of a ReLU's gradient
PARTS = 32  # programs that share a column's rows
GATED = 1024  # numbers of a program of the gate's kernels

if HAS_TRITON:
    import triton
    import triton.language as tl

    @triton.jit
    def _norm_gradient(
        x, weight, of_x, of_normed, out, of_weight, of_bias, rows, eps,
        SIZE: tl.constexpr, BLOCK: tl.constexpr, ADDS: tl.constexpr,
    ):  # fmt: skip
        column = tl.arange(0, BLOCK)
        inside = column < SIZE
        scales = tl.load(weight + column, inside, 0.0).to(tl.float32)
        sum_weight = tl.zeros([BLOCK], tl.float32)
        sum_bias = tl.zeros([BLOCK], tl.float32)
        for row in range(tl.program_id(0), rows, tl.num_programs(0)):
            at = tl.cast(row, tl.int64) * SIZE + column
            value = tl.load(x + at, inside, 0.0).to(tl.float32)
            above = tl.load(of_normed + at, inside, 0.0).to(tl.float32)
            centred = tl.where(inside, value - tl.sum(value, 0) / SIZE, 0.0)
            per_std = 1 / tl.sqrt(tl.sum(centred * centred, 0) / SIZE + eps)
            plain = centred * per_std
            scaled = scales * above
            gradient = (scaled - tl.sum(scaled, 0) / SIZE - plain * (tl.sum(scaled * plain, 0) / SIZE)) * per_std
            if ADDS:
                gradient += tl.load(of_x + at, inside, 0.0).to(tl.float32)
            tl.store(out + at, gradient.to(out.dtype.element_ty), inside)
            sum_weight += above * plain
            sum_bias += above
        place = tl.program_id(0) * SIZE + column
        tl.store(of_weight + place, sum_weight, inside)
        tl.store(of_bias + place, sum_bias, inside)

    @triton.jit
    def _relu_gradient(above, y, out, of_bias, rows, size, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
        column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
        # Summed over its rows only at the end: in each tile that took twice as long as all else.
        total = tl.zeros([ROWS, COLUMNS], tl.float32)
        for first in range(tl.program_id(1) * ROWS, rows, tl.num_programs(1) * ROWS):
            row = first + tl.arange(0, ROWS)
            at = tl.cast(row, tl.int64)[:, None] * size + column[None, :]
            inside = (row < rows)[:, None] & (column < size)[None, :]
            gradient = tl.load(above + at, inside, 0.0)
            gradient = tl.where(tl.load(y + at, inside, 0.0) <= 0, 0.0, gradient)  # passes a NaN on, as PyTorch does
            tl.store(out + at, gradient, inside)
            total += gradient.to(tl.float32)
        tl.store(of_bias + tl.program_id(1) * size + column, tl.sum(total, 0), column < size)

    @triton.jit
    def _rms_gradient(
        x, weight, of_x, of_normed, out, of_weight, rows, eps,
        SIZE: tl.constexpr, BLOCK: tl.constexpr, ADDS: tl.constexpr,
    ):  # fmt: skip
        column = tl.arange(0, BLOCK)
        inside = column < SIZE
        scales = tl.load(weight + column, inside, 0.0).to(tl.float32)
        total = tl.zeros([BLOCK], tl.float32)
        for row in range(tl.program_id(0), rows, tl.num_programs(0)):
            at = tl.cast(row, tl.int64) * SIZE + column
            value = tl.load(x + at, inside, 0.0).to(tl.float32)
            above = tl.load(of_normed + at, inside, 0.0).to(tl.float32)
            per_root = tl.rsqrt(tl.sum(value * value, 0) / SIZE + eps)
            plain = value * per_root
            scaled = scales * above
            gradient = (scaled - plain * (tl.sum(scaled * plain, 0) / SIZE)) * per_root
            if ADDS:
                gradient += tl.load(of_x + at, inside, 0.0).to(tl.float32)
            tl.store(out + at, gradient.to(out.dtype.element_ty), inside)
            total += above * plain
        tl.store(of_weight + tl.program_id(0) * SIZE + column, total, inside)

    @triton.jit
    def _gate_gradient(above, gate, up, of_gate, of_up, count, BLOCK: tl.constexpr):
        at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        inside = at < count
        g = tl.load(gate + at, inside, 0.0).to(tl.float32)
        gradient = tl.load(above + at, inside, 0.0).to(tl.float32)
        share = 1 / (1 + tl.exp(-g))
        tl.store(of_up + at, (gradient * g * share).to(of_up.dtype.element_ty), inside)
        slope = share * (1 + g * (1 - share))
        of_gated = gradient * tl.load(up + at, inside, 0.0).to(tl.float32) * slope
        tl.store(of_gate + at, of_gated.to(of_gate.dtype.element_ty), inside)


def norm_gradient(
    x: Tensor, weight: Tensor, of_x: Tensor | None, of_normed: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of x (n, d), weight (d,) and bias (d,) of a layer norm of x.

    of_normed: (n, d), the gradient of the norm's result; of_x: (n, d), x's gradient from elsewhere,
    which is added.
    """
    rows, size = x.shape
    programs = max(1, min(PROGRAMS, rows))
    parts = torch.empty(2, programs, size, dtype=torch.float32, device=x.device)
    out, of_normed = torch.empty_like(x), of_normed.contiguous()
    more = of_normed if of_x is None else of_x.contiguous()
    block = triton.next_power_of_2(size)
    _norm_gradient[(programs,)](
        x, weight, more, of_normed, out, parts[0], parts[1], rows, eps,
        SIZE=size, BLOCK=block, ADDS=of_x is not None, num_warps=4 if block <= 2048 else 8,
    )  # fmt: skip
    of_weight, of_bias = parts.sum(1).to(weight.dtype).unbind()
    return out, of_weight, of_bias


def relu_gradient(above: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradient of a ReLU's input, (n, m), and its sum over n, (m,).

    above: (n, m), the gradient of the ReLU's result y (n, m).
    """
    rows, size = y.shape
    above, out = above.contiguous(), torch.empty_like(y)
    parts = torch.empty(PARTS, size, dtype=torch.float32, device=y.device)
    _relu_gradient[(triton.cdiv(size, COLUMNS), PARTS)](
        above, y, out, parts, rows, size, ROWS=ROWS, COLUMNS=COLUMNS, num_warps=4
    )
    return out, parts.sum(0).to(y.dtype)


def rms_gradient(
    x: Tensor, weight: Tensor, of_x: Tensor | None, of_normed: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Return the gradients of x (n, d) and weight (d,) of a root-mean-square norm of x.

    of_x and of_normed are as in `norm_gradient`.
    """
    rows, size = x.shape
    programs = max(1, min(PROGRAMS, rows))
    parts = torch.empty(programs, size, dtype=torch.float32, device=x.device)
    out, of_normed = torch.empty_like(x), of_normed.contiguous()
    more = of_normed if of_x is None else of_x.contiguous()
    block = triton.next_power_of_2(size)
    _rms_gradient[(programs,)](
        x, weight, more, of_normed, out, parts, rows, eps,
        SIZE=size, BLOCK=block, ADDS=of_x is not None, num_warps=4 if block <= 2048 else 8,
    )  # fmt: skip
    return out, parts.sum(0).to(weight.dtype)


def gate_gradient(above: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of gate and up in silu(gate) up, which has the gradient `above`.

    All have one shape; gate and up are contiguous.
    """
    of_gate, of_up = torch.empty_like(gate), torch.empty_like(up)
    _gate_gradient[(triton.cdiv(gate.numel(), GATED),)](
        above.contiguous(), gate, up, of_gate, of_up, gate.numel(), BLOCK=GATED, num_warps=4
    )
    return of_gate, of_up
