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
from jobs.spec import Job, Lora
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
    """The shapes of the models of a job."""

    actor: Shape
    critic: Shape
    judge: Shape | None = None  # of ppo.judge_model

    @property
    def all(self) -> list[Shape]:
        return [self.actor, self.critic, *([self.judge] if self.judge is not None else [])]

    @property
    def is_known(self) -> bool:
        return all(shape.is_known for shape in self.all)


@dataclass(frozen=True)
class StepRows:
    """The rows of a step: how many, and their lengths in tokens."""

    count: int | None  # None: not known before the data is here
    prompt: float  # in the mean
    answer: float  # one answer, in the mean
    longest: int  # prompt and answer together
    lengths: tuple[int, ...] = ()  # of some of them: prompt and answer, in step 2 the longer one

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
    kernel: float  # seconds of the host to start a kernel


def card_speed(cards: Cards, key: str) -> tuple[Speed, float]:
    """Return a listed card's speed, and its memory in bytes."""
    card, shares = cards.cards[key], cards.shares
    link = shares.nvlink if card.nvlink else shares.host_link
    if card.measured is not None:
        measured = card.measured
        speed = Speed(key, measured.matmul, measured.bandwidth, link, is_measured=True, kernel=GPU_KERNEL)
        return speed, measured.memory_gib * GIB
    rates = card.matmul * shares.matmul, card.bandwidth * shares.bandwidth
    return Speed(key, *rates, link, is_measured=False, kernel=GPU_KERNEL), card.memory_gib * shares.memory * GIB


# --- parameters ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Size:
    """Parameters of one network."""

    all: int
    trained: int  # with LoRA: those of the adapters, which `all` leaves out


def sizes_of(job: Job, models: Models) -> dict[str, Size]:
    """Return the parameters of actor and critic, and of the judge if the job has one."""
    actor = models.actor.causal
    adapters = models.actor.adapters(job.actor.lora) if job.actor.lora is not None else 0
    critic = models.critic.scorer
    sizes = {"actor": Size(actor, adapters or actor), "critic": Size(critic, critic)}
    return sizes if models.judge is None else {**sizes, "judge": Size(models.judge.scorer, 0)}


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

    They are the reward model, the reference, the judge, and the weights that rollouts read: see
    frozen_copies in rlhf_train/steps/ppo_setup.py.
    """
    actor, critic = sizes["actor"], sizes["critic"]
    judge = sizes["judge"].all if "judge" in sizes else 0
    if zero_stage == 3:
        copies = 2 * actor.all
    else:
        # LoRA: the reference is the actor with its adapters off, and rollouts read the actor.
        copies = actor.all if actor.trained == actor.all else 0
    return (critic.all + judge + copies) * WEIGHT_BYTES[precision]


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
    networks = job.networks_of(step)
    parts = {network: training_bytes(sizes[network], precision, stages[network], ranks) for network in networks}
    held = {name: sum(part[name] for part in parts.values()) for name in ("weights", "optimizer")}
    gradients = sum(part["gradients"] for part in parts.values())
    held["buckets"] = sum(_bucket_bytes(sizes[network], stages[network], precision) for network in networks)
    keeps_cache = models.actor.is_static or placed.device == "cpu"
    if step == 3:
        held["frozen"] = frozen_bytes(sizes, precision, placed.actor_zero_stage)
        held["cache"] = cache_bytes(job, models.actor, placed, rows, slots) if keeps_cache else 0.0
        held["average"] = 4 * sizes["actor"].trained / ranks if job.ppo.ema_decay else 0.0
    passes = {
        network: _pass_bytes(job, step, network, shapes[network], placed, micro_batch, rows) for network in networks
    }
    has_several_passes = global_batch(job, step) // ranks > micro_batch
    # A pass keeps most before its backward pass, when its own gradients are not there yet; those of
    # the passes before are.
    others = gradients if has_several_passes or placed.device == "cpu" else 0.0
    others = max(others, parts["actor"]["gradients"] if step == 3 else 0.0)
    copies = 0.0 if precision == "float32" else sum(4 * sizes[n].trained / _shared(stages[n], ranks) for n in networks)
    phases = {"a pass": others + max(passes.values()), "the optimizer's step": gradients + copies}
    if step == 3 and not keeps_cache:  # a model's own forward drops it after each batch of answers
        phases["a rollout"] = gradients + cache_bytes(job, models.actor, placed, rows, slots)
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
    job: Job, step: int, network: str, shape: Shape, placed: Placed, micro_batch: int, rows: StepRows
) -> float:
    """Return what one forward pass keeps, on the longest rows."""
    weight, is_half = WEIGHT_BYTES[placed.precision], placed.precision != "float32"
    tokens = _most_tokens(job, step, shape, placed, micro_batch, rows)
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


def _most_tokens(job: Job, step: int, shape: Shape, placed: Placed, micro_batch: int, rows: StepRows) -> float:
    """Return the tokens of the largest pass.

    Padded rows are all as long as the longest. Packed ones are a trial's longest rows, or as many
    of an update's as have no more tokens than the trial's would have if padded.
    """
    sequences = micro_batch * (2 if step == 2 else 1)
    padded = float(sequences * rows.longest)
    if step == 3 or not rows.lengths or not is_packed(shape, placed):  # step 3's answers may all be long
        return padded
    mean = sum(rows.lengths) / len(rows.lengths)
    longer = rows_tokens(rows) / mean  # of a pair both count, and `lengths` has the longer
    of_count = len(rows.lengths) / max(rows.count or 1, len(rows.lengths))
    longest = sorted(rows.lengths)[-max(1, math.ceil(micro_batch * of_count)) :]
    update = global_batch(job, step) / placed.ranks * mean
    per_row = sequences / micro_batch * longer
    return min(padded, per_row * max(micro_batch * sum(longest) / len(longest), update))


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
        trained = sum(sizes[network].trained for network in job.networks_of(step))
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
    batch = spec.prompts_per_rollout if step == 3 else spec.global_batch
    whole = max(1, math.ceil(rows * spec.epochs / batch - 1e-9)) * (updates_per_rollout(job) if step == 3 else 1)
    return min(whole, spec.max_updates) if spec.max_updates else whole


def updates_per_rollout(job: Job) -> int:
    return job.ppo.ppo_epochs * job.ppo.rollout_batch // job.ppo.global_batch


@dataclass(frozen=True)
class Costs:
    """What work costs on a kind of device, in times of what its Speed says: docs/estimates.md."""

    products: float
    attention: float
    moved: float  # what layers read and write besides
    logits: tuple[float, float]  # numbers moved for each logit, forward and backward
    kernel: float
    optimizer: float  # bytes of each trained parameter
    step_weights: float  # a decode step's weights
    step_cache: tuple[float, float]  # what is in its cache: by the static decoder, by a model's own forward
    drawn: float  # bytes of each logit that a token is drawn from
    static_kernels: float  # of a layer, by the static decoder
    update_kernels: int  # of a layer once an update, whatever its passes: see GPU_KERNEL


COSTS = {
    # Kernels of our own compute softmax in one pass over the logits.
    "cuda": Costs(
        products=1.03,
        attention=2.0,
        moved=2.4,
        logits=(1, 2),
        kernel=1.0,
        optimizer=28,
        step_weights=1.0,
        step_cache=(1.0, 3.0),
        drawn=50,
        static_kernels=1.3,  # a CUDA graph starts them
        update_kernels=35,
    ),
    # Products of few rows wait for the weights. What is moved there was measured with what fits
    # into the processor's cache. Attention and softmax of float32 run far below the products' rate.
    # All are 1.2 times what the quickest of several passes took: an update of a run is none.
    "cpu": Costs(
        products=1.27,
        attention=13.2,
        moved=2.5,
        logits=(44, 66),
        kernel=16.8,
        optimizer=120,
        step_weights=10.0,
        step_cache=(14.9, 19.1),
        drawn=580,
        static_kernels=26,
        update_kernels=0,  # within CPU_UPDATE
    ),
}
ADAPTER_COST = 2  # the products of LoRA's narrow matrices, in times of others
NARROW = 0.4  # a GPU reaches less of its rate in layers narrower than WIDE: by this power of their width
WIDE = 2048
# Seconds of the host to start a kernel: 18 to 28 us explained the runs on three hosts of one card,
# so it is measured where it can be (docs/estimates.md). What the passes leave unexplained is about
# 35 kernels of each layer once an update: DeepSpeed's hooks and copies of gradients.
GPU_KERNEL = 25e-6  # where nobody measures it
MASKED_KERNELS = (6, 10)  # more where attention has a mask of padding: PyTorch's profiler, five families
GPU_UPDATE, CPU_UPDATE = 5e-3, 15e-3  # seconds of an update besides its passes
DRAW_KERNELS = 25  # that a decode step starts besides its layers, by a model's own forward
GATHER_LAYER = 10e-3  # a layer's pass at ZeRO 3, which collects its weights
LONG_ANSWERS = 5  # the longest answer of a rollout, in times of the mean one
FORWARD = 1 / 3  # of what layers move in both passes
FUSED_FAMILY = "opt"  # whose layers
FUSED = 0.35  # move this share on a GPU, by kernels of our own


@dataclass(frozen=True)
class Passes:
    """An update on one rank, where rows are padded to the longest of their pass."""

    count: float
    tokens: float  # of one sequence of each row, padding included


@dataclass(frozen=True)
class _Work:
    """What a rank computes in the passes of an update."""

    passes: float
    tokens: float
    head_tokens: float  # of which logits are computed
    length: float  # of a row, in the mean


def update_seconds(
    job: Job, step: int, models: Models, placed: Placed, rows: StepRows, speed: Speed, padded: Passes | None = None
) -> float:
    """Return the seconds of one update of a step; of step 3 with its share of the rollout.

    padded: its passes, for models whose rows are padded; None: they are taken for packed.
    """
    if step == 3:
        return _ppo_seconds(job, models, placed, rows, speed, padded)
    shape = models.actor if step == 1 else models.critic
    sequences = global_batch(job, step) * (2 if step == 2 else 1)
    lm_answers = sequences / 2 if step == 2 and job.reward.lm_coef else 0
    answers = lm_answers if step == 2 else sequences
    head = answers * (rows.answer + (rows.prompt if step == 1 and job.sft.loss_on_prompt else 0))
    micro_batch = placed.micro_batches[step - 1] * (2 if step == 2 else 1)
    work = _work(shape, sequences, head, rows, micro_batch, placed, padded, of_row=2 if step == 2 else 1)
    lora = job.actor.lora if step == 1 else None
    train = _train_seconds(job, shape, work, placed, speed, lora)
    stage = placed.actor_zero_stage if step == 1 else placed.critic_zero_stage
    size = sizes_of(job, models)["actor" if step == 1 else "critic"]
    return train + _optimizer_seconds(size, stage, work.passes * shape.layers, placed, speed)


def rows_tokens(rows: StepRows) -> float:
    return rows.prompt + rows.answer


def _work(
    shape: Shape,
    sequences: float,
    head_tokens: float,
    rows: StepRows,
    micro_batch: int,
    placed: Placed,
    padded: Passes | None,
    of_row: int = 1,
) -> _Work:
    """Return a rank's share of the work. of_row: sequences that a row has."""
    length = rows_tokens(rows)
    tokens = sequences / placed.ranks * length
    if padded is not None and not is_packed(shape, placed):
        return _Work(padded.count, max(tokens, padded.tokens * of_row), head_tokens / placed.ranks, length)
    passes = max(1, math.ceil(tokens / (micro_batch * rows.longest)))  # as many tokens as the longest rows
    return _Work(passes, tokens, head_tokens / placed.ranks, length)


def is_packed(shape: Shape, placed: Placed) -> bool:
    return shape.is_packed and (placed.device == "cpu" or placed.precision != "float32")


def _kernels(shape: Shape, placed: Placed, lora: Lora | None = None) -> tuple[int, int]:
    """Return the kernels that one layer starts on a device, forward and backward."""
    forward, backward = shape.kernels(lora)
    if placed.device == "cuda" and not is_packed(shape, placed):
        return forward + MASKED_KERNELS[0], backward + MASKED_KERNELS[1]
    return forward, backward


def _rate(shape: Shape, placed: Placed, speed: Speed) -> float:
    share = min(1.0, shape.width / WIDE) ** NARROW if placed.device == "cuda" else 1.0
    return speed.matmul * share / COSTS[placed.device].products


def _train_seconds(job: Job, shape: Shape, work: _Work, placed: Placed, speed: Speed, lora: Lora | None) -> float:
    """Return the seconds of the passes of an update, forward and backward.

    Frozen weights have no gradient. What is checkpointed runs forward twice.
    """
    again = 1 if job.hardware.gradient_checkpointing else 0
    forward, backward = _kernels(shape, placed, lora)
    return _seconds(
        shape,
        work,
        placed,
        speed,
        multiplied=2 * (1 + again) + (2 if lora is not None else 4),
        moved=1 + again * FORWARD,
        kernels=forward * (1 + again) + backward + COSTS[placed.device].update_kernels / work.passes,
        attended=3.5 + again,
        logits=(1, 1),
        lora=lora,
    )


def _forward_seconds(shape: Shape, work: _Work, placed: Placed, speed: Speed) -> float:
    kernels, _ = _kernels(shape, placed)
    return _seconds(
        shape, work, placed, speed, multiplied=2, moved=FORWARD, kernels=kernels, attended=1, logits=(1, 0), lora=None
    )


def _seconds(
    shape: Shape,
    work: _Work,
    placed: Placed,
    speed: Speed,
    *,
    multiplied: float,
    moved: float,
    kernels: float,
    attended: float,
    logits: tuple[int, int],
    lora: Lora | None,
) -> float:
    """Return the seconds of passes through a network.

    multiplied: flop for each weight and token; moved: of what layers move in both passes; kernels:
    of a layer; attended: forward passes that attention takes as long as; logits: how often they go
    forward and backward.
    """
    costs, weight = COSTS[placed.device], WEIGHT_BYTES[placed.precision]
    head_flops = 2 * (logits[0] + 2 * logits[1]) * shape.head * work.head_tokens
    adapters = 0 if lora is None else 6 * ADAPTER_COST * shape.adapters(lora)
    flops = (multiplied * shape.matrices + adapters) * work.tokens + head_flops
    products = flops / _rate(shape, placed, speed)
    # A token attends to half of its row in the mean; two products of 2 flop a number.
    attention = attended * 2 * work.tokens * work.length * shape.attention * shape.layers / speed.matmul
    layers = work.tokens * shape.layers * moved * shape.moved_by_layer(work.length / 2, weight, lora)
    if placed.device == "cuda" and shape.family == FUSED_FAMILY:
        layers *= FUSED
    softmax = weight * shape.vocabulary * work.head_tokens
    softmax *= logits[0] * costs.logits[0] + logits[1] * costs.logits[1]
    compute = products + costs.attention * attention + (costs.moved * layers + softmax) / speed.bandwidth
    host = work.passes * shape.layers * kernels * costs.kernel * speed.kernel
    return max(compute, host) if placed.device == "cuda" else compute + host


def _optimizer_seconds(size: Size, zero_stage: int, layers: float, placed: Placed, speed: Speed) -> float:
    """Return the seconds of the optimizer's step, and of what ranks send each other.

    layers: that all passes of the update compute, one after the other.
    """
    fixed = GPU_UPDATE if placed.device == "cuda" else CPU_UPDATE
    moved = COSTS[placed.device].optimizer * size.trained / _shared(zero_stage, placed.ranks)
    local = moved / speed.bandwidth
    if placed.ranks == 1:
        return fixed + local
    sent = 2 * size.trained * WEIGHT_BYTES[placed.precision] / speed.link
    return fixed + local + sent + (layers * GATHER_LAYER if zero_stage == 3 else 0.0)


def _ppo_seconds(
    job: Job, models: Models, placed: Placed, rows: StepRows, speed: Speed, padded: Passes | None
) -> float:
    """Return the seconds of an update of step 3, with its share of the rollout and of scoring."""
    actor, critic, sizes = models.actor, models.critic, sizes_of(job, models)
    batch, rollouts = job.ppo.global_batch, updates_per_rollout(job)
    # Rows are packed for both networks or for neither.
    widest = actor if not actor.is_packed else critic
    of_actor = _work(widest, batch, batch * rows.answer, rows, placed.micro_batches[2], placed, padded)
    of_critic = replace(of_actor, head_tokens=0.0)
    train = _train_seconds(job, actor, of_actor, placed, speed, job.actor.lora)
    if job.ppo.has_critic:
        train += _train_seconds(job, critic, of_critic, placed, speed, None)
    shapes = {"actor": (actor, placed.actor_zero_stage), "critic": (critic, placed.critic_zero_stage)}
    for network in job.networks_of(3):
        shape, stage = shapes[network]
        train += _optimizer_seconds(sizes[network], stage, of_actor.passes * shape.layers, placed, speed)
    by_actor, by_critic = (_forward_seconds(*work, placed, speed) for work in ((actor, of_actor), (critic, of_critic)))
    scored = by_actor + by_critic  # by the reference and the reward model
    if rollouts > 1:  # actor and critic score too
        scored += by_actor + (by_critic if job.ppo.has_critic else 0.0)
    scored *= job.ppo.rollout_batch / batch
    if models.judge is not None:  # once a rollout
        judged = _forward_seconds(models.judge, of_critic, placed, speed)
        scored += judged * job.ppo.rollout_batch / batch
    return train + (scored + rollout_seconds(job, actor, placed, rows, speed)) / rollouts


def rollout_seconds(job: Job, actor: Shape, placed: Placed, rows: StepRows, speed: Speed) -> float:
    """Return the seconds of sampling one rollout: prompts are fed, then token after token comes.

    Every step reads all weights, until the longest answer has ended; and of the answers that have
    not, the cache.
    """
    costs, weight, static = COSTS[placed.device], WEIGHT_BYTES[placed.precision], actor.is_static
    share = -(-job.ppo.rollout_batch // placed.ranks)
    slots = min(share, placed.rollout_micro_batch)
    longest = min(float(job.data.max_response_tokens), LONG_ANSWERS * rows.answer)
    if static:  # a finished answer makes room for the next
        steps = longest + (share / slots - 1) * rows.answer
    else:  # one batch after the other
        steps = longest * share / slots
    forward, _ = _kernels(actor, placed, job.actor.lora)
    kernels = actor.layers * (costs.static_kernels if static else forward)
    kernels += 0 if static else DRAW_KERNELS
    host = steps * kernels * costs.kernel * speed.kernel
    tokens = share * rows.answer
    kept = tokens * (rows.prompt + rows.answer / 2)  # tokens read from the cache, in all
    read = steps * costs.step_weights * (actor.matrices + actor.head) * weight
    read += costs.step_cache[0 if static else 1] * kept * actor.layers * 2 * actor.key_value * weight
    drawn = tokens * actor.vocabulary * (0 if static and placed.device == "cuda" else costs.drawn)
    prompts = _Work(1, share * rows.prompt, share, rows.prompt)
    fed = _forward_seconds(actor, prompts, placed, speed)
    moved = (read + drawn) / speed.bandwidth
    if placed.device == "cuda":  # it has long multiplied when the weights have come
        return fed + (moved + host if static else max(moved, host))
    return fed + moved + host + 2 * tokens * (actor.matrices + actor.head) / _rate(actor, placed, speed)


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


def step_time(
    job: Job, step: int, models: Models, placed: Placed, rows: StepRows, speed: Speed, padded: Passes | None = None
) -> StepTime:
    """Return how long a step takes, from its start to its saved model.

    padded: see update_seconds.
    """
    update_s = update_seconds(job, step, models, placed, rows, speed, padded)
    shape = models.critic if step == 2 else models.actor
    held_out = job.data.eval_rows * (2 if step == 2 else 1)
    tokens, micro_batch = held_out * rows_tokens(rows), placed.micro_batches[step - 1]
    passes = math.ceil(tokens / (micro_batch * rows.longest))
    work = _Work(passes, tokens / placed.ranks, held_out * rows.answer / placed.ranks, rows_tokens(rows))
    measure_s = _forward_seconds(shape, work, placed, speed)
    if step == 3:
        answered = 2 * job.data.eval_rows + NORMALIZATION_PROMPTS
        measure_s = rollout_seconds(job, models.actor, placed, rows, speed) * answered / job.ppo.rollout_batch / 2
    return StepTime(updates_of(job, step, rows.count), update_s, START_S[placed.device] + 2 * measure_s)
