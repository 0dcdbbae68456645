"""`--measure`: a few updates of each step, in a folder that is removed, next to the estimate.

They are those of a real run, with all that it checks where weights are needed: one row's logits
against the model's own forward, the trial update on the longest rows, the merge of adapters, what
networks say of one another's tokens. Models and a checkpoint are saved too, so the disk is tried.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median

from jobs.errors import ExitCode, ToolkitError
from jobs.estimate import Fit, StepTime
from jobs.events import RawEvent, read_events, time_of
from jobs.formatting import duration
from jobs.run_dir import RunDir
from jobs.spec import Job
from jobs.steps import STEPS
from rlhf_train import completion
from rlhf_train.host import tree_bytes
from rlhf_train.launch import launch, locked
from rlhf_train.plan.estimate import Estimate, amount, in_seconds
from rlhf_train.plan.placement import Placement
from rlhf_train.ranks.processes import SpareRanks

UPDATES = 4  # of steps 1 and 2, and rollouts of step 3; the first does not count
HELD_OUT = 32  # rows at most that are measured before and after
LOOK_S = 0.5  # between two looks at main memory
TAIL_LINES = 10  # of the log, which is removed


@dataclass(frozen=True)
class Taken:
    """What a step took on this machine."""

    update_s: float
    peak_bytes: float  # of one GPU's tensors, or of all processes on a CPU
    micro_batch: int

    def line(self, step: int, said: StepTime | None, fit: Fit, device: str) -> str:
        """Return the step's line of the report."""
        parts = [f"{in_seconds(self.update_s)} an update{_estimated(in_seconds(said.update_s) if said else '')}"]
        whole = self.seconds(said)
        if whole is not None:
            parts.append(f"about {duration(whole)} in all")
        tensors = fit.memory.peak - (fit.memory.held["CUDA"] if device == "cuda" else 0.0)
        where = "of a GPU, for tensors," if device == "cuda" else "of main memory"
        parts.append(f"{amount(self.peak_bytes)} {where} at the peak{_estimated(amount(tensors))}")
        if self.micro_batch != fit.micro_batch:
            parts.append(f"with a micro batch of {self.micro_batch}")
        return f"step {step} ({STEPS[step].title}): {', '.join(parts)}"

    def seconds(self, said: StepTime | None) -> float | None:
        """Return the whole step's seconds; what is no update is taken from the estimate."""
        if said is None or said.updates is None:
            return None
        return said.updates * self.update_s + said.fixed_s


def _estimated(text: str) -> str:
    return f" ({text} estimated)" if text else ""


def measured_job(job: Job) -> Job:
    """Return the job with few updates and few held-out rows, whose numbers nobody else gets."""

    def at_most(updates: int | None, most: int) -> int:
        return min(updates or most, most)

    rollouts = UPDATES * job.ppo.ppo_epochs * job.ppo.rollout_batch // job.ppo.global_batch
    ppo = {"critic_warmup_updates": 0, "samples_every_updates": rollouts, "max_kl": 1e9}
    changes = {
        "sft": job.sft.model_copy(update={"max_updates": at_most(job.sft.max_updates, UPDATES)}),
        "reward": job.reward.model_copy(update={"max_updates": at_most(job.reward.max_updates, UPDATES)}),
        "ppo": job.ppo.model_copy(update={"max_updates": at_most(job.ppo.max_updates, rollouts), **ppo}),
        "data": job.data.model_copy(update={"eval_rows": min(job.data.eval_rows, HELD_OUT)}),
        "checkpoint": job.checkpoint.model_copy(
            update={"every_minutes": None, "every_updates": None, "best_every_updates": None}
        ),
        "track": (),
    }
    return Job.model_validate(job.model_copy(update=changes).dump())


def measure(
    job: Job,
    run: RunDir,
    todo: Sequence[int],
    sources: Mapping[RunDir, Sequence[int]],
    placement: Placement,
    made: Estimate,
    cache: Path,
    spares: SpareRanks,
) -> tuple[str, ExitCode]:
    """Do a few updates of each step, and return the report and the exit code.

    sources: runs whose complete steps these begin from. Raises ToolkitError if a step fails.
    """
    few = measured_job(job)
    with _scratch(run) as scratch, _main_memory() as seen:
        try:
            with locked(scratch) as lock:
                completion.begin_run(scratch)
                for source, steps in sources.items():
                    completion.take_over(source, scratch, steps)
                code = launch(few, scratch, todo, placement, cache, lock, spares, quiet=True)
        except ToolkitError as error:
            raise with_log(error, scratch) from None
        if code != ExitCode.OK:
            return "", code
        events = read_events(scratch.events)[0]
        taken = {step: taken_of(events, step, placement.device, seen) for step in todo}
    lines = [f"measured on this machine, {UPDATES} updates of each step, of which the first does not count:"]
    lines += [taken[step].line(step, made.times.get(step), made.fits[step], placement.device) for step in todo]
    seconds = [taken[step].seconds(made.times.get(step)) for step in todo]
    if None not in seconds:
        lines.append(f"time: about {duration(sum(each for each in seconds if each))} in all, as measured")
    return "\n".join(lines), ExitCode.OK


def taken_of(events: Sequence[RawEvent], step: int, device: str, seen: Sequence[tuple[float, float]]) -> Taken:
    """Return what a step took. seen: (seconds since 1970, bytes of main memory)."""
    of_step = [event for event in events if event.get("step") == step]
    metrics = [event for event in of_step if event["kind"] == "metrics"]
    first = {"elapsed_s": 0.0, "update": 0}
    timed = [
        (after["elapsed_s"] - before["elapsed_s"]) / (after["update"] - before["update"])
        for before, after in pairwise([first, *metrics])
    ]
    plan = next(event for event in reversed(of_step) if event["kind"] == "plan")
    end = next(event for event in reversed(of_step) if event["kind"] == "end")
    if device == "cuda":
        peak = max((event.get("gpu_peak_bytes") or 0 for event in metrics), default=0)
    else:
        begun, ended = time_of(plan), time_of(end)
        within = [size for at, size in seen if begun <= at <= ended]
        # A step of tiny models may end between two looks.
        peak = max(within or [min(seen, key=lambda each: abs(each[0] - ended))[1]])
    return Taken(median(timed[1:] or timed), peak, plan["micro_batch"])


@contextmanager
def _scratch(run: RunDir) -> Iterator[RunDir]:
    """Make a run folder of the same name on the same disk, and remove it when the block ends."""
    folders = [run.path.parent, *run.path.parent.resolve().parents]
    parent = next(folder for folder in folders if folder.is_dir())
    folder = Path(tempfile.mkdtemp(prefix=".measure-", dir=parent))
    try:
        yield RunDir(folder / run.name)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _main_memory() -> Iterator[list[tuple[float, float]]]:
    """Note (time, bytes) of this process and all below it, until the block ends."""
    seen, ended = list[tuple[float, float]](), threading.Event()

    def watch() -> None:
        while not ended.wait(LOOK_S):
            seen.append((time.time(), float(tree_bytes(os.getpid()))))

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield seen
    finally:
        ended.set()
        thread.join()


def with_log(error: ToolkitError, run: RunDir) -> ToolkitError:
    """Add the end of the log, which is removed. A step that fails here cannot be done here."""
    log = ""
    with suppress(OSError):
        log = "\n".join(run.log.read_text(encoding="utf-8", errors="replace").splitlines()[-TAIL_LINES:])
    code = ExitCode.UNFIT if error.exit_code == ExitCode.TRAINING else error.exit_code
    hint = error.hint if code == ExitCode.USAGE else ""
    why = "\n".join(filter(None, (error.why, log and f"the end of the log:\n{log}")))
    return ToolkitError(f"measured: {error.what}", why=why, hint=hint, exit_code=code)
