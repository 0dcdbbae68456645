"""The facts about the three steps: what a step is called, learns from, trains and shows.

Every other file reads them from here; a test in tests/test_house.py refuses other tables by step.
"""

from __future__ import annotations

from dataclasses import dataclass

from jobs.events import SHOWN, Curve, MetricFormat


@dataclass(frozen=True)
class Outcome:
    """One row of the table at a run's end: fields of an `end` event, and what they mean.

    A number that is a metric, too, has its label and format from there.
    """

    label: str
    before: str
    after: str
    spec: str
    meaning: str  # for somebody who sees the number for the first time
    good: str  # which way is good
    error_before: str = ""  # the fields of its standard errors; "": there are none
    error_after: str = ""

    @classmethod
    def of(cls, metric: str, before: str, after: str, meaning: str, good: str, *errors: str) -> Outcome:
        """Make the outcome that is the metric, measured on held-out data."""
        return cls(SHOWN[metric].label, before, after, SHOWN[metric].spec, meaning, good, *errors)


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
            "perplexity", "perplexity_before", "perplexity_after", ".2f",
            "among how many equally likely tokens the model seems to choose, at each token of an answer",
            "lower is better; 1 is the least",
            "perplexity_error_before", "perplexity_error_after",
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
        Outcome.of(
            "accuracy", "reward_accuracy_before", "reward_accuracy",
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
        "mean_reward", "kl_k3", "policy_loss", "value_loss", "objective", "judge_score", "explained_variance",
        "entropy", "clip_fraction", "response_length", "eos_share", "grad_norm", "learning_rate", "tokens_per_s",
    ),
    outcomes=(
        Outcome(
            "good answers", "good_share_before", "good_share_after", ".1%",
            "the share that the job's own rule calls good; nothing learns from the rule",
            "higher is better",
        ),
        Outcome.of(
            "mean_reward", "mean_reward_before", "mean_reward_after",
            "the reward model's score: 0 is the mean, and 1 the spread, of answers before this step",
            "higher is better, as long as answers do not get worse to read",
            "mean_reward_error_before", "mean_reward_error_after",
        ),
        Outcome.of(
            "judge_score", "judge_score_before", "judge_score_after",
            "the mean score of a second reward model, from which nothing learns",
            "higher is better; falling while the mean reward rises, the reward model is being exploited",
            "judge_score_error_before", "judge_score_error_after",
        ),
        Outcome.of(
            "objective", "objective_before", "objective_after",
            "what step 3 maximises: the clipped reward less `ppo.kl_coef` times the KL",
            "higher is better",
        ),
        Outcome.of(
            "kl_k3", "kl_k3_before", "kl_k3",
            "how far the model has moved from the reference, where this step began, summed over an answer's tokens",
            "a few units are usual; a large one may mean that the reward is being exploited",
        ),
        Outcome.of(
            "response_length", "response_length_before", "response_length_after",
            "tokens of an answer",
            "steady is good; longer and longer answers may exploit the reward",
        ),
        Outcome.of(
            "eos_share", "eos_share_before", "eos_share_after",
            "the share of answers that end by themselves, not at the length limit",
            "higher is better",
        ),
    ),
)  # fmt: skip

STEPS = {step.number: step for step in (SFT, REWARD, PPO)}

OUTCOMES = {outcome.after: outcome for step in STEPS.values() for outcome in step.outcomes}
OTHER_SPEC = ".4g"  # of a metric that the panel does not show


def label_of(name: str) -> str:
    """Return what every view calls a number.

    name: of a metric, or of the field of an `end` event that holds the number after training, with
    or without its `_after`.
    """
    described = _description_of(name)
    return described.label if described else name.replace("_", " ")


def spec_of(name: str) -> str:
    """Return how every view formats a number. name: as in `label_of`."""
    described = _description_of(name)
    return described.spec if described else OTHER_SPEC


def _description_of(name: str) -> MetricFormat | Outcome | None:
    return SHOWN.get(name) or OUTCOMES.get(name) or OUTCOMES.get(f"{name}_after")
