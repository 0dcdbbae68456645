"""What jobs/estimate.py says of jobs, next to runs of them: memory at the peak, and seconds.

`python benchmarks/estimates.py --data FOLDER` runs jobs that no constant was fitted to, on this
machine, with random weights and the rows of FOLDER (in the columns of Dahoas/rm-static). Memory is
what all processes have in use: by nvidia-smi on a GPU, else their proportional set size.
"""

from __future__ import annotations

import argparse
import math
import os
import shlex
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import psutil
import yaml
from rich import box
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.machine import Where, machine, versions
from benchmarks.product import Ran, run_product
from env.settings import Cards
from jobs.estimate import GIB
from jobs.spec import load_job
from jobs.views.console import console_on
from jobs.views.plain import time_of
from rlhf_train.plan.estimate import estimate, models_of, rows_of_texts, target_of
from rlhf_train.plan.placement import Machine, place

UPDATES = 8  # of the measured step; the first two are left out
SAMPLE_S, SETTLE_S = 0.2, 2.0
LLAMA = {"model_type": "llama", "hidden_size": 2048, "num_hidden_layers": 22, "num_attention_heads": 32}
LLAMA |= {"num_key_value_heads": 4, "intermediate_size": 5632, "max_position_embeddings": 1024}
QWEN2 = {"model_type": "qwen2", "hidden_size": 896, "num_hidden_layers": 24, "num_attention_heads": 14}
QWEN2 |= {"num_key_value_heads": 2, "intermediate_size": 4864, "max_position_embeddings": 1024}
GPT2 = {"model_type": "gpt2", "n_embd": 1280, "n_layer": 36, "n_head": 20, "n_positions": 1024}
OPT = {"model_type": "opt", "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "ffn_dim": 3072}
OPT |= {"word_embed_proj_dim": 768, "max_position_embeddings": 1024}
SMALL = {"model_type": "llama", "hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 6}
SMALL |= {"num_key_value_heads": 2, "intermediate_size": 1024, "max_position_embeddings": 1024}


@dataclass(frozen=True)
class Named:
    """A job, and the step of it that is compared."""

    name: str
    step: int
    config: Mapping[str, Any]
    batch: int
    hardware: Mapping[str, Any] = field(default_factory=dict)
    lora: Mapping[str, Any] | None = None

    def fields(self, data: Path, device: str) -> dict[str, Any]:
        rates = {"learning_rate": 1e-5}
        batches = {"global_batch": self.batch, "max_updates": UPDATES if self.step == 3 else UPDATES + 1}
        earlier = {"global_batch": self.batch, "max_updates": 1}
        return {
            "name": self.name,
            "actor": {"model": {"config": dict(self.config)}, "tokenizer_vocabulary": 8192, "lora": self.lora},
            "critic": {"model": "actor"},
            "data": {"datasets": [str(data)], "max_prompt_tokens": 256, "max_response_tokens": 256, "eval_rows": 32},
            "sft": {**(batches if self.step == 1 else earlier), **rates},
            "reward": {**(batches if self.step == 2 else earlier), **rates},
            "ppo": {
                "actor_learning_rate": 1e-5,
                "critic_learning_rate": 1e-5,
                **batches,
                "rollout_batch": self.batch,
                "ppo_epochs": 1,
            },
            "hardware": {"device": device, "ranks": 1, **self.hardware},
        }


ON_A_GPU = (
    Named("llama-1.1b", 1, LLAMA, 32),
    Named("llama-1.1b-checkpointed", 1, LLAMA, 32, {"gradient_checkpointing": True}),
    Named("llama-1.1b-lora", 1, LLAMA, 32, lora={"rank": 16}),
    Named("qwen2-0.5b", 2, QWEN2, 32),
    Named("gpt2-large", 1, GPT2, 32),
    Named("opt-125m", 3, OPT, 128),
)
ON_A_CPU = (
    Named("llama-12m", 1, SMALL, 8, {"micro_batch": 4}),
    Named("llama-12m-reward", 2, SMALL, 8, {"micro_batch": 4}),
)


@dataclass(frozen=True)
class Compared:
    name: str
    step: int
    said_bytes: float
    used_bytes: float
    said_s: float | None
    took_s: float

    def cells(self) -> list[str]:
        seconds = ["", "", ""]
        if self.said_s is not None:
            seconds = [f"{self.said_s:.3g} s", f"{self.took_s:.3g} s", f"{self.said_s / self.took_s - 1:+.0%}"]
        memory = [f"{self.said_bytes / GIB:.2f} GiB", f"{self.used_bytes / GIB:.2f} GiB"]
        return [self.name, str(self.step), *memory, f"{self.said_bytes / self.used_bytes - 1:+.0%}", *seconds]


def compare(named: Named, data: Path, folder: Path, where: Where) -> Compared:
    """Estimate a job, run it, and look at its memory and its updates."""
    fields = named.fields(data, where.device)
    folder.mkdir(parents=True)
    file = folder / "job.yaml"
    file.write_text(yaml.safe_dump(fields), encoding="utf-8")
    job = load_job(str(file))
    here = Machine.look(gpus=where.device == "cuda")
    placement = place(job, here)
    made = estimate(
        job, [named.step], placement, models_of(job), rows_of_texts(job), target_of(here, placement, Cards.load())
    )
    with memory_in_use(where.device) as samples:
        ran = run_product(fields, range(1, named.step + 1), folder, where, until=UPDATES)
    took_s = median(event["wall_s"] for event in ran.updates(named.step, leave_out=2))
    used = max(size for at, size in samples if at >= began_at(ran, named.step))
    said_s = made.times[named.step].update_s if made.times else None
    return Compared(named.name, named.step, made.fits[named.step].memory.peak, used, said_s, took_s)


def began_at(ran: Ran, step: int) -> float:
    """Return when a step said its plan, in seconds since 1970."""
    return time_of(ran.events("plan", step)[0])


@contextmanager
def memory_in_use(device: str) -> Iterator[list[tuple[float, float]]]:
    """Take (time, bytes) of all that runs below this process, until the block ends."""
    samples: list[tuple[float, float]] = []
    look, before = (gpu_bytes, settled_gpu_bytes()) if device == "cuda" else (tree_bytes, 0.0)
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(SAMPLE_S):
            samples.append((time.time(), look() - before))

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield samples
    finally:
        ended.set()
        thread.join()


def settled_gpu_bytes() -> float:
    """Return what is in use when a run that was killed before has given back its memory."""
    now, before = gpu_bytes(), math.inf
    while now < before:
        time.sleep(SETTLE_S)
        now, before = gpu_bytes(), now
    return now


def gpu_bytes() -> float:
    command = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits", "--id=0"]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout) * 2**20


def tree_bytes() -> float:
    """Return the proportional set size of all processes below this one."""
    found = 0.0
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):  # it has ended
            found += process.memory_full_info().pss
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    options, say = parser.parse_args(), console_on(sys.stderr).print
    where = Where(options.device, options.threads)
    table = Table("job", "step", "memory said", "in use", "", "update said", "took", "", box=box.SIMPLE)
    with tempfile.TemporaryDirectory(prefix="estimates-") as folder:
        for named in ON_A_GPU if options.device == "cuda" else ON_A_CPU:
            compared = compare(named, options.data.resolve(), Path(folder) / named.name, where)
            say("  ".join(compared.cells()))
            table.add_row(*compared.cells())
    out = console_on(sys.stdout)
    out.width = 110
    out.print(f"$ python {shlex.join(sys.argv)}\n{machine(where)}\n{versions()}\n")
    out.print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
