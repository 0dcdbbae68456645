"""The facts about the three steps: what a step is called, learns from, trains and shows.

Every other file reads them from here; a test in tests/test_house.py refuses other tables by step.
"""

from __future__ import annotations

from dataclasses import dataclass

from jobs.events import SHOWN, Curve


@dataclass(frozen=True)
class Outcome:
    """One row of the table at a run's end: two fields of an `end` event, and what they mean."""

    short: str
    long: str
    before: str
    after: str
    spec: str
    meaning: str  # for somebody who sees the number for the first time
    good: str  # which way is good


@dataclass(frozen=True)
class Step:
    """The facts about one step of RLHF."""

    number: int  # as in `--step`
    section: str  # of the job file; also the module of rlhf_train/steps that trains it
    title: str
    rows_noun: str  # what a row of its data is called, many of them
    columns: tuple[str, ...]  # of the data that it learns from
    networks: tuple[str, ...]  # that it trains
    starts_from: tuple[int, ...]  # steps whose models it starts from
    depends_on: tuple[str, ...]  # parts of the job file that decide what it learns
    line: tuple[str, ...]  # metrics of a line of plain text
    panel: tuple[str, ...]  # metrics of the panel, in order: its curves, then its numbers
    outcomes: tuple[Outcome, ...]  # on held-out data, before and after

    def __post_init__(self) -> None:
        if unknown := {*self.line, *self.panel} - SHOWN.keys():
            raise ValueError(f"step {self.number} shows {', '.join(sorted(unknown))}: no metric of jobs/events.py")

    def curves(self, *, far: bool) -> dict[str, Curve]:
        """Return the metrics that are drawn as curves.

        far: whether the run is watched from another machine.
        """
        places = ((name, SHOWN[name].place) for name in self.panel)
        curves = {name: place for name, place in places if isinstance(place, Curve)}
        return {name: curve for name, curve in curves.items() if far or not curve.only_far}


SFT = Step(
    number=1,
    section="sft",
    title="supervised fine-tuning",
    rows_noun="rows",
    columns=("prompt", "response"),
    networks=("actor",),
    starts_from=(),
    depends_on=("seed", "actor", "data", "sft"),
    line=("loss", "learning_rate", "grad_norm"),
    panel=("loss", "learning_rate", "grad_norm", "tokens_per_s"),
    outcomes=(
        Outcome(
            "perplexity", "perplexity", "perplexity_before", "perplexity_after", ".2f",
            "among how many equally likely tokens the model seems to choose, at each token of an answer",
            "lower is better; 1 is the least",
        ),
    ),
)  # fmt: skip

REWARD = Step(
    number=2,
    section="reward",
    title="reward model",
    rows_noun="pairs",
    columns=("prompt", "chosen", "rejected"),
    networks=("critic",),
    starts_from=(1,),  # where critic.model is `actor`
    depends_on=("seed", "critic", "data", "reward"),
    line=("loss", "lm_loss", "accuracy", "margin"),
    panel=("loss", "accuracy", "margin", "lm_loss", "learning_rate", "grad_norm", "tokens_per_s"),
    outcomes=(
        Outcome(
            "accuracy", "accuracy on pairs", "reward_accuracy_before", "reward_accuracy", ".1%",
            "how often the chosen answer gets a higher score than the rejected one",
            "higher is better; 50 % is chance",
        ),
    ),
)  # fmt: skip

PPO = Step(
    number=3,
    section="ppo",
    title="PPO",
    rows_noun="prompts",
    columns=("prompt",),
    networks=("actor", "critic"),
    starts_from=(1, 2),
    depends_on=("seed", "actor", "critic", "data", "sft", "reward", "ppo"),
    line=("policy_loss", "value_loss", "kl_k3", "mean_reward"),
    panel=(
        "mean_reward", "kl_k3", "policy_loss", "value_loss", "objective", "explained_variance", "entropy",
        "clip_fraction", "response_length", "eos_share", "grad_norm", "learning_rate", "tokens_per_s",
    ),
    outcomes=(
        Outcome(
            "good answers", "good answers, by the rule", "good_share_before", "good_share_after", ".1%",
            "answers that the job's own rule calls good, which nothing learns from",
            "higher is better",
        ),
        Outcome(
            "reward", "mean reward", "mean_reward_before", "mean_reward_after", ".2f",
            "the reward model's score: 0 is the mean, and 1 the spread, of answers before this step",
            "higher is better, as long as answers do not get worse to read",
        ),
        Outcome(
            "objective", "objective", "objective_before", "objective_after", ".2f",
            "what PPO maximises: the clipped reward less `ppo.kl_coef` times the KL",
            "higher is better",
        ),
        Outcome(
            "kl (k3)", "KL to the reference (k3)", "kl_k3_before", "kl_k3", ".3f",
            "how far the model has moved from where this step began, summed over an answer's tokens",
            "a few units are usual; a large one may mean that the reward is being exploited",
        ),
        Outcome(
            "length", "response length, tokens", "response_length_before", "response_length_after", ".1f",
            "tokens of an answer",
            "steady is good; longer and longer answers may exploit the reward",
        ),
        Outcome(
            "eos", "answers that ended (EOS)", "eos_share_before", "eos_share_after", ".1%",
            "answers that end by themselves, not at the length limit",
            "higher is better",
        ),
    ),
)  # fmt: skip

STEPS = {step.number: step for step in (SFT, REWARD, PPO)}
