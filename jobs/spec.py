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

from jobs.errors import ToolkitError
from jobs.steps import STEPS
from jobs.yaml12 import dump_yaml, load_yaml

JOBS_FOLDER = Path(__file__).parent
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")  # of a job or a run: it becomes a folder's name


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
Names = Annotated[
    tuple[Annotated[str, Field(min_length=1)], ...],
    Field(strict=False),
    _wants("a list of at least one name", _is_list),
]
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
        "set: hub name or local folder of a reward model of your own, in place of step 2, which is left out",
        steps=(3,),
    )


class Data(_Strict):
    """The rows that all three steps learn from."""

    datasets: Names = _field(..., "hub names, local folders, JSONL files")
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
    eval_rows: Positive = _field(512, "held-out rows that each evaluation uses, at most", unit="rows")

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
    """Step 3, PPO. `epochs` counts passes over the prompts."""

    rollout_batch: Positive = _field(
        ..., "prompts of one rollout, over all ranks; a multiple of `global_batch`", unit="prompts"
    )
    global_batch: Positive = _field(..., "batch of one update, over all ranks", unit="sequences")
    ppo_epochs: Positive = _field(1, "passes over each rollout", unit="passes")
    actor_learning_rate: Rate = _field(..., "the actor's highest learning rate")
    critic_learning_rate: Rate = _field(..., "the critic's highest learning rate")
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
        "weight of the KL penalty in the rewards. With `normalize_rewards` a score of 1 is one standard deviation of "
        "the reward model's; a weight b for raw scores (as in DeepSpeed-Chat) is b / reward_scale here",
    )
    kl_target: Rate | None = _field(
        None, "set: `kl_coef` adapts, so that the KL to the reference comes near this", unit="nats a response"
    )
    kl_horizon: Rate = _field(10_000.0, "how slowly `kl_coef` adapts", unit="samples")
    clip_range: Rate = _field(0.2, "the policy loss clips the ratio to 1 plus or minus this")
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
        True, "shift and scale advantages to mean 0 and standard deviation 1 over all ranks"
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

    @model_validator(mode="after")
    def _whole_updates(self) -> Ppo:
        if self.rollout_batch % self.global_batch:
            raise ValueError(
                f"rollout_batch {self.rollout_batch} is not a multiple of global_batch {self.global_batch}"
            )
        return self


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
        "auto", "threads of one rank, on the CPU; `auto`: its share of the cores", unit="threads"
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
            lambda value: isinstance(value, str) and NAME.fullmatch(value),
        ),
    ] = _field(..., "names the run's folder, unless `--run` does", steps=(1, 2, 3))
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
        hint="name one of these, or give the path of a .yaml file",
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
        count = "one mistake" if len(mistakes) == 1 else f"{len(mistakes)} mistakes"
        raise ToolkitError(
            f"{count} in {source}{' with --set' if settings else ''}",
            why="\n".join(mistakes),
            hint="docs/job-file.md explains every field",
        ) from None


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
    location = [str(part) for part in mistake["loc"] if part not in KINDS_OF_MODEL]
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
    for part in location:
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
