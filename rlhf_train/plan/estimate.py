"""`--dry-run` shows the resolved job, its steps and batches, and the memory and disk it needs.

Memory is that of weights, gradients and optimizer states, which is known beforehand; activations
depend on lengths.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from jobs.errors import ExitCode, ToolkitError
from jobs.formatting import plural
from jobs.run_dir import RunDir
from jobs.spec import Job, Lora, Scratch
from jobs.steps import STEPS
from jobs.yaml12 import dump_yaml
from rlhf_train.disk import size_of
from rlhf_train.plan.placement import GIB, Placement

# ZeRO 3 is advised where it needs less than this share of the memory that is needed without it. It
# gathers layers into buffers that are not counted here: on two GPUs OPT-1.3b's step 1 took
# 23.0 GiB, and 20.0 at ZeRO 1.
ZERO_3_WORTH = 0.8
WEIGHT_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class Size:
    """Parameters of one network."""

    all: int
    trained: int  # with LoRA: those of the adapters, which `all` leaves out


def model_size(job: Job, model: str | Scratch, *, lora: bool) -> Size:
    """Count a model's parameters, without memory for them.

    The model's config is fetched from the hub if it is not on this machine.
    """
    from rlhf_train.models.adapters import add_lora

    network = _network(job, model)
    if lora and job.actor.lora is not None:
        with torch.device("meta"):
            add_lora(network, job.actor.lora, seed=0)
    adapters = sum(p.numel() for name, p in network.named_parameters() if "lora_" in name)
    everything = sum(p.numel() for p in network.parameters())
    return Size(everything - adapters, adapters or everything)


def _network(job: Job, model: str | Scratch) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    from rlhf_train.models.networks import load_config

    with torch.device("meta"):
        if not isinstance(model, Scratch):
            return AutoModelForCausalLM.from_config(load_config(model))
        fields = dict(model.config)
        try:
            return AutoModelForCausalLM.from_config(
                AutoConfig.for_model(fields.pop("model_type"), vocab_size=job.actor.tokenizer_vocabulary, **fields)
            )
        # A wrong number raises ValueError, TypeError, ZeroDivisionError, RuntimeError or one of
        # transformers' own errors.
        except Exception as error:
            raise ToolkitError(
                "transformers cannot make a model from a config in the job file",
                why=f"{type(error).__name__}: {error}",
                hint="see actor.model.config and critic.model.config",
            ) from None


def training_bytes(size: Size, precision: str, zero_stage: int, ranks: int) -> int:
    """Return the bytes of a rank's weights, gradients and AdamW states.

    In 16 bit, the states include a float32 master copy of the weights.
    """
    weight = WEIGHT_BYTES[precision]
    states = 8 if precision == "float32" else 12
    weights, gradients, optimizer = size.all * weight, size.trained * weight, size.trained * states
    return (
        weights // (ranks if zero_stage >= 3 else 1)
        + gradients // (ranks if zero_stage >= 2 else 1)
        + optimizer // (ranks if zero_stage >= 1 else 1)
    )


def frozen_bytes(actor: Size, critic: Size, precision: str, zero_stage: int) -> int:
    """Return the bytes of a rank's weights that are not trained in step 3.

    They are the reward model, the reference, and the weights that rollouts read: see
    ppo.frozen_copies.
    """
    if zero_stage == 3:
        copies = 2 * actor.all
    else:
        # LoRA: the reference is the actor with its adapters off, and rollouts read the actor.
        copies = actor.all if actor.trained == actor.all else 0
    return (critic.all + copies) * WEIGHT_BYTES[precision]


def describe(job: Job, run: RunDir, wanted: Sequence[int], todo: Sequence[int], placement: Placement) -> str:
    lines = [dump_yaml(job.dump()).rstrip(), ""]
    lines.append(f"run: {run.path}")
    ranks = plural(placement.ranks, "ranks")
    lines.append(f"device: {placement.device} ({placement.device_reason}), {ranks}, {placement.precision}")
    for step, model in sorted(job.own_models.items()):
        lines.append(f"step {step} ({STEPS[step].title}): left out, {model} takes its place")
    for step in wanted:
        state = "to do" if step in todo else "complete"
        lines.append(f"step {step} ({STEPS[step].title}): {state}; global batch {placement.batch_plan(job, step)}")
        if step == 3:
            updates = job.ppo.ppo_epochs * job.ppo.rollout_batch // job.ppo.global_batch
            lines.append(f"  {job.ppo.rollout_batch} prompts a rollout, {plural(updates, 'updates')} each")
    return "\n".join(lines + _needs(job, run, todo, placement))


def _needs(job: Job, run: RunDir, todo: Sequence[int], placement: Placement) -> list[str]:
    from rlhf_train.data import hub
    from rlhf_train.plan.model_checks import check_models

    sizes = []
    for model, lora in ((job.actor_source, True), (job.critic_source, False)):
        try:
            sizes.append(model_size(job, model, lora=lora))
        except (OSError, ValueError, ToolkitError) as error:
            if isinstance(model, Scratch) or hub.local(model):
                raise
            reason = error.why if isinstance(error, ToolkitError) else str(error)
            return [f"memory and disk: unknown, since the config of {model} cannot be read ({reason.splitlines()[0]})"]
    not_checked: list[str] = []
    try:
        check_models(job, run, todo)
    except ToolkitError as error:
        if error.exit_code != ExitCode.UNFIT:  # else the hub cannot be reached
            raise
        not_checked = [f"not checked whether the models fit together: {error.why.splitlines()[0]}"]
    actor, critic = sizes
    weight, ranks = WEIGHT_BYTES[placement.precision], placement.ranks
    actor_bytes = training_bytes(actor, placement.precision, placement.actor_zero_stage, ranks)
    critic_bytes = training_bytes(critic, placement.precision, placement.critic_zero_stage, ranks)
    frozen = frozen_bytes(actor, critic, placement.precision, placement.actor_zero_stage)
    memory = {"actor": actor_bytes, "critic": critic_bytes}
    trained = f"{actor.trained / 1e6:.1f} M trained"
    lines = [f"parameters: actor {actor.all / 1e6:.1f} M ({trained}), critic {critic.all / 1e6:.1f} M"]
    for step in todo:
        needed = sum(memory[network] for network in STEPS[step].networks) + (frozen if step == 3 else 0)
        lines.append(f"memory, step {step}: {_amount(needed)} a rank, and activations")
    need, free = disk_bytes(job, todo, actor, critic, weight), free_bytes(run)
    verdict = "; too little" if need > free else ""
    lines.append(f"disk: {_amount(need)} for models and checkpoints, of {_amount(free)} free for them{verdict}")
    return not_checked + lines


def disk_bytes(job: Job, steps: Sequence[int], actor: Size, critic: Size, weight_bytes: int) -> int:
    """Return the most disk space that the steps need at any time.

    That is the models of the steps before, a checkpoint, and next to it a second one or the model.
    """
    kept = most = 0
    for step in steps:
        model = (critic if step == 2 else actor).all * weight_bytes
        models = model * (2 if step == 3 and job.ppo.ema_decay else 1)
        best = model if job.checkpoint.best_every_updates else 0
        trained = sum({"actor": actor, "critic": critic}[network].trained for network in STEPS[step].networks)
        checkpoint = 12 * trained + (4 * actor.trained if step == 3 and job.ppo.ema_decay else 0)
        most = max(most, kept + best + checkpoint + max(checkpoint, models))
        kept += best + models
    return most


def free_bytes(run: RunDir) -> int:
    """Return the disk space that is free for the run, with what its folder already takes.

    Those files count as free since these steps will use or replace them.
    """
    folder = next(parent for parent in [run.path.resolve(), *run.path.resolve().parents] if parent.exists())
    return shutil.disk_usage(folder).free + size_of(run.path)


def check_room(job: Job, run: RunDir, steps: Sequence[int], placement: Placement) -> None:
    """Raise ToolkitError if the disk is too small for all steps to come.

    It is called before anything is fetched or trained.
    """
    try:
        actor, critic = model_size(job, job.actor_source, lora=True), model_size(job, job.critic_source, lora=False)
    except (OSError, ValueError, ToolkitError):  # the step itself will say what is wrong with a model
        return
    need, free = disk_bytes(job, steps, actor, critic, WEIGHT_BYTES[placement.precision]), free_bytes(run)
    if need > free:
        numbers = ", ".join(map(str, steps))
        named_steps = f"{'step' if len(steps) == 1 else 'steps'} {numbers}"
        raise ToolkitError(
            f"the disk is too small for the models and checkpoints of {named_steps}",
            why=f"they need {_amount(need)} at the same time, and {_amount(free)} are free for them at {run.path}",
            hint="make room, or choose an --output-dir on a larger disk; "
            "actor.lora makes checkpoints many times smaller",
            exit_code=ExitCode.UNFIT,
        )


def _amount(size_bytes: int) -> str:
    return f"{size_bytes / GIB:.1f} GiB" if size_bytes >= GIB // 10 else f"{size_bytes / 2**20:.1f} MiB"


def relief(job: Job, step: int, placement: Placement) -> str:
    """Say what would help where even a micro batch of 1 does not fit, cheapest first.

    Each remedy is a line, with the memory that a rank then needs.
    """
    precision = placement.precision
    stages = {"actor": placement.actor_zero_stage, "critic": placement.critic_zero_stage}
    networks = STEPS[step].networks
    with_lora = job.model_copy(update={"actor": job.actor.model_copy(update={"lora": job.actor.lora or Lora()})})
    try:
        plain = {
            "actor": model_size(job, job.actor_source, lora=False),
            "critic": model_size(job, job.critic_source, lora=False),
        }
        adapted = plain | {"actor": model_size(with_lora, job.actor_source, lora=True)}
    except (OSError, ValueError, ToolkitError):  # the hub cannot be reached: no numbers then
        return "hardware.gradient_checkpointing: true, then actor.lora, then ZeRO 3 on more GPUs"

    def needed(sizes: dict[str, Size], *, zero_3: bool = False, ranks: int = placement.ranks) -> int:
        stage = {network: 3 if zero_3 else stages[network] for network in networks}
        total = sum(training_bytes(sizes[network], precision, stage[network], ranks) for network in networks)
        if step == 3:
            total += frozen_bytes(sizes["actor"], sizes["critic"], precision, stage["actor"])
        return total

    sizes = plain if job.actor.lora is None else adapted
    now = needed(sizes)
    lines = [
        f"weights, gradients and optimizer states take {_amount(now)} a rank, "
        "and activations of one sequence the rest; cheapest first:"
    ]
    if not job.hardware.gradient_checkpointing:
        lines.append(
            "hardware.gradient_checkpointing: true, "
            "which keeps activations of one layer at a time and takes about a third more computing"
        )
    if job.actor.lora is None and needed(adapted) < now:  # a tiny model is smaller than its adapters
        example = "learning rates as in jobs/opt-1.3b-lora.yaml"
        lines.append(f"actor.lora: {{}}, with {example}: {_amount(now)} -> {_amount(needed(adapted))}")
    if any(stages[network] < 3 for network in networks):
        ranks = max(2, placement.ranks)
        fields = ", ".join(f"hardware.{network}_zero_stage: 3" for network in networks)
        less = needed(sizes, zero_3=True, ranks=ranks)
        if less < ZERO_3_WORTH * now:
            saved = f"{_amount(now)} -> {_amount(less)}"
            lines.append(f"{fields} on {plural(ranks, 'GPUs')}: {saved}, with more traffic between them")
    longest = job.data.max_prompt_tokens + job.data.max_response_tokens
    fields = "data.max_prompt_tokens and data.max_response_tokens"
    lines.append(f"smaller {fields} (their sum is {longest}), or a smaller model")
    return "\n".join(lines)
