"""One rollout as PPO sees it: the sampled sequences, what the networks say of them, and what to
learn from it.

On-policy (one update a rollout) the actor and the critic are not asked before they learn: at their
one update the old policy is the policy itself and the old values are the values, so both come out
of the forward pass that is trained on, and the ratio is 1. Only the rewards' KL must be known
before: it is taken from the log-probs of the rollout, which the same weights gave. They differ from
the trainer's by rounding, as the self-test before the first update makes sure; they are those of
the policy that sampled; and a bound on KL can hold before anything is learned.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from jobs.spec import Ppo
from rlhf_train.data.sequences import Sequences, sent
from rlhf_train.ranks.collectives import World
from rlhf_train.steps.losses import gae, kl_penalised_rewards, moments, whiten

RAGGED = ("prompts", "responses")
PLAIN = ("mask", "old_log_probs", "ref_log_probs", "scores", "ended")
TARGETS = ("values", "advantages", "returns")  # what the losses measure against, besides the old log-probs


@dataclass(frozen=True)
class Scored:
    """One response with the networks' numbers for each of its tokens, before any update.

    All arrays: (tokens,).
    """

    prompt: np.ndarray
    response: np.ndarray
    ended: bool
    rollout_log_probs: np.ndarray  # as the rollout saw them
    ref_log_probs: np.ndarray
    score: float  # the reward model's, normalised
    trainer: TrainerView | None = None  # None where the networks in training were not asked


@dataclass(frozen=True)
class TrainerView:
    """What actor and critic say of one response. Arrays: (tokens,)."""

    log_probs: np.ndarray  # as the trainer's forward sees them
    values: np.ndarray
    entropy: float  # mean over tokens


@dataclass(frozen=True)
class Experience:
    """A whole rollout, rows of all ranks in the order of the prompts.

    (B, R) tensors on the CPU, zero outside the mask.
    """

    prompts: list[np.ndarray]
    responses: list[np.ndarray]
    mask: Tensor
    old_log_probs: (
        Tensor  # of the policy that sampled: as the trainer's forward sees them; on-policy as the rollout did
    )
    ref_log_probs: Tensor
    scores: Tensor  # (B,)
    ended: Tensor  # (B,)
    targets: dict[str, Tensor]  # TARGETS; on-policy: `rewards`, from which each pass makes them of its values

    @classmethod
    def of(cls, rows: Sequence[Scored], spec: Ppo, kl_coef: float, *, on_policy: bool) -> Experience:
        """Rewards, and unless on-policy the targets, from the networks' numbers.

        Whitening sees the rows of all ranks.
        """
        lengths = np.array([len(row.response) for row in rows])
        mask = torch.from_numpy(np.arange(lengths.max()) < lengths[:, None])
        old = _padded([row.rollout_log_probs if on_policy else _trainer(row).log_probs for row in rows])
        ref = _padded([row.ref_log_probs for row in rows])
        scores = torch.tensor([row.score for row in rows])
        ended = torch.tensor([row.ended for row in rows])
        judged = scores - spec.missing_eos_penalty * ~ended
        rewards = kl_penalised_rewards(old, ref, judged, mask, kl_coef=kl_coef, reward_clip=spec.reward_clip)
        if spec.whiten_rewards:
            rewards = whiten(rewards, mask, keep_mean=True)
        if on_policy:
            targets = {"rewards": rewards}
        else:
            targets = targets_of(rewards, _padded([_trainer(row).values for row in rows]), mask, spec)
            if spec.whiten_advantages:
                targets["advantages"] = whiten(targets["advantages"], mask, keep_mean=False)
        return cls([row.prompt for row in rows], [row.response for row in rows], mask, old, ref, scores, ended, targets)

    def tensors(self) -> dict[str, Tensor]:
        """All of it, for a checkpoint: prompts and responses one after the other, with their
        lengths.
        """
        plain = {name: getattr(self, name) for name in PLAIN}
        ragged = {name: torch.from_numpy(np.concatenate(getattr(self, name)).astype(np.int64)) for name in RAGGED}
        lengths = {f"{name}_lengths": torch.tensor([len(row) for row in getattr(self, name)]) for name in RAGGED}
        return plain | self.targets | ragged | lengths

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Experience:
        rows: dict[str, Any] = {
            name: np.split(tensors[name].numpy(), np.cumsum(tensors[f"{name}_lengths"].numpy())[:-1]) for name in RAGGED
        }
        return cls(**rows | {name: tensors[name] for name in PLAIN}, targets={name: tensors[name] for name in TARGETS})

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of prompt and response together, (B,)."""
        return np.array([len(p) + len(r) for p, r in zip(self.prompts, self.responses, strict=True)])

    @property
    def kl(self) -> Tensor:
        """To the reference, (B,): sum of log pi - log pi_ref over each response (the k1 estimate),
        in nats.
        """
        return ((self.old_log_probs - self.ref_log_probs) * self.mask).sum(1)

    def make_pass(self, rows: np.ndarray, pad_id: int | None, device: torch.device) -> Pass:
        """One micro batch."""
        batch = Sequences.of([self.prompts[i] for i in rows], [self.responses[i] for i in rows], pad_id, device)
        mask = batch.response_mask()
        chosen = torch.from_numpy(rows)

        def trimmed(numbers: Tensor) -> Tensor:
            return sent(numbers[chosen, : mask.shape[1]], device)

        return Pass(
            batch, mask, trimmed(self.old_log_probs), {name: trimmed(numbers) for name, numbers in self.targets.items()}
        )


@dataclass
class Pass:
    """One micro batch of an update, and what its losses need. All (B, R)."""

    batch: Sequences
    mask: Tensor
    old_log_probs: Tensor
    targets: dict[str, Tensor]  # as Experience has them


def targets_of(rewards: Tensor, values: Tensor, mask: Tensor, spec: Ppo) -> dict[str, Tensor]:
    """TARGETS, (B, R), from rewards and values of the same shape; the advantages are not whitened
    yet.
    """
    advantages, returns = gae(rewards, values, mask, gamma=spec.gamma, lam=spec.lam)
    return {"values": values, "advantages": advantages, "returns": returns}


def whiten_update(passes: Sequence[Pass], world: World) -> None:
    """The advantages of an update's passes, over all of them and all ranks."""
    names = ("count", "sum", "squares")
    local = torch.stack([moments(one.targets["advantages"], one.mask) for one in passes]).sum(0)
    everywhere = torch.tensor(list(world.sum(dict(zip(names, local, strict=True))).values()), dtype=torch.float64)
    for one in passes:
        one.targets["advantages"] = whiten(
            one.targets["advantages"], one.mask, keep_mean=False, moments=everywhere.to(one.mask.device)
        )


def _trainer(row: Scored) -> TrainerView:
    assert row.trainer is not None, "with several updates a rollout, actor and critic are asked before the first"
    return row.trainer


def _padded(rows: Sequence[np.ndarray]) -> Tensor:
    """(B, R), R the longest row; zero behind a row's end."""
    out = np.zeros((len(rows), max(len(row) for row in rows)), dtype=np.float32)
    for row, values in enumerate(rows):
        out[row, : len(values)] = values
    return torch.from_numpy(out)


def response_values(critic: Callable[..., Any], batch: Sequences) -> Tensor:
    """The value before each response token, (B, R), zero elsewhere: after the tokens that the
    log-probs are read from too.
    """
    index, _ = batch.predicted()
    return batch.spread(critic(batch, index)[0])
