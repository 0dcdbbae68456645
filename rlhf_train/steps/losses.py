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

GAE_PIECE = 512  # response tokens of one product


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
    advantages = _kept(_discounted_sums(deltas, gamma * lam), mask)
    return advantages, advantages + values


def _discounted_sums(x: Tensor, discount: float) -> Tensor:
    """Return the sum over k >= t of discount^(k - t) x_k. x: (B, R). Returns (B, R).

    It is a product for each piece of tokens, from the last to the first, and what a piece's first
    token has goes to the piece before it, discounted. A loop over tokens would start thousands of
    tiny kernels on a GPU, and one product of 32,768 tokens needs a matrix of 4 GiB.
    """
    time = torch.arange(min(x.shape[1], GAE_PIECE), dtype=x.dtype, device=x.device)
    powers = (discount ** (time[:, None] - time)).tril()
    sums: list[Tensor] = []
    for piece in reversed(x.split(GAE_PIECE, dim=1)):
        count = piece.shape[1]
        inside = piece @ powers[:count, :count]
        if sums:
            inside += sums[-1][:, :1] * discount ** (count - time[:count])
        sums.append(inside)
    return torch.cat(sums[::-1], dim=1) if sums else x


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
    clip_range_high: float | None = None,
    weights: Tensor | None = None,
    normalizer: Tensor | float | None = None,
) -> Tensor:
    """Return PPO's clipped objective, negated. Schulman et al. 2017, arXiv:1707.06347, eq. 7.

    All (B, R). clip_range_high: above 1, if it is another than below: DAPO's clip-higher, Yu et al.
    2025, arXiv:2503.14476, section 3.1. weights: (B, R), of tokens, 0 outside the mask; default: 1.
    normalizer: of the whole update, what `loss_normalizer` returns; default: the number of valid
    tokens of the mask. Returns a scalar.
    """
    high = clip_range if clip_range_high is None else clip_range_high
    ratio = (_kept(log_probs, mask) - _kept(old_log_probs, mask)).exp()
    advantages = _kept(advantages, mask)
    loss = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - clip_range, 1 + high))
    return (loss * (mask if weights is None else weights)).sum() / (mask.sum() if normalizer is None else normalizer)


def kl_loss(
    log_probs: Tensor, ref_log_probs: Tensor, mask: Tensor, *, weights: Tensor, normalizer: Tensor | float
) -> Tensor:
    """Return the KL to the reference as a term of the loss, by the estimate k3.

    Shao et al. 2024 (GRPO), arXiv:2402.03300, eq. 4: pi_ref / pi - log (pi_ref / pi) - 1 at each
    token. All (B, R); weights and normalizer as in `policy_loss`. Returns a scalar.
    """
    log_ratio = _kept(ref_log_probs, mask) - _kept(log_probs, mask)
    return ((log_ratio.expm1() - log_ratio) * weights).sum() / normalizer


def token_weights(mask: Tensor, loss_mean: str) -> Tensor:
    """Return how much each token counts in the policy loss, (B, R).

    loss_mean, as `ppo.loss_mean`: with `sequence`, 1 / the tokens of its answer; else 1.
    """
    return mask / mask.sum(1, keepdim=True).clamp(min=1) if loss_mean == "sequence" else mask


def loss_normalizer(loss_mean: str, *, tokens: int, answers: int, limit: int) -> float:
    """Return what the weighted sum of an update's token losses is divided by.

    tokens, answers: of the whole update, over all ranks; limit: the longest answer allowed.
    `token`: DAPO, Yu et al. 2025, arXiv:2503.14476, section 3.3. `sequence`: GRPO, Shao et al.
    2024, arXiv:2402.03300, eq. 3. `constant`: Dr. GRPO, Liu et al. 2025, arXiv:2503.20783, section
    3.2: by a constant instead of each answer's own length.
    """
    return {"token": tokens, "sequence": answers, "constant": answers * limit}[loss_mean]


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
