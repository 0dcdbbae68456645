"""This module measures the share of real tokens among the computed ones, on the user's own rows.

It runs the three steps at default settings.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.figures import Table
from benchmarks.machine import Where
from benchmarks.product import run_product
from benchmarks.work import actor_of, opt
from jobs.events import RawEvent
from jobs.spec import load_job
from rlhf_train.models.networks import load_tokenizer

MEAN_ANSWER = 50  # tokens, as in hh-rlhf
TARGETS = "targets: 80 % by buckets, 95 % where packed"


def table(data: Path, folder: Path, where: Where, updates: int, say: Callable[[str], None]) -> Table:
    """Train a model so small that only lengths matter, from random weights.

    In step 3 it is replaced by a model whose answers end as often as real ones.
    """
    fields = opt(32, 1, 2, 0, 512)
    shape = {name: value for name, value in fields.items() if name != "vocab_size"}
    job = job_of(shape, data, where, updates)
    lines: dict[int, Sequence[RawEvent]] = {}
    for step in (1, 2):
        say(f"  step {step}")
    ran = run_product(job, [1, 2], folder / "first", where)
    lines |= {step: ran.events("metrics", step) for step in (1, 2)}
    say("  step 3")
    models = {step: ran.run.step(step).model for step in (1, 2)}
    tokenizer = load_tokenizer(str(models[1]))
    ending = actor_of({**fields, "vocab_size": len(tokenizer)}, 0, end_probability=1 / MEAN_ANSWER)
    ending.save_pretrained(str(folder / "ending"))
    tokenizer.save_pretrained(str(folder / "ending"))
    third = run_product(job, [3], folder / "second", where, given={1: folder / "ending", 2: models[2]})
    lines[3] = third.events("metrics", 3)
    row_counts = {step: (ran if step < 3 else third).events("plan", step)[-1] for step in (1, 2, 3)}
    rows = [
        [f"step {step}", f"{share(lines[step]):.1%}", str(len(lines[step])), batches(row_counts[step])]
        for step in (1, 2, 3)
    ]
    answers = sum(line["response_length"] for line in lines[3]) / len(lines[3])
    notes = [
        f"rows: {data.name}; a tokenizer of {len(tokenizer)} tokens trained on them, "
        "whose texts are somewhat longer than by OPT's own",
        f"step 3's answers end with a probability of 1/{MEAN_ANSWER} a token: {answers:.1f} tokens on average; "
        "counted is what is trained on",
        TARGETS,
    ]
    return Table("padding", ["", "real tokens", "updates", "batches"], rows, notes, lines)


def job_of(shape: Mapping[str, Any], data: Path, where: Where, updates: int) -> dict[str, Any]:
    """Return jobs/opt-1.3b.yaml with another model and these rows."""
    job = load_job("opt-1.3b").dump()
    job |= {
        "name": "benchmark",
        "actor": {"model": {"config": dict(shape)}, "tokenizer_vocabulary": 8192},
        "critic": {"model": "actor"},
    }
    job["data"] |= {"datasets": [str(data.resolve())], "eval_rows": 1}
    for part in ("sft", "reward", "ppo"):
        job[part] |= {"max_updates": updates, "epochs": 20.0}
    job["hardware"] |= {"device": where.device, "cpu_threads": where.threads, "ranks": where.ranks}
    job["checkpoint"] |= {"every_minutes": None}
    return job


def share(lines: Sequence[RawEvent]) -> float:
    return sum(line["real_token_share"] for line in lines) / len(lines)


def batches(plan: RawEvent) -> str:
    return f"{plan['global_batch']} an update, {plan['micro_batch']} at once"
