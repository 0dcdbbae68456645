"""Say what is wrong with a step's rows: too few to learn or be measured well, rendered before."""

from __future__ import annotations

from collections.abc import Mapping

from jobs.errors import ToolkitError
from jobs.formatting import plural
from jobs.spec import Job, Ppo
from jobs.steps import STEPS

FEW_HELD_OUT = 20  # a share of 50 % of so many rows has a standard error of 11 points, 0.5 / sqrt(20)


def too_few_to_train(job: Job, step: int, rows: int) -> str:
    """Return a sentence if one update takes rows more than once; else ""."""
    section, noun = STEPS[step].section, STEPS[step].rows_noun
    field = "rollout_batch" if step == 3 else "global_batch"
    batch: int = job.ppo.prompts_per_rollout if step == 3 else getattr(getattr(job, section), field)
    if not 0 < rows < batch:
        return ""
    if step == 3 and job.ppo.samples_per_prompt > 1:
        field += " / samples_per_prompt"
    return f"{plural(rows, noun)} are fewer than {section}.{field} ({batch}): an update takes some more than once"


def too_few_to_measure(step: int, rows: int) -> str:
    """Return a sentence if numbers on so many held-out rows say little; else ""."""
    if rows >= FEW_HELD_OUT:
        return ""
    return f"the step is measured on {plural(rows, f'held-out {STEPS[step].rows_noun}')}, whose numbers say little"


MESSAGES_INSTEAD = (
    'give messages, e.g. {"messages": [{"role": "user", "content": "Hi"}, ...]}: the tokenizer\'s own template '
    "writes them, with control tokens"
)


def rendered_before(row_counts: Mapping[str, int]) -> str:
    """Return a sentence if rows of text hold what chat templates write; else ""."""
    count = row_counts.get("rendered_template", 0)
    if not count:
        return ""
    hold = "rows of text hold" if count > 1 else "row of text holds"
    return f"{count} {hold} what a chat template writes, e.g. <|im_start|>: it is learned as plain text"


def check_critic_warmup(spec: Ppo, updates: int) -> None:
    """Raise ToolkitError if the critic's warm-up leaves the actor none of step 3's updates."""
    if spec.critic_warmup_updates >= updates:
        raise ToolkitError(
            f"ppo.critic_warmup_updates is {spec.critic_warmup_updates}, and step 3 has {plural(updates, 'updates')}",
            why="until then the critic learns alone, and the actor would not learn at all",
            hint="lower it, or raise ppo.epochs or ppo.max_updates",
        )
