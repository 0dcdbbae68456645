"""A placement says what `auto` in a job's `hardware` becomes on this machine.

Device, ranks, precision, ZeRO stages and micro batches are derived once and printed.
"""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass

import torch

from jobs.errors import ExitCode, ToolkitError, together
from jobs.formatting import plural
from jobs.spec import Job
from jobs.steps import STEPS
from rlhf_train.data.sequences import BatchPlan, largest_divisor
from rlhf_train.ranks.processes import cpu_threads

GIB = 2**30
# (bytes, sequences): a GPU with more memory than that tries so many sequences a pass before the
# first update, and fewer if they do not fit.
MICRO_BATCHES = ((120 * GIB, 64), (70 * GIB, 32), (40 * GIB, 16), (0, 8))


@dataclass(frozen=True)
class Machine:
    """The facts of a machine that a placement depends on."""

    cores: int  # that this process may use
    gpus: tuple[str, ...] = ()  # names
    gpu_bytes: int = 0  # memory of the smallest
    bfloat16: bool = False  # all GPUs compute in it
    capabilities: tuple[str, ...] = ()  # of the GPUs: "8.9"
    peer_access: bool | None = None  # some GPU reaches another's memory; None with one GPU
    cuda: str | None = None  # that PyTorch was built for
    gpu_error: str = ""  # why PyTorch sees no GPU, in its own words, if it has any

    @classmethod
    def look(cls, *, gpus: bool = True) -> Machine:
        """Find out the facts of this machine.

        gpus: false leaves the GPUs alone, since the job runs on the CPU; they may be broken.
        """
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        if not gpus:
            return cls(cores)
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            available = torch.cuda.is_available()
        if not available:
            error = str(warned[0].message).splitlines()[0] if warned else ""
            return cls(cores, cuda=torch.version.cuda, gpu_error=error)
        count = torch.cuda.device_count()
        cards = [torch.cuda.get_device_properties(i) for i in range(count)]
        pairs = [(i, j) for i in range(count) for j in range(count) if i != j]
        return cls(
            cores,
            tuple(c.name for c in cards),
            min(c.total_memory for c in cards),
            all(c.major >= 8 for c in cards),
            tuple(f"{c.major}.{c.minor}" for c in cards),
            any(torch.cuda.can_device_access_peer(*pair) for pair in pairs) if pairs else None,
            torch.version.cuda,
        )


@dataclass(frozen=True)
class Placement:
    """The resolved `hardware` of a job: plain values, since it is sent to the ranks as JSON."""

    device: str
    device_reason: str
    ranks: int
    precision: str
    actor_zero_stage: int
    critic_zero_stage: int
    micro_batches: tuple[int, int, int]  # steps 1, 2 and 3
    rollout_micro_batch: int
    cpu_threads: int
    notes: tuple[str, ...] = ()  # where the job's wish was not followed to the letter
    no_peer_access: str = ""  # why the GPUs of several ranks cannot reach each other's memory

    def batch_plan(self, job: Job, step: int) -> BatchPlan:
        section = STEPS[step].section
        return BatchPlan.of(getattr(job, section).global_batch, self.micro_batches[step - 1], self.ranks, section)


def place(job: Job, machine: Machine, no_peer_access: str = "") -> Placement:
    """Resolve the job's `hardware` for this machine.

    `auto` is the CPU where PyTorch sees no GPU; jobs/fitness.py has checked before whether it
    should see one. Raises ToolkitError when the job asks for what the machine lacks, or when its
    batches do not divide.
    """
    wish = job.hardware
    device, reason = _device(job, machine)
    ranks = wish.ranks if wish.ranks != "auto" else (len(machine.gpus) if device == "cuda" else 1)
    if device == "cuda" and ranks > len(machine.gpus):
        raise ToolkitError(
            f"hardware.ranks is {ranks}, but PyTorch sees {plural(len(machine.gpus), 'GPUs')}",
            hint="lower it, or set CUDA_VISIBLE_DEVICES",
            exit_code=ExitCode.UNFIT,
        )
    precision = wish.precision
    if precision == "auto":
        precision = "float32" if device == "cpu" else "bfloat16" if machine.bfloat16 else "float16"
    if precision == "float16" and device == "cpu":
        raise ToolkitError(
            "hardware.precision is float16, but this runs on CPU",
            why="its kernels are missing or slow there",
            hint="use float32 or bfloat16",
            exit_code=ExitCode.UNFIT,
        )
    if wish.micro_batch == "auto":
        # On a CPU 8 rows a pass are faster than 16: an update of real lengths took 5.0 and 6.1 s;
        # with rows of full length 8 took 2 to 4 % less.
        limit = 8 if device == "cpu" else next(size for memory, size in MICRO_BATCHES if machine.gpu_bytes > memory)
        shares = [max(1, part.global_batch // ranks) for part in (job.sft, job.reward, job.ppo)]
        micro_batches = tuple(largest_divisor(share, limit) for share in shares)
    else:
        micro_batches = (wish.micro_batch,) * 3
    stages = {
        "actor": _zero_stage(wish.actor_zero_stage, ranks, device, has_lora=job.actor.lora is not None),
        "critic": _zero_stage(wish.critic_zero_stage, ranks, device, has_lora=False),
    }
    notes: tuple[str, ...] = ()
    if precision != "float32":
        wishes = {"actor": wish.actor_zero_stage, "critic": wish.critic_zero_stage}
        # DeepSpeed 0.19.8's ZeRO 0 in bfloat16 gives other results than ZeRO 1-3 and float32 after
        # one update (gradient norm 1.83 against 1.61 on a two-layer OPT). ZeRO 1 on one rank needs
        # no more memory.
        zero_0 = [network for network, stage in wishes.items() if stage == 0]
        notes = tuple(f"{network}: ZeRO 0 is run as ZeRO 1 in {precision}" for network in zero_0)
        stages = {network: max(stage, 1) for network, stage in stages.items()}
    if wish.rollout_micro_batch != "auto":
        rollout_micro_batch = wish.rollout_micro_batch
    else:  # a GPU takes fewer if its free memory is too small for so many answers: see Rollouts
        rollout_micro_batch = max(64, job.ppo.rollout_batch // ranks) if device == "cuda" else 64
    placement = Placement(
        device=device,
        device_reason=reason,
        ranks=ranks,
        precision=precision,
        actor_zero_stage=stages["actor"],
        critic_zero_stage=stages["critic"],
        micro_batches=micro_batches,  # type: ignore[arg-type]
        rollout_micro_batch=rollout_micro_batch,
        cpu_threads=cpu_threads(job, ranks, machine.cores),
        notes=notes,
        no_peer_access=no_peer_access if device == "cuda" and ranks > 1 else "",
    )
    mistakes = _batches_that_do_not_divide(job, placement)
    if mistakes:
        raise together(mistakes)
    return placement


def _batches_that_do_not_divide(job: Job, placement: Placement) -> list[ToolkitError]:
    mistakes = []
    for step in (1, 2, 3):
        try:
            placement.batch_plan(job, step)
        except ToolkitError as error:
            mistakes.append(error)
    if job.ppo.rollout_batch % placement.ranks:
        what = f"ppo.rollout_batch {job.ppo.rollout_batch} cannot be shared by {placement.ranks} ranks"
        mistakes.append(ToolkitError(what, hint=f"use a multiple of {placement.ranks}"))
    return mistakes


def _device(job: Job, machine: Machine) -> tuple[str, str]:
    wish = job.hardware.device
    if wish == "cuda" and not machine.gpus:
        raise ToolkitError(
            "hardware.device is cuda, but PyTorch sees no GPU",
            why=f"torch {torch.__version__} was built for {torch.version.cuda or 'CPU only'}",
            hint="look at nvidia-smi and CUDA_VISIBLE_DEVICES, or set hardware.device: cpu",
            exit_code=ExitCode.UNFIT,
        )
    if wish == "cpu":
        return "cpu", "the job file says so"
    if machine.gpus:
        return "cuda", f"PyTorch sees {len(machine.gpus)} x {machine.gpus[0]}"
    return "cpu", f"PyTorch {torch.__version__} sees no GPU"


def _zero_stage(wish: str | int, ranks: int, device: str, *, has_lora: bool) -> int:
    """Choose ZeRO 0 where there is nothing or little to share among ranks, else ZeRO 1.

    Not ZeRO 2, as in DeepSpeed-Chat's single_node scripts: it sums gradients over the ranks after
    each pass, not once an update, and its bucket takes more memory than it saves (OPT-1.3b's step 1
    on two H200: 20.4 GiB of tensors, and 20.0 at ZeRO 1).
    """
    if wish != "auto":
        return int(wish)
    return 1 if ranks > 1 and device == "cuda" and not has_lora else 0
