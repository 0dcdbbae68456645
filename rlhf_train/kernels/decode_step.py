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
    def _add_norm(
        x, residual, weight, bias, total, normed, eps,
        SIZE: tl.constexpr, BLOCK: tl.constexpr, HAS_RESIDUAL: tl.constexpr, IS_RMS: tl.constexpr,
    ):  # fmt: skip
        row = tl.program_id(0).to(tl.int64)
        column = tl.arange(0, BLOCK)
        inside = column < SIZE
        value = tl.load(x + row * SIZE + column, inside, 0.0).to(tl.float32)
        if HAS_RESIDUAL:
            value += tl.load(residual + row * SIZE + column, inside, 0.0).to(tl.float32)
            value = value.to(total.dtype.element_ty).to(tl.float32)  # rounded as the sum is stored
            tl.store(total + row * SIZE + column, value.to(total.dtype.element_ty), inside)
        if IS_RMS:
            scale = 1 / tl.sqrt(tl.sum(value * value, 0) / SIZE + eps)
            # Rounded before the weight, as LLaMA's norm.
            out = (value * scale).to(normed.dtype.element_ty).to(tl.float32)
            out *= tl.load(weight + column, inside, 0.0).to(tl.float32)
        else:
            mean = tl.sum(value, 0) / SIZE
            centred = tl.where(inside, value - mean, 0.0)
            scale = 1 / tl.sqrt(tl.sum(centred * centred, 0) / SIZE + eps)
            out = centred * scale * tl.load(weight + column, inside, 0.0).to(tl.float32)
            out += tl.load(bias + column, inside, 0.0).to(tl.float32)
        tl.store(normed + row * SIZE + column, out.to(normed.dtype.element_ty), inside)

    @triton.jit
    def _silu_times(gate, up, out, gate_stride, up_stride, SIZE: tl.constexpr, BLOCK: tl.constexpr):
        row, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        inside = column < SIZE
        z = tl.load(gate + row * gate_stride + column, inside, 0.0).to(tl.float32)
        silu = (z / (1 + tl.exp(-z))).to(out.dtype.element_ty).to(tl.float32)
        product = silu * tl.load(up + row * up_stride + column, inside, 0.0).to(tl.float32)
        tl.store(out + row * SIZE + column, product.to(out.dtype.element_ty), inside)

    @triton.jit
    def _positioned(
        base, d, inside, weight, cosines, sines, eps,
        AXIS: tl.constexpr, SIZE: tl.constexpr, IS_NORMED: tl.constexpr, IS_ROTATED: tl.constexpr,
    ):  # fmt: skip
        """Load heads of a query or a key, and norm and rotate them, rounded as the model rounds."""
        x = tl.load(base + d, inside, 0.0)
        kind = x.dtype
        y = x.to(tl.float32)
        partner = d ^ (SIZE // 2)  # the other number of a rotated pair
        other = y
        if IS_ROTATED:
            other = tl.load(base + partner, inside, 0.0).to(tl.float32)
        if IS_NORMED:
            scale = 1 / tl.sqrt(tl.sum(y * y, AXIS, keep_dims=True) / SIZE + eps)
            y = (y * scale).to(kind).to(tl.float32) * tl.load(weight + d).to(tl.float32)
            y = y.to(kind).to(tl.float32)
            if IS_ROTATED:
                other = (other * scale).to(kind).to(tl.float32) * tl.load(weight + partner).to(tl.float32)
                other = other.to(kind).to(tl.float32)
        if IS_ROTATED:
            y = (y * tl.load(cosines + d).to(tl.float32)).to(kind).to(tl.float32)
            y += (other * tl.load(sines + d).to(tl.float32)).to(kind).to(tl.float32)
            y = y.to(kind).to(tl.float32)
        return y

    @triton.jit
    def _share(first, live, BLOCK: tl.constexpr, PARTS: tl.constexpr):
        """Return where this program's tokens begin and end, of those from `first` to `live`."""
        tokens = tl.cdiv(tl.cdiv(live - first, PARTS), BLOCK) * BLOCK
        begin = first + tl.program_id(2) * tokens
        return begin, tl.minimum(begin + tokens, live)

    @triton.jit
    def _attend(
        query, key, value, keys, values, length, finished, cosines, sines, query_norm, key_norm,
        out, maxima, sums, scale, query_eps, key_eps, window,
        query_stride, key_stride, value_stride, capacity,
        HEADS: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr, PARTS: tl.constexpr,
        IS_NORMED: tl.constexpr, IS_ROTATED: tl.constexpr,
    ):  # fmt: skip
        """One head, which shares its keys with no other."""
        row, head, part = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
        d = tl.arange(0, SIZE)
        kind = keys.dtype.element_ty
        live = tl.where(tl.load(finished + row) != 0, 0, tl.load(length + row)).to(tl.int32)
        turned, inside = row * SIZE, d < SIZE
        q = _positioned(
            query + row * query_stride + head * SIZE, d, inside, query_norm, cosines + turned, sines + turned,
            query_eps, 0, SIZE, IS_NORMED, IS_ROTATED,
        )  # fmt: skip
        q = (q * scale).to(kind).to(tl.float32)
        base = (row * HEADS + head) * capacity * SIZE
        new_key = _positioned(
            key + row * key_stride + head * SIZE, d, inside, key_norm, cosines + turned, sines + turned, key_eps,
            0, SIZE, IS_NORMED, IS_ROTATED,
        )  # fmt: skip
        new_value = tl.load(value + row * value_stride + head * SIZE + d)
        at = tl.load(length + row)
        tl.store(keys + base + at * SIZE + d, new_key.to(kind), inside & (part == 0))
        tl.store(values + base + at * SIZE + d, new_value, inside & (part == 0))
        # Online softmax. The first part starts with the new token, which is not read back from the
        # cache.
        most = tl.where(part == 0, tl.sum(q * new_key, 0), float("-inf"))
        total = tl.where(part == 0, 1.0, 0.0)
        mixed = tl.where(part == 0, new_value.to(tl.float32), 0.0)
        step = tl.arange(0, BLOCK)
        begin, end = _share(tl.maximum(live + 1 - window, 0), live, BLOCK, PARTS)
        for start in tl.range(begin, end, BLOCK, num_stages=STAGES):
            place = start + step
            seen = place < end
            k = tl.load(keys + base + place[:, None] * SIZE + d[None, :], seen[:, None], 0.0)
            v = tl.load(values + base + place[:, None] * SIZE + d[None, :], seen[:, None], 0.0)
            score = tl.where(seen, tl.sum(k.to(tl.float32) * q[None, :], 1), float("-inf"))
            higher = tl.maximum(most, tl.max(score, 0))
            shrink, weight = tl.exp(most - higher), tl.exp(score - higher)
            total = total * shrink + tl.sum(weight, 0)
            mixed = mixed * shrink + tl.sum(weight[:, None] * v.to(tl.float32), 0)
            most = higher
        place = (row * HEADS + head) * PARTS + part
        if PARTS == 1:
            tl.store(out + place * SIZE + d, (mixed / total).to(out.dtype.element_ty))
        else:
            tl.store(out + place * SIZE + d, mixed)
            tl.store(maxima + place, most)
            tl.store(sums + place, total)

    @triton.jit
    def _attend_in_groups(
        query, key, value, keys, values, length, finished, cosines, sines, query_norm, key_norm,
        out, maxima, sums, scale, query_eps, key_eps, window,
        query_stride, key_stride, value_stride, capacity,
        HEADS: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr, PARTS: tl.constexpr,
        IS_NORMED: tl.constexpr, IS_ROTATED: tl.constexpr, GROUPS: tl.constexpr, PADDED_GROUPS: tl.constexpr,
    ):  # fmt: skip
        """All query heads of one head of keys, which are read once. HEADS: of keys."""
        row, head, part = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
        d, group = tl.arange(0, SIZE), tl.arange(0, PADDED_GROUPS)
        kind = keys.dtype.element_ty
        live = tl.where(tl.load(finished + row) != 0, 0, tl.load(length + row)).to(tl.int32)
        turned, inside = row * SIZE, (group < GROUPS)[:, None] & (d < SIZE)[None, :]
        q = _positioned(
            query + row * query_stride + ((head * GROUPS + group) * SIZE)[:, None], d[None, :], inside,
            query_norm, cosines + turned, sines + turned, query_eps, 1, SIZE, IS_NORMED, IS_ROTATED,
        )  # fmt: skip
        q = (q * scale).to(kind)
        base = (row * HEADS + head) * capacity * SIZE
        new_key = _positioned(
            key + row * key_stride + head * SIZE, d, d < SIZE, key_norm, cosines + turned, sines + turned, key_eps,
            0, SIZE, IS_NORMED, IS_ROTATED,
        )  # fmt: skip
        new_value = tl.load(value + row * value_stride + head * SIZE + d)
        at = tl.load(length + row)
        tl.store(keys + base + at * SIZE + d, new_key.to(kind), (d < SIZE) & (part == 0))
        tl.store(values + base + at * SIZE + d, new_value, (d < SIZE) & (part == 0))
        most = tl.where(part == 0, tl.sum(q.to(tl.float32) * new_key[None, :], 1), float("-inf"))
        total = tl.where(part == 0, 1.0, tl.zeros([PADDED_GROUPS], tl.float32))
        mixed = tl.where(part == 0, new_value.to(tl.float32)[None, :], tl.zeros([PADDED_GROUPS, SIZE], tl.float32))
        step = tl.arange(0, BLOCK)
        begin, end = _share(tl.maximum(live + 1 - window, 0), live, BLOCK, PARTS)
        for start in tl.range(begin, end, BLOCK, num_stages=STAGES):
            place = start + step
            seen = place < end
            k = tl.load(keys + base + place[:, None] * SIZE + d[None, :], seen[:, None], 0.0)
            v = tl.load(values + base + place[:, None] * SIZE + d[None, :], seen[:, None], 0.0)
            score = tl.where(seen[None, :], tl.dot(q, tl.trans(k), input_precision="ieee"), float("-inf"))
            higher = tl.maximum(most, tl.max(score, 1))
            shrink, weight = tl.exp(most - higher), tl.exp(score - higher[:, None])
            total = total * shrink + tl.sum(weight, 1)
            mixed = mixed * shrink[:, None] + tl.dot(weight.to(kind), v, input_precision="ieee")
            most = higher
        place = ((row * HEADS + head) * GROUPS + group) * PARTS + part
        if PARTS == 1:
            mixed = (mixed / total[:, None]).to(out.dtype.element_ty)
        else:
            tl.store(maxima + place, most, group < GROUPS)
            tl.store(sums + place, total, group < GROUPS)
        tl.store(out + place[:, None] * SIZE + d[None, :], mixed, inside)

    @triton.jit
    def _join_parts(mixed, maxima, sums, out, SIZE: tl.constexpr, PARTS: tl.constexpr):
        """Join what several programs found for one head. PARTS: a power of two."""
        head, part, d = tl.program_id(0).to(tl.int64), tl.arange(0, PARTS), tl.arange(0, SIZE)
        most = tl.load(maxima + head * PARTS + part)  # -inf of a program without tokens; never the first
        weight = tl.exp(most - tl.max(most, 0))
        total = tl.sum(weight * tl.load(sums + head * PARTS + part), 0)
        each = tl.load(mixed + (head * PARTS + part)[:, None] * SIZE + d[None, :])
        tl.store(out + head * SIZE + d, (tl.sum(weight[:, None] * each, 0) / total).to(out.dtype.element_ty))

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
        per_temperature, stop_ids, stops, limit,
        VOCABULARY: tl.constexpr, BLOCKS: tl.constexpr, BLOCK: tl.constexpr, PADDED_BLOCKS: tl.constexpr,
        PADDED_STOPS: tl.constexpr, GREEDY: tl.constexpr,
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
            place = tl.arange(0, PADDED_STOPS)
            stop = tl.load(stop_ids + place, place < stops, -1)
            ends_here = tl.max((stop == chosen).to(tl.int32), 0)
            tl.store(finished + slot, ends_here | (at + 1 >= limit).to(tl.int32))


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
        _add_norm[(1,)](
            ones, ones, ones[0], ones[0], total, normed, 1e-5,
            SIZE=16, BLOCK=16, HAS_RESIDUAL=True, IS_RMS=False, num_warps=1,
        )  # fmt: skip
        torch.cuda.synchronize()
    except Exception as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no reason given'}"
    return ""


def run_here() -> bool:
    """Return what `work` does, without a warning: for callers that have another way."""
    return HAS_TRITON and not _failure()


def add_norm(x: Tensor, residual: Tensor | None, norm: Norm) -> tuple[Tensor, Tensor]:
    """Return x + residual and its norm. All (n, d); residual None: x and its norm."""
    normed, size = torch.empty_like(x), x.shape[1]
    total = x if residual is None else torch.empty_like(x)
    block = triton.next_power_of_2(size)
    _add_norm[(len(x),)](
        x, x if residual is None else residual, norm.weight, norm.weight if norm.bias is None else norm.bias,
        total, normed, norm.eps,
        SIZE=size, BLOCK=block, HAS_RESIDUAL=residual is not None, IS_RMS=norm.bias is None,
        num_warps=4 if block <= 2048 else 8,
    )  # fmt: skip
    return total, normed


def silu_times(gate: Tensor, up: Tensor) -> Tensor:
    """Return silu(gate) times up. Both (n, f), rows may lie apart."""
    count, size = gate.shape
    out = torch.empty(count, size, dtype=gate.dtype, device=gate.device)
    block = min(1024, triton.next_power_of_2(size))
    grid = (count, triton.cdiv(size, block))
    _silu_times[grid](gate, up, out, gate.stride(0), up.stride(0), SIZE=size, BLOCK=block, num_warps=4)
    return out


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    keys: Tensor,
    values: Tensor,
    length: Tensor,
    finished: Tensor,
    *,
    scale: float,
    block: int,
    warps: int,
    stages: int,
    parts: int = 1,
    window: int | None = None,
    rotation: tuple[Tensor, Tensor] | None = None,
    norms: tuple[Norm, Norm] | None = None,
) -> Tensor:
    """Write one new token's key and value a slot into the cache, and attend over the slot's tokens.

    Nothing else of the cache is read. Each key is read once for all query heads that share it.
    query: (n, H, D); key, value: (n, K, D), rows may lie apart; keys, values: (slots, K, T, D);
    length, finished: (n,); norms: of a head's query and key; rotation: cosines and sines at the new
    token, (n, 1, D), the first half's sines negative; window: tokens that the new one sees, itself
    included; parts: programs that share the tokens of a slot and head, a power of two. Returns (n,
    H D).
    """
    count, all_heads, size = query.shape
    _, heads, capacity, _ = keys.shape
    groups, device = all_heads // heads, query.device
    out = torch.empty(count, all_heads * size, dtype=query.dtype, device=device)
    maxima, sums = torch.empty(2, count, all_heads, parts, dtype=torch.float32, device=device)
    mixed = out if parts == 1 else torch.empty(count, all_heads, parts, size, dtype=torch.float32, device=device)
    cosines, sines = rotation if rotation is not None else (query, query)  # not read then
    weights, epsilons = ((query, query), (0.0, 0.0))
    if norms is not None:
        weights, epsilons = (norms[0].weight, norms[1].weight), (norms[0].eps, norms[1].eps)
    more = {} if groups == 1 else {"GROUPS": groups, "PADDED_GROUPS": max(16, triton.next_power_of_2(groups))}
    (_attend if groups == 1 else _attend_in_groups)[(count, heads, parts)](
        query, key, value, keys, values, length, finished, cosines, sines, *weights,
        mixed, maxima, sums, scale, *epsilons, capacity + 1 if window is None else window,
        query.stride(0), key.stride(0), value.stride(0), capacity,
        HEADS=heads, SIZE=size, BLOCK=block, STAGES=stages, PARTS=parts,
        IS_NORMED=norms is not None, IS_ROTATED=rotation is not None, **more, num_warps=warps,
    )  # fmt: skip
    if parts > 1:
        _join_parts[(count * all_heads,)](mixed, maxima, sums, out, SIZE=size, PARTS=parts, num_warps=1)
    return out


def sample(
    logits: Tensor, uniforms: Tensor, row_of: Tensor, token_of: Tensor, length: Tensor, step: Tensor,
    finished: Tensor, tokens: Tensor, log_probs: Tensor,
    *, temperature: float, greedy: bool, stop_ids: Tensor,
) -> None:  # fmt: skip
    """Sample the next token of each slot that is not finished, and update the slots' state.

    logits: (n, V); uniforms, tokens, log_probs: (rows, limit + 1); stop_ids: (m,), any of which
    ends an answer.
    """
    count, vocabulary = logits.shape
    blocks = triton.cdiv(vocabulary, VOCABULARY_BLOCK)
    maxima, sums = (torch.empty(count, blocks, dtype=torch.float32, device=logits.device) for _ in range(2))
    _masses[(count, blocks)](
        logits, maxima, sums, 1 / temperature, VOCABULARY=vocabulary, BLOCKS=blocks, BLOCK=VOCABULARY_BLOCK, num_warps=8
    )
    _sample[(count,)](
        logits, maxima, sums, uniforms, row_of, token_of, length, step, finished, tokens, log_probs,
        1 / temperature, stop_ids, len(stop_ids), tokens.shape[1] - 1,
        VOCABULARY=vocabulary, BLOCKS=blocks, BLOCK=VOCABULARY_BLOCK, PADDED_BLOCKS=triton.next_power_of_2(blocks),
        PADDED_STOPS=triton.next_power_of_2(max(1, len(stop_ids))), GREEDY=greedy, num_warps=8,
    )  # fmt: skip
