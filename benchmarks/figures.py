"""The tables' arithmetic: medians with their spread, floors and shares."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any


@dataclass(frozen=True)
class Spread:
    """The median and the range of several repeats."""

    median: float
    least: float
    most: float
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        return cls(median(values), min(values), max(values), len(values))

    def __format__(self, spec: str) -> str:
        """Format as `1.65 (1.42-2.25)`, each number by `spec`."""
        middle = format(self.median, spec)
        return f"{middle} ({format(self.least, spec)}-{format(self.most, spec)})" if self.count > 1 else middle


def decode_floor_s(
    weight_bytes: float, kv_bytes: float, copy_bytes_s: float, flops: float = 0.0, matmul_flops_s: float = float("inf")
) -> float:
    """Return the least seconds that a decode step can take.

    All weights and live keys and values are read once, or (on a CPU) computed with.
    """
    return max((weight_bytes + kv_bytes) / copy_bytes_s, flops / matmul_flops_s)


def kv_bytes(layers: int, width: int, rows: int, positions: float, bytes_each: int) -> float:
    """Return the bytes of the KV cache of `rows` sequences with `positions` tokens each."""
    return 2 * layers * width * rows * positions * bytes_each


def matmul_share(parameters: int, tokens_s: float, matmul_flops_s: float) -> float:
    """Return the share of the measured matmul rate.

    A weight and token take 2 flops forward and 4 backward.
    """
    return 6 * parameters * tokens_s / matmul_flops_s


@dataclass(frozen=True)
class Table:
    """The output of one NAME: rows of cells, and notes below."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str] = ()
    numbers: Any = None  # for the JSON file

    def __str__(self) -> str:
        if not self.rows:  # what another program has printed
            return "\n".join([self.title, "", *self.notes])
        lines = [list(self.columns), *(list(row) for row in self.rows)]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        head, *rows = ("  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]) for line in lines)
        return "\n".join([self.title, "", head, "-" * len(head), *rows, "", *self.notes])
