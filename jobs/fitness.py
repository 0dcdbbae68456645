"""The checks whether a machine is fit for a job: facts in, findings out, each with what to do.

The facts are plain values. rlhf_train/plan/machine.py collects them at each start, and a shell
probe collects them on a rented box. A fact that is None is not known, and what depends on it is not
judged. The thresholds are in env/limits.toml.
"""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import takewhile
from typing import Literal

from env.settings import CudaLimits, Limits
from jobs.errors import ExitCode, ToolkitError
from jobs.formatting import one_line, plural, size

GIB = 2**30
ON_PURPOSE = "to train on the CPU on purpose, --set hardware.device=cpu"


@dataclass(frozen=True)
class Gpu:
    name: str
    capability: str | None = None  # compute capability: "8.9"


@dataclass(frozen=True)
class Holder:
    """A process that holds GPU memory, or may hold it, since it has the GPUs open."""

    gpu: int | None  # nvidia-smi's index; None: it is not known on which GPU, or whether at all
    pid: int
    used_bytes: int | None = None
    # "" if the process cannot be seen from here: in a container, nvidia-smi may show pids of the
    # host.
    command: str = ""


@dataclass(frozen=True)
class Folder:
    """A folder that the job will write to, which need not exist yet."""

    path: str  # as the user knows it, maybe relative
    found: str  # the folder, or its nearest parent that exists, or a part of it that cannot be written
    missing: str = ""  # the first folder of the path that does not exist; "" if none
    is_folder: bool = True  # whether `found` is a folder
    writable: bool | None = None
    read_only: bool | None = None  # the file system
    uid: int | None = None  # of `found`
    free_bytes: int | None = None
    free_inodes: int | None = None


@dataclass(frozen=True)
class FitnessFacts:
    device: Literal["auto", "cpu", "cuda"] = "auto"  # hardware.device
    ranks: int | None = None  # how many the job would have on GPUs
    # The job names models, whose weights may be gigabytes; other models start from a config.
    pretrained: bool = False
    cuda: str | None = None  # the version for which PyTorch is built; None: not known, or only for the CPU
    gpus: int | None = None  # how many PyTorch sees
    gpu_error: str = ""  # PyTorch's message if it sees none
    visible_devices: str | None = None  # CUDA_VISIBLE_DEVICES
    driver: str | None = None  # the version of NVIDIA's driver that is loaded
    cards: tuple[Gpu, ...] | None = None  # those that PyTorch sees, else those of nvidia-smi
    peer_access: bool | None = None  # whether some GPU reaches another's memory
    peer_copies_wrong: bool = False  # a copy from one GPU to another was compared, and differed
    # Before the job begins, by nvidia-smi's index, hidden GPUs included.
    gpu_used_bytes: tuple[int | None, ...] | None = None
    gpu_holders: tuple[Holder, ...] = ()
    shared_memory_bytes: int | None = None  # free in /dev/shm
    shared_memory_used: bool = True  # NCCL_SHM_DISABLE is not 1
    cpu_flags: tuple[str, ...] | None = None
    prebuilt_operators: tuple[str, ...] = ()  # DeepSpeed's: cpu_adam, fused_adam
    uid: int | None = None  # ours
    gid: int | None = None
    folders: tuple[Folder, ...] = ()
    # Where models will be downloaded to; also None if there are none to download, or if it is on
    # the run's disk.
    hub_cache: Folder | None = None


@dataclass(frozen=True)
class Finding:
    level: Literal["unfit", "warning"]
    what: str
    todo: str

    def __str__(self) -> str:
        return one_line(f"{self.what}: {self.todo}")


def judge(facts: FitnessFacts, limits: Limits) -> list[Finding]:
    found: list[Finding] = []
    if wants_gpu(facts):
        found += _driver(facts, limits) or [
            *_no_gpu(facts),
            *_cards(facts, limits),
            *_gpu_memory(facts, limits),
            *_shared_memory(facts, limits),
        ]
    found += _cpu_operators(facts, limits)
    for folder in facts.folders:
        found += access(folder, facts) or _room(folder, facts, limits)
    found += _hub_room(facts.hub_cache, limits)
    return found


def error_of(findings: Iterable[Finding]) -> ToolkitError | None:
    """Return one error for all that makes the machine unfit; None if nothing does."""
    lines = [str(finding) for finding in findings if finding.level == "unfit"]
    if not lines:
        return None
    return ToolkitError("this machine is not fit for the job", why="\n".join(lines), exit_code=ExitCode.UNFIT)


def no_peer_access(facts: FitnessFacts, limits: Limits) -> str:
    """Return why NCCL must not use direct access between these GPUs; "" if NCCL may decide."""
    if facts.peer_copies_wrong:
        return "what one GPU writes into another's memory arrives changed"
    names, known_broken = [card.name for card in facts.cards or ()], limits.peer_access.broken_cards
    geforce = next((name for name in names if "GeForce" in name), "")
    broken = next((name for name in names if any(part in name for part in known_broken)), "")
    is_mended = facts.driver is not None and version(facts.driver) >= version(limits.peer_access.mended_driver)
    if geforce and facts.peer_access is False:
        return f"{geforce} has no peer access here"
    if "GeForce" in broken and not is_mended:
        return f"the peer access that driver {facts.driver or 'unknown'} offers on {broken} does not work"
    return ""


def version(text: str) -> tuple[int, ...]:
    """Convert a version to numbers: `450.80.02` -> (450, 80, 2)."""
    return tuple(int(part) for part in text.split("."))


def wants_gpu(facts: FitnessFacts) -> bool:
    """Tell whether training needs a GPU.

    With `auto`, a PyTorch that was built for CUDA needs one, unless GPUs are hidden on purpose.
    """
    hidden = facts.visible_devices is not None and facts.visible_devices.strip() in ("", "-1")
    return facts.device == "cuda" or (facts.device == "auto" and facts.cuda is not None and not hidden)


def _cuda_limits(facts: FitnessFacts, limits: Limits) -> CudaLimits | None:
    if facts.cuda is None:
        return None
    wanted = version(facts.cuda)
    known = [name for name in limits.cuda if version(name)[0] == wanted[0] and version(name) <= wanted]
    return limits.cuda[max(known, key=version)] if known else None


def _driver(facts: FitnessFacts, limits: Limits) -> list[Finding]:
    wanted = _cuda_limits(facts, limits)
    if wanted is None or facts.driver is None or facts.gpus or version(facts.driver) >= version(wanted.driver_min):
        # If PyTorch sees a GPU, an older driver works with NVIDIA's forward compatibility package.
        return []
    what = f"the NVIDIA driver {facts.driver} is too old for CUDA {facts.cuda}"
    least = "" if wanted.driver_advised == wanted.driver_min else f" ({wanted.driver_min} at least)"
    todo = f"install driver {wanted.driver_advised} or newer{least} on the host, or take a box that has it"
    return [Finding("unfit", what, todo)]


def _no_gpu(facts: FitnessFacts) -> Iterator[Finding]:
    if facts.cuda is None or facts.gpus or (facts.gpus is None and facts.cards != ()):
        return
    what = "PyTorch sees no GPU" if facts.gpus == 0 else "there is no GPU"
    if facts.visible_devices is not None:
        what += f" with CUDA_VISIBLE_DEVICES={shlex.quote(facts.visible_devices)}"
        todo = "unset it, or name cards that `nvidia-smi -L` lists"
    elif facts.cards:
        what += f", though nvidia-smi lists {plural(len(facts.cards), 'cards')} ({facts.cards[0].name})"
        what += f"; it says {facts.gpu_error}" if facts.gpu_error else ""
        todo = "start the box again, or take another (on boxes with NVSwitch, nvidia-fabricmanager must run)"
    elif facts.driver is not None:
        what += f", though the NVIDIA driver {facts.driver} is loaded"
        todo = "give the container the GPU (`docker run --gpus all`, or in compose a reservation of `driver: nvidia`;"
        todo += " both need nvidia-container-toolkit on the host)"
    else:
        what += ", and no NVIDIA driver is loaded"
        todo = "take a box on which `nvidia-smi` lists a card, or install the driver"
    yield Finding("unfit", what, f"{todo}; {ON_PURPOSE}")


def _cards(facts: FitnessFacts, limits: Limits) -> Iterator[Finding]:
    wanted = _cuda_limits(facts, limits)
    if wanted is None:
        return
    for card in dict.fromkeys(facts.cards or ()):
        what = f"{card.name} (compute capability {card.capability})"
        if card.capability is None:
            continue
        if wanted.capability_max and version(card.capability) > version(wanted.capability_max):
            what += f" is too new for CUDA {facts.cuda}, which supports up to {wanted.capability_max}"
            todo = "take a box with an older card, or flavour cu130 of the image (docs/container.md)"
            yield Finding("unfit", what, todo)
        if wanted.capability_min and version(card.capability) < version(wanted.capability_min):
            what += f" is too old for this build for CUDA {facts.cuda}, which needs at least {wanted.capability_min}"
            yield Finding("unfit", what, f"take a box with a newer card; {ON_PURPOSE}")


def _gpu_memory(facts: FitnessFacts, limits: Limits) -> Iterator[Finding]:
    for gpu, used in enumerate(facts.gpu_used_bytes or ()):
        if used is None or used <= limits.gpu_memory.used_max_bytes or not _is_visible(gpu, facts.visible_devices):
            continue
        listed = [holder for holder in facts.gpu_holders if holder.gpu == gpu]
        sure = [holder for holder in listed if holder.command]
        seen = sure or [holder for holder in facts.gpu_holders if holder.gpu is None and holder.command]
        what = f"GPU {gpu} has {size(used)} in use before the job begins, "
        if seen:
            what += f"{'by' if sure else 'maybe by'} {', '.join(map(_named, seen))}"
        elif listed:
            what += f"by {', '.join(map(_named, listed))}, which cannot be seen from here"
        else:
            what += "by no process that can be seen from here"
        yield Finding("warning", what, _freed(seen))


def _freed(seen: list[Holder]) -> str:
    ways = []
    ours = " ".join(str(holder.pid) for holder in seen if "rlhf_train" in holder.command)
    if ours:
        # A rank answers SIGTERM with a checkpoint; one that waits for others, or in a CUDA call,
        # does not answer.
        ways.append(f"`kill {ours}` if an earlier run left it behind (`kill -9 {ours}` if it stays)")
    if not seen:
        ways.append(
            "look on the host with `nvidia-smi`: it is outside this container (or another user's, or the desktop)"
        )
    wait = "wait for its end, or choose another card with CUDA_VISIBLE_DEVICES"
    return "; ".join([*ways, f"else {wait}" if ours else wait])


def _named(holder: Holder) -> str:
    """Describe a process: `pid 4321 (python -m rlhf_train.worker, 41 GB)`."""
    program, space, rest = holder.command.partition(" ")
    command = program.rpartition("/")[2] + space + rest
    about = [command if len(command) <= 60 else f"{command[:60]}..."] if command else []
    about += [] if holder.used_bytes is None else [size(holder.used_bytes)]
    return f"pid {holder.pid}" + (f" ({', '.join(about)})" if about else "")


def _is_visible(gpu: int, visible_devices: str | None) -> bool:
    """Tell whether CUDA_VISIBLE_DEVICES shows this GPU.

    CUDA reads the list up to the first entry that is not a number. For UUIDs (`GPU-...`, `MIG-...`)
    the index is not known, so the GPU counts as visible.
    """
    if visible_devices is None or re.search("[A-Za-z]", visible_devices):
        return True
    return gpu in map(int, takewhile(str.isdecimal, map(str.strip, visible_devices.split(","))))


def _shared_memory(facts: FitnessFacts, limits: Limits) -> Iterator[Finding]:
    if facts.ranks is None or facts.ranks < 2 or facts.shared_memory_bytes is None or not facts.shared_memory_used:
        return
    needed = facts.ranks * limits.shared_memory.bytes_per_rank
    enough = f"{math.ceil(needed / GIB)}g"
    if facts.shared_memory_bytes < needed:
        free = _mib(facts.shared_memory_bytes)
        yield Finding(
            "unfit",
            f"/dev/shm has {free} free, and NCCL needs {_mib(needed)} for {facts.ranks} ranks",
            f"start the container with --shm-size={enough} (docker compose: RLHF_SHM={enough}) or --ipc=host, "
            "and remove what a killed run left there (/dev/shm/nccl-*); "
            "if it cannot be raised, set NCCL_SHM_DISABLE=1, which is slower",
        )


def _cpu_operators(facts: FitnessFacts, limits: Limits) -> Iterator[Finding]:
    operators = [name for name in facts.prebuilt_operators if name in limits.cpu_operators.names]
    if not operators or facts.cpu_flags is None:
        return
    lacking = [flag for flag in limits.cpu_operators.flags if flag not in facts.cpu_flags]
    if lacking:
        # Only a warning: no job uses these operators yet (they are for optimizers on the CPU).
        what = f"this CPU lacks {', '.join(lacking)}, for which DeepSpeed's {', '.join(operators)} was compiled"
        todo = "take a box with a newer CPU before you offload the optimizer to it; all else runs"
        yield Finding("warning", what, todo)


def access(
    folder: Folder, facts: FitnessFacts, *, elsewhere: str = "choose another --output-dir, or mend the path"
) -> list[Finding]:
    """Say why a folder takes no files, with the command that mends it.

    elsewhere: what else to do, where that command may be out of reach.
    """
    path, found = shlex.quote(folder.path), shlex.quote(folder.found)
    if not folder.is_folder:
        return [Finding("unfit", f"the folder {path} cannot be made, since {found} is a file", elsewhere)]
    if folder.read_only:
        return [Finding("unfit", f"{found} is on a read-only file system", f"mount it writable, or {elsewhere}")]
    if folder.writable is not False:
        return []
    if folder.uid is None or facts.uid is None or facts.gid is None:
        return [Finding("unfit", f"{found} cannot be written", elsewhere)]
    target = shlex.quote(folder.missing) if folder.missing else path
    make = f"sudo mkdir -p {path} && " if folder.missing else ""
    if folder.uid != facts.uid:
        what = f"{found} belongs to uid {folder.uid}, and uid {facts.uid} may not write to it"
        return [Finding("unfit", what, f"{make}sudo chown -R {facts.uid}:{facts.gid} {target}")]
    return [Finding("unfit", f"{found} is write-protected", f"chmod -R u+rwX {found if folder.missing else target}")]


def _room(folder: Folder, facts: FitnessFacts, limits: Limits) -> Iterator[Finding]:
    found = shlex.quote(folder.found)
    if folder.free_bytes is not None and folder.free_bytes < limits.disk.bytes_min:
        what = f"{size(folder.free_bytes)} are free at {found}, and a run needs {size(limits.disk.bytes_min)} at least"
        yield Finding("unfit", what, "make room, or choose an --output-dir on a larger disk")
    elif folder.free_bytes is not None and facts.pretrained and folder.free_bytes < limits.disk.bytes_advised:
        what = f"only {size(folder.free_bytes)} are free at {found}"
        what += f", and a run of OPT-1.3b writes about {size(limits.disk.bytes_advised)}"
        yield Finding("warning", what, "see what this job needs with --dry-run, and make room")
    if folder.free_inodes is not None and folder.free_inodes < limits.disk.inodes_min:
        what = f"{plural(folder.free_inodes, 'inodes')} are free at {found}"
        what += f", and a run needs {limits.disk.inodes_min} at least"
        where = "`df -i` and `du --inodes` show where"
        yield Finding("unfit", what, f"remove many small files ({where}), or choose an --output-dir on another disk")


def _hub_room(folder: Folder | None, limits: Limits) -> Iterator[Finding]:
    if folder is not None and folder.free_bytes is not None and folder.free_bytes < limits.hub.bytes_advised:
        what = f"only {size(folder.free_bytes)} are free at {shlex.quote(folder.found)}, where models of the hub are"
        what += f" kept, and those of OPT-1.3b have about {size(limits.hub.bytes_advised)}"
        yield Finding("warning", what, "make room, or choose another HF_HOME")


def _mib(size_bytes: int) -> str:
    return f"{size_bytes // 2**20} MiB"
