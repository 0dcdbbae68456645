"""Compare advantages without a critic, and the losses that go with them, with numbers by hand."""

import math
import statistics

import pytest
import torch

from jobs.spec import Ppo
from rlhf_train.steps.advantages import LEAST_DEVIATION, baseline_returns, group_advantages, grouped, leave_one_out
from rlhf_train.steps.losses import kl_loss, loss_normalizer, policy_loss, token_weights

pytestmark = pytest.mark.pinned

OUTCOMES = [1.0, 2.0, 6.0, 0.5, 0.5, 0.5]  # two groups of 3
LENGTHS = [1, 3, 2, 2, 1, 3]
MASK = torch.arange(3) < torch.tensor(LENGTHS)[:, None]
# The KL costs 0.25 at each token; the score stands on the last.
REWARDS = torch.tensor(
    [
        [(OUTCOMES[row] if t == LENGTHS[row] - 1 else 0.0) - 0.25 if t < LENGTHS[row] else 0.0 for t in range(3)]
        for row in range(6)
    ]
)


def spec(advantage: str, **fields: object) -> Ppo:
    return Ppo(
        **{"rollout_batch": 6, "global_batch": 6, "actor_learning_rate": 1.0, "samples_per_prompt": 3}
        | {"advantage": advantage, "whiten_advantages": False}
        | fields
    )


def test_rloo_compares_with_the_other_answers() -> None:
    assert leave_one_out(torch.tensor(OUTCOMES), 3).tolist() == [-3.0, -1.5, 4.5, 0.0, 0.0, 0.0]


def test_rloo_pays_for_the_whole_answers_kl_and_gives_each_token_the_same() -> None:
    returns = [outcome - 0.25 * length for outcome, length in zip(OUTCOMES, LENGTHS, strict=True)]
    assert returns[:3] == [0.75, 1.25, 5.5]
    found = group_advantages(REWARDS, torch.tensor(OUTCOMES), MASK, spec("rloo"))
    expected = [0.75 - (1.25 + 5.5) / 2, 1.25 - (0.75 + 5.5) / 2, 5.5 - (0.75 + 1.25) / 2]
    assert found[0].tolist() == [expected[0], 0.0, 0.0]
    assert found[1].tolist() == [expected[1]] * 3
    assert found[2].tolist() == [expected[2], expected[2], 0.0]


def test_grpo_counts_in_standard_deviations_of_its_group_and_pays_no_kl() -> None:
    deviation = statistics.stdev(OUTCOMES[:3])
    found = group_advantages(REWARDS, torch.tensor(OUTCOMES), MASK, spec("grpo", whiten_advantages=True))
    wanted = [(outcome - 3.0) / (deviation + LEAST_DEVIATION) for outcome in OUTCOMES[:3]]
    torch.testing.assert_close(found[:, 0], torch.tensor([*wanted, 0.0, 0.0, 0.0]))  # equal scores teach nothing
    assert found[1].tolist() == [found[1, 0].item()] * 3 and found[0, 1:].tolist() == [0.0, 0.0]


def test_dr_grpo_leaves_the_deviation_out() -> None:
    assert grouped(torch.tensor(OUTCOMES), 3, deviation=False).tolist() == [-2.0, -1.0, 3.0, 0.0, 0.0, 0.0]


def test_reinforce_with_a_baseline_sums_what_is_still_to_come() -> None:
    found = baseline_returns(REWARDS, torch.tensor(OUTCOMES), MASK, 3, gamma=0.5)
    # Row 1, three tokens: its score less the mean is 2 - 3 = -1, and each token costs 0.25.
    last = -1.0 - 0.25
    middle = -0.25 + 0.5 * last
    assert found[1].tolist() == pytest.approx([-0.25 + 0.5 * middle, middle, last])
    assert found[0].tolist() == pytest.approx([-2.0 - 0.25, 0.0, 0.0])


@pytest.mark.parametrize("advantage", ["rloo", "reinforce_baseline"])
def test_whitening_is_over_all_tokens_of_the_rollout(advantage: str) -> None:
    outcomes = torch.tensor(OUTCOMES)
    raw = group_advantages(REWARDS, outcomes, MASK, spec(advantage))[MASK].tolist()
    found = group_advantages(REWARDS, outcomes, MASK, spec(advantage, whiten_advantages=True))
    mean, deviation = statistics.fmean(raw), statistics.pstdev(raw)
    assert found[MASK].tolist() == pytest.approx([(a - mean) / deviation for a in raw], abs=1e-5)
    assert found[~MASK].abs().max() == 0


# --- the loss ---


def test_each_mean_of_the_loss_by_hand() -> None:
    mask = torch.tensor([[True, False], [True, True]])
    nothing, advantages = torch.zeros(2, 2), torch.tensor([[-1.0, 9.0], [-2.0, -4.0]])  # a ratio of 1: losses 1, 2, 4
    found = {}
    for mean in ("token", "sequence", "constant"):
        normalizer = loss_normalizer(mean, tokens=3, answers=2, limit=5)
        weights = token_weights(mask, mean)
        loss = policy_loss(nothing, nothing, advantages, mask, clip_range=0.2, weights=weights, normalizer=normalizer)
        found[mean] = loss.item()
    wanted = {"token": 7 / 3, "sequence": (1 + 3) / 2, "constant": 7 / 10}
    assert found == pytest.approx(wanted)


def test_clip_higher_lets_the_ratio_rise_further_than_it_may_fall() -> None:
    ratios = torch.tensor([[1.5, 1.25, 0.5]])
    loss = policy_loss(
        ratios.log(),
        torch.zeros(1, 3),
        torch.tensor([[1.0, 1.0, -1.0]]),
        torch.ones(1, 3).bool(),
        clip_range=0.2,
        clip_range_high=0.3,
        normalizer=1.0,
    )
    assert loss.item() == pytest.approx(-1.3 - 1.25 + 0.8)


def test_the_kl_of_the_loss_is_k3_and_pulls_towards_the_reference() -> None:
    log_probs = torch.tensor([[-1.0, -2.0, 1e3]], requires_grad=True)
    mask = torch.tensor([[True, True, False]])
    loss = kl_loss(log_probs, torch.tensor([[-1.5, -1.0, 7.0]]), mask, weights=mask, normalizer=2)
    assert loss.item() == pytest.approx((math.exp(-0.5) + 0.5 - 1 + math.e - 1 - 1) / 2)
    (gradient,) = torch.autograd.grad(loss, log_probs)
    # d/dx of exp(ref - x) - (ref - x) - 1 is 1 - exp(ref - x).
    assert gradient[0].tolist() == pytest.approx([(1 - math.exp(-0.5)) / 2, (1 - math.e) / 2, 0.0])
