"""Token lists of many lengths, as pieces of larger arrays."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
import numpy.typing as npt

Order = npt.NDArray[np.int64]  # row numbers
Tokens = npt.NDArray[np.int32]

NO_LIMIT = int(np.iinfo(np.int32).max)
HASHED_ROWS = 4096  # lists that are put together for a digest


@dataclass(frozen=True, eq=False)
class Ragged:
    """Token lists of many lengths, as pieces of larger arrays, which may be parts of files.

    A list that is cut, or has another place in an order, is not copied.
    """

    arrays: tuple[Tokens, ...]
    array: npt.NDArray[np.int32]  # (n,): in which of them a list is
    starts: npt.NDArray[np.int32]  # (n,): where it starts there
    sizes: npt.NDArray[np.int32]  # (n,): its tokens

    def __len__(self) -> int:
        return len(self.sizes)

    def __getitem__(self, index: int) -> Tokens:
        row = range(len(self))[index]
        start = int(self.starts[row])
        return self.arrays[self.array[row]][start : start + int(self.sizes[row])]

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        return self.sizes.astype(np.int64)

    @property
    def offsets(self) -> npt.NDArray[np.int64]:
        """Return where each list starts in `values`, and the end: (n+1,)."""
        return starts(self.sizes)

    @property
    def values(self) -> Tokens:
        """Return all lists one behind the other, as a copy."""
        return np.concatenate([np.empty(0, np.int32), *(self[row] for row in range(len(self)))])

    def hash_into(self, digest: hashlib._Hash) -> None:
        """Add offsets and values to a digest, without a copy of all values."""
        digest.update(self.offsets.tobytes())
        for start in range(0, len(self), HASHED_ROWS):
            rows = range(start, min(start + HASHED_ROWS, len(self)))
            digest.update(np.concatenate([self[row] for row in rows]).tobytes())

    @classmethod
    def of(cls, lists: Sequence[Sequence[int]]) -> Ragged:
        return cls.packed(np.fromiter(chain.from_iterable(lists), dtype=np.int32), starts([*map(len, lists)]))

    @classmethod
    def packed(cls, values: Tokens, offsets: npt.NDArray[np.int64]) -> Ragged:
        """Make it of one array, with where each list starts there, and the end."""
        array = np.zeros(len(offsets) - 1, np.int32)
        return cls((values,), array, offsets[:-1].astype(np.int32), np.diff(offsets).astype(np.int32))

    @classmethod
    def join(cls, parts: Sequence[Ragged]) -> Ragged:
        shifts = starts([len(part.arrays) for part in parts]).astype(np.int32)
        return cls(
            tuple(chain.from_iterable(part.arrays for part in parts)),
            np.concatenate([part.array + shift for part, shift in zip(parts, shifts, strict=False)]),
            np.concatenate([part.starts for part in parts]),
            np.concatenate([part.sizes for part in parts]),
        )

    def pick(self, rows: Order, max_tokens: int = NO_LIMIT) -> Ragged:
        """Return these rows in this order, each cut after `max_tokens`."""
        sizes = np.minimum(self.sizes[rows], np.int32(min(max_tokens, NO_LIMIT)))
        return Ragged(self.arrays, self.array[rows], self.starts[rows], sizes)


def starts(lengths: npt.ArrayLike) -> npt.NDArray[np.int64]:
    """Return where each of n parts starts, and the end: (n+1,)."""
    return np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
