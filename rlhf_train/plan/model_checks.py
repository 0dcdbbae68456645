"""Check, before anything trains, that each model of a job will do, and that they fit together.

Only configs, tokenizers and the names of tensors are read.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from functools import partial
from pathlib import Path

from jobs.run_dir import RunDir
from jobs.spec import Job
from rlhf_train.data import hub
from rlhf_train.disk import read_json
from rlhf_train.models.networks import (
    HEAD,
    check_causal,
    check_lengths,
    check_same_tokenizer,
    check_scorer,
    is_classifier,
    load_config,
    load_tokenizer,
    no_head,
)


def check_models(job: Job, run: RunDir, steps: Collection[int]) -> None:
    """Raise ToolkitError if a model that `steps`, or those after them, start from will not do."""
    for check in checks_of_models(job, run, steps):
        check()


def checks_of_models(job: Job, run: RunDir, steps: Collection[int]) -> list[Callable[[], object]]:
    """List the checks of `check_models`; each raises ToolkitError.

    A model from a `config` fits by itself, and what the run's steps made is checked where it is
    loaded.
    """
    actor, critic = job.actor_source, job.critic_source
    lengths = {"prompt_tokens": job.data.max_prompt_tokens, "response_tokens": job.data.max_response_tokens}
    begins_actor = 1 in steps or (3 in steps and job.actor.sft_model is not None)
    is_own = job.critic.reward_model is not None
    # Of step 1 alone, only one that the job names: not every language model makes a reward model.
    begins_critic = 2 in steps or (3 in steps and is_own) or (1 in steps and (is_own or job.critic.model != "actor"))
    checks = list[Callable[[], object]]()
    if isinstance(actor, str) and begins_actor:
        checks.append(partial(check_causal, actor))
        checks.append(lambda: check_lengths(load_config(actor), *lengths.values()))
    if isinstance(critic, str) and begins_critic:
        # A reward model that reads text cuts it to its positions, whatever the actor's tokens are.
        most = dict.fromkeys(lengths, 0) if job.may_score_text else lengths
        checks.append(partial(check_scorer, critic, **most, lm_coef=0.0 if is_own else job.reward.lm_coef))
        if is_own:
            checks.append(partial(check_head, critic))
    reader = tokenizer_source(job, run)
    if (
        reader
        and isinstance(critic, str)
        and not job.may_score_text
        and (begins_actor or (begins_critic and 3 in steps))
    ):
        checks.append(lambda: check_same_tokenizer(load_tokenizer(reader), load_tokenizer(critic)))
    judge = job.ppo.judge_model
    if judge is not None:  # now, though step 3 alone reads it: nobody trains for hours to learn of it then
        checks.append(partial(check_scorer, judge, **lengths, lm_coef=0.0))
        checks.append(partial(check_head, judge))
        if reader:
            checks.append(lambda: check_same_tokenizer(load_tokenizer(reader), load_tokenizer(judge), "judge"))
    return checks


def tokenizer_source(job: Job, run: RunDir) -> str:
    """Return what has the actor's tokenizer; "" if that is still to be trained."""
    trained = next((folder for folder in (run.step(1).model, run.tokenizer) if folder.is_dir()), "")
    if job.actor.sft_model is not None or not trained:
        return job.actor_source if isinstance(job.actor_source, str) else ""
    return str(trained)


def check_head(source: str) -> None:
    """Raise ToolkitError if a reward model has no trained head, as far as can be seen here."""
    names = tensor_names(Path(source).expanduser()) if hub.local(source) else None
    has_head = HEAD in names if names is not None else is_classifier(load_config(source))
    if not has_head:
        raise no_head(source)


def tensor_names(folder: Path) -> set[str] | None:
    """Return the names of the tensors in a model's folder; None if they are not in safetensors."""
    from safetensors import safe_open

    index = read_json(folder / "model.safetensors.index.json")
    if index is not None:
        return set(index["weight_map"])
    file = folder / "model.safetensors"
    if not file.is_file():
        return None
    with safe_open(file, "pt") as tensors:
        return set(tensors.keys())
