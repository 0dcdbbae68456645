"""Choose the rows of an update, assign them to ranks and passes, and make packed or padded tensors.

Which rows an update trains on depends on the seed and the global batch alone, never on ranks or
micro batches.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
import torch
from torch import Tensor

from jobs.errors import ToolkitError
from jobs.formatting import plural

# Fixed cost of a pass, in tokens: Python, kernel starts, reading and adding to all gradients.
PASS_TOKENS = 256


@dataclass(frozen=True)
class BatchPlan:
    """How one optimizer update is cut into passes. Units: sequences (pairs in step 2)."""

    micro_batch: int  # of the longest rows, per forward and backward, one rank
    gradient_accumulation: int  # passes an update of such rows, one rank
    world_size: int  # ranks

    @classmethod
    def of(cls, global_batch: int, micro_batch: int, world_size: int, name: str) -> BatchPlan:
        """Return the plan; raise ToolkitError if `name`'s global batch does not divide evenly."""
        if global_batch % world_size:
            raise ToolkitError(
                f"{name}.global_batch {global_batch} cannot be shared by {world_size} ranks",
                why="every rank trains on the same number of sequences",
                hint=f"use a multiple of {world_size}, or hardware.ranks with one of {_divisors(global_batch)}",
            )
        per_rank = global_batch // world_size
        if per_rank % micro_batch:
            raise ToolkitError(
                f"{name}.global_batch {global_batch} over {plural(world_size, 'ranks')} is {per_rank}, "
                f"not a multiple of micro_batch {micro_batch}",
                hint=f"set hardware.micro_batch to one of {_divisors(per_rank)}",
            )
        return cls(micro_batch, per_rank // micro_batch, world_size)

    @property
    def global_batch(self) -> int:
        return self.micro_batch * self.gradient_accumulation * self.world_size

    def __str__(self) -> str:
        passes = f"{self.micro_batch} micro batch x {self.gradient_accumulation} accumulation"
        return f"{self.global_batch} = {passes} x {plural(self.world_size, 'ranks')}"


def _divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]


def largest_divisor(number: int, limit: int) -> int:
    return max(d for d in _divisors(number) if d <= max(1, limit))


def count_updates(rows: int, global_batch: int, epochs: float, max_updates: int | None) -> int:
    """Return how many updates take every row `epochs` times: at least 1, at most `max_updates`."""
    updates = max(1, int(np.ceil(rows * epochs / global_batch - 1e-9)))
    return min(updates, max_updates) if max_updates else updates


@lru_cache(maxsize=4)
def _permutation(rows: int, seed: tuple[int, ...]) -> np.ndarray:
    return np.random.RandomState(list(seed)).permutation(rows)


def rows_of_update(update: int, rows: int, global_batch: int, seed: Sequence[int]) -> np.ndarray:
    """Return the row numbers (global_batch,) of an update.

    One epoch follows the other, each in its own order; an update may take rows of two.
    """
    places = np.arange(update * global_batch, (update + 1) * global_batch)
    return np.array([_permutation(rows, (*seed, int(place // rows)))[place % rows] for place in places])


def assign_passes(
    lengths: np.ndarray, plan: BatchPlan, rank: int, tokens: int | None = None, *, packed: bool = False
) -> list[np.ndarray]:
    """Return the rank's passes of rows alike in length, longest first: indexes into `lengths`.

    lengths: of an update's rows. A pass computes at most `tokens`, padding included, so it takes
    many short rows; None: each takes `plan.micro_batch` rows. All ranks get the same number of rows
    and of passes, and rows of like lengths at the same time.
    """
    order = np.argsort(-lengths, kind="stable").reshape(-1, plan.world_size)
    if tokens is None:
        return np.split(order[:, rank], plan.gradient_accumulation)
    return [order[part, rank] for part in split_into_passes(lengths[order[:, 0]], tokens, packed=packed)]


def evaluation_batches(
    lengths: np.ndarray, micro_batch: int, world_size: int, rank: int, *, packed: bool = False
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield (indexes, real) for each pass of the rank; together the ranks take every row once.

    `real` is false on repeated rows, which give each rank as many rows (one rank: none). A pass
    computes no more tokens than `micro_batch` of the longest rows.
    """
    order = np.argsort(-lengths, kind="stable")
    padded = np.concatenate([order, np.repeat(order[-1:], -len(order) % world_size)]).reshape(-1, world_size)
    real = (np.arange(padded.size) < len(order)).reshape(padded.shape)
    for part in split_into_passes(lengths[padded[:, 0]], micro_batch * int(lengths.max(initial=1)), packed=packed):
        yield padded[part, rank], real[part, rank]


def split_into_passes(lengths: np.ndarray, tokens: int, *, packed: bool = False) -> list[slice]:
    """Cut rows, longest first, into the passes that compute the fewest tokens.

    A pass holds at most `tokens`, or one row. Its rows are padded to its longest, or packed. Each
    pass counts as PASS_TOKENS more than its rows: without that, each row would get its own.
    """
    total = np.cumsum([0, *lengths])
    # least[end]: lowest cost of the first `end` rows; starts[end]: where their last pass starts.
    least, starts = np.zeros(len(lengths) + 1), np.zeros(len(lengths) + 1, dtype=int)
    for end in range(1, len(lengths) + 1):
        most = max(1, tokens // int(lengths[end - 1]))
        first = np.arange(max(0, end - most), end)
        computed = total[end] - total[first] if packed else lengths[first] * (end - first)
        cost = np.where((computed <= tokens) | (first == end - 1), least[first] + computed + PASS_TOKENS, np.inf)
        starts[end], least[end] = first[cost.argmin()], cost.min()
    parts, end = list[slice](), len(lengths)
    while end:
        parts.append(slice(starts[end], end))
        end = starts[end]
    return parts[::-1]


@dataclass(frozen=True)
class Sequences:
    """Rows of prompt and response: padded on the right to the longest, or packed into one row.

    input_ids: (B, T), or packed (1, N). Hidden states and scores of its tokens are addressed flat:
    (S,), S = B T or N. host_prompt_lengths, host_response_lengths: (B,), in tokens, in the host's
    memory: indexes are computed there, so that nothing waits for a GPU. prompt_lengths and
    response_lengths are the same on the device. learned: for each row the places in its prompt of
    tokens that are learned, too, as earlier answers of a dialogue are; none of them is 0. None: no
    row has any.
    """

    input_ids: Tensor
    host_prompt_lengths: np.ndarray
    host_response_lengths: np.ndarray
    is_packed: bool = False
    learned: tuple[np.ndarray, ...] | None = None

    @classmethod
    def of(
        cls,
        prompts: Sequence[np.ndarray],
        responses: Sequence[np.ndarray],
        pad_id: int | None,
        device: torch.device,
        learned: Sequence[np.ndarray] | None = None,
    ) -> Sequences:
        """Pack the rows, or pad them with `pad_id` if it is not None.

        learned: for each row, which tokens of its prompt are learned (0 or 1); None: none.
        """
        prompt_lengths = np.array([len(p) for p in prompts])
        response_lengths = np.array([len(r) for r in responses])
        if pad_id is None:
            parts = [part for row in zip(prompts, responses, strict=True) for part in row]
            ids = np.concatenate(parts).astype(np.int64)[None]
        else:
            ids = np.full((len(prompts), int((prompt_lengths + response_lengths).max())), pad_id, dtype=np.int64)
            for row, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
                ids[row, : len(prompt)] = prompt
                ids[row, len(prompt) : len(prompt) + len(response)] = response
        places = None if learned is None else tuple(map(np.flatnonzero, learned))
        return cls(sent(torch.from_numpy(ids), device), prompt_lengths, response_lengths, pad_id is None, places)

    @property
    def host_lengths(self) -> np.ndarray:
        return self.host_prompt_lengths + self.host_response_lengths

    @cached_property
    def prompt_lengths(self) -> Tensor:
        return self._on_device(self.host_prompt_lengths)

    @cached_property
    def response_lengths(self) -> Tensor:
        return self._on_device(self.host_response_lengths)

    @property
    def lengths(self) -> Tensor:
        return self.prompt_lengths + self.response_lengths

    @property
    def attention_mask(self) -> Tensor:
        """Return (B, T), 1 on real tokens of padded rows. Training needs none: see networks.py."""
        return (torch.arange(self.input_ids.shape[1], device=self.input_ids.device) < self.lengths[:, None]).long()

    def response_mask(self) -> Tensor:
        """Return (B, R), R the longest response: true on real response tokens, the EOS included."""
        width = int(self.host_response_lengths.max())
        return torch.arange(width, device=self.input_ids.device) < self.response_lengths[:, None]

    def predicted(self, *, from_prompt: bool = False) -> tuple[Tensor, Tensor]:
        """Return which hidden states predict which tokens: (index into S, label), both (N,).

        Row by row. A response token is predicted by the state before it, and so are `learned`
        tokens of the prompt. `from_prompt` adds the prompt's tokens after its first.
        """
        first = self._starts if from_prompt else self._starts + self.host_prompt_lengths - 1
        if from_prompt or self.learned is None:
            states = _ranges(first, self._ends - 1)
        else:
            in_prompts = (start + places - 1 for start, places in zip(self._starts, self.learned, strict=True))
            in_responses = map(np.arange, first, self._ends - 1)
            states = np.concatenate([part for row in zip(in_prompts, in_responses, strict=True) for part in row])
        index = self._on_device(states)
        return index, self.input_ids.flatten()[index + 1]

    def last(self) -> Tensor:
        """Return the index into S of each row's last token, (B,)."""
        return self._on_device(self._ends - 1)

    def spread(self, flat: Tensor) -> Tensor:
        """Arrange numbers of response tokens, (N,) as in `predicted()`, as (B, R), else zero."""
        rows, width = len(self.host_response_lengths), int(self.host_response_lengths.max())
        starts = np.arange(rows) * width
        place = self._on_device(_ranges(starts, starts + self.host_response_lengths))
        return flat.new_zeros(rows * width).index_copy(0, place, flat).view(rows, width)

    def by_row(self, flat: Tensor) -> Tensor:
        """Arrange numbers of all tokens, (S,), as (B, T); arbitrary behind a row's last token."""
        if not self.is_packed:
            return flat.view(self.input_ids.shape)
        column = np.arange(self.host_lengths.max())
        return flat[self._on_device(np.minimum(self._starts[:, None] + column, self._ends[:, None] - 1))]

    @property
    def _starts(self) -> np.ndarray:
        """Return the index into S of each row's first token, (B,)."""
        lengths = self.host_lengths
        return np.cumsum(lengths) - lengths if self.is_packed else np.arange(len(lengths)) * self.input_ids.shape[1]

    @property
    def _ends(self) -> np.ndarray:
        return self._starts + self.host_lengths

    def _on_device(self, numbers: np.ndarray) -> Tensor:
        return sent(torch.from_numpy(numbers), self.input_ids.device)


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """Send a host tensor to the device from pinned memory, without waiting for the GPU's work."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def _ranges(starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """Return start, start + 1, ..., end - 1 of each pair, one pair after the other."""
    return np.concatenate([np.arange(start, end) for start, end in zip(starts, ends, strict=True)])
