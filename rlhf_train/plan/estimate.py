"""What a job takes, for `--dry-run` and before a step: jobs/estimate.py with this machine's facts.

Only configs and rows are read here: no weights, and no program code of a model.
"""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from env.settings import Cards
from jobs.errors import ExitCode, ToolkitError, together
from jobs.estimate import (
    GIB,
    Fit,
    Models,
    Speed,
    StepRows,
    StepTime,
    card_speed,
    disk_bytes,
    fit_step,
    frozen_bytes,
    sizes_of,
    step_time,
    training_bytes,
    updates_of,
)
from jobs.formatting import duration, plural
from jobs.model_shape import Shape, shape_of
from jobs.run_dir import RunDir
from jobs.spec import Job, Lora, Scratch
from jobs.steps import STEPS
from rlhf_train.data import dataset, hub
from rlhf_train.disk import read_json, size_of
from rlhf_train.host import free_memory_bytes
from rlhf_train.plan.few_rows import check_critic_warmup, too_few_to_train
from rlhf_train.plan.placement import Machine, Placement

# ZeRO 3 is advised where it needs less than this share of the memory that is needed without it. It
# gathers layers into buffers that are not counted here: on two GPUs OPT-1.3b's step 1 took
# 23.0 GiB, and 20.0 at ZeRO 1.
ZERO_3_WORTH = 0.8
CHARACTERS_A_TOKEN = 3.5  # of English text, where no tokenizer has read the rows yet
MATMUL_SIDE, MATMUL_S = 512, 0.2  # of the product that measures a CPU, and for how long
CPU_MATMUL = 60e9  # flop a second of a usual core
USUAL_CARD = "a100-80gb"  # in place of one that is not listed
CPU_BANDWIDTH = 10e9  # bytes a second of one core; seconds depend little on it


# --- models -------------------------------------------------------------------------------------


def models_of(job: Job) -> Models:
    """Return the shapes of the job's two models, from their configs.

    A config is fetched from the hub if it is not on this machine. Raises ToolkitError.
    """
    return Models(_shape(job, job.actor_source), _shape(job, job.critic_source))


def _shape(job: Job, model: str | Scratch) -> Shape:
    if isinstance(model, Scratch):
        return shape_of({**model.config, "vocab_size": job.actor.tokenizer_vocabulary})
    config = read_json(Path(hub.model(model, hub.config_files)) / "config.json")
    if not isinstance(config, dict):
        raise ToolkitError(
            f"the size of {model} is not known", why="it has no config.json", hint="choose a model that has one"
        )
    return shape_of(config)


def check_scratch(job: Job) -> None:
    """Raise ToolkitError if transformers cannot make a model from a config in the job file."""
    from transformers import AutoConfig, AutoModelForCausalLM

    for model in (job.actor_source, job.critic_source):
        if not isinstance(model, Scratch):
            continue
        fields = {**model.config, "vocab_size": job.actor.tokenizer_vocabulary}
        try:
            with torch.device("meta"):
                AutoModelForCausalLM.from_config(AutoConfig.for_model(fields.pop("model_type"), **fields))
        # A wrong number raises ValueError, TypeError, ZeroDivisionError, RuntimeError or one of
        # transformers' own errors.
        except Exception as error:
            raise ToolkitError(
                "transformers cannot make a model from a config in the job file",
                why=f"{type(error).__name__}: {error}",
                hint="see actor.model.config and critic.model.config",
            ) from None


def known_models(job: Job) -> Models:
    """Return the shapes of the job's models.

    Raises ToolkitError, which says the way to their configs.
    """
    try:
        return models_of(job)
    except ToolkitError as error:
        raise ToolkitError(
            "what this job takes is not known without the configs of its models",
            why="\n".join(filter(None, (error.what, error.why))),
            hint=error.hint,
        ) from None


# --- rows ---------------------------------------------------------------------------------------


def rows_of_table(table: dataset.Table, job: Job, step: int) -> StepRows:
    """Return the rows of a step as they were tokenised."""
    chosen = table.step_rows[step]
    if not len(chosen):
        return StepRows.unread(job)
    prompt = table.prompt.lengths[chosen]
    answers = [getattr(table, column).lengths[chosen] for column in STEPS[step].columns if column != "prompt"]
    if not answers:  # step 3 writes its own, which will be like those of the data
        answers = [table.chosen.lengths[chosen]]
    longest = prompt + np.max(answers, axis=0)
    most = int(prompt.max()) + job.data.max_response_tokens if step == 3 else int(longest.max())
    return StepRows(len(chosen), float(prompt.mean()), float(np.mean(answers)), most)


def rows_of_texts(job: Job) -> dict[int, StepRows]:
    """Return the rows of each step from their texts, which no tokenizer has read.

    Rows of a data set of the hub are not fetched: their number is not known. Raises ToolkitError if
    a data set is not there, or not readable.
    """
    search = dataset.search_folders()
    if any(dataset.find_data_set(name, search) is None for name in job.data.datasets):
        return dict.fromkeys(STEPS, StepRows.unread(job))
    texts = dataset.rows_of_steps(job.data)
    return {step: _rows_of_texts(job, step, rows) for step, rows in texts.items()}


def _rows_of_texts(job: Job, step: int, rows: Sequence[dataset.Row]) -> StepRows:
    if not rows:
        return StepRows.unread(job)
    columns = [name for name in STEPS[step].columns if name != "prompt"] or ["chosen"]
    prompts = np.array([len(row.prompt) for row in rows]) / CHARACTERS_A_TOKEN + 1
    answers = np.array([[len(getattr(row, name)) for name in columns] for row in rows]) / CHARACTERS_A_TOKEN + 1
    kept = prompts <= job.data.max_prompt_tokens
    prompts, answers = prompts[kept], np.minimum(answers[kept], job.data.max_response_tokens)
    if not len(prompts):
        return StepRows.unread(job)
    longest = int(prompts.max()) + job.data.max_response_tokens if step == 3 else int((prompts + answers.max(1)).max())
    return StepRows(len(prompts), float(prompts.mean()), float(answers.mean()), longest)


# --- this machine -------------------------------------------------------------------------------


@dataclass(frozen=True)
class TargetMachine:
    """Where a job is to run: this machine, or a card that is named."""

    speed: Speed | None  # None: nothing is known of the card
    memory: float  # of one GPU, or of the machine where it has none; 0: not known
    is_here: bool


def target_of(machine: Machine, placement: Placement, cards: Cards) -> TargetMachine:
    """Describe this machine."""
    if placement.device == "cpu":
        return TargetMachine(cpu_speed(placement), float(free_memory_bytes()), is_here=True)
    key = cards.seen_as(machine.gpus[0])
    return TargetMachine(card_speed(cards, key)[0] if key else None, float(machine.gpu_bytes), is_here=True)


def named_card(name: str, ranks: int, cards: Cards) -> tuple[Machine, TargetMachine]:
    """Return a machine with so many cards of that name. Raises ToolkitError for an unknown name."""
    if name not in cards.cards:
        raise ToolkitError(
            f"--gpu {name} is not known", why=f"env/cards.toml has {', '.join(cards.cards)}", hint="name one of these"
        )
    speed, memory = card_speed(cards, name)
    machine = Machine(1, (name,) * ranks, int(memory), cards.cards[name].bfloat16)
    return machine, TargetMachine(speed, memory, is_here=False)


def cpu_speed(placement: Placement) -> Speed:
    """Measure what one core multiplies, and take it for each thread of a rank."""
    from rlhf_train.kernels.cpu_matmul import product

    before = torch.get_num_threads()
    torch.set_num_threads(1)  # several would wait for each other where other programs run
    try:
        a, b = torch.randn(2, MATMUL_SIDE, MATMUL_SIDE)
        begun, best_s = time.perf_counter(), math.inf
        while time.perf_counter() - begun < MATMUL_S:
            start = time.perf_counter()
            product(a, b)
            best_s = min(best_s, time.perf_counter() - start)
    finally:
        torch.set_num_threads(before)
    # The best of many: the others shared the cores with other programs.
    rate = placement.cpu_threads * 2 * MATMUL_SIDE**3 / best_s
    return Speed("CPU", rate, CPU_BANDWIDTH * placement.cpu_threads, CPU_BANDWIDTH, is_measured=True)


def free_bytes(run: RunDir) -> int:
    """Return the disk space that is free for the run, with what its folder already takes.

    Those files count as free since these steps will use or replace them.
    """
    folder = next(parent for parent in [run.path.resolve(), *run.path.resolve().parents] if parent.exists())
    return shutil.disk_usage(folder).free + size_of(run.path)


# --- --dry-run ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Estimate:
    """What the steps to do take, against what there is."""

    fits: Mapping[int, Fit]
    times: Mapping[int, StepTime]  # empty if nothing is known of the card
    disk: int

    def seconds(self) -> float | None:
        """Return the seconds of all steps; None if those of one are not known."""
        seconds = [time.seconds for time in self.times.values()]
        return sum(each for each in seconds if each) if self.times and None not in seconds else None


def estimate(
    job: Job,
    steps: Sequence[int],
    placement: Placement,
    models: Models,
    rows: Mapping[int, StepRows],
    target: TargetMachine,
) -> Estimate:
    """Estimate the steps."""
    fits = {step: fit_step(job, step, models, placement, rows[step], target.memory or float("inf")) for step in steps}
    times = {}
    for step in steps if target.speed else ():
        assert target.speed is not None
        times[step] = step_time(job, step, models, placement, rows[step], target.speed)
    return Estimate(fits, times, disk_bytes(job, steps, models, placement.precision))


def describe(
    job: Job, run: RunDir, wanted: Sequence[int], todo: Sequence[int], placement: Placement, target: TargetMachine
) -> tuple[str, bool]:
    """Say what would be done, and what it takes. Returns the lines, and whether it fits.

    Raises ToolkitError with all that will not do of the job's models and data sets.
    """
    checked = check_all(job, run, todo)
    if checked.mistakes:
        raise together(checked.mistakes)
    models, rows = known_models(job), checked.rows
    made = estimate(job, todo, placement, models, rows, target)
    ranks = plural(placement.ranks, "ranks")
    lines = [
        f"run: {run.path}",
        f"device: {placement.device} ({placement.device_reason}), {ranks}, {placement.precision}",
    ]
    for step, model in sorted(job.own_models.items()):
        lines.append(f"step {step} ({STEPS[step].title}): left out, {model} takes its place")
    for step in wanted:
        state = "to do" if step in todo else "complete"
        lines.append(f"step {step} ({STEPS[step].title}): {state}; global batch {placement.batch_plan(job, step)}")
        if step == 3:
            updates = job.ppo.ppo_epochs * job.ppo.rollout_batch // job.ppo.global_batch
            lines.append(f"  {job.ppo.rollout_batch} prompts a rollout, {plural(updates, 'updates')} each")
        if step in todo:
            lines += [f"  {line}" for line in _step_lines(job, step, made, rows[step], placement, target)]
    sizes = sizes_of(job, models)
    actor, critic = sizes["actor"], sizes["critic"]
    trained = f"{actor.trained / 1e6:.1f} M trained"
    lines.append(f"parameters: actor {actor.all / 1e6:.1f} M ({trained}), critic {critic.all / 1e6:.1f} M")
    free = free_bytes(run) if target.is_here else None
    lines.append(_disk_line(made.disk, free))
    if (seconds := made.seconds()) is not None and todo:
        lines.append(f"time: about {duration(seconds)} in all{_how_sure(models, target)}")
    fits = all(fit.fits for fit in made.fits.values()) and (free is None or made.disk <= free)
    return "\n".join(checked.remarks + lines), fits


@dataclass(frozen=True)
class Checked:
    """What is known of a job before anything is loaded."""

    mistakes: list[ToolkitError]
    remarks: list[str]  # what could not be checked, and warnings
    rows: dict[int, StepRows]


def check_all(job: Job, run: RunDir, todo: Sequence[int]) -> Checked:
    """Check the models and the rows of the steps to do."""
    from rlhf_train.plan.model_checks import checks_of_models

    checked = Checked([], [], {step: StepRows.unread(job) for step in STEPS})

    def read_rows() -> None:
        checked.rows.update(rows_of_texts(job))
        updates = updates_of(job, 3, checked.rows[3].count) if 3 in todo else None
        if updates is not None:
            check_critic_warmup(job.ppo, updates)

    checks: list[Callable[[], object]] = [partial(check_scratch, job), *checks_of_models(job, run, todo), read_rows]
    for check in checks:
        try:
            check()
        except ToolkitError as error:
            if error.exit_code != ExitCode.UNFIT:
                checked.mistakes.append(error)
            elif not checked.remarks:  # the hub cannot be reached
                checked.remarks.append(f"not checked whether the models fit together: {error.why.splitlines()[0]}")
    few = ((step, too_few_to_train(job, step, checked.rows[step].count or 0)) for step in todo)
    checked.remarks.extend(f"warning: step {step}: {sentence}" for step, sentence in few if sentence)
    return checked


def _step_lines(
    job: Job, step: int, made: Estimate, rows: StepRows, placement: Placement, target: TargetMachine
) -> list[str]:
    lines = []
    if step in made.times:
        taken = made.times[step]
        if taken.updates is None:
            counts = "updates are not known before the data is here"
        else:
            counts = f"{plural(rows.count, STEPS[step].rows_noun)}, {plural(taken.updates, 'updates')}"
        whole = "" if taken.seconds is None else f", about {duration(taken.seconds)}"
        lines.append(f"{counts}; about {_seconds(taken.update_s)} an update{whole}")
    fit = made.fits[step]
    where = "of main memory" if placement.device == "cpu" else "a GPU"
    have = f", of {_amount(target.memory)}" if target.memory else ""
    lines.append(f"memory, at the peak: about {_amount(fit.memory.peak)} {where}{have} ({_parts(fit)})")
    if not fit.fits:
        first, *others = relief(job, step, placement).splitlines()
        lines += [f"does not fit: {first}", *(f"  {line}" for line in others)]
    elif fit.is_smaller:
        sizes = f"a micro batch of {fit.micro_batch}"
        sizes += f" and {fit.slots} answers at once" if fit.slots and placement.device == "cuda" else ""
        lines.append(f"that is with {sizes}, which the run finds by itself; with more it does not fit")
    return lines


def _parts(fit: Fit) -> str:
    """Name what takes most: `weights 2.5, optimizer 14.7, a pass 18.1`."""
    memory = fit.memory
    parts = {**memory.held, memory.worst: memory.phases[memory.worst]}
    shown = [f"{name} {_amount(size)}" for name, size in parts.items() if size >= 0.02 * memory.peak]
    return ", ".join(shown)


def _disk_line(need: int, free: int | None) -> str:
    if free is None:
        return f"disk: {_amount(need)} for models and checkpoints"
    verdict = "; too little" if need > free else ""
    return f"disk: {_amount(need)} for models and checkpoints, of {_amount(free)} free for them{verdict}"


def _how_sure(models: Models, target: TargetMachine) -> str:
    reasons = []
    if target.speed is not None and not target.speed.is_measured:
        reasons.append(f"estimate: nobody has measured {target.speed.name}")
    if not models.is_known:
        reasons.append("estimate: a model's family is not known, and was taken for a LLaMA")
    elif {models.actor.family, models.critic.family} != {"opt"}:
        reasons.append("estimate: only OPT was compared with runs, and others took up to four times as long")
    return f" ({'; '.join(reasons)})" if reasons else ""


def _seconds(seconds: float) -> str:
    return f"{seconds:.2g} s" if seconds < 10 else duration(seconds)


def _amount(size_bytes: float) -> str:
    return f"{size_bytes / GIB:.1f} GiB" if size_bytes >= GIB // 10 else f"{size_bytes / 2**20:.1f} MiB"


def expected_times(
    job: Job, steps: Sequence[int], placement: Placement, table: dataset.Table
) -> dict[str, dict[str, float]] | None:
    """Return the estimated times of `steps` from their rows, as a plan's event has them.

    Their sum is scaled by the pace that is measured, so the card's speed counts little. None if
    they cannot be estimated, such as for a config of an unknown form: that must not end a run.
    """
    found = {}
    try:
        models, speed = models_of(job), _usual_speed(placement)
        for step in steps:
            rows = rows_of_table(table, job, step)
            taken = step_time(job, step, models, placement, rows, speed)
            if taken.updates is not None:
                numbers = {"updates": taken.updates, "update_s": taken.update_s, "fixed_s": taken.fixed_s}
                found[str(step)] = {name: float(f"{value:.4g}") for name, value in numbers.items()}
    except Exception:
        return None
    return found


def _usual_speed(placement: Placement) -> Speed:
    if placement.device == "cpu":
        threads = placement.cpu_threads
        return Speed("CPU", CPU_MATMUL * threads, CPU_BANDWIDTH * threads, CPU_BANDWIDTH, is_measured=False)
    cards = Cards.load()
    return card_speed(cards, cards.seen_as(torch.cuda.get_device_name()) or USUAL_CARD)[0]


# --- before and during training -----------------------------------------------------------------


def check_room(job: Job, run: RunDir, steps: Sequence[int], placement: Placement) -> None:
    """Raise ToolkitError if the disk is too small for all steps to come.

    It is called before anything is fetched or trained.
    """
    try:
        models = models_of(job)
    except (OSError, ToolkitError):  # the step itself will say what is wrong with a model
        return
    need, free = disk_bytes(job, steps, models, placement.precision), free_bytes(run)
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


def relief(job: Job, step: int, placement: Placement) -> str:
    """Say what would help where even a micro batch of 1 does not fit, cheapest first.

    Each remedy is a line, with the memory that a rank then needs.
    """
    with_lora = job.model_copy(update={"actor": job.actor.model_copy(update={"lora": job.actor.lora or Lora()})})
    try:
        models = models_of(job)
    except (OSError, ToolkitError):  # the hub cannot be reached: no numbers then
        return "hardware.gradient_checkpointing: true, then actor.lora, then ZeRO 3 on more GPUs"

    def needed(job: Job, placement: Placement) -> float:
        sizes = sizes_of(job, models)
        stages = {"actor": placement.actor_zero_stage, "critic": placement.critic_zero_stage}
        parts = [
            training_bytes(sizes[network], placement.precision, stages[network], placement.ranks)
            for network in STEPS[step].networks
        ]
        frozen = frozen_bytes(sizes, placement.precision, placement.actor_zero_stage) if step == 3 else 0.0
        return frozen + sum(sum(part.values()) for part in parts)

    now = needed(job, placement)
    lines = [
        f"weights, gradients and optimizer states take {_amount(now)} a rank, "
        "and activations of one sequence the rest; cheapest first:"
    ]
    if not job.hardware.gradient_checkpointing:
        lines.append(
            "hardware.gradient_checkpointing: true, "
            "which keeps activations of one layer at a time and takes about a third more computing"
        )
    if job.actor.lora is None and needed(with_lora, placement) < now:  # a tiny model is smaller than its adapters
        example = "learning rates as in jobs/opt-1.3b-lora.yaml"
        lines.append(f"actor.lora: {{}}, with {example}: {_amount(now)} -> {_amount(needed(with_lora, placement))}")
    networks = STEPS[step].networks
    stages = {"actor": placement.actor_zero_stage, "critic": placement.critic_zero_stage}
    if any(stages[network] < 3 for network in networks):
        ranks = max(2, placement.ranks)
        fields = ", ".join(f"hardware.{network}_zero_stage: 3" for network in networks)
        changes: dict[str, Any] = {f"{network}_zero_stage": 3 for network in networks}
        less = needed(job, replace(placement, ranks=ranks, **changes))
        if less < ZERO_3_WORTH * now:
            saved = f"{_amount(now)} -> {_amount(less)}"
            lines.append(f"{fields} on {plural(ranks, 'GPUs')}: {saved}, with more traffic between them")
    longest = job.data.max_prompt_tokens + job.data.max_response_tokens
    fields = "data.max_prompt_tokens and data.max_response_tokens"
    lines.append(f"smaller {fields} (their sum is {longest}), or a smaller model")
    return "\n".join(lines)
