"""What the environment decides, read in one place: where caches and runs lie, and whether this is continuous integration."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Settings:
    cache: Path  # RLHF_CACHE: what can be made again (tokenised data); content-addressed, shared by all runs
    runs: Path  # RLHF_RUNS: the run folders; ./runs if unset
    ci: bool  # RLHF_CI=1: tests may install what they need, and a skipped test is a failed one

    @classmethod
    def from_environ(cls, environ: Mapping[str, str]) -> Settings:
        """An empty variable counts as unset, as the XDG specification has it."""
        return cls(
            cache=Path(environ["RLHF_CACHE"]) if environ.get("RLHF_CACHE") else _user_cache(environ) / "rlhf-box",
            runs=Path(environ.get("RLHF_RUNS") or "runs"),
            ci=environ.get("RLHF_CI") == "1",
        )


def _user_cache(environ: Mapping[str, str]) -> Path:
    """XDG_CACHE_HOME, which the specification says to ignore unless it is absolute; else ~/.cache."""
    chosen = Path(environ.get("XDG_CACHE_HOME", ""))
    return chosen if chosen.is_absolute() else Path(environ.get("HOME") or Path.home()) / ".cache"
