"""Runs of the product itself, `python -m rlhf_train`, on generated work; what they took is read from their events."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml

from benchmarks.work import Size
from jobs.events import RawEvent, read_events
from jobs.run_dir import RunDir
from jobs.spec import load_job

CHECKOUT = Path(__file__).resolve().parents[1]
# glibc gives large blocks back to the kernel and faults them in anew: 9 to 17 % of an update. The same for every side.
MALLOC = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "17179869184", "MALLOC_TOP_PAD_": "268435456"}


@dataclass(frozen=True)
class Where:
    """What measured processes run on; the same for ours and for the peers."""

    device: str  # cpu or cuda
    threads: int  # of a rank, on a CPU
    ranks: int = 1

    @property
    def environment(self) -> dict[str, str]:
        path = os.pathsep.join([str(CHECKOUT), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]).rstrip(os.pathsep)
        return {**os.environ, **MALLOC, "OMP_NUM_THREADS": str(self.threads), "PYTHONPATH": path, "TOKENIZERS_PARALLELISM": "false"}


def job_of(size: Size, actor: Any, critic: Any, data: Path, where: Where, **parts: Mapping[str, Any]) -> dict[str, Any]:
    """A job for these models, by folder or by config. parts: fields of sft, reward, ppo, data and hardware that differ."""
    job: dict[str, dict[str, Any]] = {
        "actor": {"model": actor},
        "critic": {"model": critic},
        "data": {
            "datasets": [str(data)],
            "split": [0, 0, 1],
            "max_prompt_tokens": size.prompt_tokens,
            "max_response_tokens": size.response_tokens,
            "eval_rows": 1,
        },
        "sft": {"global_batch": size.batch, "learning_rate": 1e-6, "schedule": "constant"},
        "reward": {"global_batch": size.batch, "learning_rate": 1e-6, "schedule": "constant"},
        "ppo": {
            "rollout_batch": size.batch,
            "global_batch": size.batch,
            "actor_learning_rate": 1e-6,
            "critic_learning_rate": 1e-6,
            "schedule": "constant",
            "normalize_rewards": False,  # its answers of the reference come before the first update, and are not what is measured
        },
        "hardware": {"ranks": where.ranks, "device": where.device, "precision": size.precision, "cpu_threads": where.threads},
        "checkpoint": {"every_minutes": None},
    }
    return {"name": "benchmark"} | {name: {**fields, **parts.get(name, {})} for name, fields in job.items()}


@dataclass(frozen=True)
class Ran:
    """A run that ended with exit code 0."""

    run: RunDir
    rank_peak_bytes: int  # the largest resident set of all processes that this benchmark has started so far

    def events(self, kind: str, step: int) -> list[RawEvent]:
        return [event for event in read_events(self.run.events)[0] if event["kind"] == kind and event.get("step") == step]

    def updates(self, step: int, leave_out: int = 1) -> list[RawEvent]:
        """Metrics without the first `leave_out`, each with `wall_s`: seconds since the one before it, all that comes between them included."""
        lines = self.events("metrics", step)
        timed = [{**event, "wall_s": event["elapsed_s"] - before["elapsed_s"]} for before, event in pairwise(lines)]
        return timed[leave_out - 1 :]


def run_product(job: Mapping[str, Any], steps: Sequence[int], folder: Path, where: Where, *, given: Mapping[int, Path] | None = None) -> Ran:
    """`python -m rlhf_train --step ...` in `folder`. given: models (folders) of steps that are to count as done."""
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
    done = subprocess.run([sys.executable, "-m", "rlhf_train", *words], cwd=CHECKOUT, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"python -m rlhf_train {' '.join(words)} ended with {done.returncode}:\n{done.stdout}\n{done.stderr}")
    return Ran(run, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024)
