"""Advantages without a critic: an answer is compared with the other answers to its prompt.

Pure functions. B rows are k answers a prompt, one group after the other; R tokens. Where we differ
from the papers: `rloo` may whiten its advantages over the whole rollout (`ppo.whiten_advantages`;
false is the paper's), and all methods keep PPO's clipped ratio, which is 1 with one update a
rollout: then the gradient is REINFORCE's.
"""

from __future__ import annotations

import torch
from torch import Tensor

from jobs.spec import Ppo
from rlhf_train.steps.losses import kl_penalised_rewards, rewards_to_go, whiten

LEAST_DEVIATION = 1e-4  # added to a group's standard deviation, as in TRL's GRPO


def group_advantages(rewards: Tensor, outcomes: Tensor, mask: Tensor, spec: Ppo) -> Tensor:
    """Return the advantages, (B, R), zero outside the mask, by the method of `spec`.

    rewards: (B, R), with the KL penalty at each token; outcomes: (B,), the clipped scores alone;
    mask: (B, R).
    """
    k = spec.samples_per_prompt
    if spec.advantage == "grpo":
        return grouped(outcomes, k, deviation=spec.whiten_advantages)[:, None] * mask
    if spec.advantage == "rloo":
        advantages = leave_one_out(rewards.sum(1), k)[:, None] * mask
    else:
        advantages = baseline_returns(rewards, outcomes, mask, k, gamma=spec.gamma)
    return whiten(advantages, mask, keep_mean=False) if spec.whiten_advantages else advantages


def leave_one_out(returns: Tensor, k: int) -> Tensor:
    """Compare each answer with the mean of the other k - 1 answers to its prompt: (B,).

    RLOO: R(y_i) - 1 / (k - 1) sum over j != i of R(y_j), where R is the score less the whole
    answer's KL penalty. Ahmadian et al. 2024, arXiv:2402.14740, section 3.3.
    """
    groups = returns.view(-1, k)
    return (groups - (groups.sum(1, keepdim=True) - groups) / (k - 1)).flatten()


def grouped(outcomes: Tensor, k: int, *, deviation: bool) -> Tensor:
    """Compare each score with the mean of its group, in standard deviations of the group: (B,).

    GRPO: Shao et al. 2024, arXiv:2402.03300, section 4.1.2. deviation: false leaves the division
    out, as Dr. GRPO does: Liu et al. 2025, arXiv:2503.20783, section 3.2.
    """
    groups = outcomes.view(-1, k)
    centred = groups - groups.mean(1, keepdim=True)
    if deviation:
        centred = centred / (groups.std(1, keepdim=True) + LEAST_DEVIATION)  # of a sample: divided by k - 1
    return centred.flatten()


def baseline_returns(rewards: Tensor, outcomes: Tensor, mask: Tensor, k: int, *, gamma: float) -> Tensor:
    """Return the rewards from each token on, (B, R), with scores less their group's mean.

    REINFORCE++ with a baseline: Hu et al. 2025, arXiv:2501.03262; its advantages are whitened over
    the whole batch. The KL penalty stays at each token, as in its variant without a baseline.
    """
    baseline = outcomes.view(-1, k).mean(1).repeat_interleave(k)
    none = torch.zeros_like(rewards)
    at_end = kl_penalised_rewards(none, none, baseline, mask, kl_coef=0.0, reward_clip=torch.inf)
    return rewards_to_go(rewards - at_end, mask, gamma=gamma)
