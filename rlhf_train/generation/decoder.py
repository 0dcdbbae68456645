"""Generate answers over a model's own tensors, with a static KV cache.

A decode step samples one token in each slot, and the host takes no part in it. Each slot has its
own length, so nothing is padded on the left. A finished answer's slot goes to the next waiting
prompt. On a GPU the whole step, sampling included, is one CUDA graph for each number of slots (and
width, without Triton). On a CPU, or if a capture fails, the same step runs without a graph. A step
reads the tensors that the trainer updates in place.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from rlhf_train import compat
from rlhf_train.data.sequences import sent, split_into_passes
from rlhf_train.kernels import decode_step, fused_layers
from rlhf_train.kernels.decoder_weights import Layer, Network, Norm
from rlhf_train.models.head import NEVER

PREFILL_TOKENS = 16384  # of the prompts of one prefill pass, padded
WIDTH_STEP = 64  # graphs without Triton read the cache up to a multiple of this
PROGRAMS = 256  # that attend concurrently: about two for each of a large GPU's multiprocessors
WARM_UPS = 2  # steps before a capture: libraries choose their kernels and workspaces


@dataclass(frozen=True)
class Sampling:
    """How a token is sampled.

    Log-probs are always those of softmax(logits / temperature), also with top_k or top_p.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None

    @property
    def is_greedy(self) -> bool:
        return self.top_k == 1

    @property
    def is_plain(self) -> bool:
        """Return whether any token may be sampled, or always the likeliest."""
        return self.is_greedy or (self.top_k is None and self.top_p is None)

    def kept(self, logits: Tensor) -> Tensor:
        """Return logits (n, V) with -inf for tokens that may not be sampled.

        These are outside the top_k, or outside the smallest set with mass top_p.
        """
        if self.top_k is not None and self.top_k < logits.shape[1]:
            least = logits.topk(self.top_k, dim=-1).values[:, -1:]
            logits = logits.masked_fill(logits < least, -torch.inf)
        if self.top_p is not None and self.top_p < 1:
            ordered, places = logits.sort(dim=-1, descending=True)
            before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)
            dropped = torch.zeros_like(logits, dtype=torch.bool).scatter(1, places, before >= self.top_p)
            logits = logits.masked_fill(dropped, -torch.inf)
        return logits


def draw(logits: Tensor, uniform: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """Sample one token a row by inverse transform.

    It is the first token whose cumulative probability exceeds the uniform. logits: (n, V), as the
    model gives them; uniform: (n,) float64 in [0, 1). Returns tokens (n,) and their log-probs (n,),
    float32.
    """
    logits = logits.float()
    if sampling.temperature != 1.0:
        logits = logits / sampling.temperature
    probabilities = logits.softmax(-1)
    if sampling.is_greedy:
        token = logits.argmax(-1)
    else:
        kept = sampling.kept(logits)
        mass = (probabilities if kept is logits else kept.softmax(-1)).cumsum(-1, dtype=torch.float64)
        place = torch.searchsorted(mass, (uniform * mass[:, -1]).unsqueeze(1), right=True)
        token = place.squeeze(1).clamp(max=logits.shape[1] - 1)
    return token, probabilities.gather(1, token.unsqueeze(1)).squeeze(1).log()


@dataclass
class State:
    """The state of S slots and of n rows (prompts) with up to R tokens each.

    What a finished slot writes goes to column R, which is never read.
    """

    row: Tensor  # (S,) the prompt that a slot answers
    token: Tensor  # (S,) sampled and not yet fed
    length: Tensor  # (S,) tokens in the cache
    step: Tensor  # (S,) tokens sampled
    finished: Tensor  # (S,) int32
    uniforms: Tensor  # (n, R + 1) float64
    tokens: Tensor  # (n, R + 1)
    log_probs: Tensor  # (n, R + 1) float32

    @classmethod
    def of(cls, slots: int, rows: int, limit: int, device: torch.device) -> State:
        row, token, length, step = (torch.zeros(slots, dtype=torch.int64, device=device) for _ in range(4))
        finished = torch.ones(slots, dtype=torch.int32, device=device)
        uniforms = torch.zeros(rows, limit + 1, dtype=torch.float64, device=device)
        tokens = torch.zeros_like(uniforms, dtype=torch.int64)
        log_probs = torch.zeros_like(uniforms, dtype=torch.float32)
        return cls(row, token, length, step, finished, uniforms, tokens, log_probs)

    def record(self, slots: Tensor | slice, logits: Tensor, sampling: Sampling, stop_ids: Tensor) -> None:
        """Sample the next token of these slots, and update their state.

        The tokens before it were fed already. logits: (n, V); stop_ids: (m,), any of which ends an
        answer.
        """
        limit = self.tokens.shape[1] - 1
        row, step, live = self.row[slots], self.step[slots], self.finished[slots] == 0
        at = torch.where(live, step, limit)
        token, log_prob = draw(logits, self.uniforms[row, at], sampling)
        self.tokens[row, at] = token
        self.log_probs[row, at] = log_prob
        self.token[slots] = torch.where(live, token, self.token[slots])
        stops = (token[:, None] == stop_ids).any(1)
        self.finished[slots] = (~live | stops | (step + 1 >= limit)).to(torch.int32)
        self.length[slots] += live
        self.step[slots] += live

    def move(self, source: Tensor, target: Tensor) -> None:
        """Copy the slots `source` to the slots `target`, and mark `source` as finished."""
        for tensor in (self.row, self.token, self.length, self.step, self.finished):
            tensor[target] = tensor[source]
        self.finished[source] = 1


class Decoder:
    """Generates up to `slots` answers concurrently, for up to `rows` prompts a call."""

    def __init__(
        self,
        network: Network,
        *,
        slots: int,
        width: int,
        rows: int,
        limit: int,
        sampling: Sampling,
        stop_ids: Collection[int],
        use_kernels: bool | None = None,
        warn: Callable[[str], object] = lambda message: None,
    ) -> None:
        """Allocate the cache.

        width: tokens of prompt and answer, at most; limit: tokens of the answer, at most; stop_ids:
        tokens that end an answer; use_kernels: Triton's; default: if they run here.
        """
        weights = network.token_embedding
        self.network, self.sampling = network, sampling
        self.slots, self.width, self.rows = slots, width, rows
        self.device = weights.device
        self.stop_ids = torch.tensor(sorted(stop_ids), dtype=torch.int64, device=self.device)
        on_gpu = self.device.type == "cuda"
        if use_kernels is None:
            use_kernels = on_gpu and decode_step.network_supported(network) and decode_step.work(warn)
        self.use_kernels = use_kernels
        quick, plain = (decode_step.add_norm, decode_step.silu_times), (_add_norm, _silu_times)
        self._kernels = quick if self.use_kernels else plain
        self.state = State.of(slots, rows, limit, self.device)
        shape = (len(network.layers), slots, network.key_heads, width, network.head_size)
        self.keys = torch.zeros(shape, dtype=weights.dtype, device=self.device)
        self.values = torch.zeros_like(self.keys)
        self._rotation = Rotation.of(network, width)
        self._graphs: dict[tuple[int, int], Any] | None = {} if on_gpu else None
        self._pool = torch.cuda.graph_pool_handle() if on_gpu else None
        self._warn = warn
        self._addresses = network.addresses()

    def reads(self, network: Network) -> bool:
        """Return whether the graphs still read the tensors of this network."""
        return network.addresses() == self._addresses

    # --- prompts ---

    def begin(self, uniforms: Tensor) -> None:
        """Free all slots, and take the uniforms (n, R) of this call's rows."""
        self.state.uniforms[: len(uniforms), : uniforms.shape[1]] = uniforms.to(self.device)
        self.state.finished.fill_(1)

    def prefill(self, slots: Sequence[int], rows: Sequence[int], prompts: Sequence[np.ndarray]) -> None:
        """Feed these prompts into free slots, and sample the first token of each answer.

        They are cut into the passes that compute the fewest tokens.
        """
        lengths = np.array([len(prompt) for prompt in prompts])
        order = np.argsort(-lengths, kind="stable")
        for part in split_into_passes(lengths[order], PREFILL_TOKENS):
            chosen = np.sort(order[part])  # consecutive slots, in most passes
            self._prefill_pass([slots[i] for i in chosen], [rows[i] for i in chosen], [prompts[i] for i in chosen])

    def _prefill_pass(self, slots: Sequence[int], rows: Sequence[int], prompts: Sequence[np.ndarray]) -> None:
        lengths = np.array([len(prompt) for prompt in prompts])
        ids = np.zeros((len(prompts), lengths.max()), dtype=np.int64)
        for place, prompt in enumerate(prompts):
            ids[place, : len(prompt)] = prompt
        slot, row, length, inputs = (self._sent(array) for array in (slots, rows, lengths, ids))
        state = self.state
        state.row[slot], state.step[slot], state.finished[slot] = row, 0, 0
        state.length[slot] = length - 1  # `record` counts the token that was fed last
        # A slice, if the slots are consecutive: on an H200, writing keys and values took 20 ms by a
        # slice and 36 ms by an index.
        run = range(slots[0], slots[0] + len(slots))
        where = slice(run.start, run.stop) if list(slots) == list(run) else slot
        state.record(slot, self._fill_cache(where, inputs, length), self.sampling, self.stop_ids)

    def _fill_cache(self, slots: Tensor | slice, ids: Tensor, lengths: Tensor) -> Tensor:
        """Write the prompts' keys and values, and return logits (n, V) after each prompt.

        ids: (n, P), padded on the right: under causal attention the padding changes nothing.
        """
        network, (count, width) = self.network, ids.shape

        places = torch.arange(width, device=ids.device)
        rotation = self._rotation.at(places) if self._rotation is not None else None

        def attend(number: int, layer: Layer, y: Tensor) -> Tensor:
            query, key, value = (part.view(count, width, -1, network.head_size) for part in layer.query_key_value(y))
            query, key = positioned(layer, query, key, rotation)
            query, key, value = (part.transpose(1, 2) for part in (query, key, value))
            self.keys[number, slots, :, :width] = key
            self.values[number, slots, :, :width] = value
            out = _attend_to_prompts(_rescaled(network, query), key, value, layer.window)
            return out.transpose(1, 2).reshape(count * width, -1)

        last = torch.arange(count, device=ids.device) * width + lengths - 1
        hidden = _run_layers(
            network, embed(network, ids.flatten(), places.repeat(count)), attend, *self._kernels, wanted=last
        )
        return _logits(network, hidden)

    def _sent(self, numbers: Sequence[int] | np.ndarray) -> Tensor:
        return sent(torch.from_numpy(np.asarray(numbers, dtype=np.int64)), self.device)

    # --- steps ---

    def advance(self, count: int, width: int, steps: int) -> None:
        """Sample `steps` more tokens in the first `count` slots.

        None of them then holds more than `width` tokens.
        """
        run = self._captured(count, width)
        for _ in range(steps):
            run()

    def _captured(self, count: int, width: int) -> Callable[[], object]:
        reach = self.width if self.use_kernels else min(self.width, -(-width // WIDTH_STEP) * WIDTH_STEP)
        if self._graphs is None:
            return lambda: self._step(count, width)
        if (count, reach) not in self._graphs:
            try:
                self._graphs[count, reach] = self._capture(lambda: self._step(count, reach))
            except Exception as error:
                if compat.is_out_of_memory(error):
                    raise
                reason = str(error).splitlines()[0]
                self._warn(f"the decode step could not be captured as a CUDA graph, and runs without: {reason}")
                self._graphs = None
                return lambda: self._step(count, width)
        return self._graphs[count, reach].replay

    def _capture(self, step: Callable[[], None]) -> Any:
        """Capture a step as a CUDA graph.

        All slots are marked as finished meanwhile, so the warm-up steps change nothing that is read
        later.
        """
        kept = self.state.finished.clone()
        self.state.finished.fill_(1)
        try:
            side_stream = torch.cuda.Stream()
            side_stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side_stream):
                for _ in range(WARM_UPS):
                    step()
            torch.cuda.current_stream().wait_stream(side_stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._pool, **compat.capture_arguments()):
                step()
        finally:  # a step that cannot be captured runs without a graph
            self.state.finished.copy_(kept)
        return graph

    def _step(self, count: int, width: int) -> None:
        network, state = self.network, self.state
        length, finished = state.length[:count], state.finished[:count]
        rotation = self._rotation.at(length) if self._rotation is not None else None
        if not self.use_kernels:
            slots = torch.arange(count, device=self.device)
            biases = {
                window: self._bias(length, width, window) for window in {layer.window for layer in network.layers}
            }

        def attend(number: int, layer: Layer, y: Tensor) -> Tensor:
            query, key, value = layer.query_key_value(y)
            keys, values = self.keys[number], self.values[number]
            query, key, value = (part.view(count, -1, network.head_size) for part in (query, key, value))
            if self.use_kernels:
                norms = (layer.query_norm, layer.key_norm) if layer.query_norm and layer.key_norm else None
                return decode_step.attend(
                    query, key, value, keys, values, length, finished,
                    scale=network.attention_scale, window=layer.window, norms=norms,
                    rotation=(rotation.cosines, rotation.sines) if rotation and layer.is_rotary else None,
                    **attention_tiles(count, network),
                )  # fmt: skip
            query, key = positioned(layer, query, key, rotation)
            query = _rescaled(network, query)
            keys[slots, :, length] = key
            values[slots, :, length] = value
            return _attend(query, keys[:count], values[:count], biases[layer.window]).view(count, -1)

        hidden = _run_layers(network, embed(network, state.token[:count], length), attend, *self._kernels)
        logits = _logits(network, hidden)
        if self.use_kernels and self.sampling.is_plain:
            decode_step.sample(
                logits, state.uniforms, state.row, state.token, state.length, state.step, state.finished,
                state.tokens, state.log_probs,
                temperature=self.sampling.temperature, greedy=self.sampling.is_greedy, stop_ids=self.stop_ids,
            )  # fmt: skip
        else:
            state.record(slice(0, count), logits, self.sampling, self.stop_ids)

    def _bias(self, length: Tensor, width: int, window: int | None) -> Tensor:
        """Return (n, 1, 1, width): -inf for what the new token, at `length` (n,), does not see."""
        places, at = torch.arange(width, device=self.device), length[:, None]
        unseen = places > at
        if window is not None:
            unseen |= places <= at - window
        bias = torch.zeros(unseen.shape, dtype=self.keys.dtype, device=self.device)
        return bias.masked_fill_(unseen, -torch.inf)[:, None, None]

    # --- slots ---

    def compact(self, source: Sequence[int], target: Sequence[int], width: int) -> None:
        """Move the answers in the slots `source` to the free slots `target`.

        None holds more than `width` tokens.
        """
        old, new = (self._sent(places) for places in (source, target))
        for cache in (self.keys, self.values):
            for layer in cache:
                layer[new, :, :width] = layer[old, :, :width]
        self.state.move(old, new)


def attention_tiles(count: int, network: Network) -> dict[str, int]:
    """Return tokens a tile, warps, stages and parts for `decode_step.attend`.

    Measured on an H200, with OPT's heads of 64: with many slots, one warp reads at the copy
    bandwidth; few slots need more warps and stages in flight. A tile of wider heads has as many
    numbers, or registers would overflow. Heads that share keys leave fewer programs, so several
    programs share a slot's tokens, until there are PROGRAMS.
    """
    if network.groups == 1:
        block = max(16, 4096 // network.head_size)
        return {"block": block, "warps": 1, "stages": 1} if count > 32 else {"block": block, "warps": 2, "stages": 3}
    parts = 1
    while parts < 8 and count * network.key_heads * parts < PROGRAMS:
        parts *= 2
    return {"block": 64, "warps": 4, "stages": 3, "parts": parts}


@dataclass(frozen=True)
class Rotation:
    """How queries and keys are rotated: Su et al. 2021, arXiv:2104.09864.

    Numbers d and d + D / 2 of a head are a pair. (n, 1, D) each, in the model's dtype, for n
    positions; the sines of the first half are negative.
    """

    cosines: Tensor
    sines: Tensor

    @classmethod
    def of(cls, network: Network, width: int) -> Rotation | None:
        """Return the rotation at positions 0 to width - 1, computed in float32 as models do."""
        if network.frequencies is None:
            return None
        weights = network.token_embedding
        places = torch.arange(width, dtype=torch.float32, device=weights.device)
        angles = places[:, None, None] * network.frequencies.float().to(weights.device)
        cosine, sine = (part * network.rotation_scale for part in (angles.cos(), angles.sin()))
        cosines, sines = torch.cat([cosine, cosine], -1), torch.cat([-sine, sine], -1)
        return cls(cosines.to(weights.dtype), sines.to(weights.dtype))

    def at(self, positions: Tensor) -> Rotation:
        return Rotation(self.cosines[positions], self.sines[positions])

    def __call__(self, x: Tensor) -> Tensor:
        """Rotate x (..., n, H, D)."""
        first, second = x.chunk(2, dim=-1)
        return x * self.cosines + torch.cat([second, first], -1) * self.sines


def positioned(layer: Layer, query: Tensor, key: Tensor, rotation: Rotation | None) -> tuple[Tensor, Tensor]:
    """Norm and rotate queries (..., n, H, D) and keys (..., n, K, D), as the layer does."""
    if layer.query_norm is not None and layer.key_norm is not None:
        query, key = layer.query_norm(query), layer.key_norm(key)
    if layer.is_rotary and rotation is not None:
        query, key = rotation(query), rotation(key)
    return query, key


def _rescaled(network: Network, query: Tensor) -> Tensor:
    """Scale queries for attention that divides scores by the root of D, as PyTorch 2.0's does."""
    scale = network.attention_scale * network.head_size**0.5
    return query if abs(scale - 1) < 1e-6 else query * scale


def embed(network: Network, ids: Tensor, positions: Tensor) -> Tensor:
    """Embed tokens at their positions. ids, positions: (n,), from 0. Returns (n, d)."""
    x = F.embedding(ids, network.token_embedding)
    if network.embedding_scale != 1.0:
        x = x * network.embedding_scale
    if network.project_in is not None:
        x = network.project_in(x)
    if network.position_embedding is not None:
        x = x + F.embedding(positions + network.position_offset, network.position_embedding)
    return x


def _add_norm(x: Tensor, residual: Tensor | None, norm: Norm) -> tuple[Tensor, Tensor]:
    """Return the sum and its norm; the slow twin of `decode_step.add_norm`."""
    total = x if residual is None else x + residual
    return total, norm(total)


def _silu_times(gate: Tensor, up: Tensor) -> Tensor:
    """Return silu(gate) times up; the slow twin of `decode_step.silu_times`."""
    return F.silu(gate).mul_(up)


def _attend_to_prompts(query: Tensor, key: Tensor, value: Tensor, window: int | None) -> Tensor:
    """Attend causally. query: (n, H, W, D); key, value: (n, K, W, D). Returns (n, H, W, D)."""
    width, groups = query.shape[2], query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    if window is None or window >= width:
        return F.scaled_dot_product_attention(query, key, value, is_causal=True)
    seen = torch.ones(width, width, dtype=torch.bool, device=query.device).tril().triu(1 - window)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=seen)


def _attend(query: Tensor, keys: Tensor, values: Tensor, bias: Tensor) -> Tensor:
    """Attend with one query a slot and head; the slow twin of `decode_step.attend`.

    Heads that share a head of keys are rows of one product, so keys are not repeated. query: (n, H,
    D); keys, values: (n, K, T, D); bias: (n, 1, 1, W), W <= T. Returns (n, H, D).
    """
    width, heads = bias.shape[-1], keys.shape[1]
    grouped = query.unflatten(1, (heads, -1))
    if query.dtype == torch.float32 and not query.is_cuda:
        return _attend_on_cpu(grouped, keys, values, bias).view(query.shape)
    out = F.scaled_dot_product_attention(grouped, keys[:, :, :width], values[:, :, :width], attn_mask=bias)
    return out.reshape(query.shape)


def _attend_on_cpu(query: Tensor, keys: Tensor, values: Tensor, bias: Tensor) -> Tensor:
    """Attend as `_attend` does, with one batched product on a CPU. query: (n, K, H / K, D).

    SDPA starts a product for each slot and head there: 64 slots and 8 heads of 100 tokens took 2.0
    ms by SDPA, and 1.5 ms in this way.
    """
    count, heads, groups, size = query.shape
    width = bias.shape[-1]
    scaled = (query * size**-0.5).view(count * heads, groups, size)
    scores = torch.bmm(scaled, keys.flatten(0, 1)[:, :width].transpose(1, 2)).view(count, heads, groups, width)
    weights = scores.add_(bias).softmax(-1).view(count * heads, groups, width)
    return torch.bmm(weights, values.flatten(0, 1)[:, :width])


def _run_layers(
    network: Network,
    x: Tensor,
    attend: Callable[[int, Layer, Tensor], Tensor],
    add_norm: Callable[[Tensor, Tensor | None, Norm], tuple[Tensor, Tensor]],
    silu_times: Callable[[Tensor, Tensor], Tensor],
    wanted: Tensor | None = None,
) -> Tensor:
    """Run all layers over embedded tokens x: (n, d).

    Returns (n, d), normed as the family does; or (m, d), of the tokens `wanted` (m,) alone.
    """
    x, y = add_norm(x, None, network.first_norm) if network.first_norm is not None else (x, x)
    for number, layer in enumerate(network.layers):
        seen = attend(number, layer, y)
        # Of all other tokens only keys and values were needed.
        if wanted is not None and layer is network.layers[-1]:
            x, seen = x[wanted], seen[wanted]
        x, y = add_norm(x, _share(network, layer.output(seen)), layer.after_attention)
        if not network.norm_first:
            x = y
        grown = _share(network, _feed_forward(layer, y, silu_times))
        x, y = add_norm(x, grown, layer.after_mlp) if layer.after_mlp is not None else (x + grown, x + grown)
        if not network.norm_first:
            x = y
    return y


def _share(network: Network, part: Tensor) -> Tensor:
    return part if network.residual_scale == 1.0 else part * network.residual_scale


def _feed_forward(layer: Layer, y: Tensor, silu_times: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    if layer.gate is not None:
        return layer.down(silu_times(*layer.gate_and_up(y)))
    if layer.up.adapter is None:
        return layer.down(fused_layers.linear_relu(y, layer.up.weight, layer.up.bias))
    return layer.down(F.relu(layer.up(y)))


def _logits(network: Network, hidden: Tensor) -> Tensor:
    logits = network.head(network.project_out(hidden) if network.project_out is not None else hidden)
    if network.logit_scale != 1.0:
        logits = logits.float() * network.logit_scale
    if network.tokens is not None:
        logits[:, network.tokens :] = NEVER
    return logits
