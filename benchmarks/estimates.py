"""What jobs/estimate.py says of jobs, next to runs of them: memory at the peak, and seconds.

`python benchmarks/estimates.py` runs six jobs, all three steps of each, with random weights. No
constant was fitted to them but, on a GPU, to the first three. Rows are made up, with lengths like
real ones; `--data FOLDER` has others (in the columns of Dahoas/rm-static). Memory is what all
processes have in use: by the driver on a GPU, else their proportional set size. Seconds on a CPU
are those that processors worked, so that other programs count little. Step 3 is estimated with the
mean length of the answers that came.
"""

from __future__ import annotations

import argparse
import json
import math
import shlex
import shutil
import string
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import psutil
import torch
import yaml
from rich import box
from rich.table import Table
from transformers import AutoConfig, AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.machine import Where, machine, versions
from benchmarks.product import Ran, run_product
from benchmarks.work import MEAN_ANSWER, MEAN_PROMPT, drawn_lengths, write_rows
from env.settings import Cards
from jobs.estimate import GIB, StepRows
from jobs.events import time_of
from jobs.spec import Job, load_job
from jobs.steps import STEPS
from jobs.views.console import console_on
from rlhf_train import compat
from rlhf_train.data import dataset
from rlhf_train.models.networks import load_tokenizer, train_tokenizer
from rlhf_train.plan.estimate import Estimate, estimate, models_of, rows_of_table, target_of
from rlhf_train.plan.placement import Machine, place

SAMPLE_S, SETTLE_S = 0.1, 2.0
ROWS = 1024  # that are made up, for all steps
COLUMNS = ("prompt", "chosen", "rejected")
BYTES, VOCABULARY = 260, 8192  # tokens of a tokenizer: of one byte each, or learned from --data
# Updates of each step that do not count, and that do. One of step 3 has a rollout, which takes
# 6 to 12 s on a GPU.
WARM_UPS = {"cuda": (2, 2, 1), "cpu": (2, 2, 2)}
COUNTED = {"cuda": (4, 4, 2), "cpu": (8, 8, 4)}


def llama(width: int, layers: int, heads: int, key_value_heads: int, feed: int, **more: Any) -> dict[str, Any]:
    """Return a config with a gated feed-forward layer, as LLaMA, Qwen and others have it."""
    return {
        "model_type": "llama",
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": key_value_heads,
        "intermediate_size": feed,
        "tie_word_embeddings": True,
        "max_position_embeddings": 2048,
        **more,
    }


def opt(width: int, layers: int, heads: int) -> dict[str, Any]:
    return {
        "model_type": "opt",
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "ffn_dim": 4 * width,
        "word_embed_proj_dim": width,
        "max_position_embeddings": 2048,
        "vocab_size": 50272,
    }


@dataclass(frozen=True)
class Named:
    """A job of which all three steps are compared. Its critic is trained from its actor."""

    name: str
    config: Mapping[str, Any]  # with its vocabulary
    batch: int
    rollout: int
    hardware: Mapping[str, Any]
    longest: tuple[int, int] = (256, 256)  # tokens of a prompt, and of an answer

    def shrunk(self) -> Named:
        """Return the same with tiny models, to try whether this program works."""
        neox = self.config["model_type"] == "gpt_neox"
        heads = {} if neox or self.config["model_type"] == "opt" else {"num_key_value_heads": 2}
        sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 512}
        feed = {"ffn_dim": 128, "word_embed_proj_dim": 64} if "ffn_dim" in self.config else {"intermediate_size": 128}
        config = {**self.config, **sizes, **feed, **heads}
        if "head_dim" in config:
            config["head_dim"] = 16
        return replace(self, config=config, batch=8, rollout=8, longest=(32, 16))

    def fields(self, model: Path, data: Path, device: str) -> dict[str, Any]:
        prompt, answer = self.longest
        rates = {"learning_rate": 1e-6, "schedule": "constant"}
        sft, reward, ppo = map(sum, zip(WARM_UPS[device], COUNTED[device], strict=True))
        return {
            "name": self.name,
            "actor": {"model": str(model)},
            "critic": {"model": "actor"},
            "data": {
                "datasets": [str(data)],
                "max_prompt_tokens": prompt,
                "max_response_tokens": answer,
                "eval_rows": 8,
            },
            "sft": {"global_batch": self.batch, "max_updates": sft, **rates},
            "reward": {"global_batch": self.batch, "max_updates": reward, **rates},
            "ppo": {
                "rollout_batch": self.rollout,
                "global_batch": self.rollout,
                "ppo_epochs": 1,
                "epochs": 100.0,
                "max_updates": ppo,
                "actor_learning_rate": 1e-6,
                "critic_learning_rate": 1e-6,
                "schedule": "constant",
                "samples_every_updates": 10_000,
                "normalize_rewards": False,
                "max_kl": 1e9,
            },
            "hardware": {"device": device, "ranks": 1, **self.hardware},
            "checkpoint": {"every_minutes": None},
        }


QWEN = {"model_type": "qwen2", "vocab_size": 151936}
ON_A_GPU = (
    Named("smollm2-360m", llama(960, 32, 15, 5, 2560, vocab_size=49152), 32, 128, {}),
    Named("qwen2.5-0.5b", llama(896, 24, 14, 2, 4864, **QWEN), 32, 128, {}),
    Named("qwen3-0.6b", llama(1024, 28, 16, 8, 3072, **{**QWEN, "model_type": "qwen3"}, head_dim=128), 32, 128, {}),
    Named(
        "pythia-410m",
        {
            "model_type": "gpt_neox",
            "hidden_size": 1024,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "intermediate_size": 4096,
            "max_position_embeddings": 2048,
            "vocab_size": 50304,
        },
        32,
        128,
        {},
    ),
    Named("opt-1.3b", opt(2048, 24, 32), 64, 128, {}),
    Named("qwen2.5-1.5b", llama(1536, 28, 12, 2, 8960, **QWEN), 64, 64, {"gradient_checkpointing": True}),
)
SMALL = {"micro_batch": 4, "cpu_threads": 1}
ON_A_CPU = (
    Named("llama-12m", llama(384, 6, 6, 2, 1024, vocab_size=2048), 8, 16, SMALL, (64, 48)),
    Named("qwen2-6m", llama(256, 4, 4, 2, 1408, vocab_size=8192, model_type="qwen2"), 8, 16, SMALL, (64, 48)),
    Named(
        "qwen3-9m", llama(256, 6, 4, 2, 768, vocab_size=16384, model_type="qwen3", head_dim=64), 8, 16, SMALL, (64, 48)
    ),
    Named(
        "pythia-14m",
        {
            "model_type": "gpt_neox",
            "hidden_size": 256,
            "num_hidden_layers": 6,
            "num_attention_heads": 4,
            "intermediate_size": 1024,
            "max_position_embeddings": 512,
            "vocab_size": 4096,
        },
        8,
        16,
        SMALL,
        (64, 48),
    ),
    Named(
        "gpt2-8m",
        {
            "model_type": "gpt2",
            "n_embd": 320,
            "n_layer": 5,
            "n_head": 5,
            "n_positions": 512,
            "vocab_size": 4096,
        },
        8,
        16,
        SMALL,
        (64, 48),
    ),
    Named("opt-19m", {**opt(384, 8, 6), "vocab_size": 8192}, 8, 16, SMALL, (64, 48)),
)


@dataclass(frozen=True)
class Compared:
    """A step of a job: what was said of it, and what it took."""

    name: str
    step: int
    said_bytes: float
    used_bytes: float
    said_s: float | None  # None: the card is not listed
    took_s: float
    phases: Mapping[str, float]  # of step 3's update, measured

    def cells(self) -> list[str]:
        seconds = ["", f"{self.took_s:.3g} s", ""]
        if self.said_s is not None:
            seconds = [f"{self.said_s:.3g} s", f"{self.took_s:.3g} s", f"{self.said_s / self.took_s - 1:+.0%}"]
        memory = [f"{self.said_bytes / GIB:.2f} GiB", f"{self.used_bytes / GIB:.2f} GiB"]
        phases = ", ".join(f"{name} {seconds:.3g}" for name, seconds in self.phases.items())
        return [
            self.name,
            str(self.step),
            *memory,
            f"{self.said_bytes / self.used_bytes - 1:+.0%}",
            *seconds,
            phases,
        ]


def compare(named: Named, data: Path | None, folder: Path, where: Where, steps: Sequence[int]) -> list[Compared]:
    """Estimate a job, run it, and look at the memory and the updates of its steps."""
    folder.mkdir(parents=True)
    rows = data or made_up_rows(named, folder / "rows")
    model = folder / "model"
    fields = named.fields(model, rows, where.device)
    file = folder / "job.yaml"
    file.write_text(yaml.safe_dump(fields), encoding="utf-8")
    job = load_job(str(file))
    write_model(named.config, job, BYTES if data is None else VOCABULARY, where.device)
    here = Machine.look(gpus=where.device == "cuda")
    placement = place(job, here)
    target = target_of(here, placement, Cards.load())
    with memory_in_use(where.device) as samples:
        ran = run_product(fields, range(1, max(steps) + 1), folder, where)
    made = estimate(job, steps, placement, models_of(job), rows_of(job, model, folder, ran), target)
    return [compared(named.name, step, made, ran, samples, where.device) for step in steps]


def compared(
    name: str, step: int, made: Estimate, ran: Ran, samples: Sequence[tuple[float, float]], device: str
) -> Compared:
    updates = ran.updates(step, leave_out=WARM_UPS[device][step - 1])
    key = "ranks_cpu_s" if device == "cpu" else "wall_s"
    began, ended = time_of(ran.events("plan", step)[0]), time_of(ran.events("end", step)[0])
    used = max(size for at, size in samples if began <= at <= ended)
    phases = {p: median(u[f"{p}_s"] for u in updates) for p in ("rollout", "score", "train") if step == 3}
    said_s = made.times[step].update_s if made.times else None
    took_s = median(update[key] for update in updates)
    return Compared(name, step, made.fits[step].memory.peak, used, said_s, took_s, phases)


def write_model(config: Mapping[str, Any], job: Job, tokens: int, device: str) -> None:
    """Write the job's model with random weights, and a tokenizer with so many tokens."""
    tokenizer, folder = train_tokenizer(dataset.texts(job.data), tokens), str(job.actor.model)
    names = ("pad_token_id", "bos_token_id", "eos_token_id")
    fields = {**config, **{name: getattr(tokenizer, name) for name in names}}
    torch.manual_seed(1)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(fields.pop("model_type"), **fields))
    model.to(torch.bfloat16 if device == "cuda" else torch.float32).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    del model
    compat.free_gpu_memory()


def made_up_rows(named: Named, folder: Path) -> Path:
    """Write rows of random letters, each a token, as long as real ones."""
    dice, (prompt, answer) = np.random.RandomState(1), named.longest
    prompts = drawn_lengths(dice, ROWS, MEAN_PROMPT * prompt, 2.0, 4, prompt - 1)
    answers = [drawn_lengths(dice, ROWS, MEAN_ANSWER * answer, 1.0, 2, answer - 1) for _ in range(2)]
    letters = np.array(list(string.ascii_lowercase))
    rows = [
        {name: "".join(dice.choice(letters, size)) for name, size in zip(COLUMNS, sizes, strict=True)}
        for sizes in zip(prompts, *answers, strict=True)
    ]
    return write_rows(rows, folder)


def rows_of(job: Job, model: Path, folder: Path, ran: Ran) -> dict[int, StepRows]:
    """Return the rows of each step as the run read them, and its answers in the mean."""
    tokenizer = load_tokenizer(str(model))
    found = dataset.prepare(job.data, tokenizer, cache=folder / "cache", rank=0, world_size=1, say=lambda what: None)
    rows = {step: rows_of_table(found.train, job, step) for step in STEPS}
    lengths = [event["response_length"] for event in ran.events("metrics", 3)]
    return {**rows, 3: replace(rows[3], answer=float(np.mean(lengths)))} if lengths else rows


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
    """Return what all processes have in use of the first GPU. Nothing is started for it."""
    free, total = torch.cuda.mem_get_info(0)
    return float(total - free)


def tree_bytes() -> float:
    """Return the proportional set size of all processes below this one."""
    found = 0.0
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):  # it has ended
            found += process.memory_full_info().pss
    return found


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, metavar="FOLDER", help="rows (default: made up)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--threads", type=int, default=1, help="of a rank on a CPU")
    parser.add_argument("--jobs", nargs="+", metavar="NAME", help="only these")
    parser.add_argument("--steps", nargs="+", type=int, default=[1, 2, 3], choices=(1, 2, 3))
    parser.add_argument("--minutes", type=float, default=math.inf, help="begin no job after so many")
    parser.add_argument("--tiny", action="store_true", help="with tiny models: does this program work?")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the numbers here, as JSON")
    return parser.parse_args()


def main() -> int:
    options, say, began = arguments(), console_on(sys.stderr).print, time.monotonic()
    where, found = Where(options.device, options.threads), list[Compared]()
    jobs = ON_A_GPU if options.device == "cuda" or options.tiny else ON_A_CPU
    names = "update said", "took" if options.device == "cuda" else "CPU took"
    table = Table("job", "step", "memory said", "in use", "", *names, "", "phases took", box=box.SIMPLE)
    with tempfile.TemporaryDirectory(prefix="estimates-") as folder:
        for named in jobs:
            if options.jobs and named.name not in options.jobs:
                continue
            if time.monotonic() - began > 60 * options.minutes:
                say(f"{named.name}: not begun, --minutes are over")
                continue
            data = options.data.resolve() if options.data else None
            job = named.shrunk() if options.tiny else named
            try:
                lines = compare(job, data, Path(folder) / named.name, where, options.steps)
            except RuntimeError as error:
                say(f"{named.name}: {error}")
                continue
            for each in lines:
                say("  ".join(each.cells()))
                table.add_row(*each.cells())
            found += lines
            shutil.rmtree(Path(folder) / named.name, ignore_errors=True)
            if options.output:
                options.output.write_text(json.dumps([asdict(each) for each in found], indent=1), encoding="utf-8")
    out = console_on(sys.stdout)
    out.width = 150
    seconds = time.monotonic() - began
    out.print(f"$ python {shlex.join(sys.argv)}  # {seconds:.0f} s\n{machine(where)}\n{versions()}\n")
    out.print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
