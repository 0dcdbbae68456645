"""This module runs the product, `python -m rlhf_train`, on generated work, and reads its events."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml

from benchmarks.machine import CHECKOUT, Where, on_other_cores
from benchmarks.work import Size
from jobs.events import RawEvent, read_events
from jobs.run_dir import RunDir
from jobs.spec import load_job

POLL_S = 0.01  # between two looks at the events of a run
GONE_S = 60.0  # until the ranks are gone after their launcher; a GPU's memory takes seconds


def job_of(size: Size, actor: Any, critic: Any, rows: Path, where: Where, **parts: Mapping[str, Any]) -> dict[str, Any]:
    """Make a job for these models, which are folders or configs.

    parts: fields of sft, reward, ppo, data and hardware that differ.
    """
    job: dict[str, dict[str, Any]] = {
        "actor": {"model": actor},
        "critic": {"model": critic},
        "data": {
            "datasets": [str(rows)],
            "split": [0, 0, 1],
            "max_prompt_tokens": size.prompt_tokens,
            "max_response_tokens": size.response_tokens,
            "eval_rows": where.ranks,  # one each
        },
        "sft": {"global_batch": size.batch, "learning_rate": 1e-6, "schedule": "constant"},
        "reward": {"global_batch": size.batch, "learning_rate": 1e-6, "schedule": "constant"},
        "ppo": {
            "rollout_batch": size.batch,
            "global_batch": size.batch,
            "actor_learning_rate": 1e-6,
            "critic_learning_rate": 1e-6,
            "schedule": "constant",
            "samples_every_updates": 10_000,  # not what is measured
            # It would sample from the reference before the first update, which is not measured.
            "normalize_rewards": False,
        },
        "hardware": {
            "ranks": where.ranks,
            "device": where.device,
            "precision": size.precision,
            "cpu_threads": where.threads,
        },
        "checkpoint": {"every_minutes": None},
    }
    return {"name": "benchmark"} | {name: {**fields, **parts.get(name, {})} for name, fields in job.items()}


@dataclass(frozen=True)
class Ran:
    """A run that ended with exit code 0."""

    run: RunDir
    # By an event's `seq`: CPU seconds of all processes when it was written, to about 0.02 s; and of
    # the ranks that lived then.
    cpu_s: Mapping[int, float]
    ranks_cpu_s: Mapping[int, float]
    process_peak_bytes: int  # the resident set of its largest process, which is a rank

    def events(self, kind: str, step: int) -> list[RawEvent]:
        events = read_events(self.run.events)[0]
        return [event for event in events if event["kind"] == kind and event.get("step") == step]

    def updates(self, step: int, leave_out: int = 1) -> list[RawEvent]:
        """Return the metrics of updates without the first `leave_out`, with what they took.

        wall_s: seconds since the metrics before, with all that lies between. cpu_s: the processors'
        seconds in that time; ranks_cpu_s: those of the ranks alone.
        """
        # A killed run may have written more events.
        seen = [event for event in self.events("metrics", step) if event["seq"] in self.cpu_s]
        clocks = {"wall_s": "elapsed_s", "cpu_s": "cpu_s", "ranks_cpu_s": "ranks_cpu_s"}
        read = {"cpu_s": self.cpu_s, "ranks_cpu_s": self.ranks_cpu_s}
        lines = [{**event, **{name: seconds[event["seq"]] for name, seconds in read.items()}} for event in seen]
        timed = [
            {**event, **{name: event[clock] - before[clock] for name, clock in clocks.items()}}
            for before, event in pairwise(lines)
        ]
        return timed[leave_out - 1 :]


def run_product(
    job: Mapping[str, Any],
    steps: Sequence[int],
    folder: Path,
    where: Where,
    *,
    given: Mapping[int, Path] | None = None,
    until: int | None = None,
) -> Ran:
    """Run `python -m rlhf_train --step ...` in `folder`.

    given: models (folders) of steps that count as done. until: kill the run after this update of
    its last step, which saves the time of a last checkpoint and of the model.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "job.yaml"
    file.write_text(yaml.safe_dump(dict(job)), encoding="utf-8")
    run = RunDir(folder / "runs" / str(job["name"]))
    shutil.rmtree(run.path, ignore_errors=True)
    for step, model in (given or {}).items():
        place = run.step(step)
        place.path.mkdir(parents=True)
        place.model.symlink_to(model.resolve(), target_is_directory=True)
        place.fields.write_text(json.dumps(load_job(str(file)).fields_of_step(step)), encoding="utf-8")
        place.complete.write_text(json.dumps({"step": step}), encoding="utf-8")
    words = ["--job", str(file), "--step", *map(str, steps), "--output-dir", str(folder / "runs")]
    environment = where.environment | {"RLHF_CACHE": str(folder / "cache")}
    with (folder / "output").open("w+") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "rlhf_train", *words], cwd=CHECKOUT, env=environment, stdout=output, stderr=output
        )
        ended, cpu, of_ranks, offset = 0, dict[int, float](), dict[int, float](), 0
        with on_other_cores(where.cores):  # polling takes a part of a core
            while not ended:
                time.sleep(POLL_S)
                events, offset = read_events(run.events, offset)
                new = [event["seq"] for event in events]
                cpu |= dict.fromkeys(new, cpu_seconds(process.pid))
                of_ranks |= dict.fromkeys(new, sum(map(cpu_seconds, ranks_of(process.pid))))
                if until is not None and any(_has_come_to(event, steps[-1], until) for event in events):
                    return Ran(run, cpu, of_ranks, killed(process))
                # Its usage is that of the launcher and of all processes that it has waited for.
                ended, status, used = os.wait4(process.pid, os.WNOHANG)
        process.returncode = os.waitstatus_to_exitcode(status)
        output.seek(0)
        if process.returncode:
            command = f"python -m rlhf_train {' '.join(words)}"
            raise RuntimeError(f"{command} ended with {process.returncode}:\n{output.read()}")
    return Ran(run, cpu, of_ranks, used.ru_maxrss * 1024)


def _has_come_to(event: RawEvent, step: int, update: int) -> bool:
    return event["kind"] == "metrics" and event["step"] == step and event["update"] >= update


def killed(launcher: subprocess.Popen[Any]) -> int:
    """Kill a launcher, and return the resident set of its largest rank, in bytes.

    Launcher and ranks are gone when this returns, and have freed their GPUs.
    """
    ranks = ranks_of(launcher.pid)
    most = max((resident_bytes(rank) for rank in ranks), default=0)
    launcher.kill()
    launcher.wait()
    deadline = time.monotonic() + GONE_S
    while any(map(lives, ranks)):
        if time.monotonic() > deadline:
            raise RuntimeError(f"the ranks {ranks} did not end with their launcher")
        time.sleep(POLL_S)
    return most


def lives(process: int) -> bool:
    """Return whether a process is alive: a zombie that nobody has waited for holds no GPU."""
    try:
        return Path(f"/proc/{process}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def children(process: int) -> list[int]:
    try:
        text = Path(f"/proc/{process}/task/{process}/children").read_text(encoding="utf-8")
    except OSError:
        return []
    return [int(child) for child in text.split()]


def ranks_of(launcher: int) -> list[int]:
    """Return the ranks that a launcher's importers have forked."""
    return [rank for importer in children(launcher) for rank in children(importer)]


def resident_bytes(process: int) -> int:
    try:
        return int(Path(f"/proc/{process}/statm").read_text(encoding="utf-8").split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


def cpu_seconds(process: int) -> float:
    """Return the CPU seconds of a process and its children, also those that have ended.

    It is 0 where there is no /proc.
    """
    try:
        fields = Path(f"/proc/{process}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    except OSError:
        return 0.0
    return sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK") + sum(map(cpu_seconds, children(process)))
