"""The experience of one rollout: sampled sequences, the networks' numbers, and PPO's targets.

On-policy (one update a rollout), actor and critic do not score responses before they learn. At
their one update the old policy is the policy itself and the old values are the values. So both come
from the forward pass of training, and the ratio is 1. Only the rewards' KL must be known earlier.
It is taken from the log-probs of the rollout, which the same weights gave: they are those of the
policy that sampled, and `max_kl` can be checked before anything is learned. They differ from the
trainer's by rounding only; the self-test before the first update checks that.
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
from rlhf_train.steps.advantages import group_advantages
from rlhf_train.steps.losses import gae, kl_penalised_rewards, moments, rewards_to_go, whiten

RAGGED = ("prompts", "responses")
PLAIN = ("mask", "old_log_probs", "ref_log_probs", "scores", "objectives", "ended")
# What the losses need besides the old log-probs, and what the critic is measured against.
TARGETS = ("values", "advantages", "returns", "rewards_to_go")


@dataclass(frozen=True)
class Scored:
    """One response with the networks' numbers for each of its tokens, before any update.

    All arrays: (tokens,).
    """

    prompt: np.ndarray
    response: np.ndarray
    ended: bool
    rollout_log_probs: np.ndarray  # as the rollout computed them
    ref_log_probs: np.ndarray
    score: float  # the reward model's, normalised
    trainer: TrainerView | None = None  # None if the networks in training did not score it
    judge_score: float | None = None  # the judge's own number; None: there is no judge


@dataclass(frozen=True)
class TrainerView:
    """The numbers of actor and critic for one response. Arrays: (tokens,)."""

    log_probs: np.ndarray  # as the trainer's forward computes them
    values: np.ndarray | None  # None: there is no critic
    entropy: float  # mean over tokens


@dataclass(frozen=True)
class Experience:
    """A whole rollout, rows of all ranks in the order of the prompts.

    (B, R) tensors on the CPU, zero outside the mask.
    """

    prompts: list[np.ndarray]
    responses: list[np.ndarray]
    mask: Tensor
    old_log_probs: Tensor  # of the policy that sampled, by the trainer's forward; on-policy by the rollout
    ref_log_probs: Tensor
    scores: Tensor  # (B,)
    objectives: Tensor  # (B,), the sum of a response's rewards, before whitening
    ended: Tensor  # (B,)
    # TARGETS; on-policy `rewards`: each pass makes TARGETS from them and its values; with no critic
    # `advantages` alone.
    targets: dict[str, Tensor]

    @classmethod
    def of(cls, rows: Sequence[Scored], spec: Ppo, kl_coef: float, *, on_policy: bool) -> Experience:
        """Compute rewards from the networks' numbers and, unless on-policy, the targets.

        Whitening is over the rows of all ranks.
        """
        lengths = np.array([len(row.response) for row in rows])
        mask = torch.from_numpy(np.arange(lengths.max()) < lengths[:, None])
        old = _padded([row.rollout_log_probs if on_policy else _trainer(row).log_probs for row in rows])
        ref = _padded([row.ref_log_probs for row in rows])
        scores = torch.tensor([row.score for row in rows])
        ended = torch.tensor([row.ended for row in rows])
        rewards = rewards_of(old, ref, scores, ended, mask, spec, kl_coef)
        objectives = rewards.sum(1)
        if spec.whiten_rewards:
            rewards = whiten(rewards, mask, keep_mean=True)
        if not spec.has_critic:
            outcomes = rewards_of(old, ref, scores, ended, mask, spec, kl_coef=0.0).sum(1)
            targets = {"advantages": group_advantages(rewards, outcomes, mask, spec)}
        elif on_policy:
            targets = {"rewards": rewards}
        else:
            targets = targets_of(rewards, _padded([_values(row) for row in rows]), mask, spec)
            if spec.whiten_advantages:
                targets["advantages"] = whiten(targets["advantages"], mask, keep_mean=False)
        prompts, responses = [row.prompt for row in rows], [row.response for row in rows]
        return cls(prompts, responses, mask, old, ref, scores, objectives, ended, targets)

    def tensors(self) -> dict[str, Tensor]:
        """Return everything as tensors, for a checkpoint.

        Prompts and responses are joined, one after the other, and their lengths are kept.
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
        return cls(
            **rows | {name: tensors[name] for name in PLAIN},
            targets={name: tensors[name] for name in TARGETS if name in tensors},
        )

    @property
    def lengths(self) -> np.ndarray:
        """Return the tokens of prompt and response together, (B,)."""
        return np.array([len(p) + len(r) for p, r in zip(self.prompts, self.responses, strict=True)])

    @property
    def kl(self) -> Tensor:
        """Return the KL to the reference, (B,), in nats.

        It is the k1 estimate, the sum of log pi - log pi_ref over each response.
        """
        return ((self.old_log_probs - self.ref_log_probs) * self.mask).sum(1)

    def make_pass(self, rows: np.ndarray, pad_id: int | None, device: torch.device) -> Pass:
        """Make the pass of one micro batch."""
        batch = Sequences.of([self.prompts[i] for i in rows], [self.responses[i] for i in rows], pad_id, device)
        mask = batch.response_mask()
        chosen = torch.from_numpy(rows)

        def trimmed(numbers: Tensor) -> Tensor:
            return sent(numbers[chosen, : mask.shape[1]], device)

        targets = {name: trimmed(numbers) for name, numbers in self.targets.items()}
        return Pass(batch, mask, trimmed(self.old_log_probs), trimmed(self.ref_log_probs), targets)


@dataclass
class Pass:
    """One micro batch of an update, with what its losses need. All (B, R)."""

    batch: Sequences
    mask: Tensor
    old_log_probs: Tensor
    ref_log_probs: Tensor
    targets: dict[str, Tensor]  # as Experience has them


def targets_of(rewards: Tensor, values: Tensor, mask: Tensor, spec: Ppo) -> dict[str, Tensor]:
    """Compute TARGETS, (B, R), from rewards and values; the advantages are not whitened yet."""
    advantages, returns = gae(rewards, values, mask, gamma=spec.gamma, lam=spec.lam)
    to_go = rewards_to_go(rewards, mask, gamma=spec.gamma)
    return {"values": values, "advantages": advantages, "returns": returns, "rewards_to_go": to_go}


def rewards_of(
    log_probs: Tensor, ref_log_probs: Tensor, scores: Tensor, ended: Tensor, mask: Tensor, spec: Ppo, kl_coef: float
) -> Tensor:
    """Return the rewards, (B, R). Their sum over a response is the objective: what PPO maximises.

    An answer that did not end pays `missing_eos_penalty` before the score is clipped. log_probs,
    ref_log_probs, mask: (B, R); scores, ended: (B,).
    """
    penalised = scores - spec.missing_eos_penalty * ~ended
    return kl_penalised_rewards(
        log_probs, ref_log_probs, penalised, mask, kl_coef=kl_coef, reward_clip=spec.reward_clip
    )


def whiten_update(passes: Sequence[Pass], world: World) -> None:
    """Whiten the advantages of an update's passes, over all passes and all ranks."""
    names = ("count", "sum", "squares")
    local = torch.stack([moments(micro.targets["advantages"], micro.mask) for micro in passes]).sum(0)
    of_all_ranks = torch.tensor(list(world.sum(dict(zip(names, local, strict=True))).values()), dtype=torch.float64)
    for micro in passes:
        advantages, mask = micro.targets["advantages"], micro.mask
        micro.targets["advantages"] = whiten(advantages, mask, keep_mean=False, moments=of_all_ranks.to(mask.device))


def _trainer(row: Scored) -> TrainerView:
    assert row.trainer is not None, "with several updates a rollout, actor and critic score it before the first"
    return row.trainer


def _values(row: Scored) -> np.ndarray:
    values = _trainer(row).values
    assert values is not None, "PPO has a critic"
    return values


def _padded(rows: Sequence[np.ndarray]) -> Tensor:
    """Stack rows as (B, R), R the longest row; zero behind a row's end."""
    out = np.zeros((len(rows), max(len(row) for row in rows)), dtype=np.float32)
    for row, values in enumerate(rows):
        out[row, : len(values)] = values
    return torch.from_numpy(out)


def response_values(critic: Callable[..., Any], batch: Sequences) -> Tensor:
    """Return the value before each response token, (B, R), zero elsewhere.

    The values and the log-probs are read at the same positions.
    """
    index, _ = batch.predicted()
    return batch.spread(critic(batch, index)[0])
