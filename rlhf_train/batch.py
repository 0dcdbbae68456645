"""From row numbers to padded tensors: which rows an update takes, how ranks share them, and how they are cut.

Which rows an update trains on depends on the seed and the global batch alone, never on ranks or micro batches.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from jobs.errors import ToolkitError
from jobs.words import plural

WINDOW = 8  # updates whose rows are grouped by length


@dataclass(frozen=True)
class BatchPlan:
    """How one optimizer update is cut into passes. Units: sequences (pairs in step 2)."""

    micro_batch: int  # per forward and backward, one rank
    gradient_accumulation: int  # passes an update, one rank
    world_size: int  # ranks

    @classmethod
    def of(cls, global_batch: int, micro_batch: int, world_size: int, name: str) -> BatchPlan:
        """Raises ToolkitError when `name`'s global batch does not divide evenly."""
        if global_batch % world_size:
            raise ToolkitError(
                f"{name}.global_batch {global_batch} cannot be shared by {world_size} ranks",
                why="every rank trains on the same number of sequences",
                hint=f"use a multiple of {world_size}, or hardware.ranks with one of {_divisors(global_batch)}",
            )
        per_rank = global_batch // world_size
        if per_rank % micro_batch:
            raise ToolkitError(
                f"{name}.global_batch {global_batch} over {plural(world_size, 'ranks')} is {per_rank}, not a multiple of micro_batch {micro_batch}",
                hint=f"set hardware.micro_batch to one of {_divisors(per_rank)}",
            )
        return cls(micro_batch, per_rank // micro_batch, world_size)

    @property
    def global_batch(self) -> int:
        return self.micro_batch * self.gradient_accumulation * self.world_size

    def __str__(self) -> str:
        return (
            f"{self.global_batch} = {self.micro_batch} micro batch x {self.gradient_accumulation} accumulation x {plural(self.world_size, 'ranks')}"
        )


def _divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]


def largest_divisor(number: int, limit: int) -> int:
    return max(d for d in _divisors(number) if d <= max(1, limit))


def count_updates(rows: int, global_batch: int, epochs: float, max_updates: int | None) -> int:
    """Enough updates that every row of `epochs` passes is seen; at least one."""
    updates = max(1, int(np.ceil(rows * epochs / global_batch - 1e-9)))
    return min(updates, max_updates) if max_updates else updates


@lru_cache(maxsize=4)
def _permutation(rows: int, seed: tuple[int, ...]) -> np.ndarray:
    return np.random.RandomState(list(seed)).permutation(rows)


def rows_of_update(update: int, rows: int, global_batch: int, seed: Sequence[int]) -> np.ndarray:
    """Row numbers (global_batch,) of update 0, 1, ...: epoch after epoch, each in its own order, none cut short."""
    places = np.arange(update * global_batch, (update + 1) * global_batch)
    return np.array([_permutation(rows, (*seed, int(place // rows)))[place % rows] for place in places])


def grouped_rows_of_update(update: int, updates: int, lengths: np.ndarray, global_batch: int, seed: Sequence[int]) -> np.ndarray:
    """`rows_of_update` with the rows of up to `WINDOW` updates sorted by length and dealt out anew: little is padded.

    lengths: (rows,) in tokens; updates: of the whole step. The same rows are trained on as without grouping, since a
    window ends with an epoch's last whole update and with the step; batches of all lengths come in random order.
    """
    epoch = max(1, len(lengths) // global_batch)  # whole updates in one pass over the rows
    first = update - (update % epoch) % WINDOW
    end = min(first + WINDOW, (update // epoch + 1) * epoch, updates)
    rows = np.concatenate([rows_of_update(u, len(lengths), global_batch, seed) for u in range(first, end)])
    rows = rows[np.argsort(lengths[rows], kind="stable")].reshape(-1, global_batch)
    return rows[_permutation(end - first, (*seed, 2**31 + first))[update - first]]


def deal(lengths: np.ndarray, plan: BatchPlan, rank: int) -> list[np.ndarray]:
    """The rank's micro batches, as indexes into `lengths` (an update's rows): alike in length, longest first.

    All ranks get the same number of rows, and rows of the same lengths at the same time.
    """
    order = np.argsort(-lengths, kind="stable").reshape(plan.gradient_accumulation, plan.micro_batch, plan.world_size)
    return [group[:, rank] for group in order]


def evaluation_batches(lengths: np.ndarray, micro_batch: int, world_size: int, rank: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(indexes, real) per pass: every row once over all ranks; `real` is false on repeats that keep ranks in step (one rank: none)."""
    order = np.argsort(-lengths, kind="stable")
    padded = np.concatenate([order, np.repeat(order[-1:], -len(order) % world_size)])
    real = np.arange(len(padded)) < len(order)
    for start in range(0, len(padded), micro_batch * world_size):
        chosen = slice(start + rank, start + micro_batch * world_size, world_size)
        yield padded[chosen], real[chosen]


@dataclass(frozen=True)
class Sequences:
    """Prompts with responses, padded on the right.

    input_ids, attention_mask: (B, T); prompt_lengths, response_lengths: (B,), in tokens.
    """

    input_ids: Tensor
    attention_mask: Tensor
    prompt_lengths: Tensor
    response_lengths: Tensor

    @classmethod
    def of(cls, prompts: Sequence[np.ndarray], responses: Sequence[np.ndarray], pad_id: int, device: torch.device) -> Sequences:
        prompt_lengths = np.array([len(p) for p in prompts])
        response_lengths = np.array([len(r) for r in responses])
        ids = np.full((len(prompts), int((prompt_lengths + response_lengths).max())), pad_id, dtype=np.int64)
        for row, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
            ids[row, : len(prompt)] = prompt
            ids[row, len(prompt) : len(prompt) + len(response)] = response
        mask = np.arange(ids.shape[1]) < (prompt_lengths + response_lengths)[:, None]
        tensors = (torch.from_numpy(array).to(device) for array in (ids, mask.astype(np.int64), prompt_lengths, response_lengths))
        return cls(*tensors)

    @property
    def lengths(self) -> Tensor:
        return self.prompt_lengths + self.response_lengths

    def response_mask(self) -> Tensor:
        """(B, R), R the longest response here: true on real response tokens, the EOS included."""
        width = int(self.response_lengths.max())
        return torch.arange(width, device=self.input_ids.device) < self.response_lengths[:, None]

    def predicted(self, *, from_prompt: bool = False) -> tuple[Tensor, Tensor]:
        """Which hidden states predict which tokens: (index into B*T, label), both (N,), row by row.

        A response token is predicted by the state before it; `from_prompt` adds the prompt's tokens after its first.
        """
        batch, width = self.input_ids.shape
        position = torch.arange(width - 1, device=self.input_ids.device)
        first = torch.zeros_like(self.prompt_lengths) if from_prompt else self.prompt_lengths - 1
        wanted = (position >= first[:, None]) & (position < self.lengths[:, None] - 1)
        index = (torch.arange(batch, device=wanted.device)[:, None] * width + position)[wanted]
        return index, self.input_ids[:, 1:][wanted]

    def spread(self, flat: Tensor) -> Tensor:
        """Numbers of the response tokens, (N,) in the order of `predicted()` -> (B, R), zero elsewhere."""
        mask = self.response_mask()
        return torch.zeros(mask.shape, dtype=flat.dtype, device=flat.device).masked_scatter(mask, flat)
