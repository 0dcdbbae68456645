"""Keep rows out of memory: in a file without a name, with a short key of each prompt and row."""

from __future__ import annotations

import hashlib
import pickle
import tempfile
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from jobs.errors import ExitCode, ToolkitError
from rlhf_train.data.forms import Row, key_of
from rlhf_train.data.ragged import Order, starts

BLOCK_ROWS = 1024  # that are written and read together
IN_MEMORY_BYTES = 2**24  # of smaller data sets; larger ones are put into the system's folder for such files
KEY_BYTES = 16

Keys = npt.NDArray[np.bytes_]  # (n,): equal for equal texts


class RowStore:
    """Rows in their order. They are added first, then read."""

    def __init__(self) -> None:
        self._file: Any = tempfile.SpooledTemporaryFile(max_size=IN_MEMORY_BYTES)  # noqa: SIM115 (as long as it lives)
        self._ends = [0]  # of the blocks, in bytes
        self._block: list[Row] = []
        self._count = 0
        self._keys = bytearray(), bytearray()  # of prompts, of rows

    def add(self, row: Row) -> None:
        """Put a row behind the others. Raises ToolkitError: the disk is full."""
        cells = [key_of(cell).encode("utf-8", "surrogatepass") for cell in row]
        whole = b"".join(len(cell).to_bytes(8, "little") + cell for cell in cells)
        for keys, text in zip(self._keys, (cells[0], whole), strict=True):
            keys += hashlib.blake2b(text, digest_size=KEY_BYTES).digest()
        self._block.append(row)
        self._count += 1
        if len(self._block) == BLOCK_ROWS:
            self._write()

    def _write(self) -> None:
        try:
            self._file.seek(self._ends[-1])
            self._file.write(pickle.dumps(self._block, protocol=5))
        except OSError as error:
            raise ToolkitError(
                f"cannot keep rows in {tempfile.gettempdir()}",
                why=str(error),
                hint="free some disk space there, or let TMPDIR name another folder",
                exit_code=ExitCode.UNFIT,
            ) from None
        self._ends.append(self._file.tell())
        self._block = []

    def block(self, number: int) -> list[Row]:
        """Return the rows of a block; those of the last may not be written yet."""
        if number == len(self._ends) - 1:
            return self._block
        self._file.seek(self._ends[number])
        rows: list[Row] = pickle.loads(self._file.read(self._ends[number + 1] - self._ends[number]))
        return rows

    def __len__(self) -> int:
        return self._count

    @property
    def prompt_keys(self) -> Keys:
        return np.frombuffer(self._keys[0], f"S{KEY_BYTES}")

    @property
    def row_keys(self) -> Keys:
        return np.frombuffer(self._keys[1], f"S{KEY_BYTES}")


class StoredRows:
    """Some rows of a store, in the store's order."""

    def __init__(self, store: RowStore, numbers: Order | None = None) -> None:
        """numbers: rising; None: of all rows."""
        self._store = store
        self.numbers: Order = np.arange(len(store)) if numbers is None else numbers

    @classmethod
    def of(cls, rows: Iterable[Row]) -> StoredRows:
        store = RowStore()
        for row in rows:
            store.add(row)
        return cls(store)

    def __len__(self) -> int:
        return len(self.numbers)

    def __iter__(self) -> Iterator[Row]:
        return self.between(0, len(self))

    def between(self, start: int, stop: int) -> Iterator[Row]:
        """Yield the rows from `start` up to `stop`."""
        wanted = self.numbers[start:stop]
        if not len(wanted):
            return
        blocks, firsts = np.unique(wanted // BLOCK_ROWS, return_index=True)
        for block, numbers in zip(blocks, np.split(wanted, firsts[1:]), strict=True):
            rows = self._store.block(int(block))
            yield from (rows[number % BLOCK_ROWS] for number in numbers.tolist())

    def pick(self, rows: Order) -> StoredRows:
        """Return some of these rows. rows: their places here, rising."""
        return StoredRows(self._store, self.numbers[rows])

    @property
    def prompt_keys(self) -> Keys:
        """Return what is equal for equal prompts, (n,)."""
        return self._store.prompt_keys[self.numbers]

    @property
    def row_keys(self) -> Keys:
        return self._store.row_keys[self.numbers]

    def by_prompt(self) -> tuple[Order, npt.NDArray[np.int64]]:
        """Group the rows by prompt, in the order in which prompts appear.

        Returns the row numbers, one group behind the other, and where each group starts, and the
        end: (groups+1,).
        """
        _, first, group, sizes = np.unique(self.prompt_keys, return_index=True, return_inverse=True, return_counts=True)
        order = np.argsort(first)  # of the groups
        rank = np.empty_like(order)
        rank[order] = np.arange(len(order))
        return np.argsort(rank[group.reshape(-1)], kind="stable"), starts(sizes[order])
