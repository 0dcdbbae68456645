"""One rollout as PPO sees it: the sampled sequences, what the four networks say of them, and what to learn from it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from jobs.spec import Ppo
from rlhf_train.batch import Sequences
from rlhf_train.losses import gae, kl_penalised_rewards, whiten
from rlhf_train.models import last_scores

RAGGED = ("prompts", "responses")
PLAIN = ("mask", "old_log_probs", "ref_log_probs", "values", "advantages", "returns", "scores", "ended", "entropy")


@dataclass(frozen=True)
class Scored:
    """One response with the networks' numbers for each of its tokens, before any update. All arrays: (tokens,)."""

    prompt: np.ndarray
    response: np.ndarray
    ended: bool
    rollout_log_probs: np.ndarray  # as the rollout saw them
    log_probs: np.ndarray  # as the trainer's forward sees them: PPO's old log-probs
    ref_log_probs: np.ndarray
    values: np.ndarray
    entropy: float  # mean over tokens
    score: float  # the reward model's, normalised


@dataclass(frozen=True)
class Experience:
    """A whole rollout, rows of all ranks in the order of the prompts. (B, R) tensors on the CPU, zero outside the mask."""

    prompts: list[np.ndarray]
    responses: list[np.ndarray]
    mask: Tensor
    old_log_probs: Tensor
    ref_log_probs: Tensor
    values: Tensor
    advantages: Tensor
    returns: Tensor
    scores: Tensor  # (B,)
    ended: Tensor  # (B,)
    entropy: Tensor  # (B,)

    @classmethod
    def of(cls, rows: Sequence[Scored], spec: Ppo, kl_coef: float) -> Experience:
        """Rewards, advantages and returns from the networks' numbers. Whitening sees the rows of all ranks."""
        width = max(len(row.response) for row in rows)
        mask = torch.tensor([[t < len(row.response) for t in range(width)] for row in rows])
        old, ref, values = (_padded([getattr(row, name) for row in rows], width) for name in ("log_probs", "ref_log_probs", "values"))
        scores = torch.tensor([row.score for row in rows])
        ended = torch.tensor([row.ended for row in rows])
        judged = scores - spec.missing_eos_penalty * ~ended
        rewards = kl_penalised_rewards(old, ref, judged, mask, kl_coef=kl_coef, reward_clip=spec.reward_clip)
        if spec.whiten_rewards:
            rewards = whiten(rewards, mask, keep_mean=True)
        advantages, returns = gae(rewards, values, mask, gamma=spec.gamma, lam=spec.lam)
        if spec.whiten_advantages:
            advantages = whiten(advantages, mask, keep_mean=False)
        return cls(
            [row.prompt for row in rows],
            [row.response for row in rows],
            mask,
            old,
            ref,
            values,
            advantages,
            returns,
            scores,
            ended,
            torch.tensor([row.entropy for row in rows]),
        )

    def tensors(self) -> dict[str, Tensor]:
        """All of it, for a checkpoint: prompts and responses one after the other, with their lengths."""
        plain = {name: getattr(self, name) for name in PLAIN}
        ragged = {name: torch.from_numpy(np.concatenate(getattr(self, name)).astype(np.int64)) for name in RAGGED}
        lengths = {f"{name}_lengths": torch.tensor([len(row) for row in getattr(self, name)]) for name in RAGGED}
        return plain | ragged | lengths

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Experience:
        rows: dict[str, Any] = {name: np.split(tensors[name].numpy(), np.cumsum(tensors[f"{name}_lengths"].numpy())[:-1]) for name in RAGGED}
        return cls(**rows | {name: tensors[name] for name in PLAIN})

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of prompt and response together, (B,)."""
        return np.array([len(p) + len(r) for p, r in zip(self.prompts, self.responses, strict=True)])

    @property
    def kl(self) -> Tensor:
        """To the reference, (B,): sum of log pi - log pi_ref over each response (the k1 estimate), in nats."""
        return ((self.old_log_probs - self.ref_log_probs) * self.mask).sum(1)

    def cut(self, rows: np.ndarray, pad_id: int, device: torch.device) -> tuple[Sequences, Tensor, dict[str, Tensor]]:
        """One micro batch: the sequences, their mask (B, R), and what the losses need of them."""
        batch = Sequences.of([self.prompts[i] for i in rows], [self.responses[i] for i in rows], pad_id, device)
        mask = batch.response_mask()
        chosen = torch.from_numpy(rows)
        names = ("old_log_probs", "values", "advantages", "returns")
        return batch, mask, {name: getattr(self, name)[chosen, : mask.shape[1]].to(device) for name in names}


def _padded(rows: Sequence[np.ndarray], width: int) -> Tensor:
    out = np.zeros((len(rows), width), dtype=np.float32)
    for row, values in enumerate(rows):
        out[row, : len(values)] = values
    return torch.from_numpy(out)


def response_values(token_values: Tensor, batch: Sequences) -> Tensor:
    """The value before each response token, (S,) -> (B, R), zero elsewhere: what the log-probs are read from too."""
    index, _ = batch.predicted()
    return batch.spread(token_values[index])


Forward = Callable[..., tuple[Tensor, Tensor | None]]


@torch.no_grad()
def judge(batch: Sequences, *, reference: Forward, reward_model: Forward, temperature: float) -> dict[str, Tensor]:
    """What the two frozen networks say of one micro batch: (B, R) log-probs of the reference, (B,) scores."""
    ref_log_probs, _ = reference(batch, temperature=temperature)
    return {"ref_log_probs": batch.spread(ref_log_probs), "score": last_scores(reward_model(batch)[0], batch)}


@torch.no_grad()
def trainer_view(batch: Sequences, *, actor: Forward, critic: Forward, temperature: float) -> dict[str, Tensor]:
    """What the two networks in training say of it: (B, R) log-probs and values, (B,) mean entropy per token."""
    log_probs, entropies = actor(batch, temperature=temperature, with_entropy=True)
    assert entropies is not None
    return {
        "log_probs": batch.spread(log_probs),
        "entropy": batch.spread(entropies).sum(1) / batch.response_lengths,
        "values": response_values(critic(batch)[0], batch),
    }
