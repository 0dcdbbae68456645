"""The job file: one YAML file for all three steps, checked whole before anything runs.

Batches are global: the same job gives the same learning on 1, 2 or 8 GPUs. `auto` chooses only what does not change
learning. Units stand in the comments; a field without a reader fails a test.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, Tag, ValidationError, model_validator
from pydantic_core import ErrorDetails, PydanticCustomError

from jobs.errors import ToolkitError
from jobs.steps import STEPS
from jobs.yaml12 import dump_yaml, load_yaml

JOBS_FOLDER = Path(__file__).parent
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")  # of a job or a run: it becomes a folder's


def _wants(wanted: str, is_right: Callable[[Any], object]) -> BeforeValidator:
    """A check whose mistake is one line, where pydantic would write one for each member of a union."""

    def check(value: Any) -> Any:
        if not is_right(value):
            raise PydanticCustomError("wanted", "{wanted}", {"wanted": wanted})
        return value

    return BeforeValidator(check)


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)  # Python's True is 1, also in a Literal


def _is_list(value: Any, length: int | None = None) -> bool:
    return isinstance(value, list | tuple) and (len(value) == length if length else len(value) > 0)


Positive = Annotated[int, Field(gt=0)]
Rate = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(ge=0, le=1)]
NonNegative = Annotated[float, Field(ge=0)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
Names = Annotated[tuple[Annotated[str, Field(min_length=1)], ...], Field(strict=False), _wants("a list of at least one name", _is_list)]
AutoCount = Annotated[
    Literal["auto"] | int, _wants("'auto' or an integer above 0", lambda value: value == "auto" or (_is_integer(value) and value > 0))
]
ZeroStage = Annotated[
    Literal["auto", 0, 1, 2, 3], _wants("'auto', 0, 1, 2 or 3", lambda value: value == "auto" or (_is_integer(value) and 0 <= value <= 3))
]


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True, extra="forbid", allow_inf_nan=False)


class Scratch(_Strict):
    """A model with random weights, from a configuration."""

    config: dict[str, Any]  # model_type and what transformers' AutoConfig.for_model takes

    @model_validator(mode="after")
    def _has_type(self) -> Scratch:
        if not isinstance(self.config.get("model_type"), str):
            raise ValueError("config needs a model_type, e.g. opt")
        return self


KINDS_OF_MODEL = ("<name>", "<config>")  # stand in pydantic's paths; no field has such a name


def _kind_of_model(value: Any) -> str:
    return KINDS_OF_MODEL[isinstance(value, dict | Scratch)]


# A hub name, a local folder, or a configuration to start from random weights.
Model = Annotated[
    Annotated[str, _wants("a model's name, a folder or a config", lambda value: value and isinstance(value, str)), Tag(KINDS_OF_MODEL[0])]
    | Annotated[Scratch, Tag(KINDS_OF_MODEL[1])],
    Discriminator(_kind_of_model),
]


class Lora(_Strict):
    """Low-rank adapters (PEFT) instead of all weights. Merged into the weights in every model that is saved."""

    rank: Positive = 64
    alpha: Rate = 64.0  # the update is scaled by alpha / rank
    target_modules: Names = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")


class Actor(_Strict):
    model: Model
    tokenizer_vocabulary: Positive = 4096  # model from a config: the size of the tokenizer trained on the job's rows, at most
    lora: Lora | None = None  # steps 1 and 3


class Critic(_Strict):
    """The reward model of step 2; step 3's critic starts from it."""

    model: Model  # "actor": start from the model that step 1 made


class Data(_Strict):
    datasets: Names  # hub names, local folders, JSONL files
    split: Annotated[
        tuple[NonNegative, NonNegative, NonNegative], Field(strict=False), _wants("a list of 3 shares", lambda value: _is_list(value, 3))
    ] = (2, 4, 4)  # of steps 1, 2 and 3
    seed: Seed = 1234  # which rows go to which step
    max_prompt_tokens: Positive = 256  # rows with longer prompts are left out, and counted
    max_response_tokens: Positive = 256  # longer answers are cut, and counted; also the longest rollout
    eval_rows: Positive = 512  # held-out rows used by each evaluation, at most

    @model_validator(mode="after")
    def _some_share(self) -> Data:
        if not any(self.split):
            raise ValueError("split needs at least one share above 0")
        return self


class Optimization(_Strict):
    """What the three steps' optimizers have in common (AdamW, one learning-rate schedule)."""

    epochs: Rate = 1.0  # passes over the step's rows; may be a fraction
    max_updates: Positive | None = None  # end earlier
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    final_learning_rate: Share = 0.0  # share of the learning rate that the schedule ends at
    warmup_updates: Annotated[int, Field(ge=0)] = 0
    betas: Annotated[tuple[Share, Share], Field(strict=False), _wants("a list of 2 numbers", lambda value: _is_list(value, 2))] = (0.9, 0.95)
    weight_decay: NonNegative = 0.0
    max_grad_norm: Rate = 1.0


class Sft(Optimization):
    global_batch: Positive  # sequences an update
    learning_rate: Rate
    loss_on_prompt: bool = False


class Reward(Optimization):
    global_batch: Positive  # pairs an update
    learning_rate: Rate
    loss: Literal["last_token", "per_token"] = "last_token"
    lm_coef: NonNegative = 0.0  # weight of a language-model loss on the chosen answers


class Ppo(Optimization):
    rollout_batch: Positive  # prompts a rollout
    global_batch: Positive  # sequences an update
    ppo_epochs: Positive = 1  # passes over a rollout
    actor_learning_rate: Rate
    critic_learning_rate: Rate
    kl_coef: NonNegative = 0.1
    kl_target: Rate | None = None  # nats a response; set: kl_coef adapts to it
    kl_horizon: Rate = 10_000.0  # samples; how slowly it adapts
    clip_range: Rate = 0.2
    value_clip_range: Rate = 0.2
    gamma: Share = 1.0
    lam: Share = 0.95
    temperature: Rate = 1.0
    # Tokens that a rollout may not draw keep their probability in log-probs and KL, whose estimates are then biased. top_k 1: greedy.
    top_k: Positive | None = None  # only so many of the likeliest
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None  # only the fewest that have this share of the probability
    normalize_rewards: bool = True  # mean 0, std 1 on the reference's answers
    reward_clip: Rate = 5.0
    max_kl: Rate = 200.0  # nats a response, mean over a rollout; beyond it the actor is lost, and the run stops
    missing_eos_penalty: NonNegative = 0.0  # taken from the score of a response that did not end, before the clip
    whiten_rewards: bool = False  # over all ranks; keeps the mean
    whiten_advantages: bool = True  # over all ranks
    ema_decay: Annotated[float, Field(gt=0, lt=1)] | None = None  # set: step 3 also saves model_ema
    rule: (  # module:function(prompt, response, ended) -> good?
        Annotated[str, _wants("module:function", lambda value: isinstance(value, str) and re.fullmatch(r"\w+(\.\w+)*:\w+", value))] | None
    ) = None

    @model_validator(mode="after")
    def _whole_updates(self) -> Ppo:
        if self.rollout_batch % self.global_batch:
            raise ValueError(f"rollout_batch {self.rollout_batch} is not a multiple of global_batch {self.global_batch}")
        return self


class Hardware(_Strict):
    """How, not what: no field here changes what is learned, up to rounding."""

    ranks: AutoCount = "auto"  # processes; auto: one a GPU, 1 on CPU
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    actor_zero_stage: ZeroStage = "auto"
    critic_zero_stage: ZeroStage = "auto"
    micro_batch: AutoCount = "auto"  # sequences (pairs in step 2) a forward and backward, one rank
    rollout_micro_batch: AutoCount = "auto"  # prompts generated at once, one rank
    gradient_checkpointing: bool = False
    cpu_threads: AutoCount = "auto"  # a rank, on CPU


class Checkpoint(_Strict):
    """What a run that is stopped, killed or preempted goes on from. The step's last is kept, besides the one being written."""

    every_minutes: Rate | None = 10.0  # more seldom where saving would hold up training for more than 1 % of the time
    every_updates: Positive | None = None  # also after each so many updates
    grace_s: Rate = 60.0  # seconds from SIGTERM to the end: a checkpoint is made if the last one was quicker
    best_every_updates: Positive | None = None  # set: measure on held-out data so often, and keep the best weights beside the model


class Job(_Strict):
    name: Annotated[
        str, _wants("letters, digits, dots, dashes and underscores, 64 at most", lambda value: isinstance(value, str) and NAME.fullmatch(value))
    ]
    seed: Seed = 1234  # weights from a config, order of rows, sampling
    actor: Actor
    critic: Critic
    data: Data
    sft: Sft
    reward: Reward
    ppo: Ppo
    hardware: Hardware = Hardware()
    checkpoint: Checkpoint = Checkpoint()

    def dump(self) -> dict[str, Any]:
        """Plain lists, dicts and numbers, as YAML and JSON have them."""
        return self.model_dump(mode="json")

    def fields_of_step(self, step: int) -> dict[str, Any]:
        """The fields that decide what `step` learns, by dotted path. Changed: the step's old result no longer counts."""
        whole = self.model_dump(mode="json", exclude_none=True)  # None: not set; only a field that is set can differ
        parts = list(STEPS[step].depends_on)
        if step == 2 and self.critic.model == "actor":
            parts += ["actor", "sft"]
        if step == 2 and isinstance(self.critic.model, Scratch):
            parts += ["actor"]  # whose tokenizer it reads with
        chosen = {part: whole[part] for part in parts}
        return dict(_flat(chosen)) | {"hardware.precision": self.hardware.precision}


def _flat(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _flat(inner, f"{path}.{key}" if path else key)
    else:
        yield path, value


def difference(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """One line a changed field: `sft.epochs: 1.0 -> 2.0`."""
    absent = "not set"
    return [
        f"{key}: {old.get(key, absent)} -> {new.get(key, absent)}"
        for key in sorted(old.keys() | new.keys())
        if old.get(key, absent) != new.get(key, absent)
    ]


# --- reading -------------------------------------------------------------------------------------------------------


def find_job(name_or_file: str) -> Path:
    """`jobs/NAME.yaml` of this checkout, or a file."""
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
    """Read, apply `a.b=value` settings, check. Raises ToolkitError with every mistake at once."""
    path = find_job(name_or_file)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ToolkitError(f"cannot read {path}", why=str(error)) from None
    return parse_job(text, str(path), settings)


def parse_job(text: str, source: str, settings: Sequence[str] = ()) -> Job:
    tree = load_yaml(text, source)
    if not isinstance(tree, dict):
        raise ToolkitError(f"{source} is not a job file", why=f"it holds {type(tree).__name__}, not a mapping of fields")
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
            hint="every field stands with its meaning in jobs/spec.py",
        ) from None


def _apply(tree: dict[str, Any], setting: str) -> None:
    """`a.b=value`, the value in YAML, into the tree."""
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


# What pydantic's kinds of mistake ask for, in our words.
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
    """One line: path, what is wrong, the valid choices, the value seen."""
    location = [str(part) for part in mistake["loc"] if part not in KINDS_OF_MODEL]
    path, kind = ".".join(location), mistake["type"]
    if kind == "extra_forbidden":
        valid = _fields_at(location[:-1])
        near = difflib.get_close_matches(location[-1], valid, n=1)
        return f"{path}: unknown field; " + (f"did you mean {near[0]}? " if near else "") + f"valid here: {', '.join(valid)}"
    if kind == "missing":
        return f"{path}: this field is required"
    if kind not in WANTED:
        return f"{path}: {mistake['msg'].removeprefix('Value error, ')}"
    limits = {name: f"{limit:g}" if isinstance(limit, float) else limit for name, limit in mistake.get("ctx", {}).items()}
    return f"{path}: {WANTED[kind].format(**limits)}, not {_shown(mistake['input'])}"


def _shown(value: Any) -> str:
    text = "nothing" if value is None else repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."


def _fields_at(location: Sequence[str]) -> list[str]:
    model: Any = Job
    for part in location:
        inner = _models_in(model.model_fields[part].annotation)
        if not inner:
            return []
        model = inner[0]
    return list(model.model_fields)


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for inner in getattr(annotation, "__args__", ()) for model in _models_in(inner)]


def steps_of(words: Sequence[str]) -> list[int]:
    """`--step 1 3`, `--step 1,3` or `--step all` -> [1, 3], in order."""
    parts = [part for word in words for part in word.split(",") if part]
    unknown = [part for part in parts if part not in ("1", "2", "3", "all")]
    if unknown or not parts:
        raise ToolkitError(f"--step {' '.join(words)} is not a step", hint="use 1, 2, 3 (several allowed) or all")
    return [1, 2, 3] if "all" in parts else sorted({int(part) for part in parts})


DEPLOYMENT_TYPES = ("single_gpu", "single_node", "multi_node")  # DeepSpeed-Chat's words


def settings_of_deployment(kind: str) -> list[str]:
    """`--deployment-type single_gpu` as `--set` has it."""
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
    """The resolved job, as a job file that reads back to the same."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(dump_yaml(job.dump()), encoding="utf-8")
    partial.replace(path)
