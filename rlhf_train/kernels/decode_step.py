"""Triton kernels of the decode step, for GPUs.

They are optional: without Triton 3, rlhf_train/generation/decoder.py does the same in plain
PyTorch. `add_norm` also serves prefill, scoring and training.

Each kernel has a slow twin in decoder.py. Tests compare the two in Triton's interpreter, on a CPU.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from rlhf_train.kernels.decoder_weights import Network, Norm

try:
    import triton
    import triton.language as tl

    HAS_TRITON = int(triton.__version__.split(".")[0]) >= 3
except ImportError:
    HAS_TRITON = False

VOCABULARY_BLOCK = 2048  # logits of one program

if HAS_TRITON:

    @triton.jit
    def _add_norm(x, residual, weight, bias, total, normed, eps, SIZE: tl.constexpr, BLOCK: tl.constexpr):
        row = tl.program_id(0).to(tl.int64)
        column = tl.arange(0, BLOCK)
        inside = column < SIZE
        value = tl.load(x + row * SIZE + column, inside, 0.0).to(tl.float32)
        value += tl.load(residual + row * SIZE + column, inside, 0.0).to(tl.float32)
        value = value.to(total.dtype.element_ty).to(tl.float32)  # rounded as the sum is stored
        tl.store(total + row * SIZE + column, value.to(total.dtype.element_ty), inside)
        mean = tl.sum(value, 0) / SIZE
        centred = tl.where(inside, value - mean, 0.0)
        scale = 1 / tl.sqrt(tl.sum(centred * centred, 0) / SIZE + eps)
        out = centred * scale * tl.load(weight + column, inside, 0.0).to(tl.float32)
        out += tl.load(bias + column, inside, 0.0).to(tl.float32)
        tl.store(normed + row * SIZE + column, out.to(normed.dtype.element_ty), inside)

    @triton.jit
    def _attend(
        query, key, value, keys, values, length, finished, out, scale,
        query_stride, key_stride, value_stride, capacity,
        HEADS: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
    ):  # fmt: skip
        row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
        d = tl.arange(0, SIZE)
        live = tl.where(tl.load(finished + row) != 0, 0, tl.load(length + row)).to(tl.int32)
        q = tl.load(query + row * query_stride + head * SIZE + d).to(tl.float32) * scale
        q = q.to(out.dtype.element_ty).to(tl.float32)
        new_key = tl.load(key + row * key_stride + head * SIZE + d)
        new_value = tl.load(value + row * value_stride + head * SIZE + d)
        base = (row * HEADS + head) * capacity * SIZE
        at = tl.load(length + row)
        tl.store(keys + base + at * SIZE + d, new_key)
        tl.store(values + base + at * SIZE + d, new_value)
        # Online softmax. It starts with the new token, which is not read back from the cache.
        most = tl.sum(q * new_key.to(tl.float32), 0)
        total = 1.0
        mixed = new_value.to(tl.float32)
        step = tl.arange(0, BLOCK)
        for start in tl.range(0, live, BLOCK, num_stages=STAGES):
            place = start + step
            seen = place < live
            k = tl.load(keys + base + place[:, None] * SIZE + d[None, :], seen[:, None], 0.0)
            v = tl.load(values + base + place[:, None] * SIZE + d[None, :], seen[:, None], 0.0)
            score = tl.where(seen, tl.sum(k.to(tl.float32) * q[None, :], 1), float("-inf"))
            higher = tl.maximum(most, tl.max(score, 0))
            shrink, weight = tl.exp(most - higher), tl.exp(score - higher)
            total = total * shrink + tl.sum(weight, 0)
            mixed = mixed * shrink + tl.sum(weight[:, None] * v.to(tl.float32), 0)
            most = higher
        tl.store(out + row * HEADS * SIZE + head * SIZE + d, (mixed / total).to(out.dtype.element_ty))

    @triton.jit
    def _masses(
        logits, maxima, sums, per_temperature, VOCABULARY: tl.constexpr, BLOCKS: tl.constexpr, BLOCK: tl.constexpr
    ):
        row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
        token = part * BLOCK + tl.arange(0, BLOCK)
        z = tl.load(logits + row * VOCABULARY + token, token < VOCABULARY, float("-inf")).to(tl.float32)
        z *= per_temperature
        most = tl.max(z, 0)
        tl.store(maxima + row * BLOCKS + part, most)
        tl.store(sums + row * BLOCKS + part, tl.sum(tl.exp(z - most), 0))

    @triton.jit
    def _sample(
        logits, maxima, sums, uniforms, row_of, token_of, length, step, finished, tokens, log_probs,
        per_temperature, eos, limit,
        VOCABULARY: tl.constexpr, BLOCKS: tl.constexpr, BLOCK: tl.constexpr, PADDED_BLOCKS: tl.constexpr,
        GREEDY: tl.constexpr,
    ):  # fmt: skip
        slot = tl.program_id(0).to(tl.int64)
        if tl.load(finished + slot) == 0:
            row, at = tl.load(row_of + slot), tl.load(step + slot)
            part = tl.arange(0, PADDED_BLOCKS)
            inside = part < BLOCKS
            block_max = tl.load(maxima + slot * BLOCKS + part, inside, float("-inf"))
            most = tl.max(block_max, 0)
            # The masses of the blocks are added up in float64.
            block_sum = tl.load(sums + slot * BLOCKS + part, inside, 0.0)
            mass = tl.where(inside, block_sum * tl.exp(block_max - most), 0.0).to(tl.float64)
            total = tl.sum(mass, 0)
            if GREEDY:
                chosen_block = tl.argmax(block_max, 0)
                before = 0.0
                wanted = total
            else:
                wanted = tl.load(uniforms + row * (limit + 1) + at) * total
                ends = tl.cumsum(mass, 0)
                chosen_block = tl.minimum(tl.sum((inside & (ends <= wanted)).to(tl.int32), 0), BLOCKS - 1)
                before = tl.sum(tl.where(part < chosen_block, mass, 0.0), 0)
            token = chosen_block * BLOCK + tl.arange(0, BLOCK)
            z = tl.load(logits + slot * VOCABULARY + token, token < VOCABULARY, float("-inf")).to(tl.float32)
            z *= per_temperature
            if GREEDY:
                chosen = chosen_block * BLOCK + tl.argmax(z, 0)
            else:
                each = tl.exp(z - most).to(tl.float64)
                inner = tl.cumsum(each, 0)
                # Here the block's mass is added up in another order than in `_masses`, so it is
                # rounded differently. The wanted mass is scaled by the quotient, or rounding could
                # choose the block's last token.
                block_mass = tl.sum(tl.where(part == chosen_block, mass, 0.0), 0)
                inside_block = (wanted - before) * tl.sum(each, 0) / block_mass
                last = tl.minimum(BLOCK, VOCABULARY - chosen_block * BLOCK) - 1
                chosen = chosen_block * BLOCK + tl.minimum(tl.sum((inner <= inside_block).to(tl.int32), 0), last)
            chosen_z = tl.load(logits + slot * VOCABULARY + chosen).to(tl.float32) * per_temperature
            log_prob = chosen_z - most - tl.log(total.to(tl.float32))
            tl.store(tokens + row * (limit + 1) + at, chosen.to(tl.int64))
            tl.store(log_probs + row * (limit + 1) + at, log_prob)
            tl.store(token_of + slot, chosen.to(tl.int64))
            tl.store(length + slot, tl.load(length + slot) + 1)
            tl.store(step + slot, at + 1)
            tl.store(finished + slot, ((chosen == eos) | (at + 1 >= limit)).to(tl.int32))


def network_supported(network: Network) -> bool:
    """Return whether the attention kernel can run a network's heads.

    Its tiles are powers of two, and OPT-2.7b's heads have 80 numbers.
    """
    return network.head_size >= 16 and network.head_size & (network.head_size - 1) == 0


def work(warn: Callable[[str], object]) -> bool:
    """Return whether Triton can run a kernel on this GPU; warn if it cannot.

    It needs a C compiler for the first kernel.
    """
    reason = _failure() if HAS_TRITON else "it is not installed, or older than Triton 3"
    if reason:
        warn(f"rollouts run without Triton's kernels, which is slower: {reason}")
    return not reason


@functools.lru_cache(maxsize=1)
def _failure() -> str:
    """Return why a kernel does not run here; "" if it does."""
    try:
        ones = torch.ones(1, 16, device="cuda")
        total, normed = torch.empty_like(ones), torch.empty_like(ones)
        _add_norm[(1,)](ones, ones, ones[0], ones[0], total, normed, 1e-5, SIZE=16, BLOCK=16, num_warps=1)
        torch.cuda.synchronize()
    except Exception as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no reason given'}"
    return ""


def run_here() -> bool:
    """Return what `work` does, without a warning: for callers that have another way."""
    return HAS_TRITON and not _failure()


def add_norm(x: Tensor, residual: Tensor, norm: Norm) -> tuple[Tensor, Tensor]:
    """Return x + residual and its layer norm. All (n, d)."""
    total, normed = torch.empty_like(x), torch.empty_like(x)
    size = x.shape[1]
    block = triton.next_power_of_2(size)
    _add_norm[(len(x),)](
        x, residual, norm.weight, norm.bias, total, normed, norm.eps,
        SIZE=size, BLOCK=block, num_warps=4 if block <= 2048 else 8,
    )  # fmt: skip
    return total, normed


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    keys: Tensor,
    values: Tensor,
    length: Tensor,
    finished: Tensor,
    *,
    block: int,
    warps: int,
    stages: int,
) -> Tensor:
    """Write one new token's key and value a slot into the cache, and attend over the slot's tokens.

    Nothing else of the cache is read. query, key, value: (n, H D), rows may lie apart; keys,
    values: (slots, H, T, D); length, finished: (n,). Returns (n, H D).
    """
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    _, heads, capacity, size = keys.shape
    _attend[(len(query), heads)](
        query, key, value, keys, values, length, finished, out, size**-0.5,
        query.stride(0), key.stride(0), value.stride(0), capacity,
        HEADS=heads, SIZE=size, BLOCK=block, STAGES=stages, num_warps=warps,
    )  # fmt: skip
    return out


def sample(
    logits: Tensor, uniforms: Tensor, row_of: Tensor, token_of: Tensor, length: Tensor, step: Tensor,
    finished: Tensor, tokens: Tensor, log_probs: Tensor,
    *, temperature: float, greedy: bool, eos_id: int,
) -> None:  # fmt: skip
    """Sample the next token of each slot that is not finished, and update the slots' state.

    logits: (n, V); uniforms, tokens, log_probs: (rows, limit + 1).
    """
    count, vocabulary = logits.shape
    blocks = triton.cdiv(vocabulary, VOCABULARY_BLOCK)
    maxima, sums = (torch.empty(count, blocks, dtype=torch.float32, device=logits.device) for _ in range(2))
    _masses[(count, blocks)](
        logits, maxima, sums, 1 / temperature, VOCABULARY=vocabulary, BLOCKS=blocks, BLOCK=VOCABULARY_BLOCK, num_warps=8
    )
    _sample[(count,)](
        logits, maxima, sums, uniforms, row_of, token_of, length, step, finished, tokens, log_probs,
        1 / temperature, eos_id, tokens.shape[1] - 1,
        VOCABULARY=vocabulary, BLOCKS=blocks, BLOCK=VOCABULARY_BLOCK, PADDED_BLOCKS=triton.next_power_of_2(blocks),
        GREEDY=greedy, num_warps=8,
    )  # fmt: skip
