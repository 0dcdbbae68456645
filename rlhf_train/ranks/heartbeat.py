"""Heartbeats tell the launcher what each rank is doing, through memory that they share.

A rank writes its phase and counts up, which costs no system call; the launcher reads. A rank that
hangs in a collective, on a dead GPU or on a dead disk stops counting. Meetings (collectives, which
all ranks reach in the same order) are counted separately: the rank with the fewest keeps the others
waiting.
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
    """A rank's latest sign of life."""

    count: int
    meetings: int
    has_trained: bool  # a checkpoint would have something to keep
    # The rank may be silent for long: it fetches a model, tokenises rows or writes a model.
    is_patient: bool
    is_saving: bool  # a checkpoint is being written, maybe next to the phase
    phase: str


class Heartbeat:
    """One rank's slot, where it writes its signs of life."""

    def __init__(self, memory: Any, rank: int) -> None:
        self._memory, self._offset = memory, rank * SLOT_BYTES
        self._count, self._meetings, self._phase = 0, 0, "starting"
        self.has_trained = self.is_patient = self.is_saving = False
        self.beat()

    @classmethod
    def unseen(cls) -> Heartbeat:
        """Make a heartbeat that nobody watches."""
        return cls(bytearray(SLOT_BYTES), 0)

    @classmethod
    def of_rank(cls, file: int, rank: int, ranks: int) -> Heartbeat:
        """Make the heartbeat of a rank. file: the launcher's open file, inherited."""
        return cls(mmap.mmap(file, ranks * SLOT_BYTES), rank)

    def beat(self, phase: str | None = None) -> None:
        """Give a sign of life; `phase` says what the rank does from now on, None: the same."""
        self._count += 1
        self._phase = self._phase if phase is None else phase
        words = self._phase.encode(errors="replace")[:108]
        flags = self.has_trained, self.is_patient, self.is_saving
        # Not pack_into: it writes zeros first, and a reader would see a rank that has not begun.
        self._memory[self._offset : self._offset + _SLOT.size] = _SLOT.pack(self._count, self._meetings, *flags, words)

    def meet(self) -> None:
        """Give a sign of life before waiting for the other ranks."""
        self._meetings += 1
        self.beat()


def read_sign(memory: Any, rank: int = 0) -> RankSign:
    """Read a rank's latest sign of life; count 0: it has not begun."""
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
        """Read each rank's latest sign of life, in the order of ranks."""
        return [read_sign(self._memory, rank) for rank in range(self._ranks)]

    def close(self) -> None:
        self._memory.close()
        self._file.close()
