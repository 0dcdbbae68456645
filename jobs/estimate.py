"""One estimate of what a job takes: memory of each step, disk, updates and seconds.

It is pure: from the models' configs (jobs/model_shape.py), the job, where it runs, and its rows. It
knows the phases of our own code: a step's trial update, its passes, the optimizer's step, rollouts.
The constants were fitted to the runs of docs/speed.md; docs/estimates.md says to which, and how far
the others lie.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from env.settings import Cards
from jobs.model_shape import Shape
from jobs.spec import Job
from jobs.steps import STEPS

GIB = 2**30
WEIGHT_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}

# --- what is needed -----------------------------------------------------------------------------


class Placed(Protocol):
    """The resolved `hardware` of a job, as rlhf_train/plan/placement.py derives it."""

    @property
    def device(self) -> str: ...
    @property
    def ranks(self) -> int: ...
    @property
    def precision(self) -> str: ...
    @property
    def actor_zero_stage(self) -> int: ...
    @property
    def critic_zero_stage(self) -> int: ...
    @property
    def micro_batches(self) -> tuple[int, int, int]: ...
    @property
    def rollout_micro_batch(self) -> int: ...


@dataclass(frozen=True)
class Models:
    """The shapes of the two models of a job."""

    actor: Shape
    critic: Shape

    @property
    def is_known(self) -> bool:
        return self.actor.is_known and self.critic.is_known


@dataclass(frozen=True)
class StepRows:
    """The rows of a step: how many, and their lengths in tokens."""

    count: int | None  # None: not known before the data is here
    prompt: float  # in the mean
    answer: float  # one answer, in the mean
    longest: int  # prompt and answer together

    @classmethod
    def unread(cls, job: Job) -> StepRows:
        """Return what is assumed of rows that nobody has read: each is as long as it may be."""
        prompt, answer = job.data.max_prompt_tokens, job.data.max_response_tokens
        return cls(None, prompt, answer, prompt + answer)


@dataclass(frozen=True)
class Speed:
    """What one rank computes."""

    name: str
    matmul: float  # flop a second, sustained
    bandwidth: float  # bytes a second
    link: float  # bytes a second between the ranks, gradients added up
    is_measured: bool  # else the numbers are published ones, of which a share is taken


def card_speed(cards: Cards, key: str) -> tuple[Speed, float]:
    """Return a listed card's speed, and its memory in bytes."""
    card, shares = cards.cards[key], cards.shares
    link = shares.nvlink if card.nvlink else shares.host_link
    if card.measured is not None:
        measured = card.measured
        return Speed(key, measured.matmul, measured.bandwidth, link, is_measured=True), measured.memory_gib * GIB
    speed = Speed(key, card.matmul * shares.matmul, card.bandwidth * shares.bandwidth, link, is_measured=False)
    return speed, card.memory_gib * shares.memory * GIB


# --- parameters ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Size:
    """Parameters of one network."""

    all: int
    trained: int  # with LoRA: those of the adapters, which `all` leaves out


def sizes_of(job: Job, models: Models) -> dict[str, Size]:
    """Return the parameters of actor and critic."""
    actor = models.actor.causal
    adapters = models.actor.adapters(job.actor.lora) if job.actor.lora is not None else 0
    critic = models.critic.scorer
    return {"actor": Size(actor, adapters or actor), "critic": Size(critic, critic)}


def training_bytes(size: Size, precision: str, zero_stage: int, ranks: int) -> dict[str, float]:
    """Return the bytes of a rank's weights, gradients and AdamW states.

    In 16 bit, the states include a float32 master copy of the weights.
    """
    weight = WEIGHT_BYTES[precision]
    states = 8 if precision == "float32" else 12
    adapters = size.trained if size.trained != size.all else 0
    return {
        "weights": (size.all + adapters) * weight / (ranks if zero_stage >= 3 else 1),
        "gradients": size.trained * weight / (ranks if zero_stage >= 2 else 1),
        "optimizer": size.trained * states / (ranks if zero_stage >= 1 else 1),
    }


def frozen_bytes(sizes: Mapping[str, Size], precision: str, zero_stage: int) -> float:
    """Return the bytes of a rank's weights that are not trained in step 3.

    They are the reward model, the reference, and the weights that rollouts read: see
    ppo.frozen_copies.
    """
    actor, critic = sizes["actor"], sizes["critic"]
    if zero_stage == 3:
        copies = 2 * actor.all
    else:
        # LoRA: the reference is the actor with its adapters off, and rollouts read the actor.
        copies = actor.all if actor.trained == actor.all else 0
    return (critic.all + copies) * WEIGHT_BYTES[precision]


# --- memory -------------------------------------------------------------------------------------

KEPT_LOGITS = 2**31  # bytes of logits that are kept for the backward pass: models/log_probs.py
NORMALIZATION_PROMPTS = 256  # answers that set the scale of the rewards: steps/ppo_setup.py
CACHE_STEP = 64  # the cache's width is a multiple of this: generation/rollout.py
ACTIVATIONS = 1.03  # what kernels keep besides (statistics of norms), over what is counted
# DeepSpeed's ZeRO 2 and 3 add up gradients in a bucket, ZeRO 3 also gathers layers: parameters.
BUCKET, GATHERED = 500_000_000, 1_000_000_000
GPU_CONTEXT = 0.8 * GIB  # CUDA's, and its libraries' workspaces
NCCL = 0.7 * GIB  # of each of several ranks
CACHED = 1.12  # what PyTorch's allocator holds, over what tensors take
CHECKPOINT_BYTES = 12  # a trained parameter, and its two moments
# Bytes of main memory without tensors: the launcher and the process that imports, and each rank.
# Ranks are forked, and share the libraries.
LAUNCHER, RANK = 0.42 * GIB, 0.18 * GIB


@dataclass(frozen=True)
class StepMemory:
    """The memory that a step needs: of one GPU, or of the whole machine on a CPU. Bytes."""

    held: dict[str, float]  # during the whole training
    phases: dict[str, float]  # on top of that, one after the other

    @property
    def peak(self) -> float:
        return sum(self.held.values()) + max(self.phases.values())

    @property
    def worst(self) -> str:
        """Return the phase that needs most."""
        return max(self.phases, key=self.phases.__getitem__)


def memory_of(
    job: Job,
    step: int,
    models: Models,
    placed: Placed,
    rows: StepRows,
    *,
    micro_batch: int | None = None,
    slots: int | None = None,
) -> StepMemory:
    """Return the memory of a step.

    micro_batch: of this step; slots: answers that rollouts sample at once; None: as planned.
    """
    micro_batch = micro_batch or placed.micro_batches[step - 1]
    sizes, precision, ranks = sizes_of(job, models), placed.precision, placed.ranks
    stages = {"actor": placed.actor_zero_stage, "critic": placed.critic_zero_stage}
    shapes = {"actor": models.actor, "critic": models.critic}
    networks = STEPS[step].networks
    parts = {network: training_bytes(sizes[network], precision, stages[network], ranks) for network in networks}
    held = {name: sum(part[name] for part in parts.values()) for name in ("weights", "optimizer")}
    gradients = sum(part["gradients"] for part in parts.values())
    held["buckets"] = sum(_bucket_bytes(sizes[network], stages[network], precision) for network in networks)
    if step == 3:
        held["frozen"] = frozen_bytes(sizes, precision, placed.actor_zero_stage)
        held["cache"] = cache_bytes(job, models.actor, placed, rows, slots)
        held["average"] = 4 * sizes["actor"].trained / ranks if job.ppo.ema_decay else 0.0
    passes = {
        network: _pass_bytes(job, step, network, shapes[network], placed.precision, micro_batch, rows)
        for network in networks
    }
    has_several_passes = global_batch(job, step) // ranks > micro_batch
    # A pass keeps most before its backward pass, when its own gradients are not there yet; those of
    # the passes before are.
    others = gradients if has_several_passes or placed.device == "cpu" else 0.0
    others = max(others, parts["actor"]["gradients"] if step == 3 else 0.0)
    copies = 0.0 if precision == "float32" else sum(4 * sizes[n].trained / _shared(stages[n], ranks) for n in networks)
    phases = {"a pass": others + max(passes.values()), "the optimizer's step": gradients + copies}
    if placed.device == "cpu":
        # The last checkpoint is copied, then the model, while the allocator still holds what the
        # passes took.
        trained = sum(sizes[network].trained for network in networks)
        model = sizes["critic" if step == 2 else "actor"].all * WEIGHT_BYTES[precision]
        phases["saving"] = phases["a pass"] + CHECKPOINT_BYTES * trained + model
    return _with_overhead(StepMemory(held, phases), placed)


def _shared(zero_stage: int, ranks: int) -> int:
    return ranks if zero_stage >= 1 else 1


def _bucket_bytes(size: Size, zero_stage: int, precision: str) -> float:
    weight = WEIGHT_BYTES[precision]
    bucket = min(BUCKET, size.trained) * weight if zero_stage >= 2 else 0
    return bucket + (min(GATHERED, size.all) * weight if zero_stage >= 3 else 0)


def _pass_bytes(
    job: Job, step: int, network: str, shape: Shape, precision: str, micro_batch: int, rows: StepRows
) -> float:
    """Return what one forward pass keeps, on the longest rows."""
    weight, is_half = WEIGHT_BYTES[precision], precision != "float32"
    sequences = micro_batch * (2 if step == 2 else 1)
    tokens = sequences * rows.longest
    of_layer = tokens * weight * ACTIVATIONS * shape.kept_by_layer(rows.longest, is_half=is_half)
    if network == "actor" and job.actor.lora is not None:
        of_layer += tokens * weight * job.actor.lora.rank * len(shape.adapted(job.actor.lora))
    if job.hardware.gradient_checkpointing:
        activations = of_layer + shape.layers * tokens * shape.width * weight
    else:
        activations = shape.layers * of_layer
    # The trial update computes the log-probs of all tokens.
    has_logits = network == "actor" or (step == 2 and job.reward.lm_coef > 0)
    logits = min(tokens * shape.vocabulary * weight, KEPT_LOGITS) if has_logits else 0
    return activations + logits


def global_batch(job: Job, step: int) -> int:
    return int(getattr(job, STEPS[step].section).global_batch)


def slots_of(job: Job, placed: Placed, rows: StepRows) -> int:
    """Return how many answers a rank samples at once, if memory allows."""
    most = max(job.ppo.rollout_batch, job.data.eval_rows, NORMALIZATION_PROMPTS)
    if rows.count is not None:
        most = max(job.ppo.rollout_batch, min(most, rows.count))
    return min(placed.rollout_micro_batch, -(-most // placed.ranks))


def cache_bytes(job: Job, actor: Shape, placed: Placed, rows: StepRows, slots: int | None = None) -> float:
    """Return the bytes of a rank's key-value cache."""
    width = -(-(job.data.max_prompt_tokens + job.data.max_response_tokens) // CACHE_STEP) * CACHE_STEP
    count = slots_of(job, placed, rows) if slots is None else slots
    return float(count * width * actor.layers * 2 * actor.key_value * WEIGHT_BYTES[placed.precision])


def _with_overhead(memory: StepMemory, placed: Placed) -> StepMemory:
    """Add what is no tensor of ours: contexts and buffers on a GPU, processes on a CPU."""
    if placed.device == "cuda":
        tensors = memory.peak
        overhead = (CACHED - 1) * tensors + GPU_CONTEXT + (NCCL if placed.ranks > 1 else 0.0)
        return replace(memory, held={**memory.held, "CUDA": overhead})
    held = {name: placed.ranks * size for name, size in memory.held.items()}
    phases = {name: placed.ranks * size for name, size in memory.phases.items()}
    return StepMemory({**held, "processes": LAUNCHER + placed.ranks * RANK}, phases)


@dataclass(frozen=True)
class Fit:
    """Whether a step fits into so much memory, and with which sizes."""

    memory: StepMemory
    micro_batch: int
    slots: int | None  # answers that rollouts sample at once; None: no rollouts
    fits: bool
    is_smaller: bool  # than planned; the run finds such sizes by itself


def fit_step(job: Job, step: int, models: Models, placed: Placed, rows: StepRows, available: float) -> Fit:
    """Find the largest sizes with which a step fits, the cache first; if none do, the smallest."""
    planned = placed.micro_batches[step - 1]
    share = global_batch(job, step) // placed.ranks
    tried = [planned, *(size for size in range(planned - 1, 0, -1) if share % size == 0)]
    slots = slots_of(job, placed, rows) if step == 3 else None
    fit = None
    for size in tried:
        for count in _halves(slots) if slots and placed.device == "cuda" else [slots]:
            memory = memory_of(job, step, models, placed, rows, micro_batch=size, slots=count)
            is_smaller = (size, count) != (planned, slots)
            fit = Fit(memory, size, count, memory.peak <= available, is_smaller)
            if fit.fits:
                return fit
    assert fit is not None
    return fit


def _halves(count: int) -> list[int]:
    return [count, *_halves(count // 2)] if count > 1 else [count]


# --- disk ---------------------------------------------------------------------------------------


def disk_bytes(job: Job, steps: Sequence[int], models: Models, precision: str) -> int:
    """Return the most disk space that the steps need at any time.

    That is the models of the steps before, a checkpoint, and next to it a second one or the model.
    """
    sizes, weight = sizes_of(job, models), WEIGHT_BYTES[precision]
    actor, critic = sizes["actor"], sizes["critic"]
    kept = most = 0
    for step in steps:
        model = (critic if step == 2 else actor).all * weight
        made = model * (2 if step == 3 and job.ppo.ema_decay else 1)
        best = model if job.checkpoint.best_every_updates else 0
        trained = sum(sizes[network].trained for network in STEPS[step].networks)
        checkpoint = CHECKPOINT_BYTES * trained + (4 * actor.trained if step == 3 and job.ppo.ema_decay else 0)
        most = max(most, kept + best + checkpoint + max(checkpoint, made))
        kept += best + made
    return most


# --- updates and seconds ------------------------------------------------------------------------


def updates_of(job: Job, step: int, rows: int | None) -> int | None:
    """Return the updates of a step; None: not known before its rows are."""
    spec = getattr(job, STEPS[step].section)
    if rows is None:
        return None
    batch = spec.rollout_batch if step == 3 else spec.global_batch
    whole = max(1, math.ceil(rows * spec.epochs / batch - 1e-9)) * (updates_per_rollout(job) if step == 3 else 1)
    return min(whole, spec.max_updates) if spec.max_updates else whole


def updates_per_rollout(job: Job) -> int:
    return job.ppo.ppo_epochs * job.ppo.rollout_batch // job.ppo.global_batch


# A GPU's rate is that of long products. Narrower layers reach less of it: 0.83 at a width of 2048,
# 0.59 at 1024.
WIDE, WIDE_SHARE = 2048, 0.83
CPU_SHARE = 0.6
# Seconds of the host: a layer's forward and backward pass; a layer's decode step, in a CUDA graph
# and by a model's own forward; an update besides its passes.
GPU_LAYER, GRAPH_LAYER, OWN_LAYER, GPU_UPDATE = 0.8e-3, 38e-6, 0.4e-3, 5e-3
CPU_LAYER, CPU_STEP_LAYER, CPU_UPDATE = 1.5e-3, 0.4e-3, 5e-3
GATHER_LAYER = 10e-3  # a layer's pass at ZeRO 3, which collects its weights
LONG_ANSWERS = 5  # the longest answer of a rollout, in times of the mean one
OPTIMIZER_BYTES = 28  # that AdamW reads and writes for each trained parameter
STATIC = "opt"  # the family whose answers come from the static decoder


def update_seconds(job: Job, step: int, models: Models, placed: Placed, rows: StepRows, speed: Speed) -> float:
    """Return the seconds of one update of a step; of step 3 with its share of the rollout."""
    if step != 3:
        shape = models.actor if step == 1 else models.critic
        sequences = global_batch(job, step) * (2 if step == 2 else 1)
        lm_answers = sequences / 2 if step == 2 and job.reward.lm_coef else 0
        answers = lm_answers if step == 2 else sequences
        head = answers * (rows.answer + (rows.prompt if step == 1 and job.sft.loss_on_prompt else 0))
        passes = _passes(sequences, rows, placed.micro_batches[step - 1] * (2 if step == 2 else 1), placed.ranks)
        has_lora = step == 1 and job.actor.lora is not None
        train = _train_seconds(shape, sequences * rows_tokens(rows), head, passes, placed, speed, has_lora=has_lora)
        stage = placed.actor_zero_stage if step == 1 else placed.critic_zero_stage
        size = sizes_of(job, models)["actor" if step == 1 else "critic"]
        return train + _optimizer_seconds(size, stage, passes * shape.layers, placed, speed)
    return _ppo_seconds(job, models, placed, rows, speed)


def rows_tokens(rows: StepRows) -> float:
    return rows.prompt + rows.answer


def _passes(sequences: int, rows: StepRows, micro_batch: int, ranks: int) -> int:
    """Return the passes of one rank: they hold as many tokens as the longest rows."""
    tokens = sequences / ranks * rows_tokens(rows)
    return max(1, math.ceil(tokens / (micro_batch * rows.longest)))


def _rate(shape: Shape, placed: Placed, speed: Speed) -> float:
    if placed.device == "cpu":
        return speed.matmul * CPU_SHARE
    return speed.matmul * WIDE_SHARE * min(1.0, shape.width / WIDE) ** 0.5


def _train_seconds(
    shape: Shape,
    tokens: float,
    head_tokens: float,
    passes: int,
    placed: Placed,
    speed: Speed,
    *,
    has_lora: bool = False,
) -> float:
    """Return the seconds of the passes of an update, forward and backward."""
    each = 4.2 if has_lora else 6.0  # frozen weights have no gradient
    if placed.device == "cuda" and has_lora:
        each = 5.4  # the adapters' narrow products take what is saved: 0.219 and 0.243 s with and without
    flops = (each * shape.matrices * tokens + 6 * shape.head * head_tokens) / placed.ranks
    host = passes * shape.layers * (GPU_LAYER if placed.device == "cuda" else CPU_LAYER)
    compute = flops / _rate(shape, placed, speed)
    return max(compute, host) if placed.device == "cuda" else compute + host


def _forward_seconds(shape: Shape, tokens: float, head_tokens: float, placed: Placed, speed: Speed) -> float:
    flops = 2 * (shape.matrices * tokens + shape.head * head_tokens) / placed.ranks
    host = shape.layers * (GPU_LAYER if placed.device == "cuda" else CPU_LAYER) / 3
    return flops / _rate(shape, placed, speed) + host


def _optimizer_seconds(size: Size, zero_stage: int, layers: int, placed: Placed, speed: Speed) -> float:
    """Return the seconds of the optimizer's step, and of what ranks send each other.

    layers: that all passes of the update compute, one after the other.
    """
    fixed = GPU_UPDATE if placed.device == "cuda" else CPU_UPDATE
    local = OPTIMIZER_BYTES * size.trained / _shared(zero_stage, placed.ranks) / speed.bandwidth
    if placed.ranks == 1:
        return fixed + local
    sent = 2 * size.trained * WEIGHT_BYTES[placed.precision] / speed.link
    return fixed + local + sent + (layers * GATHER_LAYER if zero_stage == 3 else 0.0)


def _ppo_seconds(job: Job, models: Models, placed: Placed, rows: StepRows, speed: Speed) -> float:
    """Return the seconds of an update of step 3, with its share of the rollout and of scoring."""
    actor, critic, sizes = models.actor, models.critic, sizes_of(job, models)
    batch, rollout = job.ppo.global_batch, job.ppo.rollout_batch
    tokens = rows_tokens(rows)
    passes = _passes(batch, rows, placed.micro_batches[2], placed.ranks)
    has_lora = job.actor.lora is not None
    train = _train_seconds(actor, batch * tokens, batch * rows.answer, passes, placed, speed, has_lora=has_lora)
    train += _train_seconds(critic, batch * tokens, 0, passes, placed, speed)
    for network, shape, stage in (
        ("actor", actor, placed.actor_zero_stage),
        ("critic", critic, placed.critic_zero_stage),
    ):
        train += _optimizer_seconds(sizes[network], stage, passes * shape.layers, placed, speed)
    scored = _forward_seconds(actor, rollout * tokens, rollout * rows.answer, placed, speed)
    scored += _forward_seconds(critic, rollout * tokens, 0, placed, speed)
    if updates_per_rollout(job) > 1:  # actor and critic score too
        scored *= 2
    return train + (scored + rollout_seconds(job, actor, placed, rows, speed)) / updates_per_rollout(job)


def rollout_seconds(job: Job, actor: Shape, placed: Placed, rows: StepRows, speed: Speed) -> float:
    """Return the seconds of sampling one rollout: prompts are fed, then token after token comes.

    Every step reads all weights, until the longest answer has ended; and of the answers that have
    not, the cache.
    """
    share = -(-job.ppo.rollout_batch // placed.ranks)
    slots = min(share, placed.rollout_micro_batch)
    weight = WEIGHT_BYTES[placed.precision]
    longest = min(float(job.data.max_response_tokens), LONG_ANSWERS * rows.answer)
    steps = longest + (share / slots - 1) * rows.answer  # a finished answer makes room for the next
    host = CPU_STEP_LAYER
    if placed.device == "cuda":
        host = GRAPH_LAYER if actor.family == STATIC else OWN_LAYER
    step_s = (actor.matrices + actor.head) * weight / speed.bandwidth + actor.layers * host
    kept = share * rows.answer * (rows.prompt + rows.answer / 2)  # tokens read from the cache, in all
    cache_s = kept * actor.layers * 2 * actor.key_value * weight / speed.bandwidth
    multiplied = share * rows.prompt * actor.matrices
    if placed.device == "cpu":  # a GPU has long multiplied when the weights have come
        multiplied += share * rows.answer * (actor.matrices + actor.head)
    return steps * step_s + cache_s + 2 * multiplied / _rate(actor, placed, speed)


@dataclass(frozen=True)
class StepTime:
    """How long a step takes; None: not known before its rows are."""

    updates: int | None
    update_s: float
    fixed_s: float  # start-up, measuring before and after, saving

    @property
    def seconds(self) -> float | None:
        return None if self.updates is None else self.fixed_s + self.updates * self.update_s


# Start-up of a step, without its compute: imports, loading, saving.
START_S = {"cuda": 10.0, "cpu": 6.0}


def step_time(job: Job, step: int, models: Models, placed: Placed, rows: StepRows, speed: Speed) -> StepTime:
    """Return how long a step takes, from its start to its saved model."""
    update_s = update_seconds(job, step, models, placed, rows, speed)
    shape = models.critic if step == 2 else models.actor
    held_out = job.data.eval_rows * (2 if step == 2 else 1)
    measure_s = _forward_seconds(shape, held_out * rows_tokens(rows), held_out * rows.answer, placed, speed)
    if step == 3:
        answered = 2 * job.data.eval_rows + NORMALIZATION_PROMPTS
        measure_s = rollout_seconds(job, models.actor, placed, rows, speed) * answered / job.ppo.rollout_batch / 2
    return StepTime(updates_of(job, step, rows.count), update_s, START_S[placed.device] + 2 * measure_s)
