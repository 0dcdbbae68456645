"""The job file: one YAML file for all three steps, checked whole before anything runs.

Batches are global: the same job gives the same learning on 1, 2 or 8 GPUs. `auto` chooses only what
does not change learning. Each field has its meaning and unit next to it, and docs/job-file.md is
made from them (jobs/job_file_page.py). A test fails for a field without a meaning, or one that
nobody reads.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, Tag, ValidationError, model_validator
from pydantic_core import ErrorDetails, PydanticCustomError

from env.settings import Flavour
from jobs.errors import ToolkitError
from jobs.run_dir import RUN_NAME
from jobs.steps import STEPS
from jobs.yaml12 import dump_yaml, load_yaml

JOBS_FOLDER = Path(__file__).parent


def _wants(wanted: str, is_right: Callable[[Any], object]) -> BeforeValidator:
    """Make a check whose mistake is one line; pydantic writes one for each member of a union."""

    def check(value: Any) -> Any:
        if not is_right(value):
            raise PydanticCustomError("wanted", "{wanted}", {"wanted": wanted})
        return value

    return BeforeValidator(check)


def _field(default: Any, meaning: str = "", *, unit: str = "", steps: Sequence[int] = ()) -> Any:
    """Make a field of the job file.

    default: `...` if the file must have the field. meaning: for a section, its docstring has it.
    steps: the steps that read the field, if they are not its section's.
    """
    return Field(default, description=meaning, json_schema_extra={"unit": unit, "steps": list(steps)})


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)  # Python's True is 1, also in a Literal


def _is_list(value: Any, length: int | None = None) -> bool:
    return isinstance(value, list | tuple) and (len(value) == length if length else len(value) > 0)


Positive = Annotated[int, Field(gt=0)]
Rate = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(ge=0, le=1)]
NonNegative = Annotated[float, Field(ge=0)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
Targets = Annotated[
    Literal["all-linear"] | Annotated[tuple[Annotated[str, Field(min_length=1)], ...], Field(strict=False)],
    _wants("'all-linear' or a list of at least one name", lambda value: value == "all-linear" or _is_list(value)),
]
TRACKERS = ("wandb", "trackio")
Trackers = Annotated[
    tuple[Annotated[str, _wants(" or ".join(TRACKERS), lambda value: value in TRACKERS)], ...],
    Field(strict=False),
    _wants(
        f"a list, of {' and '.join(TRACKERS)}, each once",
        lambda value: isinstance(value, list | tuple) and len({*map(str, value)}) == len(value),
    ),
]


def _each_a_flavour(value: Any) -> Any:
    known = Flavour.load_all()
    named = {*map(str, value)} if isinstance(value, list | tuple) else {""}
    if not named <= known.keys() or len(named) < len(value):
        wanted = f"a list, of {' and '.join(known)}, each once"
        raise PydanticCustomError("wanted", "{wanted}", {"wanted": wanted})
    return value


Flavours = Annotated[tuple[str, ...], Field(strict=False), BeforeValidator(_each_a_flavour)]
AutoCount = Annotated[
    Literal["auto"] | int,
    _wants("'auto' or an integer above 0", lambda value: value == "auto" or (_is_integer(value) and value > 0)),
]
ZeroStage = Annotated[
    Literal["auto", 0, 1, 2, 3],
    _wants("'auto', 0, 1, 2 or 3", lambda value: value == "auto" or (_is_integer(value) and 0 <= value <= 3)),
]


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True, extra="forbid", allow_inf_nan=False)


class Scratch(_Strict):
    """A model with random weights, from a configuration."""

    config: dict[str, Any] = _field(
        ..., "`model_type`, e.g. `opt`, and what transformers' `AutoConfig.for_model` takes for it"
    )

    @model_validator(mode="after")
    def _has_type(self) -> Scratch:
        if not isinstance(self.config.get("model_type"), str):
            raise ValueError("config needs a model_type, e.g. opt")
        return self


KINDS_OF_MODEL = ("<name>", "<config>")  # they are in pydantic's paths; no field has one of these names


def _kind_of_model(value: Any) -> str:
    return KINDS_OF_MODEL[isinstance(value, dict | Scratch)]


# A hub name, a local folder, or a configuration to start from random weights.
Model = Annotated[
    Annotated[
        str,
        _wants("a model's name, a folder or a config", lambda value: value and isinstance(value, str)),
        Tag(KINDS_OF_MODEL[0]),
    ]
    | Annotated[Scratch, Tag(KINDS_OF_MODEL[1])],
    Discriminator(_kind_of_model),
]

# A model that was trained elsewhere, and takes the place of a step.
OwnModel = Annotated[
    str, _wants("a model's name or a folder", lambda value: isinstance(value, str) and value and value != "actor")
]


class Lora(_Strict):
    """Low-rank adapters (PEFT) instead of all weights.

    They are merged into the weights in every model that is saved.
    """

    rank: Positive = _field(64, "rank of the two small matrices")
    alpha: Rate = _field(64.0, "the adapter's product is scaled by alpha / rank")
    target_modules: Targets = _field(
        "all-linear",
        "the layers that get an adapter: all linear layers of the blocks, or a list of names, by their last parts",
    )


class Actor(_Strict):
    """The model that learns to answer. Step 1 trains it on answers, step 3 on scores."""

    model: Model = _field(..., "hub name, local folder, or a `config` for random weights")
    tokenizer_vocabulary: Positive = _field(
        4096,
        "with a `config`: the largest vocabulary of the tokenizer that is trained on the job's rows",
        unit="tokens",
    )
    lora: Lora | None = _field(None, "set: train low-rank adapters instead of all weights")
    sft_model: OwnModel | None = _field(
        None,
        "set: hub name or local folder of a fine-tuned model of your own, in place of step 1, which is left out",
        steps=(2, 3),
    )


class Critic(_Strict):
    """The reward model of step 2. Step 3's critic starts from it."""

    model: Model = _field(
        ..., "as `actor.model`; or `actor`: start from the model that step 1 made, or from `actor.sft_model`"
    )
    reward_model: OwnModel | None = _field(
        None,
        "set: hub name or local folder of a reward model of your own, in place of step 2, which is left out. Where "
        "`ppo.advantage` has no critic it may have another tokenizer than the actor, and reads the answers as text",
        steps=(3,),
    )


# Our names of columns, which an entry of `datasets` may rename; rlhf_train/data/forms.py reads them
DATA_COLUMNS = (
    "prompt", "chosen", "rejected", "response", "completion", "messages", "conversations", "conversation",
    "instruction", "input", "output", "system", "history", "label",
)  # fmt: skip


class DataSet(_Strict):
    """Where rows come from, in full. A name alone stands for `{name: NAME}`."""

    name: Annotated[str, Field(min_length=1)] = _field(..., "hub name, local folder or file")
    split: Annotated[str, Field(min_length=1)] | None = _field(
        None, "the split of its training rows, e.g. `train_prefs`; not set: `train`"
    )
    config: Annotated[str, Field(min_length=1)] | None = _field(
        None, "its configuration; not set: the only one, or the default"
    )
    columns: dict[Literal[DATA_COLUMNS], Annotated[str, Field(min_length=1)]] | None = _field(  # type: ignore[valid-type]
        None, "what its columns are called, if otherwise: `{prompt: question, response: answer}`"
    )
    steps: (
        Annotated[
            tuple[Literal[1, 2, 3], ...],
            Field(strict=False),
            _wants(
                "a list of steps, of 1, 2 and 3, each once",
                lambda value: _is_list(value) and len({*map(str, value)}) == len(value) and {*value} <= {1, 2, 3},
            ),
        ]
        | None
    ) = _field(None, "the steps that learn from it; not set: all that can learn from rows of its form")
    weight: Rate = _field(
        1.0, "how often a step takes each of its rows in a pass; 0.5: half of them, chosen by `data.seed`"
    )


# A name, or all that can be said of a data set.
DataSource = Annotated[
    Annotated[str, _wants("text that is not empty", lambda value: value), Tag(KINDS_OF_MODEL[0])]
    | Annotated[DataSet, Tag(KINDS_OF_MODEL[1])],
    Discriminator(lambda value: KINDS_OF_MODEL[isinstance(value, dict | DataSet)]),
]


class Data(_Strict):
    """The rows that all three steps learn from."""

    datasets: Annotated[
        tuple[DataSource, ...],
        Field(strict=False),
        _wants("a list of at least one name", _is_list),
    ] = _field(..., "hub names, local folders, files; or fields that say more of one")
    split: Annotated[
        tuple[NonNegative, NonNegative, NonNegative],
        Field(strict=False),
        _wants("a list of 3 shares", lambda value: _is_list(value, 3)),
    ] = _field((2, 4, 4), "shares of the rows that steps 1, 2 and 3 get", unit="shares")
    seed: Seed = _field(1234, "decides which rows go to which step")
    max_prompt_tokens: Positive = _field(256, "rows with a longer prompt are left out, and counted", unit="tokens")
    max_response_tokens: Positive = _field(
        256, "longer answers are cut, and counted; also the longest rollout", unit="tokens"
    )
    system: Literal["merge", "drop"] | None = _field(
        None,
        "what becomes of a system turn where the chat template refuses one: `merge` puts it in front of the first "
        "user turn, `drop` leaves it out; not set: such rows are refused",
    )
    chat_template_kwargs: dict[str, Any] = _field(
        {}, "what else the chat template reads, e.g. `{enable_thinking: false}`"
    )
    eval_rows: Positive = _field(512, "held-out rows that each evaluation uses, at most", unit="rows")

    @property
    def entries(self) -> tuple[DataSet, ...]:
        """Return the data sets, each in full."""
        return tuple(DataSet(name=each) if isinstance(each, str) else each for each in self.datasets)

    @property
    def names(self) -> list[str]:
        """Return the names of the data sets, each once."""
        return [*dict.fromkeys(entry.name for entry in self.entries)]

    @model_validator(mode="after")
    def _some_share(self) -> Data:
        if not any(self.split):
            raise ValueError("split needs at least one share above 0")
        return self


class Optimization(_Strict):
    """What the three steps' optimizers have in common (AdamW, one learning-rate schedule)."""

    epochs: Rate = _field(1.0, "passes over the step's rows; may be a fraction", unit="passes")
    max_updates: Positive | None = _field(None, "set: end after this many updates", unit="updates")
    schedule: Literal["cosine", "linear", "constant"] = _field(
        "cosine", "how the learning rate falls after the warm-up"
    )
    final_learning_rate: Share = _field(0.0, "where the schedule ends", unit="share of the learning rate")
    warmup_updates: Annotated[int, Field(ge=0)] = _field(
        0, "the learning rate rises for so long, then the schedule begins", unit="updates"
    )
    betas: Annotated[
        tuple[Share, Share], Field(strict=False), _wants("a list of 2 numbers", lambda value: _is_list(value, 2))
    ] = _field((0.9, 0.95), "AdamW's two averages: how much of the old value stays")
    eps: Rate = _field(1e-8, "AdamW's ε, added to the root of its second average")
    weight_decay: NonNegative = _field(0.0, "AdamW's decay of the weights")
    max_grad_norm: Rate = _field(1.0, "gradients with a larger norm are scaled down to it")


class Sft(Optimization):
    """Step 1, supervised fine-tuning of the actor."""

    global_batch: Positive = _field(..., "batch of one update, over all ranks", unit="sequences")
    learning_rate: Rate = _field(..., "the schedule's highest learning rate")
    loss_on_prompt: bool = _field(False, "learn the prompt's tokens too, not the answer's alone")


class Reward(Optimization):
    """Step 2, the reward model."""

    global_batch: Positive = _field(..., "batch of one update, over all ranks", unit="pairs")
    learning_rate: Rate = _field(..., "the schedule's highest learning rate")
    loss: Literal["last_token", "per_token"] = _field(
        "last_token",
        "`last_token`: the Bradley-Terry loss on the answers' last tokens; "
        "`per_token`: on each token after the pair parts, as in DeepSpeed-Chat",
    )
    lm_coef: NonNegative = _field(0.0, "weight of a language-model loss on the chosen answers")


class Ppo(Optimization):
    """Step 3, PPO or a method without a critic. `epochs` counts passes over the prompts."""

    advantage: Literal["gae", "rloo", "grpo", "reinforce_baseline"] = _field(
        "gae",
        "what an answer is compared with. `gae`: with a critic's values, as in PPO; the others: with the other answers "
        "to its prompt, without a critic. `rloo` and `reinforce_baseline` pay for the KL in the rewards, `grpo` in the "
        "loss: docs/which-method.md",
    )
    samples_per_prompt: Positive = _field(
        1, "answers of a rollout to each of its prompts; without a critic 2 or more", unit="answers"
    )
    rollout_batch: Positive = _field(
        ...,
        "answers of one rollout, over all ranks, one a prompt or `samples_per_prompt`; a multiple of `global_batch`",
        unit="answers",
    )
    global_batch: Positive = _field(..., "batch of one update, over all ranks", unit="sequences")
    ppo_epochs: Positive = _field(1, "passes over each rollout", unit="passes")
    actor_learning_rate: Rate = _field(..., "the actor's highest learning rate")
    critic_learning_rate: Rate | None = _field(
        None, "the critic's highest learning rate; `gae` must have it, and no other method reads it"
    )
    # Larger than the other steps': early updates of PPO are smaller and steadier for it. Huang et
    # al. 2023, https://huggingface.co/blog/the_n_implementation_details_of_rlhf_with_ppo
    eps: Rate = _field(1e-5, "AdamW's ε, of actor and critic, added to the root of its second average")
    critic_warmup_updates: Annotated[int, Field(ge=0)] = _field(
        0,
        "the critic alone learns for so long, then the actor's own schedule begins, with its `warmup_updates`",
        unit="updates",
    )
    kl_coef: NonNegative = _field(
        0.1,
        "weight of the KL penalty in the rewards (`grpo`: in the loss). With `normalize_rewards` a score of 1 is one "
        "standard deviation of the reward model's; a weight b for raw scores (as in DeepSpeed-Chat) is "
        "b / reward_scale here",
    )
    kl_target: Rate | None = _field(
        None, "set: `kl_coef` adapts, so that the KL to the reference comes near this", unit="nats a response"
    )
    kl_horizon: Rate = _field(10_000.0, "how slowly `kl_coef` adapts", unit="samples")
    clip_range: Rate = _field(0.2, "the policy loss clips the ratio to 1 plus or minus this")
    clip_range_high: Rate | None = _field(
        None, "set: the ratio is clipped to 1 plus this above, and to 1 minus `clip_range` below (DAPO's clip-higher)"
    )
    loss_mean: Literal["token", "sequence", "constant"] = _field(
        "token",
        "the policy loss is a mean over the update's tokens (`token`); over its answers, of which each is the mean of "
        "its tokens (`sequence`, as in GRPO's paper); or over its answers, of which each is the sum of its tokens "
        "divided by `data.max_response_tokens` (`constant`, as in Dr. GRPO)",
    )
    value_clip_range: Rate = _field(0.2, "the value loss clips the change of a value to this")
    gamma: Share = _field(1.0, "discount of later rewards")
    lam: Share = _field(0.95, "GAE's λ: 1 trusts the rewards, 0 the critic")
    temperature: Rate = _field(1.0, "of sampling: lower is closer to greedy")
    # Tokens that a rollout may not draw keep their probability in log-probs and KL, whose estimates
    # are then biased.
    top_k: Positive | None = _field(
        None,
        "set: draw from only so many of the likeliest tokens (1: greedy); the KL's estimate is then biased",
        unit="tokens",
    )
    top_p: Annotated[float, Field(gt=0, le=1)] | None = _field(
        None,
        "set: draw from only the fewest tokens that have this share of the probability; "
        "the KL's estimate is then biased",
        unit="share",
    )
    normalize_rewards: bool = _field(
        True, "shift and scale scores to mean 0 and standard deviation 1 on the reference's answers"
    )
    reward_clip: Rate = _field(5.0, "scores are clipped to plus or minus this")
    max_kl: Rate = _field(
        200.0, "a rollout whose mean KL is beyond this ends the run: the actor is lost", unit="nats a response"
    )
    missing_eos_penalty: NonNegative = _field(
        0.0, "taken from the score of an answer that did not end, before the clip"
    )
    whiten_rewards: bool = _field(False, "scale rewards to standard deviation 1 over all ranks; their mean stays")
    whiten_advantages: bool = _field(
        True,
        "shift and scale advantages to mean 0 and standard deviation 1 over all ranks; with `grpo` they are divided by "
        "the standard deviation of their prompt's answers instead",
    )
    samples_every_updates: Positive | None = _field(
        None,
        "answers to a few held-out prompts are sampled and kept so often, at the next rollout; "
        "not set: a quarter, half and three quarters through",
        unit="updates",
    )
    ema_decay: Annotated[float, Field(gt=0, lt=1)] | None = _field(
        None,
        "set: also save `step3/model_ema`, a moving average of the actor's weights; "
        "how much of the old average stays at each update",
    )
    rule: (
        Annotated[
            str,
            _wants("module:function", lambda value: isinstance(value, str) and re.fullmatch(r"\w+(\.\w+)*:\w+", value)),
        ]
        | None
    ) = _field(
        None,
        "`module:function`; `function(prompt, response, ended)` says whether an answer is good. "
        "Only reported: nothing learns from it",
    )
    judge_model: OwnModel | None = _field(
        None,
        "set: hub name or local folder of a second reward model, of the actor's tokenizer, which scores the answers, "
        "too; an alarm says if the reward rises while these scores fall. Only reported: nothing learns from it",
    )

    @model_validator(mode="after")
    def _whole_updates(self) -> Ppo:
        if text := _not_whole(self.rollout_batch, self.global_batch):
            raise ValueError(text)
        return self

    @model_validator(mode="after")
    def _fits_the_method(self) -> Ppo:
        if self.has_critic and self.critic_learning_rate is None:
            raise ValueError("critic_learning_rate: this field is required with advantage: gae")
        if self.rollout_batch % self.samples_per_prompt:
            raise ValueError(
                f"rollout_batch {self.rollout_batch} is not a multiple of samples_per_prompt {self.samples_per_prompt}"
            )
        if self.has_critic:
            return self
        if self.samples_per_prompt < 2:
            raise ValueError(
                f"samples_per_prompt: 2 or more with advantage: {self.advantage}, which compares a prompt's answers"
            )
        if self.critic_warmup_updates:
            raise ValueError(f"critic_warmup_updates: advantage: {self.advantage} has no critic; leave the field out")
        if self.whiten_rewards:
            raise ValueError(f"whiten_rewards: only with advantage: gae, not {self.advantage}")
        return self

    @property
    def has_critic(self) -> bool:
        return self.advantage == "gae"

    @property
    def kl_in_loss(self) -> bool:
        """Return whether the KL penalty is a term of the loss (k3), not of the rewards (k1)."""
        return self.advantage == "grpo"

    @property
    def prompts_per_rollout(self) -> int:
        return self.rollout_batch // self.samples_per_prompt

    @property
    def unread(self) -> list[str]:
        """List the fields that are set, and that this method does not read."""
        if self.has_critic:
            return []
        names = ["critic_learning_rate", "value_clip_range", "lam"]
        names += [] if self.advantage == "reinforce_baseline" else ["gamma"]
        return [name for name in names if getattr(self, name) != type(self).model_fields[name].default]


class Hardware(_Strict):
    """How, not what: no field here changes what is learned, up to rounding."""

    ranks: AutoCount = _field("auto", "training processes; `auto`: one a GPU, 1 on the CPU", unit="processes")
    device: Literal["auto", "cpu", "cuda"] = _field("auto", "`auto`: `cuda` where PyTorch sees a GPU, else `cpu`")
    precision: Literal["auto", "float32", "bfloat16", "float16"] = _field(
        "auto", "`auto`: `float32` on the CPU; `bfloat16` where all GPUs compute in it, else `float16`"
    )
    actor_zero_stage: ZeroStage = _field(
        "auto", "DeepSpeed ZeRO stage of the actor; `auto`: 1 on several GPUs without LoRA, else 0", steps=(1, 3)
    )
    critic_zero_stage: ZeroStage = _field(
        "auto",
        "DeepSpeed ZeRO stage of the reward model and the critic; `auto`: 1 on several GPUs, else 0",
        steps=(2, 3),
    )
    micro_batch: AutoCount = _field(
        "auto",
        "batch of one forward and backward pass of one rank; `auto`: by the GPU's memory, 8 at most on the CPU",
        unit="sequences (step 2: pairs)",
    )
    rollout_micro_batch: AutoCount = _field(
        "auto",
        "prompts that one rank answers concurrently; `auto`: by the GPU's free memory, 64 on the CPU",
        unit="prompts",
        steps=(3,),
    )
    gradient_checkpointing: bool = _field(
        False, "compute activations again in the backward pass: less memory, more time"
    )
    cpu_threads: AutoCount = _field(
        "auto", "threads of one rank, on the CPU, at most one a core; `auto`: its share of the cores", unit="threads"
    )


class CheckpointSchedule(_Strict):
    """What a run that is stopped, killed or preempted resumes from. A step keeps its last one."""

    every_minutes: Rate | None = _field(
        10.0,
        "time between checkpoints; more where saving would cost more than 1 % of the training time; "
        "`null`: none by time",
        unit="minutes",
    )
    every_updates: Positive | None = _field(None, "set: a checkpoint also after each so many updates", unit="updates")
    grace_s: Rate = _field(
        60.0,
        "time from SIGTERM to the end; a checkpoint is made if the last one was quicker than what is left of it",
        unit="seconds",
    )
    best_every_updates: Positive | None = _field(
        None,
        "set: measure on held-out data so often, and at the end, and keep the best weights in `stepN/best/`",
        unit="updates",
    )


class Job(_Strict):
    name: Annotated[
        str,
        _wants(
            "letters, digits, dots, dashes and underscores, 64 at most",
            lambda value: isinstance(value, str) and RUN_NAME.fullmatch(value),
        ),
    ] = _field(..., "names the run's folder, unless `--run` does", steps=(1, 2, 3))
    flavours: Flavours = _field(
        (),
        "the flavours of the stack that run it, e.g. `[cu118, cu130]`; others refuse it. "
        "`[]`: all that have its models (see models-and-data.md)",
        steps=(1, 2, 3),
    )
    seed: Seed = _field(1234, "of weights from a config, of the order of rows, of sampling", steps=(1, 2, 3))
    actor: Actor = _field(..., steps=(1, 3))
    critic: Critic = _field(..., steps=(2, 3))
    data: Data = _field(..., steps=(1, 2, 3))
    sft: Sft = _field(..., steps=(1,))
    reward: Reward = _field(..., steps=(2,))
    ppo: Ppo = _field(..., steps=(3,))
    hardware: Hardware = _field(Hardware(), steps=(1, 2, 3))
    checkpoint: CheckpointSchedule = _field(CheckpointSchedule(), steps=(1, 2, 3))
    track: Trackers = _field(
        (),
        "trackers that get all metrics, and this job as the run's config: `wandb`, `trackio`",
        steps=(1, 2, 3),
    )

    def dump(self) -> dict[str, Any]:
        """Convert the job to plain lists, dicts and numbers, as YAML and JSON have them."""
        return self.model_dump(mode="json")

    @property
    def own_models(self) -> dict[int, str]:
        """Return the models that take the place of a step's result, by step."""
        models = {1: self.actor.sft_model, 2: self.critic.reward_model}
        return {step: model for step, model in models.items() if model is not None}

    def starts_from(self, step: int) -> list[int]:
        """List the steps whose models `step` starts from, or models that take their place."""
        return [] if step == 2 and self.critic.model != "actor" else list(STEPS[step].starts_from)

    def own_models_of(self, step: int) -> dict[str, str]:
        """Return the models of one's own that `step` starts from, by the field that names them."""
        fields = {1: "actor.sft_model", 2: "critic.reward_model"}
        return {fields[n]: self.own_models[n] for n in self.starts_from(step) if n in self.own_models}

    def without_own_models(self) -> Job:
        """Return this job with all models made by its steps."""
        actor = self.actor.model_copy(update={"sft_model": None})
        critic = self.critic.model_copy(update={"reward_model": None})
        return self.model_copy(update={"actor": actor, "critic": critic})

    @property
    def actor_source(self) -> str | Scratch:
        """Return the model that the run's first actor is loaded from."""
        return self.own_models.get(1, self.actor.model)

    @property
    def critic_source(self) -> str | Scratch:
        """Return the model that the run's first critic is loaded from, or has the shape of."""
        return self.own_models.get(2) or (self.actor_source if self.critic.model == "actor" else self.critic.model)

    @property
    def sources(self) -> list[str | Scratch]:
        """Return all models that the run loads and that its own steps do not make."""
        return [self.actor_source, self.critic_source, *([self.ppo.judge_model] if self.ppo.judge_model else [])]

    @property
    def may_score_text(self) -> bool:
        """Return whether the reward model may have another tokenizer than the actor.

        A critic predicts the rewards from the actor's own tokens, so there is none then.
        """
        return self.critic.reward_model is not None and not self.ppo.has_critic

    def networks_of(self, step: int) -> tuple[str, ...]:
        """Return the networks that `step` trains."""
        has_critic = step != 3 or self.ppo.has_critic
        return tuple(network for network in STEPS[step].networks if network != "critic" or has_critic)

    def models_read(self, steps: Collection[int]) -> tuple[list[str], list[str]]:
        """List the models that `steps` load whole, and those of which they read the tokenizer only.

        By hub name or folder. Models that the run's own steps make are not among them.
        """
        own, left = self.own_models, {*steps} - {*self.own_models}
        actor = self.actor_source
        critic = own.get(2, None if self.critic.model == "actor" else self.critic.model)
        starts = {start for step in left for start in self.starts_from(step)}
        whole = [
            actor if 1 in left or (1 in own and 1 in starts) else None,
            critic if 2 in left or (2 in own and 2 in starts) else None,
            self.ppo.judge_model if 3 in left else None,
        ]
        tokenizers = [
            critic if 1 in left else None,  # step 1 compares it with the actor's
            actor if 2 in left and isinstance(critic, Scratch) else None,
        ]
        named = [*dict.fromkeys(name for name in whole if isinstance(name, str))]
        return named, [name for name in tokenizers if isinstance(name, str) and name not in named]

    def fields_of_step(self, step: int) -> dict[str, Any]:
        """Return the fields that decide what `step` learns, by dotted path.

        If one of them changes, the step's old result no longer counts.
        """
        tree = self.model_dump(mode="json", exclude_none=True)  # None: not set; only a field that is set can differ
        parts = list(STEPS[step].depends_on)
        if step == 2 and self.critic.model == "actor":
            parts += ["actor", "sft"]
        if step == 2 and isinstance(self.critic.model, Scratch):
            parts += ["actor"]  # the reward model reads with the actor's tokenizer
        tree["data"].pop("eval_rows", None)  # it decides what is measured, not what is learned
        tree["ppo"].pop("samples_every_updates", None)  # as this one
        # Of a model that takes the place of a step, its name counts, and nothing of that step.
        for place in self.own_models:
            network, section = ("actor", "sft") if place == 1 else ("critic", "reward")
            kept = ("sft_model", "reward_model", "lora") if step == 3 else ("sft_model", "reward_model")
            tree[network] = {name: value for name, value in tree[network].items() if name in kept}
            tree[section] = {}
        chosen = {part: tree[part] for part in parts}
        return dict(_flat(chosen)) | {"hardware.precision": self.hardware.precision}


def _flat(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _flat(inner, f"{path}.{key}" if path else key)
    else:
        yield path, value


def difference(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Describe each changed field on a line: `sft.epochs: 1.0 -> 2.0`."""
    absent = "not set"
    return [
        f"{key}: {old.get(key, absent)} -> {new.get(key, absent)}"
        for key in sorted(old.keys() | new.keys())
        if old.get(key, absent) != new.get(key, absent)
    ]


# --- reading --------------------------------------------------------------------------------------


def find_job(name_or_file: str) -> Path:
    """Return the path of `jobs/NAME.yaml` in this checkout, or of a file."""
    is_file = "/" in name_or_file or name_or_file.endswith((".yaml", ".yml"))
    path = Path(name_or_file) if is_file else JOBS_FOLDER / f"{name_or_file}.yaml"
    if os.path.isfile(path):  # noqa: PTH113 (Path.is_file raises when the name is too long)
        return path
    known = ", ".join(sorted(path.stem for path in JOBS_FOLDER.glob("*.yaml")))
    raise ToolkitError(
        f"there is no job `{name_or_file}`",
        why=f"neither a file of that name nor one of: {known}",
        hint="name one of these, or give the path of a .yaml file (a container sees those in ./jobs alone)",
    )


def load_job(name_or_file: str, settings: Sequence[str] = ()) -> Job:
    """Read a job, apply `a.b=value` settings, and check it.

    Raises ToolkitError with all mistakes together.
    """
    path = find_job(name_or_file)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ToolkitError(f"cannot read {path}", why=str(error)) from None
    return parse_job(text, str(path), settings)


def parse_job(text: str, source: str, settings: Sequence[str] = ()) -> Job:
    tree = load_yaml(text, source)
    if not isinstance(tree, dict):
        raise ToolkitError(
            f"{source} is not a job file", why=f"it holds {type(tree).__name__}, not a mapping of fields"
        )
    for setting in settings:
        _apply(tree, setting)
    try:
        return Job.model_validate(tree)
    except ValidationError as error:
        mistakes = [_explain(mistake) for mistake in error.errors()]
        mistakes += [mistake for mistake in _partial_updates(tree) if mistake not in mistakes]
        count = "one mistake" if len(mistakes) == 1 else f"{len(mistakes)} mistakes"
        raise ToolkitError(
            f"{count} in {source}{' with --set' if settings else ''}",
            why="\n".join(mistakes),
            hint="docs/job-file.md explains every field",
        ) from None


def _partial_updates(tree: dict[str, Any]) -> list[str]:
    """Return what `Ppo` says of its batches; pydantic leaves it out if another field is wrong."""
    ppo = tree.get("ppo")
    match (ppo.get("rollout_batch"), ppo.get("global_batch")) if isinstance(ppo, dict) else ():
        case (int(rollout), int(update)) if rollout > 0 and update > 0 and (text := _not_whole(rollout, update)):
            return [f"ppo: {text}"]
    return []


def _not_whole(rollout_batch: int, global_batch: int) -> str:
    if rollout_batch % global_batch == 0:
        return ""
    return f"rollout_batch {rollout_batch} is not a multiple of global_batch {global_batch}"


def _apply(tree: dict[str, Any], setting: str) -> None:
    """Set a field of the tree by `a.b=value`, with the value in YAML."""
    path, equals, value = setting.partition("=")
    keys = path.strip().split(".")
    if not equals or not all(keys):
        raise ToolkitError(f"--set {setting} is not of the form a.b=value", hint="e.g. --set ppo.kl_coef=0.05")
    for depth, key in enumerate(keys[:-1]):
        if tree.get(key) is None:
            tree[key] = {}
        tree = tree[key]
        if not isinstance(tree, dict):
            raise ToolkitError(f"--set {setting}: {'.'.join(keys[: depth + 1])} is a value, it has no fields")
    tree[keys[-1]] = load_yaml(value, f"--set {setting}")


# pydantic's kinds of mistake -> what is wanted instead, in our words.
WANTED = {
    "wanted": "{wanted}",
    "int_type": "an integer",
    "float_type": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "string_type": "text",
    "string_too_short": "text that is not empty",
    "dict_type": "fields",
    "model_type": "fields",
    "literal_error": "{expected}",
    "greater_than": "above {gt}",
    "greater_than_equal": "{ge} or above",
    "less_than": "below {lt}",
    "less_than_equal": "{le} or below",
}


def _explain(mistake: ErrorDetails) -> str:
    """Describe a mistake on one line: path, what is wrong, the valid choices, the value seen."""
    location = [str(part) for part in mistake["loc"] if part not in (*KINDS_OF_MODEL, "[key]")]
    path, kind = ".".join(location), mistake["type"]
    if kind == "extra_forbidden":
        valid = _fields_at(location[:-1])
        guess = _guess(location, valid)
        return f"{path}: unknown field; {guess}valid here: {', '.join(valid)}"
    if kind == "missing":
        return f"{path}: this field is required"
    if kind not in WANTED:
        return f"{path}: {mistake['msg'].removeprefix('Value error, ')}"
    if path == "actor.lora" and mistake["input"] is True:
        return "actor.lora: fields, not True; `lora: {}` takes the defaults"
    if path.endswith("precision") and str(mistake["input"]) in ("fp16", "half", "bf16", "fp32"):
        word = {"bf16": "bfloat16", "fp32": "float32"}.get(str(mistake["input"]), "float16")
        return f"{path}: did you mean {word}? not {_shown(mistake['input'])}"
    context = mistake.get("ctx", {})
    limits = {name: f"{limit:g}" if isinstance(limit, float) else limit for name, limit in context.items()}
    return f"{path}: {WANTED[kind].format(**limits)}, not {_shown(mistake['input'])}"


# Words of other toolkits -> our fields, by the last part of their path.
SYNONYMS = {
    "lr": ("learning_rate", "actor_learning_rate"),
    "batch_size": ("global_batch",),
    "train_batch_size": ("global_batch",),
    "num_train_epochs": ("epochs",),
    "max_steps": ("max_updates",),
    "fp16": ("precision",),
    "bf16": ("precision",),
    "dataset": ("data.datasets",),
    "datasets": ("data.datasets",),
    "model": ("actor.model",),
    "model_name_or_path": ("actor.model", "model"),
    "tokenizer": ("actor.model",),
    "sft_model": ("actor.sft_model",),
    "reward_model": ("critic.reward_model",),
    "judge": ("judge_model", "ppo.judge_model"),
    "beta": ("kl_coef",),
    "cliprange": ("clip_range",),
}


def _guess(location: Sequence[str], valid: Sequence[str]) -> str:
    """Return `did you mean ...? ` for an unknown field; "" if nothing is like it."""
    known = [name for name in SYNONYMS.get(location[-1], ()) if name in valid or (len(location) == 1 and "." in name)]
    near = known or difflib.get_close_matches(location[-1], valid, n=1)
    return f"did you mean {near[0]}? " if near else ""


def _shown(value: Any) -> str:
    text = "nothing" if value is None else repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."


def _fields_at(location: Sequence[str]) -> list[str]:
    model: Any = Job
    for part in (part for part in location if not part.isdigit()):
        inner = models_in(model.model_fields[part].annotation)
        if not inner:
            return []
        model = inner[0]
    return list(model.model_fields)


def models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for inner in getattr(annotation, "__args__", ()) for model in models_in(inner)]


def steps_of(words: Sequence[str]) -> list[int]:
    """Parse `--step 1 3`, `--step 1,3` or `--step all` into the steps, in order."""
    parts = [part for word in words for part in word.split(",") if part]
    unknown = [part for part in parts if part not in ("1", "2", "3", "all")]
    if unknown or not parts:
        raise ToolkitError(f"--step {' '.join(words)} is not a step", hint="use 1, 2, 3 (several allowed) or all")
    return [1, 2, 3] if "all" in parts else sorted({int(part) for part in parts})


DEPLOYMENT_TYPES = ("single_gpu", "single_node", "multi_node")  # DeepSpeed-Chat's words


def settings_of_deployment(kind: str) -> list[str]:
    """Translate `--deployment-type` into settings as `--set` takes them."""
    if kind == "multi_node":
        raise ToolkitError(
            "--deployment-type multi_node is not supported yet",
            why="rented containers open no ports to each other",
            hint="use single_node: all GPUs of one machine",
        )
    if kind not in DEPLOYMENT_TYPES:
        raise ToolkitError(f"--deployment-type {kind} is not known", hint=f"one of {', '.join(DEPLOYMENT_TYPES)}")
    return ["hardware.ranks=" + {"single_gpu": "1", "single_node": "auto"}[kind]]


def save_job(job: Job, path: Path) -> None:
    """Write the resolved job as a job file, which reads back to the same job."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(dump_yaml(job.dump()), encoding="utf-8")
    partial.replace(path)
