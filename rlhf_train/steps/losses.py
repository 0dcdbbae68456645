"""The maths of the three steps: pure functions of tensors, no model, no state.

Shapes: B batch, T tokens, R response tokens. A mask is true on what counts. Where we differ from
DeepSpeed-Chat: every sum is divided by the number of valid tokens of the whole update
(`normalizer`), over all micro batches and ranks, so neither changes the gradient. Padding never
counts; the EOS that ends a response does.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def _kept(x: Tensor, mask: Tensor) -> Tensor:
    """Set x to zero where the mask is false, also an inf: inf times 0 would be NaN."""
    return x.masked_fill(~mask.bool(), 0.0)


def preference_loss(chosen: Tensor, rejected: Tensor) -> Tensor:
    """Return -log P(chosen beats rejected), mean over pairs.

    Scores: (B,). Bradley-Terry; Ouyang et al. 2022, eq. 1.
    """
    return -F.logsigmoid(chosen - rejected).mean()


def preference_loss_per_token(chosen: Tensor, rejected: Tensor, mask: Tensor) -> Tensor:
    """Return DeepSpeed-Chat's loss: the pair loss at each token, mean over tokens, then pairs.

    chosen, rejected: (B, T) scores after each token; mask: (B, T), true from the first token that
    differs to the end of the shorter answer, so without padding. A pair with an empty mask counts
    as 0.
    """
    per_token = -F.logsigmoid(_kept(chosen, mask) - _kept(rejected, mask)) * mask
    return (per_token.sum(1) / mask.sum(1).clamp(min=1)).mean()


def kl_penalised_rewards(
    log_probs: Tensor, ref_log_probs: Tensor, scores: Tensor, mask: Tensor, *, kl_coef: float, reward_clip: float
) -> Tensor:
    """Return the rewards: the KL penalty at each token, and the clipped score on the last real one.

    The KL penalty is -kl_coef (log pi - log pi_ref). log_probs, ref_log_probs, mask: (B, R);
    scores: (B,). Returns (B, R), zero outside the mask. Ziegler et al. 2019, arXiv:1909.08593,
    eq. 2.
    """
    rewards = -kl_coef * (_kept(log_probs, mask) - _kept(ref_log_probs, mask))
    last = (torch.arange(mask.shape[1], device=mask.device) * mask).argmax(1, keepdim=True)
    clipped = scores.clamp(-reward_clip, reward_clip).to(rewards.dtype) * mask.any(1)
    return rewards.scatter_add(1, last, clipped.unsqueeze(1))


def kl_k3(log_probs: Tensor, ref_log_probs: Tensor, mask: Tensor) -> Tensor:
    """Return the KL to the reference, (B,), in nats, by an estimate that is never negative.

    It is Schulman's k3, the sum of r - 1 - log r over each response, r = pi_ref / pi:
    http://joschu.net/blog/kl-approx.html. All (B, R).
    """
    log_ratio = _kept(ref_log_probs, mask) - _kept(log_probs, mask)
    return (log_ratio.expm1() - log_ratio).sum(1)


def gae(rewards: Tensor, values: Tensor, mask: Tensor, *, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Compute generalized advantage estimation (GAE) over response tokens.

    rewards, values, mask: (B, R); the mask is true from the first response token to the last, EOS
    included, without gaps. Returns advantages, returns: (B, R), zero outside the mask. Nothing is
    bootstrapped after the last token. Advantages are not whitened; see `whiten`. Schulman et al.
    2016, arXiv:1506.02438, eq. 16.
    """
    rewards, values = _kept(rewards, mask), _kept(values, mask)
    deltas = rewards - values  # d_t = r_t + gamma V_{t+1} - V_t
    deltas[:, :-1] += gamma * values[:, 1:]
    # A_t = sum over k >= t of (gamma lam)^(k - t) d_k, as one product: a loop over tokens would
    # start hundreds of tiny kernels on a GPU.
    time = torch.arange(mask.shape[1], dtype=deltas.dtype, device=mask.device)
    advantages = _kept(deltas @ ((gamma * lam) ** (time[:, None] - time)).tril(), mask)
    return advantages, advantages + values


def rewards_to_go(rewards: Tensor, mask: Tensor, *, gamma: float) -> Tensor:
    """Return the discounted sum of the rewards from each token on, which the critic is to predict.

    rewards, mask: (B, R), as in `gae`. Returns (B, R), zero outside the mask.
    """
    return gae(rewards, torch.zeros_like(rewards), mask, gamma=gamma, lam=1.0)[1]


def moments(x: Tensor, mask: Tensor) -> Tensor:
    """Return count, sum and sum of squares of the masked values, float64 (3,).

    Their sums over ranks are the `moments` of `whiten`.
    """
    kept = _kept(x.double(), mask)
    return torch.stack([mask.sum().double(), kept.sum(), kept.square().sum()])


def whiten(x: Tensor, mask: Tensor, *, keep_mean: bool, moments: Tensor | None = None) -> Tensor:
    """Scale the masked values to variance 1, and to mean 0 unless `keep_mean`.

    x, mask: (B, R). moments: (3,) as `moments` returns them, of all ranks; default: those of x.
    Returns (B, R), zero outside the mask. Biased variance, 1e-8 under the root.
    """
    count, total, squares = (_moments(x, mask) if moments is None else moments.double()).unbind()
    mean = total / count.clamp(min=1)
    variance = (squares / count.clamp(min=1) - mean.square()).clamp(min=0)
    whitened = (_kept(x.double(), mask) - mean) * torch.rsqrt(variance + 1e-8) + (mean if keep_mean else 0.0)
    return (whitened * mask).to(x.dtype)


_moments = moments  # `whiten` has a parameter of that name


def policy_loss(
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    clip_range: float,
    normalizer: Tensor | float | None = None,
) -> Tensor:
    """Return PPO's clipped objective, negated. Schulman et al. 2017, arXiv:1707.06347, eq. 7.

    All (B, R). normalizer: the number of valid tokens of the whole update; default: those of the
    mask. Returns a scalar.
    """
    ratio = (_kept(log_probs, mask) - _kept(old_log_probs, mask)).exp()
    advantages = _kept(advantages, mask)
    loss = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - clip_range, 1 + clip_range))
    return (loss * mask).sum() / (mask.sum() if normalizer is None else normalizer)


def value_loss(
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    mask: Tensor,
    *,
    clip_range: float,
    normalizer: Tensor | float | None = None,
) -> Tensor:
    """Return half the squared error of the plain or the clipped value, whichever is larger.

    Same shapes as `policy_loss`. Ouyang et al. 2022's code and DeepSpeed-Chat:
    0.5 max((V - R)^2, (clip(V, V_old - c, V_old + c) - R)^2).
    """
    values, old_values, returns = (_kept(x, mask) for x in (values, old_values, returns))
    clipped = old_values + (values - old_values).clamp(-clip_range, clip_range)
    loss = torch.maximum((values - returns).square(), (clipped - returns).square())
    return 0.5 * (loss * mask).sum() / (mask.sum() if normalizer is None else normalizer)
