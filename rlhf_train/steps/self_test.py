"""Step 3's self-test: before anything is learned, the networks must agree about the same tokens.

The ratio of new to old log-probs is 1, the actor is the reference, and the rollout saw the
log-probs that the trainer sees, which are those of the model's own forward. What is wrong in a
run's positions, masks, adapters or sampling shows here. After a resume the actor has learned: then
a digest shows that the reference is the one that the run began with.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from jobs.errors import ExitCode, ToolkitError
from jobs.events import Progress
from rlhf_train.data.sequences import Sequences
from rlhf_train.engine.deepspeed_engine import Engine
from rlhf_train.steps.context import StepContext
from rlhf_train.steps.experience import Scored
from rlhf_train.steps.own_forward import (
    AGREEMENT_LIMITS,
    ROWS,
    allowed_difference,
    our_log_probs,
    ours_of,
    own_log_probs,
)

# Mean absolute difference of log-probs, in nats a token, of the worst response. Two passes over one
# batch with the same weights differ by nothing, and the reference has the actor's weights. Ratio
# and rollout run other batches, and have the limits of own_forward.py.
SAME_BATCH_LIMIT = 1e-3
LEAST_TOKENS = 8  # of a response that counts: the mean of few tokens is noise


@dataclass(frozen=True)
class Comparison:
    name: str
    what: str
    cause: str
    limit: float
    left: Sequence[np.ndarray]
    right: Sequence[np.ndarray]

    def worst(self) -> tuple[float, int]:
        """Return the greatest difference of a response, in nats a token, and the response."""
        long = [place for place, row in enumerate(self.left) if len(row) >= LEAST_TOKENS]
        places = long or list(range(len(self.left)))
        found = np.array([np.abs(self.left[place] - self.right[place]).mean() for place in places])
        found = np.where(np.isnan(found), np.inf, found)
        return float(found.max()), places[int(found.argmax())]


def self_test(
    context: StepContext,
    rows: Sequence[Scored],
    actor: Engine,
    pad_id: int | None,
    *,
    with_reference: bool = True,
) -> None:
    """Check that the networks agree about a rollout that nothing was learned from.

    rows: of all ranks, scored by the trainer. with_reference: the actor has learned nothing yet.
    Raises ToolkitError.
    """
    batch_rows, temperature = rows[: context.placement.micro_batches[2]], context.job.ppo.temperature
    batch = Sequences.of([r.prompt for r in batch_rows], [r.response for r in batch_rows], pad_id, context.world.device)
    again, once_more = (
        [found[place, : len(row.response)] for place, row in enumerate(batch_rows)]
        for found in (
            batch.spread(actor(batch, temperature=temperature)[0]).detach().float().cpu().numpy() for _ in range(2)
        )
    )
    own, ours = partial(own_log_probs, temperature=temperature), partial(our_log_probs, temperature=temperature)
    old = [row.trainer.log_probs for row in rows if row.trainer is not None]
    limit = AGREEMENT_LIMITS[context.placement.precision]
    not_one = "the ratio of new to old log-probs is not 1"
    randomness = "dropout or another source of randomness in the actor's forward pass"
    repeated = Comparison("repeated", not_one, randomness, SAME_BATCH_LIMIT, again, once_more)
    ratio = Comparison("ratio", not_one, randomness, limit, old[: len(again)], again)
    alone = Comparison(
        "own forward",
        "the trainer and the model's own forward see different log-probs",
        "what the model does to its states or logits is not known here: choose another model",
        limit,
        again[:ROWS],
        [own(actor.module.model, row.prompt, row.response) for row in batch_rows[:ROWS]],
    )
    reference = Comparison(
        "KL",
        "the actor is not the reference",
        "the two were loaded from different weights, or an adapter does not start at zero",
        SAME_BATCH_LIMIT,
        old,
        [row.ref_log_probs for row in rows],
    )
    rollout = Comparison(
        "rollout",
        "the rollout and the trainer see different log-probs",
        "positions or masks of left-padded prompts, a stale KV cache, or another temperature",
        limit,
        old,
        [row.rollout_log_probs for row in rows],
    )
    results = []
    for check in (repeated, ratio, alone, reference, rollout) if with_reference else (repeated, ratio, alone, rollout):
        (difference, place), allowed = check.worst(), check.limit
        if check.limit > SAME_BATCH_LIMIT:
            worst = (rows[place].prompt, rows[place].response)
            allowed = allowed_difference(context, actor.module.model, [(old[place], ours_of(worst, ours))], difference)
        if not difference <= allowed:
            raise ToolkitError(
                f"step 3's self-test failed {when(with_reference)}: {check.what}",
                why=f"they differ by {difference:.3g} nats a token in the worst response; "
                f"{allowed:.3g} is allowed in {context.placement.precision}",
                hint=f"the likely cause: {check.cause}",
                exit_code=ExitCode.TRAINING,
            )
        if check is not repeated:
            results.append(f"{check.name} {difference:.1e}")
    context.emit(Progress(step=3, doing=f"self-test passed: {', '.join(results)}"))


def check_frozen(saved: str, found: str, folders: Sequence[str]) -> None:
    """Raise ToolkitError if a resumed run would have other frozen networks. "": of an older run."""
    if saved and saved != found:
        what = "the reference is" if len(folders) == 1 else "the reference, the reward model or the judge is"
        raise ToolkitError(
            f"{what} not the one that step 3 began with",
            why=f"the weights in {' or '.join(folders)} have changed since",
            hint="bring them back, or train step 3 again with --redo --step 3",
            exit_code=ExitCode.USAGE,
        )


def weights_digest(folders: Sequence[str]) -> str:
    """Return the sha256 of saved models' weights."""
    digest = hashlib.sha256()
    files = [sorted(Path(folder).glob(pattern)) for folder in folders for pattern in ("*.safetensors", "*.bin")]
    for file in (file for group in files for file in group):
        with file.open("rb") as stream:
            while block := stream.read(2**24):
                digest.update(block)
    return digest.hexdigest()


def when(with_reference: bool) -> str:
    return "before the first update" if with_reference else "at the first rollout after a resume"
