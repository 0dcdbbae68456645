"""`events.jsonl`, the truth of a training run: one JSON object a line, written by rank 0 and flushed.

Every line has `schema`, `seq`, `time` (UTC) and `kind`; the other fields of each kind are the dataclasses below.
Fields that are None are left out; numbers that are not finite are the words nan, inf and -inf. Terminal, SSH view and
report are views of these lines and of nothing else.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, ClassVar

SCHEMA = 1

RawEvent = dict[str, Any]  # one line, as it is read


@dataclass(frozen=True, kw_only=True)
class Event:
    kind: ClassVar[str]


@dataclass(frozen=True, kw_only=True)
class Plan(Event):
    """A step is about to start: what was derived from the job, for a person to check."""

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


@dataclass(frozen=True, kw_only=True)
class Progress(Event):
    """Something other than an update is being done (tokenising, evaluating, saving)."""

    kind = "progress"
    step: int
    doing: str


@dataclass(frozen=True, kw_only=True)
class Metrics(Event):
    """Numbers after `update` of `updates`. Step 3 writes one line a rollout, averaged over its updates."""

    kind = "metrics"
    step: int
    update: int
    updates: int
    elapsed_s: float  # since the step's first update began
    learning_rate: float
    tokens_per_s: float  # real tokens trained on, all ranks
    real_token_share: float  # real tokens among those computed in training, and in step 3 in scoring
    grad_norm: float  # before clipping
    gpu_peak_bytes: int | None = None  # most memory that rank 0's tensors held on its GPU, in this step
    # step 1 and 2
    loss: float | None = None
    lm_loss: float | None = None  # reward.lm_coef: cross-entropy on the chosen answers
    accuracy: float | None = None  # pairs with chosen above rejected
    margin: float | None = None  # chosen score - rejected score
    # step 3
    policy_loss: float | None = None
    value_loss: float | None = None
    critic_grad_norm: float | None = None
    mean_reward: float | None = None  # score of the reward model, normalised, before clipping
    kl: float | None = None  # to the reference: sum over a response's tokens, mean over responses (k1)
    kl_coef: float | None = None
    entropy: float | None = None  # per token, of the policy that sampled
    ratio: float | None = None  # mean importance ratio, to the policy that sampled
    clip_fraction: float | None = None  # tokens whose ratio left the clip range
    value_clip_fraction: float | None = None
    response_length: float | None = None  # tokens, EOS included
    eos_share: float | None = None  # responses that ended by themselves
    rollout_s: float | None = None
    score_s: float | None = None
    train_s: float | None = None


@dataclass(frozen=True, kw_only=True)
class Sample(Event):
    """One held-out prompt with the answer sampled before or after training."""

    kind = "sample"
    step: int
    when: str  # "before" or "after"
    prompt: str
    response: str
    reward: float
    good: bool | None = None  # by `ppo.rule`


@dataclass(frozen=True, kw_only=True)
class Checkpoint(Event):
    """A folder is complete on disk: what the step can go on from, or a model in Hugging Face format."""

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
    message: str
    why: str | None = None
    hint: str | None = None
    exit_code: int


@dataclass(frozen=True, kw_only=True)
class Resumed(Event):
    """`step` goes on after `from_update`; views drop its later events (0: it starts anew)."""

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
    perplexity_before: float | None = None
    perplexity_after: float | None = None
    reward_accuracy_before: float | None = None
    reward_accuracy: float | None = None
    mean_reward_before: float | None = None
    mean_reward_after: float | None = None
    good_share_before: float | None = None
    good_share_after: float | None = None
    kl_before: float | None = None
    kl: float | None = None
    response_length_before: float | None = None
    response_length_after: float | None = None
    eos_share_before: float | None = None
    eos_share_after: float | None = None
    reward_shift: float | None = None  # rewards are (logit - shift) / scale
    reward_scale: float | None = None


KINDS: dict[str, type[Event]] = {cls.kind: cls for cls in (Plan, Progress, Metrics, Sample, Checkpoint, Warning, Error, Resumed, End)}


class EventWriter:
    """Appends events to `path`, one flushed line each; cuts a torn last line first."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._seq = _cut_torn_line(path)
        # A lone surrogate (a path that is not UTF-8, in an error) becomes its own JSON escape and reads back the same.
        self._file = path.open("a", encoding="utf-8", errors="backslashreplace")

    def __call__(self, event: Event) -> RawEvent:
        """Write one event; returns its line, parsed."""
        present = {key: _json(value) for key, value in asdict(event).items() if value is not None}
        now = datetime.now(timezone.utc).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        line = {"schema": SCHEMA, "seq": self._seq, "time": now, "kind": event.kind, **present}
        self._file.write(json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n")
        self._file.flush()
        self._seq += 1
        return line


def _json(value: Any) -> Any:
    """JSON has no number for them: "nan", "inf", "-inf"."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _cut_torn_line(path: Path) -> int:
    """Number of whole lines; what follows the last newline is cut off."""
    if not path.exists():
        return 0
    data = path.read_bytes()
    whole = data.rfind(b"\n") + 1
    if whole < len(data):
        os.truncate(path, whole)
    return data[:whole].count(b"\n")


def read_events(path: Path, offset: int = 0) -> tuple[list[RawEvent], int]:
    """Whole lines from byte `offset` on -> (parsed events, offset to read on from). A torn last line waits; one that a loss of power
    has damaged is left out.
    """
    if not path.exists():
        return [], offset
    with path.open("rb") as file:
        file.seek(offset)
        data = file.read()
    whole = data.rfind(b"\n") + 1
    return [event for line in data[:whole].splitlines() if (event := parsed(line)) is not None], offset + whole


def parsed(line: bytes) -> RawEvent | None:
    """One line; None for what is no event."""
    try:
        event = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return event if isinstance(event, dict) and "kind" in event else None


def parse(line: RawEvent) -> Event:
    """A line of the file as its typed event. Raises KeyError for an unknown kind."""
    cls = KINDS[line["kind"]]
    known = {field.name for field in fields(cls)}
    return cls(**{key: value for key, value in line.items() if key in known})


def effective(events: Iterable[RawEvent]) -> list[RawEvent]:
    """The events that still hold: `resumed` undoes what its step wrote after `from_update`."""
    kept: list[RawEvent] = []
    for event in events:
        if event["kind"] == "resumed":
            kept = [e for e in kept if e.get("step") != event["step"] or _precedes(e, event["from_update"])]
        kept.append(event)
    return kept


def _precedes(event: RawEvent, update: int) -> bool:
    """Whether the step's event was written at or before `update`; at update 0, none was."""
    is_last = event["kind"] == "end" or event.get("when") == "after"
    return update > 0 and event.get("update", 0) <= update and not is_last
