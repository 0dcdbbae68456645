"""What fits into memory here: the sizes that a run came down to, remembered in its folder for its
next start.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from jobs.run_dir import RunDir
from jobs.spec import Job
from rlhf_train.data.sequences import largest_divisor
from rlhf_train.disk import read_json, write_json
from rlhf_train.plan.placement import Placement


def fit(job: Job, run: RunDir, placement: Placement) -> Placement:
    """`placement` with the sizes that are remembered for these devices and this wish, where they
    are smaller.
    """
    known = read_json(run.fitted)
    if known is None or known["for"] != _circumstances(job, placement):
        return placement
    return replace(
        placement,
        micro_batches=tuple(
            min(now, then) for now, then in zip(placement.micro_batches, known["micro_batches"], strict=True)
        ),
        rollout_micro_batch=min(placement.rollout_micro_batch, known["rollout_micro_batch"]),
    )


def remember(job: Job, run: RunDir, placement: Placement) -> None:
    """The sizes of `placement`, for the next start; what is remembered already stays where it is
    smaller.
    """
    placement = fit(job, run, placement)
    sizes = {"micro_batches": list(placement.micro_batches), "rollout_micro_batch": placement.rollout_micro_batch}
    write_json(run.fitted, {"for": _circumstances(job, placement), **sizes})


def smaller(job: Job, step: int, placement: Placement) -> Placement | None:
    """With half the micro batch in `step`, or the next number below that divides a rank's share;
    None if it is 1 already.
    """
    plan = placement.batch_plan(job, step)
    if plan.micro_batch == 1:
        return None
    sizes = list(placement.micro_batches)
    sizes[step - 1] = largest_divisor(plan.micro_batch * plan.gradient_accumulation, plan.micro_batch // 2)
    return replace(placement, micro_batches=tuple(sizes))  # type: ignore[arg-type]


def _circumstances(job: Job, placement: Placement) -> list[Any]:
    """On other devices, with other models, wishes or lengths, other sizes fit."""
    wish = job.hardware.model_dump(mode="json", exclude={"cpu_threads"})
    batches = [part.global_batch for part in (job.sft, job.reward, job.ppo)]  # which the sizes must divide
    models = [job.actor.model_dump(mode="json"), job.critic.model_dump(mode="json")]
    lengths = [job.data.max_prompt_tokens, job.data.max_response_tokens]
    return [placement.device_reason, placement.ranks, placement.precision, wish, batches, models, lengths]
