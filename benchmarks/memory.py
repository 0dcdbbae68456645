"""This module measures the most memory that each step of the product takes.

On a GPU that is the memory of its tensors, on a CPU that of its largest process.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from benchmarks import ppo, steps
from benchmarks.figures import Table
from benchmarks.machine import Where
from benchmarks.product import Ran
from benchmarks.work import Size


def peak_bytes(ran: Ran, step: int) -> int:
    peaks = [line["gpu_peak_bytes"] for line in ran.events("metrics", step) if line.get("gpu_peak_bytes")]
    return max(peaks, default=ran.process_peak_bytes)


def table(size: Size, folder: Path, where: Where, seed: int, say: Callable[[str], None]) -> Table:
    runs: dict[str, tuple[int, Ran]] = {}
    for name in ("sft", "reward"):
        step = steps.steps_of(size, name)
        say(f"  {step.name}")
        ran = steps.run(step, size, folder / name, where, 1, seed)
        runs[f"{step.name}, {step.sequences} sequences of {step.tokens} tokens"] = (step.number, ran)
    say("  step 3")
    ppo.write_work(size, folder / "ppo", where.device, seed, real_lengths=False)
    name = f"step 3, {size.batch} prompts of {size.prompt_tokens} tokens, answers of {size.response_tokens}"
    runs[name] = (3, ppo.run(size, folder / "ppo", where, 1))
    peaks = {name: peak_bytes(ran, step) for name, (step, ran) in runs.items()}
    rows = [[name, f"{peak / 2**30:.2f} GiB"] for name, peak in peaks.items()]
    kind = "the resident set of the largest process, libraries included"
    if where.device == "cuda":
        kind = "the tensors of rank 0 on its GPU"
    note = f"at the peak, {kind}; all weights in training, {size.precision}, micro batch as the product chooses it"
    return Table("memory", ["", "peak"], rows, [note], peaks)
