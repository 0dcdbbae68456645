"""Limits of this process, for as long as a test needs them."""

from __future__ import annotations

import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def small_files(largest: int) -> Iterator[None]:
    """Limit the files of this process to `largest` bytes, as a full disk would.

    A longer write fails half-way. Not for a fixture: pytest prints a test's dot before its fixtures
    end, into a log that may be longer than that.
    """
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
