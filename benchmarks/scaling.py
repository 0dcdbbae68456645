"""This module measures the three steps on one GPU and on two.

It reports samples a second and memory by ZeRO stage, with LoRA, and without peer access.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import yaml

from benchmarks import steps
from benchmarks.figures import Spread, Table
from benchmarks.machine import Where
from benchmarks.product import Ran, job_of, ranks_of, run_product
from benchmarks.work import (
    Size,
    actor_of,
    critic_of,
    matmul_parameters,
    prompt_rows,
    prompts_of,
    write_rows,
)
from jobs.events import RawEvent, read_events
from jobs.run_dir import RunDir
from jobs.spec import Data, load_job
from jobs.steps import STEPS
from rlhf_train.data.dataset import texts
from rlhf_train.models.networks import train_tokenizer
from rlhf_train.plan.placement import GIB

LORA = {"rank": 128, "alpha": 128.0}  # of jobs/opt-1.3b-lora.yaml
UNREACHABLE = (("NCCL_P2P_DISABLE", "1"),)
SAMPLE_S = 0.2


@dataclass(frozen=True)
class Extent:
    """How much of a step is measured."""

    warm_up: int  # updates that do not count
    curve_updates: int  # updates whose numbers are compared
    curve_numbers: tuple[str, ...]  # names of these numbers


EXTENTS = {
    1: Extent(2, 12, ("loss", "grad_norm")),
    2: Extent(2, 12, ("loss", "accuracy", "grad_norm")),
    3: Extent(1, 5, ("mean_reward", "kl", "value_loss", "entropy", "response_length", "grad_norm")),
}


@dataclass(frozen=True)
class Variant:
    """One way to run a step."""

    name: str
    ranks: int
    zero_stage: int | None = None  # of actor and critic; None: `auto`
    lora: bool = False
    variables: tuple[tuple[str, str], ...] = ()
    more: tuple[tuple[str, Any], ...] = ()  # fields of hardware
    times: int = 1  # an update has this many times the samples of other variants

    def hardware(self) -> dict[str, Any]:
        stages = {}
        if self.zero_stage is not None:
            stages = {"actor_zero_stage": self.zero_stage, "critic_zero_stage": self.zero_stage}
        return {"ranks": self.ranks, **stages, **dict(self.more)}

    def actor(self, model: Path) -> dict[str, Any]:
        return {"model": str(model)} | ({"lora": LORA} if self.lora else {})


ONE = Variant("1 GPU", 1)
ONE_LORA = Variant("1 GPU, LoRA", 1, lora=True)
TWO = (
    Variant("2 GPUs, ZeRO 1", 2, 1),
    Variant("2 GPUs, ZeRO 1, twice the batch", 2, 1, times=2),
    Variant("2 GPUs, ZeRO 2", 2, 2),
    Variant("2 GPUs, ZeRO 3", 2, 3),
    Variant("2 GPUs, LoRA", 2, lora=True),
    Variant("2 GPUs, ZeRO 1, NCCL_P2P_DISABLE=1", 2, 1, variables=UNREACHABLE),
    Variant("2 GPUs, ZeRO 2, NCCL_P2P_DISABLE=1", 2, 2, variables=UNREACHABLE),
)


def variants_of(step: int) -> list[Variant]:
    """Return the variants of a step; step 2 has no adapters."""
    return [variant for variant in (ONE, ONE_LORA, *TWO) if not (variant.lora and step == 2)]


# --- speed ---


@dataclass(frozen=True)
class Work:
    """The files that one step is measured on, written once for all its variants."""

    step: int
    size: Size
    folder: Path
    samples: int  # an update

    def run(self, variant: Variant, where: Where, updates: int) -> Ran:
        where = replace(where, ranks=variant.ranks, variables=(*where.variables, *variant.variables))
        total = updates + EXTENTS[self.step].warm_up + 1  # the last is not waited for
        samples = self.samples * variant.times
        part = {"global_batch": samples, "max_updates": total, "epochs": float(total * variant.times)}
        if self.step == 3:
            part |= {"rollout_batch": samples}
        data = {"split": [int(self.step == n) for n in (1, 2, 3)], "eval_rows": 2}
        sized = replace(self.size, batch=samples)
        parts = {STEPS[self.step].section: part, "data": data, "hardware": variant.hardware()}
        job = job_of(sized, "", str(self.folder / "critic"), self.folder / "rows", where, **parts)
        job["actor"] = variant.actor(self.folder / "actor")
        given = {1: self.folder / "actor", 2: self.folder / "critic"} if self.step == 3 else None
        return run_product(job, [self.step], self.folder / slug(variant.name), where, given=given, until=total - 1)


def slug(name: str) -> str:
    return "".join(letter if letter.isalnum() else "-" for letter in name)


def write_work(step: int, size: Size, folder: Path, device: str, seed: int, models: Path) -> Work:
    """Write rows of full length: no answer ends, and nothing is padded."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("actor", "critic"):
        (folder / name).symlink_to(models / name, target_is_directory=True)
    if step == 3:
        write_rows(prompt_rows(prompts_of(size, seed, real_lengths=False)), folder / "rows")
        return Work(step, size, folder, size.batch)
    shape = steps.steps_of(size, STEPS[step].section)
    write_rows(steps.full_rows(shape, size, 8 * shape.batch, seed), folder / "rows")
    return Work(step, size, folder, shape.batch)


def speed(
    name: str, size: Size, folder: Path, where: Where, updates: int, seed: int, models: Path, say: Callable[[str], None]
) -> Table:
    """Measure the speed of a step. name: sft, reward or ppo.

    The runs on one GPU run concurrently, each on its own GPU.
    """
    step = next(step.number for step in STEPS.values() if step.section == name)
    work = write_work(step, size, folder, where.device, seed, models)
    ran: dict[str, tuple[Ran, float]] = {}

    def measure(variant: Variant, where: Where) -> None:
        began = time.monotonic()
        with card_memory() as memory:
            done = work.run(variant, where, updates)
        ran[variant.name] = done, memory.most_bytes(gpus_of(where))
        say(f"  {variant.name}: {seconds_of(done, step):.3f} s ({time.monotonic() - began:.0f} s in all)")

    alone = [variant for variant in variants_of(step) if variant.ranks == 1]
    on = [
        replace(where, variables=(("CUDA_VISIBLE_DEVICES", str(gpu)),)) if where.device == "cuda" else where
        for gpu in range(len(alone))
    ]
    with ThreadPoolExecutor(len(alone) if where.device == "cuda" else 1) as pool:
        list(pool.map(measure, alone, on))
    for variant in variants_of(step):
        if variant.ranks > 1:
            measure(variant, where)
    rows = [row_of(variant, ran, step, work.samples) for variant in variants_of(step)]
    fields, with_head = (size.critic, False) if step == 2 else (size.actor, True)
    weights = f"{matmul_parameters(fields, with_head=with_head) / 1e6:.0f} M weights"
    notes = [
        f"step {step}, {work.samples} samples an update on 1 GPU and on 2, "
        f"{size.prompt_tokens} + {size.response_tokens} tokens each;",
        f"{updates} updates after {EXTENTS[step].warm_up} that do not count; {weights}",
        "GiB: peak of rank 0's tensors, and peak of its card by nvidia-smi (libraries and caches included)",
    ]
    numbers = {
        name: {"updates": done.updates(step, EXTENTS[step].warm_up), "card_bytes": card}
        for name, (done, card) in ran.items()
    }
    columns = ["", "seconds an update", "samples/s", "against 1 GPU", "rollouts", "scoring", "training"]
    columns += ["tensors, GiB", "card, GiB"]
    return Table(f"scaling-{name}", columns, rows, notes, numbers)


def seconds_of(ran: Ran, step: int) -> Spread:
    return Spread.of([update["wall_s"] for update in ran.updates(step, EXTENTS[step].warm_up)])


def row_of(variant: Variant, ran: Mapping[str, tuple[Ran, float]], step: int, samples: int) -> list[str]:
    done, card = ran[variant.name]
    taken = seconds_of(done, step)
    alone = seconds_of(ran[(ONE_LORA if variant.lora else ONE).name][0], step)
    updates = done.updates(step, EXTENTS[step].warm_up)
    phases = [
        f"{Spread.of([u[p] for u in updates]).median:.2f}" if updates[0].get(p) is not None else "-"
        for p in ("rollout_s", "score_s", "train_s")
    ]
    peak = max((update.get("gpu_peak_bytes") or 0 for update in updates), default=0)
    memory = [f"{peak / GIB:.1f}", f"{card / GIB:.1f}"]
    rate, rate_alone = samples * variant.times / taken.median, samples / alone.median
    return [variant.name, f"{taken:.3f}", f"{rate:.1f}", f"{rate / rate_alone:.2f}x", *phases, *memory]


def gpus_of(where: Where) -> list[int]:
    """Return the GPUs that the measured processes see, by nvidia-smi's index."""
    chosen = dict(where.variables).get("CUDA_VISIBLE_DEVICES")
    return [int(gpu) for gpu in chosen.split(",")] if chosen else list(range(torch.cuda.device_count()))


class CardMemory:
    """Samples the bytes in use on each card while something runs.

    It has no samples where there is no nvidia-smi.
    """

    def __init__(self) -> None:
        self._most: dict[int, int] = {}
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)

    def most_bytes(self, gpus: Sequence[int]) -> int:
        return max((self._most.get(gpu, 0) for gpu in gpus), default=0)

    def start(self) -> None:
        self._thread.start()

    def end(self) -> None:
        self._ended.set()
        self._thread.join()

    def _look(self) -> None:
        command = ["nvidia-smi", "--query-gpu=index,memory.used", "--format=csv,noheader,nounits"]
        while not self._ended.wait(SAMPLE_S):
            try:
                done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
            except (OSError, subprocess.SubprocessError):
                return
            for index, used in (map(int, line.split(",")) for line in done.stdout.splitlines()):
                self._most[index] = max(self._most.get(index, 0), used * 2**20)


@contextmanager
def card_memory() -> Iterator[CardMemory]:
    memory = CardMemory()
    memory.start()
    try:
        yield memory
    finally:
        memory.end()


# --- the same curve ---

CONCURRENT_RUNS = 4  # on the two cards, where only the runs' numbers count


def curve_job(data: Path, models: Path, variant: Variant, where: Where) -> dict[str, Any]:
    """Return jobs/opt-1.3b.yaml with fewer tokens a row, random models and this data."""
    job = load_job("opt-1.3b").dump()
    job["name"] = "benchmark"
    job["data"] |= {
        "datasets": [str(data.resolve())],
        "max_prompt_tokens": 192,
        "max_response_tokens": 64,
        "eval_rows": 32,
    }
    job["sft"] |= {"global_batch": 64, "learning_rate": 1e-4}
    for step in STEPS.values():
        job[step.section] |= {
            "max_updates": EXTENTS[step.number].curve_updates + 1,
            "epochs": 20.0,
            "schedule": "constant",
        }
    job["hardware"] |= {"device": where.device, "cpu_threads": where.threads, "micro_batch": 8, **variant.hardware()}
    job["actor"] = variant.actor(models / "actor")
    job["critic"] = {"model": str(models / "critic")}
    job["checkpoint"] |= {"every_minutes": None}
    return job


def curves(size: Size, data: Path, folder: Path, where: Where, seed: int, say: Callable[[str], None]) -> Table:
    """Compare the curves of each step by each variant.

    At the same global batch the curves of 1 and 2 GPUs differ only by rounding. One GPU with
    smaller passes shows the effect of rounding. Several runs train concurrently.
    """
    tokenizer = train_tokenizer(texts(Data(datasets=(str(data.resolve()),))), 8192)
    models = folder / "models"
    with torch.device(where.device):
        for name, fields, make in (("actor", size.actor, actor_of), ("critic", size.critic, critic_of)):
            model = make({**fields, "vocab_size": len(tokenizer)}, seed).to(size.dtype)
            model.save_pretrained(str(models / name))
            tokenizer.save_pretrained(str(models / name))
    other_passes = Variant("1 GPU, passes of 4", 1, more=(("micro_batch", 4),))
    runs = [
        (step, variant)
        for step in (3, 1, 2)
        for variant in (ONE, other_passes, *variants_of(step)[1:])
        if not variant.variables and variant.times == 1
    ]
    found: dict[tuple[int, str], list[RawEvent]] = {}

    def measure(number: int) -> None:
        step, variant = runs[number]
        extent = EXTENTS[step]
        gpu = {"CUDA_VISIBLE_DEVICES": str(number % 2)} if variant.ranks == 1 and where.device == "cuda" else {}
        run_where = replace(where, ranks=variant.ranks, variables=tuple(gpu.items()))
        given = {1: models / "actor", 2: models / "critic"} if step == 3 else None
        job = curve_job(data, models, variant, run_where)
        place = folder / f"{step}-{slug(variant.name)}"
        ran = run_product(job, [step], place, run_where, given=given, until=extent.curve_updates)
        found[step, variant.name] = ran.events("metrics", step)[: extent.curve_updates]
        curve = " ".join(f"{event[extent.curve_numbers[0]]:.4f}" for event in found[step, variant.name])
        say(f"  step {step}, {variant.name}: {curve}")

    with ThreadPoolExecutor(CONCURRENT_RUNS if where.device == "cuda" else 1) as pool:
        list(pool.map(measure, range(len(runs))))
    rows = []
    for step, variant in sorted(runs, key=lambda run: run[0]):
        first = found[step, (ONE_LORA if variant.lora else ONE).name]
        curve = found[step, variant.name]
        differences = [difference(first, curve, name) for name in EXTENTS[step].curve_numbers]
        rows.append([f"step {step}, {variant.name}", *differences])
    most = max(map(len, rows))
    columns = ["difference to 1 GPU: first update / largest", *(f"number {n}" for n in range(1, most))]
    notes = [
        f"numbers of step {step}: {', '.join(extent.curve_numbers)}; {extent.curve_updates} updates"
        for step, extent in EXTENTS.items()
    ]
    numbers = {f"step {step}, {name}": events for (step, name), events in found.items()}
    return Table("curves", columns, [row + [""] * (most - len(row)) for row in rows], notes, numbers)


def difference(first: Sequence[RawEvent], other: Sequence[RawEvent], name: str) -> str:
    """Return the difference of the first update, and the largest of all updates.

    Differences are relative, but not those of mean reward and KL, which are about 0.
    """
    share = [1.0 if name in ("mean_reward", "kl") else abs(a[name]) for a in first]
    apart = [abs(a[name] - b[name]) / part for a, b, part in zip(first, other, share, strict=True)]
    return f"{apart[0]:.1e} / {max(apart):.1e}"


# --- a rank that is killed ---

SMALL = {
    "model_type": "opt",
    "hidden_size": 512,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "ffn_dim": 2048,
    "word_embed_proj_dim": 512,
}
KILLED_AFTER = 12  # updates of step 3


def killed_rank(data: Path, folder: Path, where: Where, say: Callable[[str], None]) -> Table:
    """Run all three steps of a small OPT on two ranks, and kill rank 1 in step 3.

    Then the same command is run again.
    """
    job = load_job("opt-1.3b").dump()
    job |= {"name": "benchmark", "actor": {"model": {"config": SMALL}}, "critic": {"model": "actor"}}
    job["data"] |= {
        "datasets": [str(data.resolve())],
        "max_prompt_tokens": 192,
        "max_response_tokens": 64,
        "eval_rows": 64,
    }
    for step in STEPS.values():
        job[step.section] |= {"max_updates": 30, "epochs": 20.0}
    job["hardware"] |= {"device": where.device, "cpu_threads": where.threads, "ranks": 2}
    job["checkpoint"] |= {"every_updates": 5}
    (folder / "job.yaml").write_text(yaml.safe_dump(job), encoding="utf-8")
    command = [sys.executable, "-m", "rlhf_train", "--job", str(folder / "job.yaml")]
    command += ["--step", "all", "--output-dir", str(folder / "runs")]
    environment = where.environment | {"RLHF_CACHE": str(folder / "cache")}
    run = RunDir(folder / "runs" / "benchmark")

    output = folder / "output"
    with output.open("w") as file:
        launcher = subprocess.Popen(command, env=environment, stdout=file, stderr=file)
        deadline = time.monotonic() + 1800
        while not any(_has_come_to(event) for event in read_events(run.events)[0]):
            if launcher.poll() is not None or time.monotonic() > deadline:
                launcher.kill()
                what = f"the run did not reach update {KILLED_AFTER} of step 3"
                raise RuntimeError(f"{what}:\n{output.read_text(encoding='utf-8')}")
            time.sleep(SAMPLE_S)
        victim = next(rank for rank in ranks_of(launcher.pid) if name_of(rank) == "rank 1")
        os.kill(victim, signal.SIGKILL)
        began = time.monotonic()
        launcher.wait(timeout=300)
    log = output.read_text(encoding="utf-8")
    ended_s, code = time.monotonic() - began, launcher.returncode
    lines = [line.strip() for line in log.splitlines() if "rank 1" in line]
    named = lines[0] if lines else f"rank 1 is not named: {log[-1500:]}"

    began = time.monotonic()
    again = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=600)
    again_s = time.monotonic() - began
    resumed = [event["from_update"] for event in read_events(run.events)[0] if event["kind"] == "resumed"]
    notes = [
        f"rank 1 was killed after update {KILLED_AFTER} of step 3: exit code {code} after {ended_s:.1f} s, {named}",
        f"the same command again: exit code {again.returncode} after {again_s:.1f} s, resumed after update {resumed}",
        *([] if again.returncode == 0 else [(again.stdout + again.stderr)[-1500:]]),
    ]
    numbers = {
        "ended_s": ended_s,
        "code": code,
        "named": named,
        "again": again.returncode,
        "again_s": again_s,
        "resumed": resumed,
    }
    return Table("killed-rank", [], [], notes, numbers)


def _has_come_to(event: RawEvent) -> bool:
    return event["kind"] == "metrics" and event["step"] == 3 and event["update"] >= KILLED_AFTER


def name_of(process: int) -> str:
    try:
        return Path(f"/proc/{process}/comm").read_text(encoding="utf-8").strip()
    except OSError:
        return ""


# --- cards of 24 GB ---

FREE_BYTES = 24_200 * 2**20  # what PyTorch may take of an RTX 4090's 24,564 MiB
HOG = """
import sys, torch
held = []
for gpu in range(torch.cuda.device_count()):
    free, _ = torch.cuda.mem_get_info(gpu)
    held.append(torch.empty(max(0, free - {free}), dtype=torch.uint8, device=gpu))
print(*(torch.cuda.mem_get_info(gpu)[0] for gpu in range(torch.cuda.device_count())), flush=True)
sys.stdin.read()
"""


@contextmanager
def only_free(free_bytes: int) -> Iterator[list[int]]:
    """Leave so many bytes free on each card inside the block, and yield what is really free."""
    command = [sys.executable, "-c", HOG.format(free=free_bytes)]
    hog = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert hog.stdin is not None and hog.stdout is not None
    try:
        yield [int(word) for word in hog.stdout.readline().split()]
    finally:
        hog.stdin.close()
        hog.wait()


def fits(size: Size, folder: Path, where: Where, seed: int, models: Path, say: Callable[[str], None]) -> Table:
    """Try OPT-1.3b's two recipes on two cards that have as much free memory as an RTX 4090.

    Each step has rows of the greatest length.
    """
    full = Variant("opt-1.3b", 2, more=(("micro_batch", 8),))  # `auto` begins with 8 on this card
    spared = replace(full, name="opt-1.3b, gradient checkpointing", more=(*full.more, ("gradient_checkpointing", True)))
    lora = replace(spared, name="opt-1.3b-lora", lora=True, more=(("micro_batch", 4), ("gradient_checkpointing", True)))
    tries = [(1, full), (2, full), (3, full), (3, spared), (1, lora), (3, lora)]
    rows: list[list[str]] = []
    numbers: dict[str, Any] = {}
    with only_free(FREE_BYTES) as free:
        say(f"  free on each card: {', '.join(f'{each / GIB:.2f} GiB' for each in free)}")
        taken = torch.cuda.get_device_properties(0).total_memory - min(free)  # by the hog
        for step, variant in tries:
            samples = 128 if step == 1 else 64  # of the recipes
            place = folder / f"{step}-{slug(variant.name)}"
            work = write_work(step, replace(size, batch=64), place, where.device, seed, models)
            work = replace(work, samples=samples)
            with card_memory() as memory:
                try:
                    seconds, failed = f"{seconds_of(work.run(variant, where, 2), step):.2f}", ""
                except RuntimeError as error:
                    if "out of memory" not in str(error):
                        raise
                    seconds, failed = "does not fit", str(error)
            events = read_events(RunDir(place / slug(variant.name) / "runs" / "benchmark").events)[0]
            metrics = [event for event in events if event["kind"] == "metrics"]
            peak = max((event.get("gpu_peak_bytes") or 0 for event in metrics), default=0) / GIB
            used = (memory.most_bytes(gpus_of(where)) - taken) / GIB
            warned = [event["message"] for event in events if event["kind"] == "warning"]
            name = f"step {step}, {variant.name}"
            rows.append([name, seconds, f"{peak:.1f}", f"{used:.1f}"])
            numbers[name] = {"failed": failed, "warned": warned, "used_gib": used, "peak_gib": peak}
            messages = [f"    {message}" for message in warned]
            say("\n".join([f"  {name}: {seconds}", *messages, *failed[-1500:].splitlines()]))
    notes = [f"{FREE_BYTES / GIB:.1f} GiB left free on each card; rows of 512 tokens, global batches of the recipes"]
    return Table("fits-24gb", ["", "seconds an update", "tensors, GiB", "in use, GiB"], rows, notes, numbers)
