"""What a job takes, for `--dry-run` and before a step: jobs/estimate.py with this machine's facts.

Only configs and rows are read here: no weights, and no program code of a model.
"""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
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
    Passes,
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
from rlhf_train.data.forms import Row, texts_of
from rlhf_train.data.reading import find_data_set, search_folders
from rlhf_train.data.sequences import split_into_passes
from rlhf_train.disk import read_json, size_of
from rlhf_train.host import free_memory_bytes
from rlhf_train.plan import kernel_start
from rlhf_train.plan.few_rows import check_critic_warmup, too_few_to_train
from rlhf_train.plan.placement import Machine, Placement

# ZeRO 3 is advised where it needs less than this share of the memory that is needed without it. It
# gathers layers into buffers that are not counted here: on two GPUs OPT-1.3b's step 1 took
# 23.0 GiB, and 20.0 at ZeRO 1.
ZERO_3_WORTH = 0.8
CHARACTERS_A_TOKEN = 3.5  # of English text, where no tokenizer has read the rows yet
MATMUL_SIDE, MATMUL_S = 512, 0.2  # of the product that measures a CPU, and for how long
MOVED_NUMBERS, STARTS = 2**20, 200  # of the sums that measure what a core moves and starts
# Of a usual core: flop and bytes a second, and seconds to start a kernel.
USUAL_CORE = (100e9, 80e9, 1.2e-6)
OVER_TINY = 1.15  # a kernel of a real model's layer to start, in times of one of kernel_start.py
USUAL_CARD = "a100-80gb"  # in place of one that is not listed
LENGTHS = 512  # of rows that are kept to see how they are cut into passes


# --- models -------------------------------------------------------------------------------------


def models_of(job: Job) -> Models:
    """Return the shapes of the job's models, from their configs.

    A config is fetched from the hub if it is not on this machine. Raises ToolkitError.
    """
    judge = _shape(job, job.ppo.judge_model) if job.ppo.judge_model is not None else None
    return Models(_shape(job, job.actor_source), _shape(job, job.critic_source), judge)


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

    for model in job.sources:
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
        answers = [table.some_answer.lengths[chosen]]
    longest = prompt + np.max(answers, axis=0)
    most = int(prompt.max()) + job.data.max_response_tokens if step == 3 else int(longest.max())
    return StepRows(len(chosen), float(prompt.mean()), float(np.mean(answers)), most, _some(longest))


def rows_of_texts(job: Job, steps: Collection[int] = ()) -> tuple[dict[int, StepRows], list[str]]:
    """Return the rows of each step from their texts, which no tokenizer has read.

    And a line for each data set: its form and counts.
    Rows of a data set of the hub are not fetched: their number is not known. Raises ToolkitError if
    a data set is not there, or not readable, or if none has rows for one of `steps`.
    """
    search = search_folders()
    if any(find_data_set(name, search) is None for name in job.data.names):
        return dict.fromkeys(STEPS, StepRows.unread(job)), []
    rows, orders, recognised = dataset.rows_of_steps(job.data, steps)
    tokens = _tokens_of_texts(job, rows)
    return {step: _rows_of_texts(job, step, tokens[order]) for step, order in orders.items()}, recognised


def _is_of_hub(name: str) -> bool:
    try:
        return find_data_set(name, search_folders()) is None
    except ToolkitError:  # a path where nothing is, which reading its rows says
        return False


def _tokens_of_texts(job: Job, rows: Iterable[Row]) -> np.ndarray:
    """Guess the tokens of each row's prompt and answers, (n,), with a field for each column."""

    def tokens(row: Row, name: str) -> float:
        texts = texts_of(getattr(row, name)) or texts_of(row.response)
        return sum(map(len, texts)) / CHARACTERS_A_TOKEN + 1 if texts else job.data.max_response_tokens

    kinds = [(name, float) for name in Row._fields]
    return np.fromiter((tuple(tokens(row, name) for name in Row._fields) for row in rows), kinds)


def _rows_of_texts(job: Job, step: int, tokens: np.ndarray) -> StepRows:
    if not len(tokens):
        return StepRows.unread(job)
    columns = [name for name in STEPS[step].columns if name != "prompt"] or ["chosen"]
    prompts, answers = tokens["prompt"], np.stack([tokens[name] for name in columns], axis=1)
    kept = prompts <= job.data.max_prompt_tokens
    prompts, answers = prompts[kept], np.minimum(answers[kept], job.data.max_response_tokens)
    if not len(prompts):
        return replace(StepRows.unread(job), count=0)
    longest = int(prompts.max()) + job.data.max_response_tokens if step == 3 else int((prompts + answers.max(1)).max())
    lengths = prompts + answers.max(1)
    return StepRows(len(prompts), float(prompts.mean()), float(answers.mean()), longest, _some(lengths))


def _some(lengths: np.ndarray) -> tuple[int, ...]:
    """Return up to LENGTHS of them, evenly from the shortest to the longest."""
    places = np.linspace(0, len(lengths) - 1, min(len(lengths), LENGTHS)).astype(int)
    return tuple(int(length) for length in np.sort(lengths)[places])


def padded_passes(job: Job, step: int, placement: Placement, rows: StepRows) -> Passes | None:
    """Return how one rank cuts an update of usual rows into padded passes; None: rows not known."""
    if not rows.lengths:
        return None
    plan = placement.batch_plan(job, step)
    share = plan.micro_batch * plan.gradient_accumulation
    lengths = np.resize(rows.lengths, share) if share > len(rows.lengths) else np.array(rows.lengths)
    places = np.linspace(0, len(lengths) - 1, share + 2)[1:-1].astype(int)  # neither shortest nor longest
    usual = np.sort(lengths)[places][::-1]
    parts = split_into_passes(usual, plan.micro_batch * rows.longest)
    return Passes(len(parts), float(sum(usual[part].max() * len(usual[part]) for part in parts)))


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
    speed = card_speed(cards, key)[0] if key else None
    start_s = kernel_start.in_another_process() if speed else None
    if speed is not None and start_s is not None:
        speed = replace(speed, kernel=OVER_TINY * start_s)
    return TargetMachine(speed, float(machine.gpu_bytes), is_here=True)


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
    """Measure what one core multiplies, moves and starts, and take it for each thread of a rank."""
    from rlhf_train.kernels.cpu_matmul import product

    before = torch.get_num_threads()
    torch.set_num_threads(1)  # several would wait for each other where other programs run
    try:
        a, b = torch.randn(2, MATMUL_SIDE, MATMUL_SIDE)
        long, short = torch.randn(MOVED_NUMBERS), torch.randn(8)
        multiply_s = _best_s(lambda: product(a, b), MATMUL_S)
        move_s = _best_s(lambda: long * long, MATMUL_S / 4)
        start_s = _best_s(lambda: [short * short for _ in range(STARTS)], MATMUL_S / 4) / STARTS
    finally:
        torch.set_num_threads(before)
    moved = 2 * long.element_size() * MOVED_NUMBERS / move_s  # it reads one, and writes one
    return _of_cores(placement, 2 * MATMUL_SIDE**3 / multiply_s, moved, start_s, is_measured=True)


def _best_s(run: Callable[[], object], during_s: float) -> float:
    """Return the seconds of the quickest of many runs.

    They are those that this thread had a core: other programs may be busy on it meanwhile.
    """
    begun, best_s = time.thread_time(), math.inf
    while time.thread_time() - begun < during_s:
        start = time.thread_time()
        run()
        best_s = min(best_s, time.thread_time() - start)
    return best_s


def _of_cores(placement: Placement, matmul: float, moved: float, start_s: float, *, is_measured: bool) -> Speed:
    threads = placement.cpu_threads
    return Speed("CPU", matmul * threads, moved * threads, moved, is_measured=is_measured, kernel=start_s)


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
        padded = padded_passes(job, step, placement, rows[step])
        times[step] = step_time(job, step, models, placement, rows[step], target.speed, padded)
    return Estimate(fits, times, disk_bytes(job, steps, models, placement.precision))


def describe(
    job: Job, run: RunDir, wanted: Sequence[int], todo: Sequence[int], placement: Placement, target: TargetMachine
) -> tuple[str, bool, Estimate]:
    """Say what would be done, and what it takes.

    Returns the lines, whether it fits, and the estimate. Raises ToolkitError with all that will not
    do of the job's models and data sets.
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
        *(f"data: {line}" for line in checked.recognised),
    ]
    for step, model in sorted(job.own_models.items()):
        lines.append(f"step {step} ({STEPS[step].title}): left out, {model} takes its place")
    for step in wanted:
        state = "to do" if step in todo else "complete"
        lines.append(f"step {step} ({STEPS[step].title}): {state}; global batch {placement.batch_plan(job, step)}")
        if step == 3:
            updates = job.ppo.ppo_epochs * job.ppo.rollout_batch // job.ppo.global_batch
            each = f", {job.ppo.samples_per_prompt} answers to each" if job.ppo.samples_per_prompt > 1 else ""
            lines.append(f"  {job.ppo.prompts_per_rollout} prompts a rollout{each}, {plural(updates, 'updates')} each")
        if step in todo:
            lines += [f"  {line}" for line in _step_lines(job, step, made, rows[step], placement, target)]
    sizes = sizes_of(job, models)
    actor, critic = sizes["actor"], sizes["critic"]
    trained = f"{actor.trained / 1e6:.1f} M trained"
    judge = f", judge {sizes['judge'].all / 1e6:.1f} M" if "judge" in sizes else ""
    network = "critic" if job.ppo.has_critic else "reward model"
    lines.append(f"parameters: actor {actor.all / 1e6:.1f} M ({trained}), {network} {critic.all / 1e6:.1f} M{judge}")
    free = free_bytes(run) if target.is_here else None
    lines.append(_disk_line(made.disk, free))
    if (seconds := made.seconds()) is not None and todo:
        lines.append(f"time: about {duration(seconds)} in all{_how_sure(models, target)}")
    fits = all(fit.fits for fit in made.fits.values()) and (free is None or made.disk <= free)
    return "\n".join(checked.remarks + lines), fits, made


@dataclass(frozen=True)
class Checked:
    """What is known of a job before anything is loaded."""

    mistakes: list[ToolkitError]
    remarks: list[str]  # what could not be checked, and warnings
    rows: dict[int, StepRows]
    recognised: list[str]  # of each data set whose rows were read


def check_all(job: Job, run: RunDir, todo: Sequence[int]) -> Checked:
    """Check the models and the rows of the steps to do."""
    from rlhf_train.plan.model_checks import checks_of_models

    checked = Checked([], [], {step: StepRows.unread(job) for step in STEPS}, [])

    def read_rows() -> None:
        rows, recognised = rows_of_texts(job, todo)
        checked.rows.update(rows)
        checked.recognised.extend(recognised)
        updates = updates_of(job, 3, checked.rows[3].count) if 3 in todo else None
        if updates is not None:
            check_critic_warmup(job.ppo, updates)

    def ask_hub(name: str) -> None:
        if not hub.listing(name, "dataset").files:
            checked.remarks.append(f"not checked whether there is a data set `{name}`: the hub does not answer")

    checks: list[Callable[[], object]] = [partial(check_scratch, job), *checks_of_models(job, run, todo), read_rows]
    checks += [partial(ask_hub, name) for name in job.data.names if _is_of_hub(name)]
    unreached = list[str]()
    for check in checks:
        try:
            check()
        except ToolkitError as error:
            if error.exit_code != ExitCode.UNFIT:
                checked.mistakes.append(error)
            elif not unreached:  # the hub
                unreached.append(f"not checked whether the models fit together: {error.why.splitlines()[0]}")
    checked.remarks[:0] = unreached
    if unreached and not checked.mistakes:  # then the models' sizes may be unknown, too
        try:
            known_models(job)
        except ToolkitError as error:
            checked.mistakes.append(error)
    for step in (step for step in todo if checked.rows[step].count == 0):
        checked.remarks.append(
            f"warning: step {step}: all its prompts seem longer than data.max_prompt_tokens "
            f"({job.data.max_prompt_tokens}), and would be left out"
        )
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
        lines.append(f"{counts}; about {in_seconds(taken.update_s)} an update{whole}")
    fit = made.fits[step]
    where = "of main memory" if placement.device == "cpu" else "a GPU"
    have = f", of {amount(target.memory)}" if target.memory else ""
    lines.append(f"memory, at the peak: about {amount(fit.memory.peak)} {where}{have} ({_parts(fit)})")
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
    shown = [f"{name} {amount(size)}" for name, size in parts.items() if size >= 0.02 * memory.peak]
    return ", ".join(shown)


def _disk_line(need: int, free: int | None) -> str:
    if free is None:
        return f"disk: {amount(need)} for models and checkpoints"
    verdict = "; too little" if need > free else ""
    return f"disk: {amount(need)} for models and checkpoints, of {amount(free)} free for them{verdict}"


def _how_sure(models: Models, target: TargetMachine) -> str:
    reasons = []
    if target.speed is not None and not target.speed.is_measured:
        reasons.append(f"estimate: nobody has measured {target.speed.name}")
    if not models.is_known:
        reasons.append("estimate: a model's family is not known, and was taken for a LLaMA")
    return f" ({'; '.join(reasons)})" if reasons else ""


def in_seconds(seconds: float) -> str:
    return f"{seconds:.2g} s" if seconds < 10 else duration(seconds)


def amount(size_bytes: float) -> str:
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
            padded = padded_passes(job, step, placement, rows)
            taken = step_time(job, step, models, placement, rows, speed, padded)
            if taken.updates is not None:
                numbers = {"updates": taken.updates, "update_s": taken.update_s, "fixed_s": taken.fixed_s}
                found[str(step)] = {name: float(f"{value:.4g}") for name, value in numbers.items()}
    except Exception:
        return None
    return found


def _usual_speed(placement: Placement) -> Speed:
    if placement.device == "cpu":
        return _of_cores(placement, *USUAL_CORE, is_measured=False)
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
            why=f"they need {amount(need)} at the same time, and {amount(free)} are free for them at {run.path}",
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
            for network in job.networks_of(step)
        ]
        frozen = frozen_bytes(sizes, placement.precision, placement.actor_zero_stage) if step == 3 else 0.0
        return frozen + sum(sum(part.values()) for part in parts)

    now = needed(job, placement)
    lines = [
        f"weights, gradients and optimizer states take {amount(now)} a rank, "
        "and activations of one sequence the rest; cheapest first:"
    ]
    if not job.hardware.gradient_checkpointing:
        lines.append(
            "hardware.gradient_checkpointing: true, "
            "which keeps activations of one layer at a time and takes about a third more computing"
        )
    if job.actor.lora is None and needed(with_lora, placement) < now:  # a tiny model is smaller than its adapters
        example = "learning rates as in jobs/opt-1.3b-lora.yaml"
        lines.append(f"actor.lora: {{}}, with {example}: {amount(now)} -> {amount(needed(with_lora, placement))}")
    networks = job.networks_of(step)
    stages = {"actor": placement.actor_zero_stage, "critic": placement.critic_zero_stage}
    if any(stages[network] < 3 for network in networks):
        ranks = max(2, placement.ranks)
        fields = ", ".join(f"hardware.{network}_zero_stage: 3" for network in networks)
        changes: dict[str, Any] = {f"{network}_zero_stage": 3 for network in networks}
        less = needed(job, replace(placement, ranks=ranks, **changes))
        if less < ZERO_3_WORTH * now:
            saved = f"{amount(now)} -> {amount(less)}"
            lines.append(f"{fields} on {plural(ranks, 'GPUs')}: {saved}, with more traffic between them")
    longest = job.data.max_prompt_tokens + job.data.max_response_tokens
    fields = "data.max_prompt_tokens and data.max_response_tokens"
    lines.append(f"smaller {fields} (their sum is {longest}), or a smaller model")
    return "\n".join(lines)
