"""What the environment decides, read in one place: where caches and runs lie, and whether this is
continuous integration; what a machine must have (limits.toml); and what is known of those who rent
machines out (providers/).
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

LIMITS = Path(__file__).with_name("limits.toml")
PROVIDERS = Path(__file__).with_name("providers")


@dataclass(frozen=True)
class Settings:
    cache: Path  # RLHF_CACHE: what can be made again (tokenised data); content-addressed, shared by all runs
    runs: Path  # RLHF_RUNS: the run folders; ./runs if unset
    ci: bool  # RLHF_CI=1: tests may install what they need, and a skipped test is a failed one
    boxes: Path  # RLHF_BOXES: the boxes that `fab` knows; ./boxes.yaml if unset
    state: Path  # what the laptop remembers of its boxes: their host keys, what was fetched

    @classmethod
    def from_environ(cls, environ: Mapping[str, str]) -> Settings:
        """An empty variable counts as unset, as the XDG specification has it."""
        return cls(
            cache=Path(environ["RLHF_CACHE"])
            if environ.get("RLHF_CACHE")
            else _user_folder(environ, "XDG_CACHE_HOME", ".cache") / "rlhf-box",
            runs=Path(environ.get("RLHF_RUNS") or "runs"),
            ci=environ.get("RLHF_CI") == "1",
            boxes=Path(environ.get("RLHF_BOXES") or "boxes.yaml"),
            state=_user_folder(environ, "XDG_STATE_HOME", ".local/state") / "rlhf-box",
        )


def _user_folder(environ: Mapping[str, str], variable: str, default: str) -> Path:
    """XDG_CACHE_HOME and its like, which the specification says to ignore unless they are absolute;
    else ~/.cache.
    """
    chosen = Path(environ.get(variable, ""))
    return chosen if chosen.is_absolute() else Path(environ.get("HOME") or Path.home()) / default


Version = Annotated[str, Field(pattern=r"^[0-9]+(\.[0-9]+)+$")]
Count = Annotated[int, Field(gt=0)]
Amount = Annotated[float, Field(gt=0, allow_inf_nan=False)]
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


class EnvironmentLimits(_Table):
    bytes_cuda: Count
    bytes_cpu: Count


class CpuOperatorLimits(_Table):
    names: Names
    flags: Names


class PeerAccessLimits(_Table):
    broken_cards: Names  # parts of their names
    mended_driver: Version


class ImageLimits(_Table):
    cuda: Version
    python: Version
    machine: str  # as `uname -m` says it


class GpuHealthLimits(_Table):
    ecc_uncorrected_max: Annotated[int, Field(ge=0)]
    xid_unfit: Annotated[tuple[Count, ...], Field(strict=False)]
    xid_warning: Annotated[tuple[Count, ...], Field(strict=False)]


class CpuLimits(_Table):
    cores_min: Amount
    cores_advised_per_rank: Amount


class MemoryLimits(_Table):
    bytes_min: Count
    bytes_advised: Count


class HubLimits(_Table):
    small_file_max_s: Amount
    bytes_advised: Count


class ClockLimits(_Table):
    offset_max_s: Amount


class Limits(_Table):
    """limits.toml: every threshold that decides whether a machine is fit.

    A key too many or too few is an error.
    """

    image: ImageLimits
    cuda: dict[Version, CudaLimits]
    gpu_health: GpuHealthLimits
    cpu: CpuLimits
    memory: MemoryLimits
    hub: HubLimits
    clock: ClockLimits
    shared_memory: SharedMemoryLimits
    gpu_memory: GpuMemoryLimits
    disk: DiskLimits
    environment: EnvironmentLimits
    cpu_operators: CpuOperatorLimits
    peer_access: PeerAccessLimits

    @classmethod
    def load(cls, file: Path = LIMITS) -> Limits:
        return cls.model_validate(tomllib.loads(file.read_text(encoding="utf-8")))


Words = Annotated[tuple[Annotated[str, Field(min_length=1)], ...], Field(strict=False)]
Paths = Annotated[
    tuple[Annotated[str, Field(pattern=r"^(/|\$HOME(/|$))")], ...], Field(strict=False)
]  # `$HOME` is the box's, of its user
Fate = Literal["kept", "lost", "unknown"]


class Signs(_Table):
    """How a box is recognised: by any one of these."""

    hostnames: Words = ()  # regular expressions for the whole name
    variables: Annotated[
        tuple[Names, ...], Field(strict=False)
    ] = ()  # groups of names, of process 1; all of a group must be there
    files: Paths = ()


class KeptFolder(_Table):
    """What becomes of a folder when the box is stopped, and when it is given back."""

    path: str
    on_stop: Fate
    on_release: Fate
    days: Count | None = None  # that it is kept after a stop; None: no such end is known
    note: str = ""


class StopRules(_Table):
    """What stopping means for the meter and for the data."""

    meter: Literal["off", "on", "unknown"]  # for the machine with its GPUs, once it is stopped
    disk: Literal["free", "paid", "unknown"]  # while it is stopped
    disk_note: str = ""
    deadline_days: Count | None = None  # from the stop until the data is released
    deadline_note: str = ""  # what else ends it
    restart_note: str = ""  # whether it comes back as it was
    command: Words = ()  # inside the box; () where there is none that stops the meter
    variables: Words = ()  # of process 1's environment that the command needs, and an SSH session does not have
    by_hand: str  # where a person does it instead


class Provider(_Table):
    """providers/NAME.toml: what is known of one who rents boxes out.

    Facts only: code decides by them, not by the name.
    """

    name: str
    title: str
    sort: Literal["container", "machine", "unknown"]  # what its boxes are, as a rule; the probe looks for itself
    signs: Signs = Signs()
    data_folders: Paths  # for our folder: the first of them that is there
    folders: Annotated[tuple[KeptFolder, ...], Field(strict=False)] = ()
    stop: StopRules
    # what its own shells read and `ssh BOX COMMAND` does not: to be sourced before a job, if there
    env_files: Paths = ()
    # sets a proxy for the way abroad; to be sourced for that alone, never together with a mirror
    proxy_files: Paths = ()
    mirror: str = "default"  # the file of mirrors/ that is advised there
    pythons: Paths = ()  # interpreters that a non-interactive shell does not find
    condas: Paths = ()
    notes: Words = ()  # for a person

    @classmethod
    def load(cls, file: Path) -> Provider:
        return cls.model_validate({"name": file.stem, **tomllib.loads(file.read_text(encoding="utf-8"))})

    @classmethod
    def load_all(cls, folder: Path = PROVIDERS) -> dict[str, Provider]:
        """By name. `generic` is always there: a box of which nothing is known."""
        return {file.stem: cls.load(file) for file in sorted(folder.glob("*.toml"))}
