"""This module measures step 3: seconds of its phases, and samples a second.

Rows have either the full length or lengths that are drawn like real ones.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.figures import Spread, Table
from benchmarks.machine import Where
from benchmarks.product import Ran, job_of, run_product
from benchmarks.work import Prompts, Size, prompt_rows, prompts_of, write_models, write_rows

WARM_UP = 1  # updates of a process that do not count
LENGTHS = {False: "full length", True: "real lengths"}
# Our names of the phases, with the product's names.
PHASES = {
    "generation_s": "rollout_s",
    "scoring_s": "score_s",
    "training_s": "train_s",
    "total_s": "wall_s",
    "cpu_s": "cpu_s",
}


def write_work(size: Size, folder: Path, device: str, seed: int, *, real_lengths: bool) -> Prompts:
    """Write `actor/`, `critic/` and `rows/` with one rollout's prompts, which every update uses."""
    prompts = prompts_of(size, seed, real_lengths=real_lengths)
    write_models(size, folder, device, seed, real_lengths=real_lengths)
    write_rows(prompt_rows(prompts), folder / "rows")
    return prompts


def lengths_of(size: Size, real_lengths: bool) -> Size:
    """Return the work's size, in which prompts and answers may be as long as real ones."""
    if not real_lengths:
        return size
    return replace(size, prompt_tokens=size.real_prompt_tokens, response_tokens=size.real_response_tokens)


def run(size: Size, work: Path, where: Where, updates: int, **parts: Mapping[str, Any]) -> Ran:
    """Run the product's step 3 on the folder `work`, which `write_work` has written.

    updates: without those that do not count.
    """
    total = updates + WARM_UP
    ppo = {"max_updates": total, "epochs": float(total), **parts.pop("ppo", {})}
    job = job_of(size, str(work / "actor"), str(work / "critic"), work / "rows", where, ppo=ppo, **parts)
    return run_product(job, [3], work / "ours", where, given={1: work / "actor", 2: work / "critic"})


def repeats_of(ran: Ran, prompts: Prompts) -> list[dict[str, Any]]:
    """Return a line for each update, with the names that the peers use.

    Raises AssertionError when the run did other work than it was asked to.
    """
    repeats = []
    for update in ran.updates(3, WARM_UP):
        answer_tokens = round(update["response_length"] * len(prompts.ids))
        mismatch = f"answers have {answer_tokens} tokens, not {prompts.answer_tokens}"
        assert answer_tokens == prompts.answer_tokens, mismatch
        times = {phase: update[product_name] for phase, product_name in PHASES.items()}
        counts = {"prompt_tokens": prompts.prompt_tokens, "answer_tokens": answer_tokens}
        rest = {"real_token_share": update["real_token_share"], "peak_bytes": update.get("gpu_peak_bytes")}
        repeats.append({**times, **counts, **rest})
    return repeats


def row(name: str, repeats: Sequence[Mapping[str, Any]], samples: int) -> list[str]:
    """Make one line of the table; phases that were not measured have `-`."""
    spreads = {
        phase: Spread.of([repeat[phase] for repeat in repeats]) if phase in repeats[0] else None for phase in PHASES
    }
    cells = [name, *("-" if spread is None else f"{spread:.2f}" for spread in spreads.values())]
    total, generation = spreads["total_s"], spreads["generation_s"]
    assert generation is not None
    cells.append("-" if total is None else f"{samples / total.median:.2f}")
    cells.append(f"{repeats[0]['answer_tokens'] / generation.median:,.0f}")
    return cells


COLUMNS = [
    "seconds, median (least-most)",
    "generation",
    "scoring",
    "training",
    "whole update",
    "CPU",
    "samples/s",
    "answer tokens/s",
]


def table(
    size: Size, folder: Path, where: Where, updates: int, seed: int, lengths: str, say: Callable[[str], None]
) -> Table:
    """Measure step 3 and make its table. lengths: full, real or both."""
    rows, notes, numbers = [], [], {}
    for real_lengths, name in LENGTHS.items():
        if lengths not in ("both", name.split()[0]):
            continue
        say(f"  {name}")
        work = folder / name.split()[0]
        prompts = write_work(size, work, where.device, seed, real_lengths=real_lengths)
        repeats = repeats_of(run(lengths_of(size, real_lengths), work, where, updates), prompts)
        rows.append(row(name, repeats, size.batch))
        share = f"{repeats[0]['real_token_share']:.1%} of the tokens computed in training are real"
        notes.append(f"{name}: {described(prompts)}; {share}")
        numbers[name] = repeats
    notes.append(
        f"first {WARM_UP} of {WARM_UP + updates} updates left out; no answer of the full length ends with an EOS"
    )
    return Table("ppo", COLUMNS, rows, notes, numbers)


def described(prompts: Prompts) -> str:
    count = len(prompts.ids)
    return (
        f"{count} prompts of {prompts.prompt_tokens / count:.1f} tokens ({max(map(len, prompts.ids))} the longest), "
        f"answers of {prompts.answer_tokens / count:.1f} ({max(prompts.answers)} the longest)"
    )
