"""What the environment decides, read in one place: where caches and runs lie, and whether this is continuous integration;
and what a machine must have (limits.toml).
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

LIMITS = Path(__file__).with_name("limits.toml")


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


Version = Annotated[str, Field(pattern=r"^[0-9]+(\.[0-9]+)+$")]
Count = Annotated[int, Field(gt=0)]
Names = Annotated[tuple[str, ...], Field(strict=False, min_length=1)]


class _Table(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")


class CudaLimits(_Table):
    driver_min: Version
    driver_advised: Version
    capability_min: Version | None = None  # compute capability of the cards; None: not checked
    capability_max: Version | None = None


class SharedMemoryLimits(_Table):
    bytes_per_rank: Count


class GpuMemoryLimits(_Table):
    used_max_bytes: Count  # of a card, by others, before the job begins


class DiskLimits(_Table):
    bytes_min: Count
    bytes_advised: Count
    inodes_min: Count


class CpuOperatorLimits(_Table):
    names: Names
    flags: Names


class PeerAccessLimits(_Table):
    broken_cards: Names  # parts of their names
    mended_driver: Version


class Limits(_Table):
    """limits.toml: every threshold that decides whether a machine is fit. A key too many or too few is an error."""

    cuda: dict[Version, CudaLimits]
    shared_memory: SharedMemoryLimits
    gpu_memory: GpuMemoryLimits
    disk: DiskLimits
    cpu_operators: CpuOperatorLimits
    peer_access: PeerAccessLimits

    @classmethod
    def load(cls, file: Path = LIMITS) -> Limits:
        return cls.model_validate(tomllib.loads(file.read_text(encoding="utf-8")))
