"""`rlhf-train` in this process, for tests of what is trained: its runs share their importers.

Starting a launcher and an importer takes 6 CPU seconds, and the three steps of the tiny job take 2.
How both start and end is tested elsewhere, in tests/rlhf_train. What ranks compute is the same: an
importer forks the ranks of all steps, and here also those of several runs.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from rlhf_train.__main__ import main
from rlhf_train.ranks.processes import SpareRanks

# An importer's environment, and its number of ranks: it stays until this process ends, and ends
# with it.
_shared: dict[tuple[tuple[str, str] | str, ...], SpareRanks] = {}


def train(words: Sequence[str], cache: Path, variables: Mapping[str, str] | None = None) -> int:
    """Run `rlhf-train WORDS`, and return its exit code.

    variables: of the ranks alone.
    """
    ranks = [word for word in words if word.startswith("hardware.ranks=")]
    spares = _shared.setdefault((*ranks[-1:], *(variables or {}).items()), SpareRanks(os.environ | (variables or {})))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RLHF_CACHE", str(cache))
        try:
            return main(words, spares)
        finally:
            spares.end()
