"""Settings come from environment variables, limits, cards and providers from files of this folder.

Settings say where caches and runs lie, and whether this is continuous integration. Limits say what
a machine must have. Cards are GPUs, with what is known of their speed. Providers are those who rent
machines out, with what is known about them.
"""

from __future__ import annotations

import re
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
CARDS = Path(__file__).with_name("cards.toml")
PROVIDERS = Path(__file__).with_name("providers")
FLAVOURS = Path(__file__).with_name("flavours")
FAMILIES = Path(__file__).with_name("families.toml")
DEFAULT_FLAVOUR = "cu118"
OUR_FOLDER = "rlhf-box"  # on a box, in a data folder: our code, environments and runs


@dataclass(frozen=True)
class Settings:
    cache: Path  # RLHF_CACHE: what can be made again (tokenised data); content-addressed, shared by all runs
    runs: Path  # RLHF_RUNS: the run folders; ./runs if unset
    ci: bool  # RLHF_CI=1: tests may install what they need, and a skipped test is a failed one
    boxes: Path  # RLHF_BOXES: the boxes that `fab` knows; ./boxes.yaml if unset
    state: Path  # what the laptop remembers of its boxes: their host keys, what was fetched
    flavour: str  # RLHF_FLAVOUR: of the stack, set in the image and on a box; "" elsewhere

    @classmethod
    def from_environ(cls, environ: Mapping[str, str]) -> Settings:
        """Read the settings; an empty variable counts as unset, as in the XDG specification."""
        default_cache = _user_folder(environ, "XDG_CACHE_HOME", ".cache") / "rlhf-box"
        return cls(
            cache=Path(environ.get("RLHF_CACHE") or default_cache),
            runs=Path(environ.get("RLHF_RUNS") or "runs"),
            ci=environ.get("RLHF_CI") == "1",
            boxes=Path(environ.get("RLHF_BOXES") or "boxes.yaml"),
            state=_user_folder(environ, "XDG_STATE_HOME", ".local/state") / "rlhf-box",
            flavour=environ.get("RLHF_FLAVOUR", ""),
        )


def _user_folder(environ: Mapping[str, str], variable: str, default: str) -> Path:
    """Return the folder of XDG_CACHE_HOME or a variable like it; else the default, ~/.cache.

    The specification says to ignore a path that is not absolute.
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


class Flavour(_Table):
    """flavours/NAME.env has what one flavour of the image and of the bare environment is made of.

    Shell scripts read the same file; they need more of it.
    """

    name: str
    python: Version
    cuda: Version

    @classmethod
    def load(cls, file: Path) -> Flavour:
        settings = dict(re.findall(r"^([A-Z_]+)=(.*)$", file.read_text(encoding="utf-8"), re.MULTILINE))
        return cls(name=file.stem, python=settings["PYTHON"], cuda=settings["CUDA"])

    @classmethod
    def load_all(cls, folder: Path = FLAVOURS) -> dict[str, Flavour]:
        return {file.stem: cls.load(file) for file in sorted(folder.glob("*.env"))}


class Limits(_Table):
    """limits.toml has every threshold that decides whether a machine is fit.

    An unknown or missing key is an error. The flavours are read with it.
    """

    flavours: dict[str, Flavour]

    machine: str  # as `uname -m` says it
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
        fields = tomllib.loads(file.read_text(encoding="utf-8"))
        return cls.model_validate({**fields, "flavours": Flavour.load_all()})


class Family(_Table):
    """A family of models, as families.toml lists it."""

    title: str
    hub: Annotated[tuple[str, ...], Field(strict=False)] = ()  # how names of its models begin on the model hub
    flavours: Names  # whose transformers has it
    static: str | None = None  # its description for rollouts: a file of rlhf_train/generation/families


def load_families(file: Path = FAMILIES) -> dict[str, Family]:
    """Load all families, by the `model_type` of their config.json."""
    found = tomllib.loads(file.read_text(encoding="utf-8"))
    return {name: Family.model_validate(family) for name, family in found.items()}


class MeasuredCard(_Table):
    """What we measured ourselves on such a card."""

    memory_gib: Amount  # that PyTorch sees
    bandwidth: Amount
    matmul: Amount
    source: str


class Card(_Table):
    """A GPU, as cards.toml describes it."""

    seen_as: Names  # parts of PyTorch's name for it
    memory_gib: Amount
    bandwidth: Amount  # bytes a second
    matmul: Amount  # flop a second, of 16-bit numbers
    bfloat16: bool
    nvlink: bool  # between the cards of one machine
    source: str
    measured: MeasuredCard | None = None


class CardShares(_Table):
    """What a long job reaches: of a published number, and between two cards in bytes a second."""

    matmul: Amount
    bandwidth: Amount
    memory: Amount
    nvlink: Amount
    host_link: Amount


class Cards(_Table):
    """cards.toml has the GPUs of which something is known."""

    shares: CardShares
    cards: dict[str, Card]

    @classmethod
    def load(cls, file: Path = CARDS) -> Cards:
        return cls.model_validate(tomllib.loads(file.read_text(encoding="utf-8")))

    def seen_as(self, name: str) -> str | None:
        """Return our name of the card that PyTorch calls `name`; None if it is not listed.

        A part is whole words: an L40S is no L4, and an A100 no A10.
        """
        parts = ((part, key) for key, card in self.cards.items() for part in card.seen_as)
        return next((key for part, key in parts if re.search(rf"\b{re.escape(part)}\b", name)), None)


Words = Annotated[tuple[Annotated[str, Field(min_length=1)], ...], Field(strict=False)]
# `$HOME` is that of the box's user.
Paths = Annotated[tuple[Annotated[str, Field(pattern=r"^(/|\$HOME(/|$))")], ...], Field(strict=False)]
Fate = Literal["kept", "lost", "unknown"]


class Signs(_Table):
    """Signs of a provider: a box that has any one of these is recognised."""

    hostnames: Words = ()  # regular expressions for the whole name
    # Groups of variables of process 1; all names of a group must be there.
    variables: Annotated[tuple[Names, ...], Field(strict=False)] = ()
    files: Paths = ()


class KeptFolder(_Table):
    """What becomes of a folder when the box is stopped, and when it is given back."""

    path: str
    on_stop: Fate
    on_release: Fate
    days: Count | None = None  # how long it is kept after a stop; None: no limit is known
    note: str = ""


class StopRules(_Table):
    """What a stop means for the meter and for the data."""

    meter: Literal["off", "on", "unknown"]  # for the machine with its GPUs, once it is stopped
    disk: Literal["free", "paid", "unknown"]  # while it is stopped
    disk_note: str = ""
    deadline_days: Count | None = None  # from the stop until the data is released
    deadline_note: str = ""  # what else ends it
    restart_note: str = ""  # whether it comes back as it was
    command: Words = ()  # inside the box; () where there is none that stops the meter
    # Variables of process 1 that the command needs and an SSH session does not have.
    variables: Words = ()
    by_hand: str  # where a person stops it instead


class Provider(_Table):
    """providers/NAME.toml has what is known about a provider of rented boxes.

    It holds only facts, and code decides by them, not by the name.
    """

    name: str
    title: str
    # What its boxes usually are; the probe looks for itself.
    sort: Literal["container", "machine", "unknown"]
    signs: Signs = Signs()
    data_folders: Paths  # our folder is made in the first of these that exists
    folders: Annotated[tuple[KeptFolder, ...], Field(strict=False)] = ()
    stop: StopRules
    # Files that its shells read and `ssh BOX COMMAND` does not. They are sourced before a job, if
    # they exist.
    env_files: Paths = ()
    # Files that set a proxy for servers abroad. They are sourced for that alone, never together
    # with a mirror.
    proxy_files: Paths = ()
    mirror: str = "default"  # the advised file of mirrors/
    pythons: Paths = ()  # interpreters that a non-interactive shell does not find
    condas: Paths = ()
    notes: Words = ()  # for a person

    @classmethod
    def load(cls, file: Path) -> Provider:
        return cls.model_validate({"name": file.stem, **tomllib.loads(file.read_text(encoding="utf-8"))})

    @classmethod
    def load_all(cls, folder: Path = PROVIDERS) -> dict[str, Provider]:
        """Load all providers by name; `generic` is for a box about which nothing is known."""
        return {file.stem: cls.load(file) for file in sorted(folder.glob("*.toml"))}
