"""Sample answers by one interface, `Rollouts.generate`, for every model.

Randomness belongs to the row: the uniforms behind a response depend on (seed, row id) alone and are
drawn before the loop, and each token is the inverse of the distribution at its uniform. So any
number of ranks, any batch and a second try sample the same answers.

The static decoder generates for the model families in rlhf_train/generation/families. Any other
model generates by its own forward with a KV cache. Tests compare the decoder with that.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from jobs.errors import ExitCode, ToolkitError
from rlhf_train import compat
from rlhf_train.generation.decoder import Decoder, Sampling, draw
from rlhf_train.generation.families.known import read_network
from rlhf_train.generation.families.tensors import UnknownModel
from rlhf_train.kernels.decoder_weights import Network
from rlhf_train.models.head import transform_of

# Decode steps between two looks at which answers are finished. They keep the GPU busy while the
# host lags behind.
STEPS = {"cuda": 8, "cpu": 1}
SPARE_BYTES = 2**30  # GPU memory for what a rollout needs besides its cache
WIDTHS = 64  # the cache's width is a multiple of this, so that it is seldom allocated again


@dataclass(frozen=True)
class Responses:
    """The responses sampled for n prompts."""

    tokens: list[np.ndarray]  # n arrays; they include the stop token if one was sampled
    log_probs: list[np.ndarray]  # of the same lengths
    ended: np.ndarray  # (n,) bool: with a stop token, not by the length limit

    @property
    def lengths(self) -> np.ndarray:
        return np.array([len(t) for t in self.tokens], dtype=np.int64)


def draw_uniforms(seed: int, row_ids: Sequence[int], count: int) -> Tensor:
    """Draw (n, count) uniforms in [0, 1): row i depends on (seed, row_ids[i]) alone."""
    uniforms = np.empty((len(row_ids), count))
    for place, row in enumerate(row_ids):
        uniforms[place] = np.random.Generator(np.random.Philox(key=[seed, row])).random(count)
    return torch.from_numpy(uniforms)


class Rollouts:
    """Samples answers with the model's weights as they are at each call."""

    def __init__(
        self,
        model: Any,
        *,
        stop_ids: Collection[int],
        pad_id: int,
        max_tokens: int,
        temperature: float,
        batch: int,
        device: torch.device,
        top_k: int | None = None,
        top_p: float | None = None,
        max_prompt_tokens: int = 0,
        is_static: bool = True,
        beat: Callable[[], object] = lambda: None,
        is_asked_to_stop: Callable[[], bool] = lambda: False,
        warn: Callable[[str], object] = lambda message: None,
    ) -> None:
        """Prepare rollouts of `model`.

        stop_ids: tokens of which any ends an answer; at least one.
        batch: concurrent prompts, at most. They are fewer if the GPU has no free memory for more,
        and stay halved after it runs out.
        max_prompt_tokens: the first cache has room for prompts of this length, even if the first
        call's prompts are shorter.
        is_static: false: generate by the model's own forward.
        beat: called before each token, or each few.
        is_asked_to_stop: once it returns true, generation stops, and the answers have no meaning.
        """
        self.model, self.pad_id, self.sampling = model, pad_id, Sampling(temperature, top_k, top_p)
        self.stop_ids = np.array(sorted(stop_ids))
        self._beat, self._is_asked_to_stop, self._warn = beat, is_asked_to_stop, warn
        self.max_tokens, self.batch, self.device, self._longest = max_tokens, batch, device, max_prompt_tokens
        self._decoder: Decoder | None = None
        self._room = batch  # prompts whose cache fits into the GPU's free memory
        # GPU memory that training needs at its peak and does not hold between two updates.
        self._training_bytes: int | None = None
        self._wants_positions = compat.takes_position_ids(model.base_model)
        self.is_static = False
        if is_static:
            try:
                read_network(model)
                self.is_static = True
            except UnknownModel as reason:
                self._warn_of_own_forward(str(reason))

    def _warn_of_own_forward(self, reason: str) -> None:
        name = type(self.model).__name__
        self._warn(f"rollouts of {name} run by its own forward, which is slower than the static decoder: {reason}")

    @torch.no_grad()
    def generate(
        self, prompts: Sequence[np.ndarray], *, seed: int, row_ids: Sequence[int], by_own_forward: bool = False
    ) -> Responses:
        """Sample one response a prompt, in order; prompts of like length are generated together.

        by_own_forward: generate so even if there is a static decoder. Its cache is freed first.
        """
        if not prompts:  # a rank may have none
            return Responses([], [], np.zeros(0, bool))
        uniforms = draw_uniforms(seed, row_ids, self.max_tokens)
        order = np.argsort([len(p) for p in prompts], kind="stable")
        if by_own_forward and self._decoder is not None:
            self._decoder = None
            compat.free_gpu_memory()
        is_static = self.is_static and not by_own_forward and self._fits(prompts)
        generate = self._generate_static if is_static else self._generate_eagerly
        made, scored = self._fitting(lambda: generate([prompts[i] for i in order], uniforms[order]), len(prompts))
        tokens: list[np.ndarray] = [np.empty(0)] * len(prompts)
        log_probs, ended = list(tokens), np.zeros(len(prompts), bool)
        for place, row in enumerate(order):
            stop = np.flatnonzero(np.isin(made[place], self.stop_ids))
            ended[row] = len(stop) > 0
            length = int(stop[0]) + 1 if len(stop) else made.shape[1]
            tokens[row], log_probs[row] = made[place, :length], scored[place, :length]
        return Responses(tokens, log_probs, ended)

    def _fits(self, prompts: Sequence[np.ndarray]) -> bool:
        """Return whether the static decoder knows the rotation of all positions that come up."""
        most, longest = read_network(self.model).most_tokens, max(map(len, prompts)) + self.max_tokens
        if most is None or longest <= most:
            return True
        self._warn_of_own_forward(f"with {longest} tokens its rotary positions are scaled by their number")
        return False

    def _fitting(
        self, generate: Callable[[], tuple[np.ndarray, np.ndarray]], prompts: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Call `generate` again with half as many concurrent prompts until they fit into memory.

        Raises ToolkitError if not even one does.
        """
        while True:
            try:
                return generate()
            except Exception as error:
                if not compat.is_out_of_memory(error):
                    raise
                if min(self.batch, self._room, prompts) == 1:
                    raise ToolkitError(
                        "out of memory in a rollout with one prompt at a time",
                        why=str(error).splitlines()[0],
                        hint="actor.lora, a smaller critic.model, or ZeRO 3 on more GPUs leave more room; "
                        "a smaller data.max_response_tokens needs less",
                        exit_code=ExitCode.TRAINING,
                    ) from None
            # After the handler, whose traceback keeps the tensors alive.
            self._decoder = None
            self.batch = max(1, min(self.batch, self._room, prompts) // 2)
            compat.free_gpu_memory()

    # --- the static decoder ---

    def _generate_static(self, prompts: list[np.ndarray], uniforms: Tensor) -> tuple[np.ndarray, np.ndarray]:
        """Return tokens and log-probs (n, max_tokens), in the order of the prompts.

        What follows a row's stop token has no meaning.
        """
        decoder = self._decoder_for(prompts)
        decoder.begin(uniforms)
        decoder.state.tokens.fill_(self.stop_ids[0])
        on_gpu, most_steps = self.device.type == "cuda", STEPS[self.device.type]
        waiting = list(range(len(prompts)))
        slots = Slots(min(decoder.slots, len(prompts)), self.max_tokens)
        looks = FinishedSlots(decoder.state.finished)
        while (waiting or slots.live) and not self._is_asked_to_stop():
            self._beat()
            if waiting and (len(slots.free) >= max(1, slots.count // 8) or not slots.live):
                taken, rows = slots.free[: len(waiting)], waiting[: len(slots.free)]
                waiting = waiting[len(taken) :]
                decoder.prefill(taken, rows, [prompts[row] for row in rows])
                slots.take(taken, [len(prompts[row]) for row in rows], looks.made)
            elif not waiting and (fewer := fewer_slots(len(slots.live), slots.count, on_gpu)) < slots.count:
                source, target = slots.shrink(fewer, looks.made)
                if source:
                    decoder.compact(source, target, slots.width)
            steps = min(most_steps, slots.longest_left)
            if steps:
                decoder.advance(slots.count, slots.grow(steps), steps)
            slots.release(*looks.check(slots.count))
        results = (decoder.state.tokens, decoder.state.log_probs)
        tokens, log_probs = (result[: len(prompts), : self.max_tokens].cpu().numpy().copy() for result in results)
        return tokens, log_probs

    def _decoder_for(self, prompts: list[np.ndarray]) -> Decoder:
        """Return the last decoder, or a new one if it is too small or the model's tensors moved."""
        network: Network = read_network(self.model)
        width = -(-(max(self._longest, *map(len, prompts)) + self.max_tokens) // WIDTHS) * WIDTHS
        slots, rows = min(self.batch, self._room, len(prompts)), len(prompts)
        last, self._decoder = self._decoder, None
        if last is not None:
            if last.reads(network) and last.width >= width and last.slots >= slots and last.rows >= rows:
                self._decoder = last
                return last
            width, slots, rows = max(width, last.width), max(slots, last.slots), max(rows, last.rows)
            del last
            compat.free_gpu_memory()
        if self.device.type == "cuda":
            if self._training_bytes is None:  # before the first cache
                peak_bytes = torch.cuda.max_memory_allocated(self.device)
                self._training_bytes = peak_bytes - torch.cuda.memory_allocated(self.device)
            slot_bytes = 2 * len(network.layers) * network.key_width * width * network.token_embedding.element_size()
            self._room = max(1, (_free_bytes(self.device) - self._training_bytes) // slot_bytes)
            if self._room < slots:
                self._warn(
                    f"the GPU has free memory for {self._room} concurrent answers, not for {slots}: rollouts are slower"
                )
                slots = self._room
        self._decoder = Decoder(
            network,
            slots=slots,
            width=width,
            rows=rows,
            limit=self.max_tokens,
            sampling=self.sampling,
            stop_ids=self.stop_ids.tolist(),
            warn=self._warn,
        )
        return self._decoder

    # --- the model's own forward ---

    def _generate_eagerly(self, prompts: list[np.ndarray], uniforms: Tensor) -> tuple[np.ndarray, np.ndarray]:
        """Return what `_generate_static` does, by the model's own forward, batch after batch."""
        tokens = np.full((len(prompts), self.max_tokens), self.stop_ids[0])
        log_probs = np.zeros((len(prompts), self.max_tokens), dtype=np.float32)
        was_training = self.model.training
        self.model.eval()  # gradient checkpointing would drop the cache
        try:
            for first in range(0, len(prompts), self.batch):
                if self._is_asked_to_stop():
                    break
                rows = slice(first, first + self.batch)
                made, scored = self._generate_batch(prompts[rows], uniforms[rows])
                tokens[rows, : made.shape[1]], log_probs[rows, : made.shape[1]] = made, scored
        finally:
            self.model.train(was_training)
        return tokens, log_probs

    def _generate_batch(self, prompts: list[np.ndarray], uniforms: Tensor) -> tuple[np.ndarray, np.ndarray]:
        """Return tokens and log-probs (n, <= max_tokens) of one batch.

        Prompts are padded on the left; finished rows leave the batch.
        """
        lengths = np.array([len(p) for p in prompts])
        width = int(lengths.max())
        ids = np.full((len(prompts), width), self.pad_id, dtype=np.int64)
        for row, prompt in enumerate(prompts):
            ids[row, width - len(prompt) :] = prompt
        is_real = np.arange(width) >= width - lengths[:, None]
        mask = torch.from_numpy(is_real.astype(np.int64)).to(self.device)
        inputs, uniforms = torch.from_numpy(ids).to(self.device), uniforms.to(self.device)
        positions = (mask.cumsum(1) - 1).clamp(min=0)

        tokens = torch.full((len(prompts), self.max_tokens), int(self.stop_ids[0]), device=self.device)
        log_probs = torch.zeros(len(prompts), self.max_tokens, device=self.device)
        live, cache = torch.arange(len(prompts), device=self.device), None
        stop_ids = torch.from_numpy(self.stop_ids).to(self.device)
        unfinished = torch.ones(len(prompts), dtype=torch.bool, device=self.device)
        for t in range(self.max_tokens):
            self._beat()
            if self._is_asked_to_stop():
                break
            extra = {"position_ids": positions} if self._wants_positions else {}
            out = self.model.base_model(
                input_ids=inputs, attention_mask=mask, past_key_values=cache, use_cache=True, **extra
            )
            cache = out.past_key_values
            raw = self.model.get_output_embeddings()(out.last_hidden_state[:, -1])
            logits = transform_of(self.model)(raw.float())
            token, log_prob = draw(logits, uniforms[live, t], self.sampling)
            tokens[live, t], log_probs[live, t] = token, log_prob
            unfinished &= (token[:, None] != stop_ids).all(1)
            left = int(unfinished.sum())
            if left == 0:
                return tokens[:, : t + 1].cpu().numpy(), log_probs[:, : t + 1].cpu().numpy()
            if left <= 0.75 * len(live):
                rows = unfinished.nonzero().squeeze(1)
                cache = compat.keep_rows(cache, rows)
                live, token, mask, positions = live[rows], token[rows], mask[rows], positions[rows]
                unfinished = unfinished[rows]
            inputs = token.unsqueeze(1)
            mask = torch.cat([mask, mask.new_ones(len(live), 1)], dim=1)
            positions = positions[:, -1:] + 1
        return tokens.cpu().numpy(), log_probs.cpu().numpy()


def _free_bytes(device: torch.device) -> int:
    """Return the GPU memory that no tensor holds, less what is always left free."""
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device) - SPARE_BYTES


def fewer_slots(live: int, count: int, on_gpu: bool) -> int:
    """Return how many slots the next decode steps keep.

    On a GPU it is one of few sizes, 1 or 1.5 times a power of two: each size has a CUDA graph.
    """
    if not on_gpu:
        return max(1, live) if live <= 0.75 * count else count
    sizes = sorted(size for power in (8, 16, 32, 64, 128, 256, 512) for size in (power, power * 3 // 2))
    return min([size for size in sizes if size >= live] + [count])


class Slots:
    """The host's view of the decoder's first `count` slots: free or not, their lengths at most."""

    def __init__(self, count: int, limit: int) -> None:
        self.count, self._limit = count, limit
        self._length = [0] * count  # tokens in the cache at most; 0: free
        self._left = [0] * count  # tokens that may still come
        self._since = [0] * count  # the first look that can tell about this answer

    @property
    def free(self) -> list[int]:
        return [slot for slot in range(self.count) if not self._length[slot]]

    @property
    def live(self) -> list[int]:
        return [slot for slot in range(self.count) if self._length[slot]]

    @property
    def width(self) -> int:
        return max(self._length[: self.count])

    @property
    def longest_left(self) -> int:
        return max(self._left[: self.count])

    def take(self, slots: Sequence[int], lengths: Sequence[int], looks: int) -> None:
        """Note that prompts of these lengths were fed, and each answer's first token sampled."""
        for slot, length in zip(slots, lengths, strict=True):
            self._length[slot], self._left[slot], self._since[slot] = length, self._limit - 1, looks
            if self._limit == 1:
                self._length[slot] = 0

    def grow(self, steps: int) -> int:
        """Note `steps` more tokens in each slot, and return the width that these steps need.

        A slot becomes free when its answer reaches the length limit.
        """
        width = 0
        for slot in self.live:
            fed = min(steps, self._left[slot])
            width = max(width, self._length[slot] + fed)
            self._length[slot] = self._length[slot] + fed if fed < self._left[slot] else 0
            self._left[slot] -= fed
        return width

    def shrink(self, count: int, looks: int) -> tuple[list[int], list[int]]:
        """Move answers beyond `count` to free slots below it, and return (source, target)."""
        source, target = [slot for slot in self.live if slot >= count], [slot for slot in self.free if slot < count]
        target = target[: len(source)]
        for old, new in zip(source, target, strict=True):
            self._length[new], self._left[new], self._since[new] = self._length[old], self._left[old], looks
        self.count = count
        return source, target

    def release(self, look: int, finished: Sequence[bool]) -> None:
        """Free the slots that look number `look` found finished."""
        for slot, is_finished in enumerate(finished[: self.count]):
            if is_finished and self._length[slot] and look >= self._since[slot]:
                self._length[slot] = self._left[slot] = 0


class FinishedSlots:
    """Tells which slots are finished, without waiting for the GPU.

    Each look starts a copy to the host, and returns the result of the look before.
    """

    def __init__(self, finished: Tensor) -> None:
        self._finished, self.made = finished, 0
        self._asked: list[tuple[int, Tensor, Any]] = []

    def check(self, count: int) -> tuple[int, list[bool]]:
        """Look again, and return (number of the answered look, finished by slot)."""
        if self._finished.is_cuda:
            answer = torch.empty(len(self._finished), dtype=self._finished.dtype, pin_memory=True)
            answer[:count].copy_(self._finished[:count], non_blocking=True)
            answer[count:] = 0
            event = torch.cuda.Event()
            event.record()
        else:
            answer, event = self._finished[:count], None
        self._asked.append((self.made, answer, event))
        self.made += 1
        if event is None:
            number, answer, _ = self._asked.pop()
        elif len(self._asked) < 2:
            return -1, []
        else:
            number, answer, event = self._asked.pop(0)
            event.synchronize()
        return number, answer.bool().tolist()
