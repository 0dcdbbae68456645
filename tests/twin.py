"""The three steps once more, in plain PyTorch and transformers, without our code.

The twin is written from the formulas: one row at a time, unpadded, loops over tokens, its own
losses, GAE and AdamW. It is told which rows an update takes, and which answers were sampled; all
else it computes itself.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Ids = tuple[int, ...]
Row = tuple[Ids, Ids]  # prompt, answer with its EOS


# --- what networks say of one row ---


def log_probs_of(model: Any, row: Row, *, tokens: int, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """Return the log-probs of the answer's tokens, and their mean entropy.

    tokens: ids from there on are never drawn.
    """
    prompt, answer = row
    logits = model(input_ids=torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1, :tokens]
    log_probs = torch.log_softmax(logits / temperature, dim=-1)
    entropy = -(log_probs.exp() * log_probs).sum(-1).mean()
    return log_probs[torch.arange(len(answer)), torch.tensor(answer)], entropy


def scores_of(model: Any, row: Row) -> Tensor:
    """Return a score after each token of prompt and answer."""
    ids = torch.tensor([row[0] + row[1]])
    return model.score(model.base_model(input_ids=ids).last_hidden_state)[0, :, 0]


# --- AdamW ---


class TwinAdamW:
    """AdamW with a linear warm-up, a linear schedule and gradients scaled down to a norm."""

    def __init__(
        self,
        model: Any,
        learning_rate: float,
        *,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        max_grad_norm: float,
        warmup: int,
        final: float,
        updates: int,
    ) -> None:
        self.parameters = list(model.parameters())
        self.learning_rate, self.betas, self.eps, self.weight_decay = learning_rate, betas, eps, weight_decay
        self.max_grad_norm, self.warmup, self.final, self.updates = max_grad_norm, warmup, final, updates
        self.means = [torch.zeros_like(p) for p in self.parameters]
        self.squares = [torch.zeros_like(p) for p in self.parameters]
        self.done = 0

    def rate(self) -> float:
        if self.done < self.warmup:
            return self.learning_rate * (self.done + 1) / self.warmup
        left = 1 - (self.done - self.warmup) / (self.updates - self.warmup)
        return self.learning_rate * (self.final + (1 - self.final) * left)

    def step(self, loss: Tensor) -> float:
        """Update the weights, and return the gradient's norm before it was scaled down."""
        gradients = torch.autograd.grad(loss, self.parameters)
        norm = math.sqrt(sum(float(g.double().square().sum()) for g in gradients))
        rate, shrink = self.rate(), min(1.0, self.max_grad_norm / (norm + 1e-6))
        self.done += 1
        first, second = self.betas
        with torch.no_grad():
            for place, (p, gradient) in enumerate(zip(self.parameters, gradients, strict=True)):
                g = gradient * shrink
                self.means[place] = first * self.means[place] + (1 - first) * g
                self.squares[place] = second * self.squares[place] + (1 - second) * g * g
                mean = self.means[place] / (1 - first**self.done)
                square = self.squares[place] / (1 - second**self.done)
                decayed = p * (1 - rate * self.weight_decay) if p.ndim >= 2 else p  # matrices alone decay
                p.copy_(decayed - rate * mean / (square.sqrt() + self.eps))
        return norm


# --- step 1 ---


def text_loss(model: Any, row: Row) -> tuple[Tensor, int]:
    """Return the summed cross-entropy of all tokens after the first, and their count."""
    ids = torch.tensor([row[0] + row[1]])
    logits = model(input_ids=ids).logits[0, :-1]
    return torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum"), ids.shape[1] - 1


@torch.no_grad()
def text_perplexity(model: Any, rows: Sequence[Row]) -> float:
    losses = [text_loss(model, row) for row in rows]
    return math.exp(sum(float(loss) for loss, _ in losses) / sum(count for _, count in losses))


def train_text(model: Any, adamw: TwinAdamW, updates: Sequence[Sequence[Row]]) -> list[dict[str, float]]:
    """Train on the rows of each update, prompts and answers, and return each update's numbers."""
    numbers = []
    for rows in updates:
        losses = [text_loss(model, row) for row in rows]
        loss = torch.stack([loss for loss, _ in losses]).sum() / sum(count for _, count in losses)
        rate = adamw.rate()
        numbers.append({"loss": loss.item(), "learning_rate": rate, "grad_norm": adamw.step(loss)})
    return numbers


# --- step 2 ---


@dataclass(frozen=True)
class TwinPair:
    """A prompt with its two answers."""

    prompt: Ids
    chosen: Ids
    rejected: Ids


def pair_loss(model: Any, pair: TwinPair, *, per_token: bool) -> Tensor:
    """Return -log sigmoid(chosen - rejected), after the last tokens.

    per_token: the mean from the first token that differs to the shorter end.
    """
    chosen = scores_of(model, (pair.prompt, pair.chosen))
    rejected = scores_of(model, (pair.prompt, pair.rejected))
    if not per_token:
        return -torch.log(torch.sigmoid(chosen[-1] - rejected[-1]))
    one, other = pair.prompt + pair.chosen, pair.prompt + pair.rejected
    end, first = min(len(one), len(other)), 0
    while one[first] == other[first]:
        first += 1
    losses = [-torch.log(torch.sigmoid(chosen[t] - rejected[t])) for t in range(first, end)]
    return torch.stack(losses).mean()


def language_loss(model: Any, pair: TwinPair) -> Tensor:
    """Return the summed cross-entropy of the chosen answer; the embedding is the output layer."""
    states = model.base_model(input_ids=torch.tensor([pair.prompt + pair.chosen])).last_hidden_state[0]
    logits = states[len(pair.prompt) - 1 : -1] @ model.get_input_embeddings().weight.T
    return torch.nn.functional.cross_entropy(logits, torch.tensor(pair.chosen), reduction="sum")


def train_reward_model(
    model: Any, adamw: TwinAdamW, updates: Sequence[Sequence[TwinPair]], *, per_token: bool, lm_coef: float
) -> list[dict[str, float]]:
    """Train on the pairs of each update, and return each update's numbers."""
    numbers = []
    for pairs in updates:
        loss = torch.stack([pair_loss(model, pair, per_token=per_token) for pair in pairs]).mean()
        lm_loss = torch.stack([language_loss(model, pair) for pair in pairs]).sum() / sum(len(p.chosen) for p in pairs)
        with torch.no_grad():
            margins = [
                float(scores_of(model, (p.prompt, p.chosen))[-1] - scores_of(model, (p.prompt, p.rejected))[-1])
                for p in pairs
            ]
        found = {
            "loss": loss.item(),
            "lm_loss": lm_loss.item(),
            "accuracy": sum(margin > 0 for margin in margins) / len(pairs),
            "margin": sum(margins) / len(pairs),
            "learning_rate": adamw.rate(),
        }
        found["grad_norm"] = adamw.step(loss + lm_coef * lm_loss if lm_coef else loss)
        numbers.append(found)
    return numbers


# --- step 3 ---


@dataclass
class TwinRow:
    """A sampled answer with the networks' numbers at its rollout. Lists: a number a token."""

    row: Row
    old: Tensor  # log-probs
    entropy: float
    kl: float
    kl_k3: float  # sum of r - 1 - log r, r = pi_ref / pi
    score: float
    values: list[float]
    objective: float
    rewards: list[float]
    to_go: list[float]  # the discounted rewards from a token on
    advantages: list[float]
    returns: list[float]


def whitened(rows: Sequence[list[float]], *, keep_mean: bool) -> list[list[float]]:
    flat = [number for row in rows for number in row]
    mean = sum(flat) / len(flat)
    deviation = math.sqrt(sum((number - mean) ** 2 for number in flat) / len(flat) + 1e-8)
    return [[(number - mean) / deviation + (mean if keep_mean else 0.0) for number in row] for row in rows]


def generalized_advantages(
    rewards: Sequence[float], values: Sequence[float], *, gamma: float, lam: float
) -> tuple[list[float], list[float]]:
    """Return advantages and returns.

    A_t = d_t + gamma lam A_{t+1}, with d_t = r_t + gamma V_{t+1} - V_t.
    """
    advantages, later, next_value = [0.0] * len(rewards), 0.0, 0.0
    for t in reversed(range(len(rewards))):
        delta = rewards[t] + gamma * next_value - values[t]
        later = delta + gamma * lam * later
        advantages[t], next_value = later, values[t]
    return advantages, [a + v for a, v in zip(advantages, values, strict=True)]


@dataclass
class TwinPpo:
    """The four networks of step 3, and its settings by their names in a job file."""

    actor: Any
    reference: Any
    critic: Any
    reward_model: Any
    settings: Mapping[str, Any]
    tokens: int  # ids that may be drawn
    eos: int
    shift: float = 0.0
    scale: float = 1.0

    def __post_init__(self) -> None:
        self.kl_coef = self.settings["kl_coef"]
        self.ema = [p.detach().clone() for p in self.actor.parameters()]
        self.done = 0  # updates of the critic

    @torch.no_grad()
    def normalise(self, rows: Sequence[Row]) -> None:
        """Make scores mean 0 and standard deviation 1 on the reference's answers.

        The critic's values get the same shift and scale.
        """
        scores = [self.score(row) for row in rows]  # the shift is 0 and the scale 1 still
        self.shift = sum(scores) / len(scores)
        self.scale = math.sqrt(sum((score - self.shift) ** 2 for score in scores) / len(scores))

    def score(self, row: Row) -> float:
        return (float(scores_of(self.reward_model, row)[-1]) - self.shift) / self.scale

    def values(self, row: Row) -> Tensor:
        """Return the value before each token of the answer."""
        return (scores_of(self.critic, row)[len(row[0]) - 1 : -1] - self.shift) / self.scale

    def log_probs(self, model: Any, row: Row) -> tuple[Tensor, Tensor]:
        return log_probs_of(model, row, tokens=self.tokens, temperature=self.settings["temperature"])

    @torch.no_grad()
    def answers(self, rows: Sequence[Row]) -> dict[str, float]:
        """Return the means over answers to held-out prompts, of the actor as it is now."""
        kls = [
            float((self.log_probs(self.actor, row)[0] - self.log_probs(self.reference, row)[0]).sum()) for row in rows
        ]
        return {"reward": sum(self.score(row) for row in rows) / len(rows), "kl": sum(kls) / len(rows)}

    @torch.no_grad()
    def experience(self, rows: Sequence[Row]) -> dict[Row, TwinRow]:
        settings, made = self.settings, list[TwinRow]()
        for row in rows:
            old, entropy = self.log_probs(self.actor, row)
            costs = (old - self.log_probs(self.reference, row)[0]).tolist()
            score = self.score(row)
            rewards = [-self.kl_coef * cost for cost in costs]
            penalised = score - (settings["missing_eos_penalty"] if row[1][-1] != self.eos else 0.0)
            clipped = max(-settings["reward_clip"], min(penalised, settings["reward_clip"]))
            rewards[-1] += clipped
            objective = clipped - self.kl_coef * sum(costs)
            k3 = sum(math.exp(-cost) - 1 + cost for cost in costs)
            values = self.values(row).tolist()
            made.append(
                TwinRow(row, old, float(entropy), sum(costs), k3, score, values, objective, rewards, [], [], [])
            )
        if settings["whiten_rewards"]:
            for one, rewards in zip(made, whitened([one.rewards for one in made], keep_mean=True), strict=True):
                one.rewards = rewards
        for one in made:
            for reward in reversed(one.rewards):
                later = one.to_go[0] if one.to_go else 0.0
                one.to_go.insert(0, reward + settings["gamma"] * later)
            one.advantages, one.returns = generalized_advantages(
                one.rewards, one.values, gamma=settings["gamma"], lam=settings["lam"]
            )
        for one, advantages in zip(made, whitened([one.advantages for one in made], keep_mean=False), strict=True):
            one.advantages = advantages
        return {one.row: one for one in made}

    def losses(self, rows: Sequence[TwinRow]) -> tuple[Tensor, Tensor, dict[str, float]]:
        """Return an update's policy loss and value loss, means over tokens, and its counts."""
        clip, value_clip = self.settings["clip_range"], self.settings["value_clip_range"]
        policy, value, ratios, clipped, values_clipped, count = [], [], 0.0, 0, 0, 0
        for one in rows:
            log_probs, values = self.log_probs(self.actor, one.row)[0], self.values(one.row)
            for t in range(len(one.row[1])):
                ratio = torch.exp(log_probs[t] - one.old[t])
                bounded = torch.clamp(ratio, 1 - clip, 1 + clip)
                policy.append(torch.maximum(-one.advantages[t] * ratio, -one.advantages[t] * bounded))
                near = torch.clamp(values[t], one.values[t] - value_clip, one.values[t] + value_clip)
                errors = (values[t] - one.returns[t]) ** 2, (near - one.returns[t]) ** 2
                value.append(0.5 * torch.maximum(*errors))
                count, ratios = count + 1, ratios + ratio.item()
                clipped += abs(ratio.item() - 1) > clip
                values_clipped += abs(values[t].item() - one.values[t]) > value_clip
        numbers = {"ratio": ratios, "clip_fraction": clipped, "value_clip_fraction": values_clipped, "tokens": count}
        return torch.stack(policy).sum() / count, torch.stack(value).sum() / count, numbers

    def learn(
        self, rollout: Sequence[Row], updates: Sequence[Sequence[Row]], actor: TwinAdamW, critic: TwinAdamW
    ) -> dict[str, float]:
        """Make the updates of one rollout, and return its numbers as means."""
        experience, kl_coef = self.experience(rollout), self.kl_coef
        found = dict.fromkeys(("policy_loss", "value_loss", "grad_norm", "critic_grad_norm"), 0.0)
        to_go, errors = list[float](), list[float]()
        counted = dict.fromkeys(("ratio", "clip_fraction", "value_clip_fraction", "tokens"), 0.0)
        for rows in updates:
            policy, value, numbers = self.losses([experience[row] for row in rows])
            rates = {"critic_learning_rate": critic.rate()}
            actor_norm = 0.0
            if self.done >= self.settings["critic_warmup_updates"]:
                rates["learning_rate"] = actor.rate()
                actor_norm = actor.step(policy)
            norms = actor_norm, critic.step(value)
            self.done += 1
            targets = [g for row in rows for g in experience[row].to_go]
            to_go += targets
            errors += [g - v for g, v in zip(targets, (v for row in rows for v in experience[row].values), strict=True)]
            for name, number in zip(found, (policy.item(), value.item(), *norms), strict=True):
                found[name] += number / len(updates)
            counted = {name: counted[name] + number for name, number in numbers.items()}
            decay = self.settings["ema_decay"]
            self.ema = [
                decay * average + (1 - decay) * p.detach()
                for average, p in zip(self.ema, self.actor.parameters(), strict=True)
            ]
        of_tokens = {name: number / counted["tokens"] for name, number in counted.items() if name != "tokens"}
        rows, count = experience.values(), len(experience)
        kl = sum(one.kl for one in rows) / count
        if self.settings["kl_target"] is not None:
            error = max(-0.2, min(kl / self.settings["kl_target"] - 1, 0.2))
            self.kl_coef *= 1 + error * count / self.settings["kl_horizon"]
        mean = sum(to_go) / len(to_go)
        unexplained = sum(error**2 for error in errors) / sum((g - mean) ** 2 for g in to_go)
        return (
            found
            | of_tokens
            | rates
            | {
                "kl": kl,
                "kl_k3": sum(one.kl_k3 for one in rows) / count,
                "objective": sum(one.objective for one in rows) / count,
                "explained_variance": 1 - unexplained,
                "kl_coef": kl_coef,
                "mean_reward": sum(one.score for one in rows) / count,
                "entropy": sum(one.entropy for one in rows) / count,
                "response_length": sum(len(one.row[1]) for one in rows) / count,
                "eos_share": sum(one.row[1][-1] == self.eos for one in rows) / count,
            }
        )


# --- step 3 without a critic ---


@dataclass
class TwinGroups(TwinPpo):
    """Step 3 with several answers a prompt, which are compared with each other.

    The critic is never asked.
    """

    limit: int = 0  # of an answer, in tokens
    tokenizers: tuple[Any, Any] | None = None  # of actor and reward model, if the latter reads text

    @torch.no_grad()
    def score(self, row: Row) -> float:
        if self.tokenizers is None:
            return super().score(row)
        actor, own = self.tokenizers
        text = actor.decode([*row[0], *row[1]], skip_special_tokens=True)
        ids = own(text)["input_ids"] + ([own.eos_token_id] if row[1][-1] == self.eos else [])
        logit = self.reward_model.score(self.reward_model.base_model(input_ids=torch.tensor([ids])).last_hidden_state)
        return (float(logit[0, -1, 0]) - self.shift) / self.scale

    @torch.no_grad()
    def group_experience(self, rows: Sequence[Row]) -> dict[Row, TwinRow]:
        """Return each answer with its advantages. Two like answers to a prompt have the same."""
        settings, method = self.settings, self.settings["advantage"]
        made = list(self.experience(rows).values())
        by_row = {one.row: one for one in made}
        of_prompt: dict[Ids, list[TwinRow]] = {}
        for row in rows:
            of_prompt.setdefault(row[0], []).append(by_row[row])
        outcomes = {one.row: one.objective + self.kl_coef * one.kl for one in made}  # the clipped scores
        for one in made:
            group = of_prompt[one.row[0]]
            assert len(group) == settings["samples_per_prompt"]
            scores = [outcomes[other.row] for other in group]
            mean, length = sum(scores) / len(scores), len(one.row[1])
            if method == "grpo":
                squares = sum((score - mean) ** 2 for score in scores) / (len(scores) - 1)
                deviation = math.sqrt(squares) + 1e-4 if settings["whiten_advantages"] else 1.0
                one.advantages = [(outcomes[one.row] - mean) / deviation] * length
            elif method == "rloo":
                others = sum(other.objective for other in group) - one.objective
                one.advantages = [one.objective - others / (len(group) - 1)] * length
            else:
                later, one.advantages = 0.0, []
                for t in reversed(range(length)):
                    later = one.rewards[t] - (mean if t == length - 1 else 0.0) + settings["gamma"] * later
                    one.advantages.insert(0, later)
        if settings["whiten_advantages"] and method != "grpo":
            every = [by_row[row] for row in rows]
            white = whitened([one.advantages for one in every], keep_mean=False)
            for row, advantages in zip(rows, white, strict=True):
                by_row[row].advantages = advantages
        return by_row

    def group_loss(self, rows: Sequence[TwinRow]) -> tuple[Tensor, dict[str, float]]:
        settings, counted = self.settings, dict.fromkeys(("ratio", "clip_fraction", "tokens"), 0.0)
        low = settings["clip_range"]
        high = settings.get("clip_range_high") or low
        terms = []
        for one in rows:
            log_probs = self.log_probs(self.actor, one.row)[0]
            with torch.no_grad():
                ref = self.log_probs(self.reference, one.row)[0]
            losses = []
            for t in range(len(one.row[1])):
                ratio = torch.exp(log_probs[t] - one.old[t])
                bounded = torch.clamp(ratio, 1 - low, 1 + high)
                loss = torch.maximum(-one.advantages[t] * ratio, -one.advantages[t] * bounded)
                if settings["advantage"] == "grpo":
                    away = ref[t] - log_probs[t]
                    loss = loss + self.kl_coef * (torch.exp(away) - away - 1)
                losses.append(loss)
                counted["tokens"] += 1
                counted["ratio"] += ratio.item()
                counted["clip_fraction"] += ratio.item() > 1 + high or ratio.item() < 1 - low
            terms.append(torch.stack(losses))
        if settings["loss_mean"] == "sequence":
            loss = torch.stack([term.mean() for term in terms]).mean()
        elif settings["loss_mean"] == "constant":
            loss = torch.stack([term.sum() for term in terms]).mean() / self.limit
        else:
            loss = torch.cat(terms).mean()
        return loss, counted

    def learn_groups(
        self, rollout: Sequence[Row], updates: Sequence[Sequence[Row]], actor: TwinAdamW
    ) -> dict[str, float]:
        """Make the updates of one rollout, and return its numbers as means."""
        experience, kl_coef = self.group_experience(rollout), self.kl_coef
        every = [experience[row] for row in rollout]
        found, counted = (
            {"policy_loss": 0.0, "grad_norm": 0.0},
            dict.fromkeys(("ratio", "clip_fraction", "tokens"), 0.0),
        )
        for rows in updates:
            loss, numbers = self.group_loss([experience[row] for row in rows])
            rate, norm = actor.rate(), actor.step(loss)
            found = {
                "policy_loss": found["policy_loss"] + loss.item() / len(updates),
                "grad_norm": found["grad_norm"] + norm / len(updates),
            }
            counted = {name: counted[name] + number for name, number in numbers.items()}
        count = len(every)
        kl = sum(one.kl for one in every) / count
        if self.settings["kl_target"] is not None:
            error = max(-0.2, min(kl / self.settings["kl_target"] - 1, 0.2))
            self.kl_coef *= 1 + error * count / self.settings["kl_horizon"]
        of_tokens = {name: number / counted["tokens"] for name, number in counted.items() if name != "tokens"}
        return (
            found
            | of_tokens
            | {
                "learning_rate": rate,
                "kl": kl,
                "kl_k3": sum(one.kl_k3 for one in every) / count,
                "objective": sum(one.objective for one in every) / count,
                "kl_coef": kl_coef,
                "mean_reward": sum(one.score for one in every) / count,
                "entropy": sum(one.entropy for one in every) / count,
                "response_length": sum(len(one.row[1]) for one in every) / count,
                "eos_share": sum(one.row[1][-1] == self.eos for one in every) / count,
            }
        )
