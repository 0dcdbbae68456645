"""This module measures steps 1 and 2 on rows of exactly known length.

It reports samples and tokens a second, and the share of the measured matmul rate.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.ceilings import Ceilings, clock_of, scaled
from benchmarks.figures import Spread, Table, matmul_share
from benchmarks.machine import Where
from benchmarks.product import Ran, job_of, run_product
from benchmarks.work import SPECIAL, Size, matmul_parameters, text, write_models, write_rows

WARM_UP = 2  # updates that do not count
COLUMNS = ["", "seconds an update", "samples/s", "real tokens/s", "share of matmul", "real tokens"]


@dataclass(frozen=True)
class Step:
    number: int
    name: str
    part: str  # of the job
    batch: int  # rows an update; pairs in step 2
    tokens: int  # of a sequence, prompt and answer together

    @property
    def sequences(self) -> int:
        return self.batch * self.number  # a pair is two


def steps_of(size: Size, name: str) -> Step:
    """Return the shape of the published measurements.

    It is 16 x 128 on a CPU, 32 x 512 and 16 pairs x 512 on a GPU.
    """
    tokens = size.prompt_tokens + size.response_tokens
    if name == "sft":
        return Step(1, "step 1", "sft", 32 if tokens >= 512 else min(16, size.batch), tokens)
    return Step(2, "step 2", "reward", min(16, size.batch), tokens)


def full_rows(step: Step, size: Size, count: int, seed: int) -> list[dict[str, str]]:
    """Make rows with the most tokens that prompt and answers, EOS included, may have."""
    dice = np.random.RandomState(seed)

    def words(tokens: int) -> str:
        return text(dice.randint(len(SPECIAL), size.words, tokens).tolist())

    answer = size.response_tokens - 1
    return [
        {"prompt": words(size.prompt_tokens), "chosen": words(answer), "rejected": words(answer)} for _ in range(count)
    ]


def run(step: Step, size: Size, folder: Path, where: Where, updates: int, seed: int, **parts: Any) -> Ran:
    """Run a step. updates: without those that do not count."""
    write_models(size, folder, where.device, seed)
    write_rows(full_rows(step, size, 8 * step.batch, seed), folder / "rows")
    total = updates + WARM_UP
    data = {"split": [int(step.number == n) for n in (1, 2, 3)]}
    part = {"global_batch": step.batch, "max_updates": total, "epochs": float(total)}
    sized, name = replace(size, batch=step.batch), str(folder / ("actor" if step.number == 1 else "critic"))
    job = job_of(sized, name, name, folder / "rows", where, data=data, **{step.part: part}, **parts)
    return run_product(job, [step.number], folder, where)


def table(
    name: str,
    size: Size,
    folder: Path,
    where: Where,
    updates: int,
    seed: int,
    ceiling: Ceilings,
    say: Callable[[str], None],
) -> Table:
    step = steps_of(size, name)
    say(f"  {step.sequences} sequences of {step.tokens} tokens")
    lines = run(step, size, folder, where, updates, seed).updates(step.number, WARM_UP)
    key = "cpu_s" if clock_of(where).startswith("seconds of the CPU") else "wall_s"
    fields, with_head = (size.actor, True) if step.number == 1 else (size.critic, False)
    parameters = matmul_parameters(fields, with_head=with_head)
    row, numbers = row_of(step, [line[key] for line in lines], parameters, ceiling.flops.median)
    row.append(f"{Spread.of([line['real_token_share'] for line in lines]).median:.1%}")
    head = ", with the tied head" if with_head else ""
    notes = [
        f"{step.sequences} sequences of {step.tokens} tokens an update, none padded; "
        f"{updates} updates after {WARM_UP} that do not count",
        f"share: 6 flops a weight and token ({parameters / 1e6:.1f}M without embeddings{head}) "
        f"of {scaled(ceiling.flops, 1e9).median:,.0f} GFLOP/s, measured just before",
        f"an update: all that lies between two updates of a real run; {clock_of(where)}",
    ]
    return Table(name, COLUMNS, [row], notes, {**numbers, "updates": lines})


def row_of(step: Step, seconds: Sequence[float], parameters: int, flops_s: float) -> tuple[list[str], dict[str, Any]]:
    taken = Spread.of(seconds)
    tokens_s = step.sequences * step.tokens / taken.median
    share = matmul_share(parameters, tokens_s, flops_s)
    numbers = {
        "parameters": parameters,
        "tokens_s": tokens_s,
        "matmul_share": share,
        "samples_s": step.batch / taken.median,
    }
    kind = "pairs" if step.number == 2 else "rows"
    row = [
        f"{step.name}, {step.batch} {kind}",
        f"{taken:.3f}",
        f"{step.batch / taken.median:.1f}",
        f"{tokens_s:,.0f}",
        f"{share:.1%}",
    ]
    return row, numbers
