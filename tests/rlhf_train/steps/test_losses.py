"""Compare the losses with the formulas in plain Python, and test properties of the maths."""

import math
import random

import pytest
import torch

from rlhf_train.models.log_probs import entropy, token_log_probs
from rlhf_train.steps import losses
from rlhf_train.steps.losses import (
    gae,
    kl_penalised_rewards,
    moments,
    policy_loss,
    preference_loss,
    preference_loss_per_token,
    value_loss,
    whiten,
)

pytestmark = pytest.mark.pinned

ROWS, WIDTH = 5, 7


@pytest.fixture
def numbers():
    """Random (B, R) tensors with responses of 1 to 7 tokens; garbage where the mask is false."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.tensor([7, 1, 4, 2, 6])
    mask = torch.arange(WIDTH) < lengths[:, None]

    def draw():
        return torch.where(mask, torch.randn(ROWS, WIDTH, generator=generator), torch.full((ROWS, WIDTH), 1e3))

    return mask, draw


def close(tensor, expected, tolerance=1e-5):
    torch.testing.assert_close(tensor, torch.as_tensor(expected, dtype=tensor.dtype), rtol=tolerance, atol=tolerance)


def test_gae_by_hand():
    # gamma 0.5, lam 0.5, one row of two tokens: d1 = 2 - 4 = -2; d0 = 1 + 0.5*4 - 3 = 0; A1 = -2;
    # A0 = 0 + 0.25*-2.
    advantages, returns = gae(
        torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 4.0]]), torch.ones(1, 2).bool(), gamma=0.5, lam=0.5
    )
    close(advantages, [[-0.5, -2.0]])
    close(returns, [[2.5, 2.0]])


@pytest.mark.parametrize("piece", [losses.GAE_PIECE, 3])
@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.5), (1.0, 1.0), (0.7, 0.0)])
def test_gae_is_the_discounted_sum_of_deltas(numbers, gamma, lam, piece, monkeypatch):
    monkeypatch.setattr(losses, "GAE_PIECE", piece)
    mask, draw = numbers
    rewards, values = draw(), draw()
    advantages, returns = gae(rewards, values, mask, gamma=gamma, lam=lam)
    for row in range(ROWS):
        length = int(mask[row].sum())
        r, v = rewards[row, :length].tolist(), [*values[row, :length].tolist(), 0.0]
        for t in range(length):  # A_t = sum_k (gamma lam)^k delta_{t+k}: eq. 16 itself, not its recursion
            expected = sum((gamma * lam) ** (k - t) * (r[k] + gamma * v[k + 1] - v[k]) for k in range(t, length))
            assert advantages[row, t].item() == pytest.approx(expected, abs=1e-5)
            assert returns[row, t].item() == pytest.approx(expected + v[t], abs=1e-5)
    assert not advantages[~mask].any()
    assert not returns[~mask].any()


def test_gae_with_lam_1_returns_the_rewards_to_go(numbers):
    mask, draw = numbers
    rewards = draw()
    _, returns = gae(rewards, draw(), mask, gamma=1.0, lam=1.0)
    to_go = (rewards * mask).flip(1).cumsum(1).flip(1) * mask
    close(returns, to_go)


def test_kl_penalised_rewards(numbers):
    mask, draw = numbers
    log_probs, ref_log_probs = draw(), draw()
    scores = torch.tensor([3.0, -9.0, 0.5, 9.0, -1.0])
    rewards = kl_penalised_rewards(log_probs, ref_log_probs, scores, mask, kl_coef=0.1, reward_clip=5.0)
    for row in range(ROWS):
        length = int(mask[row].sum())
        for t in range(WIDTH):
            expected = -0.1 * (log_probs[row, t].item() - ref_log_probs[row, t].item()) if t < length else 0.0
            if t == length - 1:
                expected += min(max(scores[row].item(), -5.0), 5.0)
            assert rewards[row, t].item() == pytest.approx(expected, abs=1e-5)


def test_rewards_sum_to_the_score_when_actor_and_reference_agree(numbers):
    mask, draw = numbers
    same = draw()
    scores = torch.randn(ROWS)
    close(kl_penalised_rewards(same, same, scores, mask, kl_coef=0.1, reward_clip=5.0).sum(1), scores)


def plain_policy_loss(log_probs, old, advantages, mask, clip_range):
    total = count = 0.0
    for row in range(ROWS):
        for t in range(WIDTH):
            if mask[row, t]:
                ratio = math.exp(log_probs[row, t] - old[row, t])
                clipped = min(max(ratio, 1 - clip_range), 1 + clip_range)
                total += -min(ratio * advantages[row, t].item(), clipped * advantages[row, t].item())
                count += 1
    return total / count


def test_policy_loss_is_the_negated_clipped_objective(numbers):
    mask, draw = numbers
    log_probs, old, advantages = draw(), draw(), draw()
    log_probs = old + 0.3 * torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(1))
    expected = plain_policy_loss(log_probs, old, advantages, mask, 0.2)
    assert policy_loss(log_probs, old, advantages, mask, clip_range=0.2).item() == pytest.approx(expected, abs=1e-5)


def test_policy_loss_at_ratio_1_is_minus_the_mean_advantage(numbers):
    mask, draw = numbers
    old, advantages = draw(), draw()
    assert policy_loss(old, old, advantages, mask, clip_range=0.2).item() == pytest.approx(
        -advantages[mask].mean().item(), abs=1e-6
    )


def test_policy_gradient_at_ratio_1_is_the_advantage_and_vanishes_where_clipped():
    old, mask = torch.zeros(1, 3), torch.ones(1, 3).bool()
    log_probs = torch.tensor([[0.0, 0.5, -0.5]], requires_grad=True)
    policy_loss(log_probs, old, torch.tensor([[2.0, 1.0, -1.0]]), mask, clip_range=0.2).backward()
    close(log_probs.grad, [[-2.0 / 3, 0.0, 0.0]])  # ratios 1.65 with A > 0 and 0.61 with A < 0 are past the clip


def test_value_loss(numbers):
    mask, draw = numbers
    values, old, returns = draw(), draw(), draw()
    total = 0.0
    for row in range(ROWS):
        for t in range(WIDTH):
            if mask[row, t]:
                v, o, r = values[row, t].item(), old[row, t].item(), returns[row, t].item()
                clipped = min(max(v, o - 0.2), o + 0.2)
                total += 0.5 * max((v - r) ** 2, (clipped - r) ** 2)
    assert value_loss(values, old, returns, mask, clip_range=0.2).item() == pytest.approx(
        total / mask.sum().item(), rel=1e-5
    )


@pytest.mark.parametrize("garbage", [(-77.0, 5.0), (math.inf, -math.inf), (math.nan, math.inf)])
def test_masked_tokens_change_nothing(numbers, garbage):
    mask, draw = numbers
    tensors = [draw() for _ in range(3)]
    other = [torch.where(mask, x, torch.full_like(x, garbage[i % 2])) for i, x in enumerate(tensors)]
    for loss in (policy_loss, value_loss):
        ours = [x.clone().requires_grad_() for x in other[:1]] + other[1:]
        value = loss(*ours, mask, clip_range=0.2)
        assert value == loss(*tensors, mask, clip_range=0.2)
        value.backward()
        assert not ours[0].grad[~mask].any()
    for one, two in zip(
        gae(*tensors[:2], mask, gamma=1.0, lam=0.95), gae(*other[:2], mask, gamma=1.0, lam=0.95), strict=True
    ):
        assert torch.equal(one, two)
    assert torch.equal(whiten(tensors[0], mask, keep_mean=False), whiten(other[0], mask, keep_mean=False))
    scores = torch.ones(ROWS)
    penalised = [
        kl_penalised_rewards(*pair[:2], scores, mask, kl_coef=0.1, reward_clip=5.0) for pair in (tensors, other)
    ]
    assert torch.equal(*penalised)
    assert preference_loss_per_token(*tensors[:2], mask) == preference_loss_per_token(*other[:2], mask)


def test_the_score_stands_on_the_last_real_token_of_a_mask_that_starts_late():
    mask = torch.tensor([[False, False, True, True, False], [True, False, False, False, False]])
    zeros = torch.zeros(2, 5)
    rewards = kl_penalised_rewards(zeros, zeros, torch.tensor([2.0, -3.0]), mask, kl_coef=0.1, reward_clip=5.0)
    assert rewards.tolist() == [[0, 0, 0, 2, 0], [-3, 0, 0, 0, 0]]


@pytest.mark.parametrize("loss", [policy_loss, value_loss])
def test_normalizer_makes_micro_batches_add_up(numbers, loss):
    """Two micro batches over the update's token count: the loss and gradient of the whole batch."""
    mask, draw = numbers
    ours, old, target = draw(), draw(), draw()
    whole = ours.clone().requires_grad_()
    loss(whole, old, target, mask, clip_range=0.2).backward()
    parts = ours.clone().requires_grad_()
    for rows in (slice(0, 2), slice(2, 5)):
        loss(parts[rows], old[rows], target[rows], mask[rows], clip_range=0.2, normalizer=mask.sum()).backward()
    close(parts.grad[mask], whole.grad[mask])


def test_preference_loss():
    expected = -sum(math.log(1 / (1 + math.exp(-d))) for d in (1.5, -0.5)) / 2
    assert preference_loss(torch.tensor([2.0, 0.0]), torch.tensor([0.5, 0.5])).item() == pytest.approx(
        expected, abs=1e-6
    )
    assert preference_loss(torch.zeros(3), torch.zeros(3)).item() == pytest.approx(math.log(2))


def test_preference_loss_per_token_weighs_pairs_alike():
    chosen = torch.tensor([[9.0, 1.0, 2.0, 9.0], [9.0, 9.0, 9.0, 0.5]])
    rejected = torch.tensor([[0.0, 0.0, 1.0, 0.0], [0.0, 0.0, 0.0, 1.5]])
    mask = torch.tensor([[False, True, True, False], [False, False, False, True]])

    def pair(d):
        return math.log(1 + math.exp(-d))

    expected = ((pair(1.0) + pair(1.0)) / 2 + pair(-1.0)) / 2
    assert preference_loss_per_token(chosen, rejected, mask).item() == pytest.approx(expected, abs=1e-6)


def test_preference_losses_agree_on_one_token():
    random.seed(0)
    chosen, rejected = torch.randn(6), torch.randn(6)
    one = torch.ones(6, 1).bool()
    close(preference_loss_per_token(chosen[:, None], rejected[:, None], one), preference_loss(chosen, rejected))


def test_token_log_probs_and_entropy_against_the_softmax():
    logits = torch.randn(2, 3, 11, dtype=torch.float64)
    labels = torch.tensor([[0, 10, 3], [4, 4, 9]])
    probabilities = [[[math.exp(x) for x in row] for row in part] for part in logits.tolist()]
    for i in range(2):
        for j in range(3):
            total = sum(probabilities[i][j])
            p = [x / total for x in probabilities[i][j]]
            assert token_log_probs(logits, labels)[i, j].item() == pytest.approx(math.log(p[labels[i, j]]), abs=1e-5)
            assert entropy(logits)[i, j].item() == pytest.approx(-sum(x * math.log(x) for x in p), abs=1e-5)


@pytest.mark.parametrize("keep_mean", [True, False])
def test_whiten(numbers, keep_mean):
    mask, draw = numbers
    x = draw() * 3
    valid = [v for row in range(ROWS) for v in x[row][mask[row]].tolist()]
    mean = sum(valid) / len(valid)
    std = math.sqrt(sum((v - mean) ** 2 for v in valid) / len(valid))
    expected = [(v - mean) / std + (mean if keep_mean else 0) for v in valid]
    close(whiten(x, mask, keep_mean=keep_mean)[mask], expected)
    assert not whiten(x, mask, keep_mean=keep_mean)[~mask].any()


def test_whiten_with_the_moments_of_all_ranks(numbers):
    mask, draw = numbers
    x = draw()
    both = moments(x[:2], mask[:2]) + moments(x[2:], mask[2:])
    close(both, [mask.sum().item(), x[mask].sum().item(), x[mask].square().sum().item()])
    parts = [whiten(x[rows], mask[rows], keep_mean=False, moments=both) for rows in (slice(0, 2), slice(2, 5))]
    close(torch.cat(parts), whiten(x, mask, keep_mean=False))
    assert not torch.allclose(parts[0], whiten(x[:2], mask[:2], keep_mean=False))


def test_whitening_equal_values_gives_zeros():
    assert not whiten(torch.full((2, 3), 5.0), torch.ones(2, 3).bool(), keep_mean=False).any()
