"""This module measures how step 3's cost grows with its work.

The length of answers, the batch and the size of the models grow, and ranks go from 1 to 2.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from benchmarks import ppo
from benchmarks.figures import Spread, Table
from benchmarks.machine import Where
from benchmarks.work import Size, opt

COLUMNS = ["", *ppo.COLUMNS[1:], "against the first"]


def variants(size: Size, ranks: int) -> Iterator[tuple[str, Size, int]]:
    """Yield (what grows, the work, ranks); each line of a group doubles the line before it."""
    for times in (1, 2, 4):
        tokens = size.response_tokens * times // 4
        yield f"answers of {tokens} tokens", replace(size, response_tokens=tokens), 1
    for times in (1, 2, 4):
        batch = size.batch * times // 4
        yield f"batch {batch}", replace(size, batch=batch), 1
    for times in (1, 2):
        width = size.actor["hidden_size"] * times // 2
        layers, heads = size.actor["num_hidden_layers"], size.actor["num_attention_heads"] * times // 2
        wide = opt(width, layers, heads, size.vocabulary, size.actor["max_position_embeddings"])
        yield f"actor of width {width}", replace(size, actor=wide), 1
    for count in range(1, ranks + 1):
        yield f"ranks {count}", size, count


def table(
    size: Size, folder: Path, where: Where, updates: int, seed: int, ranks: int, say: Callable[[str], None]
) -> Table:
    rows: list[list[str]] = []
    numbers = {}
    first: dict[str, float] = {}  # of each group: what its first line took
    for number, (name, work, count) in enumerate(variants(size, ranks)):
        place = folder / str(number)
        prompts = ppo.write_work(work, place, where.device, seed, real_lengths=False)
        repeats = ppo.repeats_of(ppo.run(work, place, replace(where, ranks=count), updates), prompts)
        seconds = Spread.of([repeat["total_s"] for repeat in repeats])
        say(f"  {name}: {seconds:.2f} s")
        group = name.rstrip("0123456789").split(" of ")[0]
        spent = Spread.of([repeat["cpu_s" if where.device == "cpu" else "total_s"] for repeat in repeats]).median
        ratio = spent / first.setdefault(group, spent)
        rows.append([*ppo.row(name, repeats, work.batch), f"{ratio:.2f}x"])
        numbers[name] = repeats
    spent_of = "CPU seconds, of all ranks together" if where.device == "cpu" else "whole update"
    notes = [
        f"otherwise {size.batch} prompts of {size.prompt_tokens} tokens with answers of {size.response_tokens}, "
        "one update a batch, 1 rank",
        f"{updates} updates after {ppo.WARM_UP} that does not count; the last column: {spent_of}",
    ]
    return Table("growth", COLUMNS, rows, notes, numbers)
