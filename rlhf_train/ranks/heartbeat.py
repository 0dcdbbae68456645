"""Signs of life: what each rank does now, in memory that the launcher shares with all ranks.

A rank writes its phase and counts up, which costs no system call; the launcher reads. A rank that
hangs in a collective, on a dead GPU or a dead disk, counts no further. Meetings, the collectives
that all ranks come to in the same order, are counted apart: the rank that the others wait for has
come to fewest.
"""

from __future__ import annotations

import mmap
import os
import struct
import tempfile
from dataclasses import dataclass
from typing import Any

_SLOT = struct.Struct("<QQ???108s")
SLOT_BYTES = 128


@dataclass(frozen=True)
class RankSign:
    """What a rank said last."""

    count: int
    meetings: int
    has_trained: bool  # there is something that a checkpoint could keep
    is_patient: bool  # something goes on that may take long without a sign: fetching a model, tokenising, writing one
    is_saving: bool  # a checkpoint is being written, maybe beside the phase
    phase: str


class Heartbeat:
    """One rank's slot, which it writes its signs of life to."""

    def __init__(self, memory: Any, rank: int) -> None:
        self._memory, self._offset = memory, rank * SLOT_BYTES
        self._count, self._meetings, self._phase = 0, 0, "starting"
        self.has_trained = self.is_patient = self.is_saving = False
        self.beat()

    @classmethod
    def unseen(cls) -> Heartbeat:
        """Make one that nobody watches."""
        return cls(bytearray(SLOT_BYTES), 0)

    @classmethod
    def of_rank(cls, file: int, rank: int, ranks: int) -> Heartbeat:
        """Make the heartbeat of a rank. file: the launcher's, inherited."""
        return cls(mmap.mmap(file, ranks * SLOT_BYTES), rank)

    def beat(self, phase: str | None = None) -> None:
        """Give a sign of life; the rank does `phase` from now on, if it is given."""
        self._count += 1
        self._phase = self._phase if phase is None else phase
        words = self._phase.encode(errors="replace")[:108]
        # Not pack_into: it writes zeros first, and who reads then sees a rank that has not begun.
        flags = self.has_trained, self.is_patient, self.is_saving
        self._memory[self._offset : self._offset + _SLOT.size] = _SLOT.pack(self._count, self._meetings, *flags, words)

    def meet(self) -> None:
        """Give a sign of life before waiting for the other ranks."""
        self._meetings += 1
        self.beat()


def sign_in(memory: Any, rank: int = 0) -> RankSign:
    """Read what a rank said last; count 0: it has not begun."""
    count, meetings, has_trained, is_patient, is_saving, words = _SLOT.unpack_from(memory, rank * SLOT_BYTES)
    return RankSign(count, meetings, has_trained, is_patient, is_saving, words.rstrip(b"\0").decode(errors="replace"))


class HeartbeatReader:
    """Reads the signs of life of all ranks, for the launcher."""

    def __init__(self, ranks: int) -> None:
        self._file = tempfile.TemporaryFile()  # noqa: SIM115 (open as long as the ranks live)
        os.truncate(self._file.fileno(), ranks * SLOT_BYTES)
        self._memory, self._ranks = mmap.mmap(self._file.fileno(), ranks * SLOT_BYTES), ranks

    @property
    def file(self) -> int:
        return self._file.fileno()

    def signs(self) -> list[RankSign]:
        """Read what each rank said last, in the order of ranks."""
        return [sign_in(self._memory, rank) for rank in range(self._ranks)]

    def close(self) -> None:
        self._memory.close()
        self._file.close()
