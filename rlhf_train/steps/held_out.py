"""Answer held-out prompts, score the answers by the frozen networks and the rule, and average."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from jobs.events import Sample
from rlhf_train.generation.rollout import Rollouts
from rlhf_train.models.float32 import in_float32
from rlhf_train.steps.change import standard_error
from rlhf_train.steps.context import StepContext
from rlhf_train.steps.experience import rewards_of
from rlhf_train.steps.losses import kl_k3
from rlhf_train.steps.merged import merged
from rlhf_train.steps.rule import Rule
from rlhf_train.steps.scoring import Scorer

SAMPLES = 12  # prompts shown with their answers


@dataclass(frozen=True)
class Answer:
    prompt: str
    response: str
    ended: bool
    tokens: int
    score: float
    kl: float  # k1, nats, the whole response
    kl_k3: float  # the same by the estimate that is never negative
    objective: float  # what PPO maximises, with the job's `kl_coef`
    good: bool | None
    judge_score: float | None = None  # None: there is no judge


@dataclass(frozen=True)
class Summary:
    """Means over answers."""

    reward: float
    kl: float
    kl_k3: float
    objective: float
    length: float
    ended: float
    good: float | None
    reward_error: float | None = None  # standard error of the mean reward; None: not known
    judge_score: float | None = None
    judge_error: float | None = None
    # Of each answer, in the prompts' order, to be compared with the same prompts' later.
    rewards: list[float] | None = None
    goods: list[bool] | None = None
    judge_scores: list[float] | None = None


class HeldOut:
    """Prompts that are not trained on, answered with the same uniforms each time."""

    def __init__(
        self, context: StepContext, prompts: list[np.ndarray], tokenizer: Any, rule: Rule | None, *, seed: int
    ) -> None:
        self.context, self.prompts, self.tokenizer, self.rule, self.seed = context, prompts, tokenizer, rule, seed

    def answers(self, rollouts: Rollouts, scorer: Scorer, count: int | None = None) -> list[Answer]:
        """Sample and score one answer a prompt, in order; ranks share the work.

        count: of the first prompts; None: of all. The answers are those of the model as it is
        saved, with its adapters merged.
        """
        world, spec = self.context.world, self.context.job.ppo
        places = np.arange(len(self.prompts[:count]))[world.rank :: world.size]
        prompts = [self.prompts[i] for i in places]
        with merged(rollouts.model) as is_float32:  # but the reference may be the same model without adapters
            made = rollouts.generate(prompts, seed=self.seed, row_ids=places.tolist(), by_own_forward=is_float32)
        self.context.stop_if_asked()
        # Against a 16-bit reference, the KL would be that of its rounding, too.
        with in_float32(scorer.reference.model) if is_float32 else nullcontext():
            scored, _ = scorer.score(prompts, made)
        answers: list[tuple[int, Answer]] = []
        for row, numbers in enumerate(scored):
            ended = bool(made.ended[row])
            prompt = self.tokenizer.decode(prompts[row], skip_special_tokens=True)
            tokens = made.tokens[row][: -1 if ended else None]
            response = self.tokenizer.decode(tokens)  # special tokens other than the EOS are part of it
            good = self.rule(prompt, response, ended) if self.rule is not None else None
            log_probs, ref = (torch.from_numpy(x)[None] for x in (made.log_probs[row], numbers["ref_log_probs"]))
            score, mask = torch.tensor([numbers["score"]]), torch.ones_like(log_probs, dtype=torch.bool)
            rewards = rewards_of(log_probs, ref, score, torch.tensor([ended]), mask, spec, spec.kl_coef)
            answer = Answer(
                prompt,
                response,
                ended,
                tokens=len(made.tokens[row]),
                score=numbers["score"],
                kl=float((log_probs - ref).sum()),
                kl_k3=float(kl_k3(log_probs, ref, mask)),
                objective=float(rewards.sum()),
                good=good,
                judge_score=numbers.get("judge_score"),
            )
            answers.append((int(places[row]), answer))
        of_all_ranks = sorted((pair for part in world.gather(answers) for pair in part), key=lambda pair: pair[0])
        return [answer for _, answer in of_all_ranks]

    def show(self, answers: Sequence[Answer], when: str, update: int | None = None) -> None:
        for place, answer in enumerate(answers[:SAMPLES]):
            self.context.emit(
                Sample(
                    step=3,
                    when=when,
                    update=update,
                    place=place,
                    prompt=answer.prompt,
                    response=answer.response,
                    reward=answer.score,
                    good=answer.good,
                    judge_score=answer.judge_score,
                )
            )

    def summary(self, answers: Sequence[Answer]) -> Summary:
        def mean(numbers: Sequence[float]) -> float:
            return float(np.mean(numbers))

        goods = [bool(a.good) for a in answers] if self.rule is not None else None
        judged = [a.judge_score for a in answers if a.judge_score is not None] or None
        return Summary(
            reward=mean([a.score for a in answers]),
            kl=mean([a.kl for a in answers]),
            kl_k3=mean([a.kl_k3 for a in answers]),
            objective=mean([a.objective for a in answers]),
            length=mean([a.tokens for a in answers]),
            ended=mean([a.ended for a in answers]),
            good=mean(goods) if goods is not None else None,
            reward_error=standard_error([a.score for a in answers]),
            judge_score=mean(judged) if judged else None,
            judge_error=standard_error(judged) if judged else None,
            rewards=[a.score for a in answers],
            goods=goods,
            judge_scores=judged,
        )
