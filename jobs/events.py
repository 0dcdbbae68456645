"""The events of a training run: `events.jsonl`, one JSON object on each line, written by rank 0.

Every line has `schema`, `seq`, `time` (UTC) and `kind`; the dataclasses below hold the other fields
of each kind. Fields that are None are left out. Numbers that are not finite are written as the
words nan, inf and -inf. Terminal, SSH view and report show these lines and nothing else.
"""

from __future__ import annotations

import inspect
import json
import math
import os
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, ClassVar, Literal

SCHEMA = 1

RawEvent = dict[str, Any]  # one line, as it is read


@dataclass(frozen=True, kw_only=True)
class Event:
    kind: ClassVar[str]


@dataclass(frozen=True, kw_only=True)
class Plan(Event):
    """A step is about to start with these values, which were derived from the job."""

    kind = "plan"
    step: int
    updates: int  # optimizer updates of this step
    rows: int  # training rows (pairs in step 2, prompts in step 3)
    ranks: int
    device: str
    device_reason: str
    precision: str
    global_batch: int
    micro_batch: int  # per forward/backward, one rank
    gradient_accumulation: int
    zero_stage: int
    data: dict[str, int]  # rows read, left out and cut, by reason
    own_models: dict[str, str] | None = None  # that the step starts from, by the job's field
    # Estimates of this step and of those to come, by their numbers: jobs/estimate.py. Each has
    # updates, update_s, and fixed_s for all besides them. jobs/pace.py scales them.
    expected: dict[str, dict[str, float]] | None = None
    hardware: str | None = None  # what `device` is: the GPUs, or the processor and its threads
    versions: dict[str, str] | None = None  # of Python and of the libraries that train


@dataclass(frozen=True, kw_only=True)
class Progress(Event):
    """Something other than an update is being done (tokenising, evaluating, saving)."""

    kind = "progress"
    step: int
    doing: str


@dataclass(frozen=True)
class Curve:
    """The panel draws the metric as a curve over the updates."""

    color: str
    only_far: bool = False  # only where a run is watched from another machine; elsewhere it is a number


NUMBER: Literal["number"] = "number"


@dataclass(frozen=True)
class MetricFormat:
    """How a metric is written, and where it is in the panel."""

    spec: str  # as format() takes it
    label: str  # in every view: the words of the field's name, but for the unit tok/s
    place: Curve | Literal["number"]


def metric(spec: str, label: str, place: Curve | Literal["number"]) -> dict[str, MetricFormat | None]:
    """Make the metadata of a metric's field: all that the views need to show it."""
    return {"shown": MetricFormat(spec, label, place)}


NOT_SHOWN: dict[str, MetricFormat | None] = {"shown": None}  # the metric is only in events.jsonl


@dataclass(frozen=True, kw_only=True)
class Measured(Event):
    """Something was measured after an update.

    Each field that a subclass adds is a metric: its metadata is `metric(...)` or `NOT_SHOWN`.
    """

    step: int
    update: int
    updates: int
    elapsed_s: float  # since the step's first update began

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        for name in inspect.get_annotations(cls):
            if "shown" not in getattr(cls.__dict__.get(name), "metadata", {}):
                raise TypeError(f"{cls.__name__}.{name} needs metadata=metric(...), or NOT_SHOWN: how is it shown?")


@dataclass(frozen=True, kw_only=True)
class Metrics(Measured):
    """The numbers after `update` of `updates`.

    Step 3 writes one line for each rollout, averaged over its updates.
    """

    kind = "metrics"
    learning_rate: float = field(metadata=metric(".3g", "learning rate", NUMBER))
    # Real tokens trained on, all ranks.
    tokens_per_s: float = field(metadata=metric(".0f", "tok/s", NUMBER))
    # Real tokens among those computed in training, and in step 3 in scoring.
    real_token_share: float = field(metadata=NOT_SHOWN)
    # Before clipping.
    grad_norm: float = field(metadata=metric(".2f", "grad norm", NUMBER))
    # Most memory that rank 0's tensors held on its GPU, in this step.
    gpu_peak_bytes: int | None = field(default=None, metadata=NOT_SHOWN)

    # step 1 and 2
    loss: float | None = field(default=None, metadata=metric(".4f", "loss", Curve("cyan")))
    # reward.lm_coef: cross-entropy on the chosen answers.
    lm_loss: float | None = field(default=None, metadata=metric(".4f", "lm loss", NUMBER))
    # Pairs with chosen above rejected.
    accuracy: float | None = field(default=None, metadata=metric(".1%", "accuracy", Curve("green")))
    # Chosen score - rejected score.
    margin: float | None = field(default=None, metadata=metric(".3f", "margin", NUMBER))

    # step 3
    policy_loss: float | None = field(default=None, metadata=metric(".4f", "policy loss", Curve("cyan", only_far=True)))
    value_loss: float | None = field(default=None, metadata=metric(".4f", "value loss", NUMBER))
    critic_grad_norm: float | None = field(default=None, metadata=NOT_SHOWN)
    critic_learning_rate: float | None = field(default=None, metadata=NOT_SHOWN)
    # Of the rewards from each token on, by the critic's values when the rollout was made: 1 - mean
    # squared error / variance. 0 is as good as a constant.
    explained_variance: float | None = field(default=None, metadata=metric(".2f", "explained variance", NUMBER))
    # Score of the reward model, normalised, before clipping.
    mean_reward: float | None = field(default=None, metadata=metric(".2f", "mean reward", Curve("green")))
    # What PPO maximises: the clipped score less the KL's cost, mean over responses.
    objective: float | None = field(default=None, metadata=metric(".2f", "objective", NUMBER))
    # Score of ppo.judge_model, as it gives it: neither shifted nor scaled.
    judge_score: float | None = field(default=None, metadata=metric(".2f", "judge score", NUMBER))
    # To the reference: sum over a response's tokens, mean over responses. k1 is what the rewards
    # pay for, and may be negative by chance; k3 is never negative. Both: experience.py.
    kl: float | None = field(default=None, metadata=NOT_SHOWN)
    kl_k3: float | None = field(default=None, metadata=metric(".3f", "kl k3", Curve("yellow")))
    kl_coef: float | None = field(default=None, metadata=NOT_SHOWN)
    # Per token, of the policy that sampled.
    entropy: float | None = field(default=None, metadata=metric(".3f", "entropy", NUMBER))
    # Mean importance ratio, to the policy that sampled.
    ratio: float | None = field(default=None, metadata=NOT_SHOWN)
    # Tokens whose ratio left the clip range.
    clip_fraction: float | None = field(default=None, metadata=metric(".1%", "clip fraction", NUMBER))
    value_clip_fraction: float | None = field(default=None, metadata=NOT_SHOWN)
    # Tokens, EOS included.
    response_length: float | None = field(default=None, metadata=metric(".1f", "response length", NUMBER))
    # Responses that ended by themselves.
    eos_share: float | None = field(default=None, metadata=metric(".1%", "eos share", NUMBER))
    rollout_s: float | None = field(default=None, metadata=NOT_SHOWN)
    score_s: float | None = field(default=None, metadata=NOT_SHOWN)
    train_s: float | None = field(default=None, metadata=NOT_SHOWN)


SHOWN: dict[str, MetricFormat] = {
    each.name: each.metadata["shown"] for each in fields(Metrics) if each.metadata.get("shown")
}


@dataclass(frozen=True, kw_only=True)
class Sample(Event):
    """One held-out prompt with the answer sampled before, during or after training."""

    kind = "sample"
    step: int
    when: str  # "before", "during" or "after"
    update: int | None = None  # during training: the updates made so far
    place: int | None = None  # of the prompt among the held-out ones, from 0
    prompt: str
    response: str
    reward: float
    good: bool | None = None  # by `ppo.rule`
    judge_score: float | None = None  # by `ppo.judge_model`


@dataclass(frozen=True, kw_only=True)
class Checkpoint(Event):
    """A folder is complete on disk: a checkpoint of the step, or a model in Hugging Face format."""

    kind = "checkpoint"
    step: int
    update: int
    path: str
    size_bytes: int
    seconds: float  # until it was on disk
    held_up_s: float | None = None  # how long training waited for it; None for models
    metric: str | None = None  # of the best model so far: what was measured on held-out data
    value: float | None = None


@dataclass(frozen=True, kw_only=True)
class Warning(Event):  # the field's word for it
    kind = "warning"
    step: int | None = None
    message: str
    hint: str | None = None


@dataclass(frozen=True, kw_only=True)
class Error(Event):
    kind = "error"
    step: int | None = None
    rank: int
    what: str
    why: str | None = None
    hint: str | None = None
    exit_code: int


@dataclass(frozen=True, kw_only=True)
class Resumed(Event):
    """`step` resumes after `from_update` (0: from scratch); views drop its later events."""

    kind = "resumed"
    step: int
    from_update: int


@dataclass(frozen=True, kw_only=True)
class End(Event):
    """A step is complete: its numbers on held-out data, and where its model is."""

    kind = "end"
    step: int
    updates: int
    seconds: float
    model: str
    own_models: dict[str, str] | None = None  # as in `plan`
    held_out_rows: int | None = None  # that all these numbers were measured on
    perplexity_before: float | None = None
    perplexity_after: float | None = None
    perplexity_error_before: float | None = None  # standard error, as rlhf_train/steps/sft.py computes it
    perplexity_error_after: float | None = None
    perplexity_change_error: float | None = None  # standard error of after - before, since both are of the same rows
    reward_accuracy_before: float | None = None
    reward_accuracy: float | None = None
    reward_accuracy_both: float | None = None  # the share of the pairs that is ranked right before and after
    margins_before: dict[str, Any] | None = None  # on the held-out pairs, as `histogram` makes it
    margins: dict[str, Any] | None = None
    mean_reward_before: float | None = None
    mean_reward_after: float | None = None
    mean_reward_error_before: float | None = None  # standard error of the mean
    mean_reward_error_after: float | None = None
    mean_reward_change_error: float | None = None  # as perplexity_change_error
    judge_score_before: float | None = None  # of ppo.judge_model
    judge_score_after: float | None = None
    judge_score_error_before: float | None = None
    judge_score_error_after: float | None = None
    judge_score_change_error: float | None = None
    good_share_before: float | None = None
    good_share_after: float | None = None
    good_share_both: float | None = None  # the share of the prompts whose answers are good before and after
    objective_before: float | None = None
    objective_after: float | None = None
    kl_before: float | None = None  # k1
    kl: float | None = None
    kl_k3_before: float | None = None
    kl_k3: float | None = None
    response_length_before: float | None = None
    response_length_after: float | None = None
    eos_share_before: float | None = None
    eos_share_after: float | None = None
    reward_shift: float | None = None  # rewards are (logit - shift) / scale
    reward_scale: float | None = None


KINDS: dict[str, type[Event]] = {
    cls.kind: cls for cls in (Plan, Progress, Metrics, Sample, Checkpoint, Warning, Error, Resumed, End)
}


_WORDS = {"int": int, "float": float, "bool": bool, "str": str, "dict": dict}
# By kind: what each field holds. `float | None`, `dict[str, int]`: the first word says it.
_TYPES = {
    kind: {each.name: _WORDS[re.split(r"\W", str(each.type))[0]] for each in fields(cls)} for kind, cls in KINDS.items()
}


class EventWriter:
    """Appends events to `path`, one flushed line each, after cutting a torn last line off."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._seq = _cut_torn_line(path)
        # A lone surrogate (from a path that is not UTF-8, in an error) becomes a JSON escape, and
        # reads back as the same character.
        self._file = path.open("a", encoding="utf-8", errors="backslashreplace")

    def __call__(self, event: Event) -> RawEvent:
        """Write one event, and return its line, parsed."""
        present = {key: _json(value) for key, value in asdict(event).items() if value is not None}
        now = datetime.now(timezone.utc).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        line = {"schema": SCHEMA, "seq": self._seq, "time": now, "kind": event.kind, **present}
        self._file.write(json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n")
        self._file.flush()
        self._seq += 1
        return line


def _json(value: Any) -> Any:
    """Replace a number that JSON does not have by a word: "nan", "inf", "-inf"."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _cut_torn_line(path: Path) -> int:
    """Cut off what follows the last newline, and return the number of lines."""
    if not path.exists():
        return 0
    data = path.read_bytes()
    end = data.rfind(b"\n") + 1
    if end < len(data):
        os.truncate(path, end)
    return data[:end].count(b"\n")


def read_events(path: Path, offset: int = 0) -> tuple[list[RawEvent], int]:
    """Read whole lines from byte `offset` on; return the events and the next offset.

    A torn last line is read by a later call. A line that a power failure has damaged is left out.
    """
    if not path.exists():
        return [], offset
    with path.open("rb") as file:
        file.seek(offset)
        data = file.read()
    end = data.rfind(b"\n") + 1
    return [event for line in data[:end].splitlines() if (event := parsed(line)) is not None], offset + end


def parsed(line: bytes) -> RawEvent | None:
    """Parse one line; None if it is not an event.

    An error of an older run gets today's field names.
    """
    try:
        event = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(event, dict) or not isinstance(event.get("kind"), str):
        return None
    if event["kind"] == "error" and "message" in event and "what" not in event:
        event["what"] = event.pop("message")
    return without_damage(event)


def without_damage(event: RawEvent) -> RawEvent:
    """Drop the fields that do not hold what their kind's do, such as text in place of a number.

    What a newer writer has added stays. Every view can show an event that lacks fields.
    """
    types = _TYPES.get(event["kind"], {})
    unsure = [name for name, value in event.items() if type(value) is not float or types.get(name) is not float]
    damaged = [name for name in unsure if name in types and not _is_of(types[name], event[name])]
    for name in damaged:
        del event[name]
    return event


def _is_of(wanted: type, value: Any) -> bool:
    if wanted is float:
        is_word = isinstance(value, str) and value in ("nan", "inf", "-inf")
        return type(value) is float or is_word or _is_of(int, value)
    if wanted is int:
        return type(value) is int and abs(value) < 2**63
    return type(value) is wanted


def time_of(event: RawEvent) -> float:
    """Return the event's time in seconds; NaN if it has no readable time."""
    try:
        return datetime.fromisoformat(str(event.get("time")).replace("Z", "+00:00")).timestamp()
    except (ValueError, OverflowError):
        return math.nan


def parse(line: RawEvent) -> Event:
    """Convert a line of the file to its typed event. Raises KeyError for an unknown kind."""
    cls = KINDS[line["kind"]]
    known = {each.name for each in fields(cls)}
    return cls(**{key: value for key, value in line.items() if key in known})


def effective(events: Iterable[RawEvent]) -> list[RawEvent]:
    """Return the events that still hold: `resumed` undoes its step's events after `from_update`."""
    kept: list[RawEvent] = []
    for event in events:
        if event["kind"] == "resumed":
            update = event.get("from_update", 0)
            kept = [e for e in kept if e.get("step") != event.get("step") or _precedes(e, update)]
        kept.append(event)
    return kept


def _precedes(event: RawEvent, update: int) -> bool:
    """Tell whether the step's event was written at or before `update`; at update 0 none was.

    Answers sampled during training come before what follows their update, and are sampled again.
    """
    is_last = event["kind"] == "end" or event.get("when") == "after"
    is_sampled_again = event.get("when") == "during" and event.get("update", 0) >= update
    return update > 0 and event.get("update", 0) <= update and not is_last and not is_sampled_again
