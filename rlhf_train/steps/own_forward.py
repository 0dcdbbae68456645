"""Compare our forward passes with a model's own, on rows of the job, before anything is learned.

We call a model's body and its head apart, on packed or padded rows. models/head.py finds what the
model's own forward does to the output of its head. Whatever else it does shows here, in the
log-probs or the scores of whole rows, and the model is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from jobs.errors import ExitCode, ToolkitError
from rlhf_train import compat
from rlhf_train.data.dataset import Ragged, Table
from rlhf_train.data.sequences import Sequences
from rlhf_train.engine.deepspeed_engine import full_state
from rlhf_train.models.adapters import merge_lora
from rlhf_train.models.float32 import in_float32
from rlhf_train.models.head import transform_of
from rlhf_train.models.log_probs import token_log_probs
from rlhf_train.models.networks import ActorForward, ScoreForward
from rlhf_train.steps.context import StepContext

ROWS = 4  # that are compared, at most
# Mean absolute difference of a row's log-probs in nats a token, or difference of its score as a
# share of the greatest score. Two batches of the same weights differ in float32 by the order of
# summation, in 16 bit by rounding, which grows with the model. So the limit there is the greater of
# these and three times what rounding does to either of them.
AGREEMENT_LIMITS = {"float32": 1e-3, "bfloat16": 0.03, "float16": 0.03}
ROUNDING_FACTOR = 3.0

Row = tuple[np.ndarray, np.ndarray]  # prompt, answer
Rows = Sequence[Row]
Own = Callable[[Any, np.ndarray, np.ndarray], np.ndarray]  # of a model, a prompt, an answer
Ours = Callable[[Any, Sequences], Tensor]
Way = tuple[np.ndarray, Callable[[Any], np.ndarray]]  # numbers of a row, and how a model computes them


def check_log_probs(context: StepContext, forward: ActorForward, rows: Rows, pad_id: int | None) -> None:
    """Raise ToolkitError if the log-probs of rows are not those of the model's own logits.

    Call it before the model has an engine.
    """
    batch = _batch(context, rows, pad_id)
    with torch.no_grad():
        flat, _ = forward.train()(batch)
    spread = batch.spread(flat).float().cpu().numpy()
    ours = [numbers[: len(response)] for numbers, (_, response) in zip(spread, rows, strict=True)]
    _compare(context, forward.model, rows, ours, LOG_PROBS)


def try_float32(context: StepContext, forward: ActorForward, rows: Rows, pad_id: int | None) -> None:
    """Check, before training, that a 16-bit model with adapters can be measured in float32.

    It is measured so in the end if that is how it is saved: see merged.py.
    """
    if context.job.actor.lora is not None and context.placement.precision != "float32":
        with in_float32(forward.model):
            check_log_probs(context, forward, rows, pad_id)


def check_scores(context: StepContext, forward: ScoreForward, rows: Rows, pad_id: int | None) -> None:
    """Raise ToolkitError if the scores of rows are not the classifier's own logits.

    Call it before the model has an engine, and its scores a shift and a scale.
    """
    batch = _batch(context, rows, pad_id)
    with torch.no_grad():
        scores, _ = forward(batch, batch.last())
    ours = list(scores.float().cpu().numpy()[:, None])
    _compare(context, forward.model, rows, ours, SCORES)


def example_rows(context: StepContext, step: int, table: Table, answers: Ragged) -> Rows:
    """Choose at most ROWS training rows of a step, from the longest to the shortest."""
    numbers = table.step_rows[step]
    ordered = numbers[np.argsort(-(table.prompt.lengths + answers.lengths)[numbers], kind="stable")]
    count = min(ROWS, context.placement.micro_batches[step - 1], len(ordered))
    chosen = ordered[np.linspace(0, len(ordered) - 1, count).astype(int)]
    return [(table.prompt[row], answers[row]) for row in chosen]


def _batch(context: StepContext, rows: Rows, pad_id: int | None) -> Sequences:
    return Sequences.of([prompt for prompt, _ in rows], [answer for _, answer in rows], pad_id, context.world.device)


def _compare(context: StepContext, model: Any, rows: Rows, found: Sequence[np.ndarray], numbers: _Numbers) -> None:
    """Raise ToolkitError if our numbers of rows are not the model's own. found: ours."""
    theirs = [numbers.own(model, *row) for row in rows]
    if not all(np.isfinite(of_row).all() for of_row in theirs):
        return  # the trial update says what is wrong with the model
    size = (float(np.abs(theirs).max()) or 1.0) if numbers.is_relative else 1.0
    differences = np.array([np.abs(a - b).mean() for a, b in zip(found, theirs, strict=True)]) / size
    place = int(differences.argmax())
    row = rows[place]
    ways = [(found[place], ours_of(row, numbers.ours)), (theirs[place], lambda twin: numbers.own(twin, *row))]
    allowed = allowed_difference(context, model, ways, differences[place], size)
    if not differences[place] <= allowed:
        raise ToolkitError(
            f"{type(model).__name__} computes its {numbers.name} in a way that is not known here",
            why=f"its own forward and ours differ by {differences[place]:.3g} {numbers.unit} in the worst of "
            f"{len(rows)} rows; {allowed:.3g} is allowed in {context.placement.precision}",
            hint="choose another model: OPT, GPT-2, LLaMA, Mistral, Qwen and Gemma are among those that work",
            exit_code=ExitCode.USAGE,
        )


@torch.no_grad()
def own_log_probs(model: Any, prompt: np.ndarray, response: np.ndarray, temperature: float = 1.0) -> np.ndarray:
    """Return the log-probs of a response's tokens (R,) by the model's own forward."""
    ids = _ids(model, prompt, response)
    logits = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1]
    logits = transform_of(model).without_unused(logits.float()) / temperature
    return token_log_probs(logits, ids[0, len(prompt) :]).cpu().numpy()


@torch.no_grad()
def own_score(model: Any, prompt: np.ndarray, response: np.ndarray) -> np.ndarray:
    """Return the score of a row (1,) by the classifier's own forward."""
    score: np.ndarray = model(input_ids=_ids(model, prompt, response), use_cache=False).logits[0].float().cpu().numpy()
    return score


def _ids(model: Any, prompt: np.ndarray, response: np.ndarray) -> Tensor:
    return torch.from_numpy(np.concatenate([prompt, response]).astype(np.int64))[None].to(model.device)


def allowed_difference(
    context: StepContext, model: Any, ways: Sequence[Way], difference: float, size: float = 1.0
) -> float:
    """Return how far numbers of a row may be from others, as a share of `size`.

    ways: in which they were computed. difference: how far they are on this rank, as a share of
    `size`. All ranks take part, since one of them alone may be beyond the limit.
    """
    limit = AGREEMENT_LIMITS[context.placement.precision]
    if not context.world.any(not difference <= limit):
        return limit
    return max(limit, ROUNDING_FACTOR * rounding_of(context, model, ways) / size)


def ours_of(row: Row, ours: Ours) -> Callable[[Any], np.ndarray]:
    """Return what computes our numbers of a row on a CPU."""

    def compute(model: Any) -> np.ndarray:
        numbers: np.ndarray = ours(model, Sequences.of(row[:1], row[1:], 0, torch.device("cpu"))).numpy()
        return numbers

    return compute


def rounding_of(context: StepContext, model: Any, ways: Sequence[Way]) -> float:
    """Return how far a row's numbers are, in the mean, from those in float32: the worst way's.

    By chance one way's may be close to them, above all a score, which is a single number. 0 where
    the trainer runs in float32. All ranks take part; rank 0 computes it on its CPU.
    """
    if context.placement.precision == "float32":
        return 0.0
    world, found = context.world, 0.0
    state = full_state(model, keep=world.is_main)
    if world.is_main:
        load = AutoModelForCausalLM if model.get_output_embeddings() is not None else AutoModelForSequenceClassification
        twin = load.from_config(model.config, **compat.dtype_argument(torch.float32)).eval()
        twin.logit_transform = transform_of(model)
        plain = merge_lora({name: value.float() for name, value in state.items()}, model)
        loaded = twin.load_state_dict(plain, strict=False)
        assert not loaded.unexpected_keys, "all weights of the model have a place in its twin"
        with torch.no_grad():
            found = max(float(np.abs(compute(twin) - numbers).mean()) for numbers, compute in ways)
    return float(world.gather(found)[0])


def our_log_probs(model: Any, batch: Sequences, temperature: float = 1.0) -> Tensor:
    return ActorForward(model)(batch, temperature=temperature)[0]


def our_scores(model: Any, batch: Sequences) -> Tensor:
    return ScoreForward(model)(batch, batch.last())[0]


@dataclass(frozen=True)
class _Numbers:
    """What is compared."""

    name: str
    unit: str
    own: Own
    ours: Ours
    is_relative: bool  # to the greatest of the rows


LOG_PROBS = _Numbers("log-probs", "nats a token", own_log_probs, our_log_probs, False)
SCORES = _Numbers("scores", "of the greatest score", own_score, our_scores, True)
