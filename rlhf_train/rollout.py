"""Sampling answers: one interface, `Rollouts.generate`, whatever the model.

Randomness belongs to the row: the uniform numbers behind a response are a function of (seed, row id) and made before
the loop, and each token is the inverse of the distribution at its number. So other ranks, batches and a second try
sample the same answers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from jobs.errors import ExitCode, ToolkitError
from rlhf_train import compat


@dataclass(frozen=True)
class Responses:
    """What was sampled for n prompts. tokens: n arrays, EOS included where it came; log_probs: the same lengths."""

    tokens: list[np.ndarray]
    log_probs: list[np.ndarray]
    ended: np.ndarray  # (n,) bool: by itself, with an EOS

    @property
    def lengths(self) -> np.ndarray:
        return np.array([len(t) for t in self.tokens], dtype=np.int64)


def uniforms(seed: int, row_ids: Sequence[int], count: int) -> Tensor:
    """(n, count) in [0, 1): row i depends on (seed, row_ids[i]) alone."""
    numbers = np.empty((len(row_ids), count))
    for place, row in enumerate(row_ids):
        numbers[place] = np.random.Generator(np.random.Philox(key=[seed, row])).random(count)
    return torch.from_numpy(numbers)


def sample(logits: Tensor, uniform: Tensor) -> Tensor:
    """Inverse transform sampling: the first token whose cumulative probability exceeds the number.

    logits: (B, V); uniform: (B,) in [0, 1). Returns (B,).
    """
    cumulative = logits.float().softmax(-1).double().cumsum(-1)
    token = torch.searchsorted(cumulative, (uniform * cumulative[:, -1]).unsqueeze(1), right=True).squeeze(1)
    return token.clamp(max=logits.shape[1] - 1)


class Rollouts:
    """Generates with `model` as it stands at each call; eager, with a key-value cache, rows leaving as they end."""

    def __init__(
        self,
        model: Any,
        *,
        eos_id: int,
        pad_id: int,
        max_tokens: int,
        temperature: float,
        batch: int,
        device: torch.device,
        beat: Callable[[], object] = lambda: None,
        is_asked_to_stop: Callable[[], bool] = lambda: False,
    ) -> None:
        """batch: prompts at once, at most; halved for good when the GPU has no memory for them. beat: called before each token.

        is_asked_to_stop: once true, what is left is not generated: the answers have no meaning then.
        """
        self.model, self.eos_id, self.pad_id = model, eos_id, pad_id
        self._beat, self._is_asked_to_stop = beat, is_asked_to_stop
        self.max_tokens, self.temperature, self.batch, self.device = max_tokens, temperature, batch, device
        self._wants_positions = compat.takes_position_ids(model.base_model)

    @torch.no_grad()
    def generate(self, prompts: Sequence[np.ndarray], *, seed: int, row_ids: Sequence[int]) -> Responses:
        """One response a prompt, in their order. Prompts of like length are generated together."""
        numbers = uniforms(seed, row_ids, self.max_tokens)
        tokens: list[np.ndarray] = [np.empty(0)] * len(prompts)
        log_probs, ended = list(tokens), np.zeros(len(prompts), bool)
        order = np.argsort([len(p) for p in prompts], kind="stable")
        was_training = self.model.training
        self.model.eval()  # gradient checkpointing would drop the cache
        done = 0
        while done < len(order) and not self._is_asked_to_stop():
            rows = order[done : done + self.batch]
            made, scored = self._fitting([prompts[i] for i in rows], numbers[rows])
            rows = rows[: len(made)]
            done += len(rows)
            for place, row in enumerate(rows):
                stop = np.flatnonzero(made[place] == self.eos_id)
                ended[row] = len(stop) > 0
                length = int(stop[0]) + 1 if len(stop) else made.shape[1]
                tokens[row], log_probs[row] = made[place, :length], scored[place, :length]
        self.model.train(was_training)
        return Responses(tokens, log_probs, ended)

    def _fitting(self, prompts: list[np.ndarray], numbers: Tensor) -> tuple[np.ndarray, np.ndarray]:
        """`_generate` of as many as fit into memory. Raises ToolkitError if not one does."""
        while True:
            try:
                return self._generate(prompts[: self.batch], numbers[: self.batch])
            except Exception as error:
                if not compat.is_out_of_memory(error):
                    raise
                if min(self.batch, len(prompts)) == 1:
                    raise ToolkitError(
                        "out of memory in a rollout with one prompt at once",
                        why=str(error).splitlines()[0],
                        hint="actor.lora, a smaller critic.model, or ZeRO 3 on more GPUs leave more room; shorter data.max_response_tokens need less",
                        code=ExitCode.TRAINING,
                    ) from None
            # Not in the handler, whose traceback holds on to the tensors.
            self.batch = max(1, min(self.batch, len(prompts)) // 2)
            compat.free_gpu_memory()

    def _generate(self, prompts: list[np.ndarray], numbers: Tensor) -> tuple[np.ndarray, np.ndarray]:
        """-> tokens and log-probs (n, <= max_tokens); what follows a row's EOS has no meaning."""
        width = max(len(p) for p in prompts)
        ids = np.full((len(prompts), width), self.pad_id, dtype=np.int64)
        for row, prompt in enumerate(prompts):
            ids[row, width - len(prompt) :] = prompt
        mask = torch.from_numpy((np.arange(width) >= width - np.array([len(p) for p in prompts])[:, None]).astype(np.int64)).to(self.device)
        inputs, numbers = torch.from_numpy(ids).to(self.device), numbers.to(self.device)
        positions = (mask.cumsum(1) - 1).clamp(min=0)

        tokens = torch.full((len(prompts), self.max_tokens), self.eos_id, device=self.device)
        log_probs = torch.zeros(len(prompts), self.max_tokens, device=self.device)
        live, cache = torch.arange(len(prompts), device=self.device), None
        unfinished = torch.ones(len(prompts), dtype=torch.bool, device=self.device)
        for t in range(self.max_tokens):
            self._beat()
            if self._is_asked_to_stop():
                break
            extra = {"position_ids": positions} if self._wants_positions else {}
            out = self.model.base_model(input_ids=inputs, attention_mask=mask, past_key_values=cache, use_cache=True, **extra)
            cache = out.past_key_values
            logits = self.model.get_output_embeddings()(out.last_hidden_state[:, -1]).float() / self.temperature
            token = sample(logits, numbers[live, t])
            tokens[live, t] = token
            log_probs[live, t] = logits.log_softmax(-1).gather(1, token.unsqueeze(1)).squeeze(1)
            unfinished &= token != self.eos_id
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
