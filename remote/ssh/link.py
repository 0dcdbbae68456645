"""The outcome of connecting to a box, as `fab doctor` shows it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Link:
    """How the box was reached. The caller finds this out before the probe."""

    reached: bool = True
    seconds: float | None = None  # of the connection, or of the probe's round trip
    error: str = ""  # why it was not reached
    todo: str = ""
    host_key: Literal["known", "new", "changed", "unknown"] = "unknown"
    fingerprint: str = ""
