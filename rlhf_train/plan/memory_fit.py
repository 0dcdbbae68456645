"""A run remembers which micro batches fitted into memory, in its folder, for its next start."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from jobs.run_dir import RunDir
from jobs.spec import Job
from rlhf_train.data.sequences import largest_divisor
from rlhf_train.disk import read_json, write_json
from rlhf_train.plan.placement import Placement


def fit(job: Job, run: RunDir, placement: Placement) -> Placement:
    """Return `placement` with the remembered sizes where they are smaller.

    Sizes that were remembered for other circumstances are not used.
    """
    known = read_json(run.fitted)
    if known is None or known["for"] != _circumstances(job, placement):
        return placement
    pairs = zip(placement.micro_batches, known["micro_batches"], strict=True)
    return replace(
        placement,
        micro_batches=tuple(min(now, remembered) for now, remembered in pairs),
        rollout_micro_batch=min(placement.rollout_micro_batch, known["rollout_micro_batch"]),
    )


def remember(job: Job, run: RunDir, placement: Placement) -> None:
    """Remember the sizes of `placement` for the next start; smaller remembered sizes stay."""
    placement = fit(job, run, placement)
    sizes = {"micro_batches": list(placement.micro_batches), "rollout_micro_batch": placement.rollout_micro_batch}
    write_json(run.fitted, {"for": _circumstances(job, placement), **sizes})


def with_smaller_micro_batch(job: Job, step: int, placement: Placement) -> Placement | None:
    """Return `placement` with half the micro batch in `step`; None if it is 1 already.

    If half does not divide a rank's share, it is the next smaller number that does.
    """
    plan = placement.batch_plan(job, step)
    if plan.micro_batch == 1:
        return None
    sizes = list(placement.micro_batches)
    sizes[step - 1] = largest_divisor(plan.micro_batch * plan.gradient_accumulation, plan.micro_batch // 2)
    return replace(placement, micro_batches=tuple(sizes))  # type: ignore[arg-type]


def _circumstances(job: Job, placement: Placement) -> list[Any]:
    """Return all that decides which sizes fit: devices, models, the job's wishes, lengths."""
    wish = job.hardware.model_dump(mode="json", exclude={"cpu_threads"})
    batches = [part.global_batch for part in (job.sft, job.reward, job.ppo)]  # the sizes divide these
    models = [job.actor.model_dump(mode="json"), job.critic.model_dump(mode="json")]
    models += [{"judge": job.ppo.judge_model}] if job.ppo.judge_model is not None else []
    lengths = [job.data.max_prompt_tokens, job.data.max_response_tokens]
    return [placement.device_reason, placement.ranks, placement.precision, wish, batches, models, lengths]
