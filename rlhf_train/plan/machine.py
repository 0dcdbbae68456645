"""This module finds out the facts of this machine that jobs/fitness.py judges.

What cannot be found out stays unknown, and nothing is written.
"""

from __future__ import annotations

import importlib.util
import os
import re
import stat
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from jobs.fitness import FitnessFacts, Folder, Gpu, Holder, wants_gpu
from jobs.run_dir import RunDir
from jobs.spec import Job, Scratch
from rlhf_train.host import cpu_flags, cpu_text, read
from rlhf_train.plan.placement import Machine

DRIVER = Path("/proc/driver/nvidia/version")  # the host's; containers see it too, even without a GPU
SHARED_MEMORY = Path("/dev/shm")
PROC = Path("/proc")
GPU_FILE = re.compile("/dev/nvidia[0-9]+")  # one for each card
NVIDIA_SMI_S = 20.0  # it hangs on some broken cards, and takes seconds without persistence mode


def facts_of(job: Job, run: RunDir, cache: Path, machine: Machine, environ: Mapping[str, str]) -> FitnessFacts:
    wish, runs = job.hardware, run_folder(run.path)
    models = [model for model in job.sources if not isinstance(model, Scratch)]
    facts = FitnessFacts(
        device=wish.device,
        ranks=len(machine.gpus) if wish.ranks == "auto" else wish.ranks,
        pretrained=bool(models),
        cuda=machine.cuda,
        visible_devices=environ.get("CUDA_VISIBLE_DEVICES"),
        cpu_flags=cpu_flags(cpu_text()),
        prebuilt_operators=prebuilt_operators(),
        uid=os.geteuid(),
        gid=os.getegid(),
        # The cache's disk is not checked: tokenised rows are small.
        folders=(runs, replace(folder(cache), free_bytes=None, free_inodes=None)),
        hub_cache=hub_cache(models, runs) if models else None,
    )
    return _with_gpus(facts, machine, environ) if wants_gpu(facts) else facts


def _with_gpus(facts: FitnessFacts, machine: Machine, environ: Mapping[str, str]) -> FitnessFacts:
    driver, cards = driver_version(read(DRIVER)), tuple(map(Gpu, machine.gpus, machine.capabilities)) or None
    if cards is None:
        listed, cards = nvidia_smi()
        driver = driver or listed  # WSL has no /proc/driver/nvidia
    # Without cards nvidia-smi has failed above, and might hang a second time.
    used, holders = gpu_memory() if cards else (None, ())
    return replace(
        facts,
        gpus=len(machine.gpus),
        gpu_error=machine.gpu_error,
        driver=driver,
        cards=cards,
        peer_access=machine.peer_access,
        gpu_used_bytes=used,
        gpu_holders=holders,
        shared_memory_bytes=_free_bytes(SHARED_MEMORY),
        shared_memory_used=environ.get("NCCL_SHM_DISABLE") != "1",
    )


def driver_version(text: str) -> str | None:
    """Find the driver's version in the text of /proc/driver/nvidia/version.

    Its first line is `NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.159.04  Release
    Build  (...)`, or has `x86_64 Kernel Module`.
    """
    found = re.search(r"^NVRM version:.*?\s([0-9]+(?:\.[0-9]+)+)\s", text, flags=re.MULTILINE)
    return found[1] if found else None


def nvidia_smi() -> tuple[str | None, tuple[Gpu, ...] | None]:
    """Ask nvidia-smi for (driver, cards); None where it does not answer."""
    # Drivers older than 2022 do not know compute_cap.
    for fields in ("driver_version,name,compute_cap", "driver_version,name"):
        answer = _run_nvidia_smi(f"--query-gpu={fields}", "--format=csv,noheader")
        if answer is None:
            return None, None
        if answer.returncode == 0:
            return listed_cards(answer.stdout)
    return None, None


def _run_nvidia_smi(*options: str) -> subprocess.CompletedProcess[str] | None:
    """Run nvidia-smi; None: it is not installed, or it hangs."""
    try:
        return subprocess.run(
            ["nvidia-smi", *options],
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=NVIDIA_SMI_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None


def listed_cards(text: str) -> tuple[str | None, tuple[Gpu, ...]]:
    """Parse nvidia-smi's list into (driver, cards).

    Its lines are `580.159.04, NVIDIA H200, 9.0`, the last part maybe left out or `[N/A]`; or
    `No devices were found`.
    """
    driver, cards = None, []
    for line in text.splitlines():
        if found := re.fullmatch(r"([0-9.]+), (.+?)(?:, ([0-9]+\.[0-9]+|\[.*\]))?", line.strip()):
            driver, name, capability = found.groups()
            cards.append(Gpu(name, None if capability is None or capability.startswith("[") else capability))
    return driver, tuple(cards)


def gpu_memory() -> tuple[tuple[int | None, ...] | None, tuple[Holder, ...]]:
    """Return (bytes in use on each card, the other processes that hold them).

    The bytes are None where nvidia-smi does not report them. Not by torch.cuda.mem_get_info: it
    makes a CUDA context, which holds memory of its own until the launcher ends.
    """
    cards = _run_nvidia_smi("--query-gpu=index,uuid,memory.used", "--format=csv,noheader,nounits")
    if cards is None or cards.returncode:
        return None, ()
    indexes, used = cards_in_use(cards.stdout)
    apps = _run_nvidia_smi("--query-compute-apps=gpu_uuid,pid,used_memory", "--format=csv,noheader,nounits")
    listed = listed_holders(apps.stdout, indexes) if apps and not apps.returncode else []
    # In a container nvidia-smi lists no processes, or lists the container's own by the host's pids
    # (NVIDIA/nvidia-docker#1483): these are found in the way of `fuser /dev/nvidia*`.
    unlisted = [Holder(None, pid) for pid in with_gpus_open() if pid not in {holder.pid for holder in listed}]
    others = [holder for holder in [*listed, *unlisted] if holder.pid != os.getpid()]
    return used, tuple(replace(holder, command=command_of(holder.pid)) for holder in others)


def cards_in_use(text: str) -> tuple[dict[str, int], tuple[int | None, ...]]:
    """Parse nvidia-smi's lines `0, GPU-1b2c..., 1024` (MiB, maybe `[N/A]`).

    Returns (index by UUID, bytes in use by index).
    """
    indexes, used = {}, {}
    for line in text.splitlines():
        if found := re.fullmatch(r"([0-9]+), (\S+), ([0-9]+|\[.*\])", line.strip()):
            indexes[found[2]] = int(found[1])
            used[int(found[1])] = _mebibytes(found[3])
    return indexes, tuple(used.get(index) for index in range(max(used, default=-1) + 1))


def listed_holders(text: str, indexes: Mapping[str, int]) -> list[Holder]:
    """Parse nvidia-smi's lines `GPU-1b2c..., 4321, 1024` (MiB, maybe `[N/A]`).

    Lines without a pid are left out.
    """
    matches = (re.fullmatch(r"(\S+), ([0-9]+), ([0-9]+|\[.*\])", line.strip()) for line in text.splitlines())
    return [Holder(indexes.get(match[1]), int(match[2]), _mebibytes(match[3])) for match in matches if match]


def _mebibytes(text: str) -> int | None:
    return int(text) * 2**20 if text.isdecimal() else None


def with_gpus_open() -> list[int]:
    """List the processes of this container that have a card open.

    For root these are all processes, for others those of the same user.
    """
    pids = sorted(int(entry.name) for entry in PROC.glob("[0-9]*"))
    return [pid for pid in pids if any(map(GPU_FILE.fullmatch, _open_files(pid)))]


def _open_files(pid: int) -> Iterator[str]:
    with suppress(OSError):  # another user's process, or gone
        for file in (PROC / str(pid) / "fd").iterdir():
            with suppress(OSError):  # closed meanwhile
                yield str(file.readlink())


def command_of(pid: int) -> str:
    """Return `python -m rlhf_train.worker`; "" if the process cannot be seen from here."""
    return read(PROC / str(pid) / "cmdline").replace("\0", " ").strip()


def prebuilt_operators() -> tuple[str, ...]:
    """List DeepSpeed's operators that were compiled when it was installed.

    They are files like `deepspeed/ops/adam/cpu_adam_op.cpython-310-....so`. DeepSpeed is not
    imported: that takes seconds.
    """
    package = importlib.util.find_spec("deepspeed")
    places = package.submodule_search_locations if package else None
    files = (file for place in places or () for file in Path(place, "ops").glob("*/*_op*.so"))
    return tuple(sorted(file.name.split("_op.")[0] for file in files))


def folder(path: Path) -> Folder:
    """Describe `path`, or the folder where it would be made."""
    found, missing, hidden = path, "", False
    while True:
        try:
            is_folder = stat.S_ISDIR(found.stat().st_mode)
            break
        except (FileNotFoundError, NotADirectoryError):
            missing = str(found)
        except PermissionError:  # its parent cannot be read
            hidden = True
        except OSError:  # a name too long, a loop of links
            return Folder(str(path), str(path), writable=False)
        if found == found.parent:
            return Folder(str(path), str(found), writable=False)
        found = found.parent
    try:
        room = os.statvfs(found)
    except OSError:
        return Folder(str(path), str(found), missing, is_folder)
    return Folder(
        str(path),
        str(found),
        missing,
        is_folder,
        writable=_may_write(found),
        read_only=bool(room.f_flag & os.ST_RDONLY),
        uid=None if hidden else found.stat().st_uid,
        free_bytes=room.f_bavail * room.f_frsize,
        free_inodes=room.f_favail if room.f_files else None,  # Btrfs and others have no such number
    )


def run_folder(path: Path) -> Folder:
    """Describe the run's folder; before it is made, the folder where runs are kept.

    If a file of another user in our own folder cannot be written, the folder counts as not
    writable: a container that ran as root leaves such files.
    """
    seen = folder(path)
    if seen.missing:
        return folder(path.parent)
    if seen.is_folder and seen.writable:
        with suppress(OSError):
            for inside in sorted(path.iterdir()):
                if inside.lstat().st_uid != os.geteuid() and not _may_write(inside):
                    return replace(seen, found=str(inside), writable=False, uid=inside.lstat().st_uid)
    return seen


def hub_cache(models: Sequence[str], runs: Folder) -> Folder | None:
    """Describe the folder that these models will be fetched to, if its disk has to be checked.

    None: the models are on this machine already, or go to the disk of the runs, which is checked
    for both.
    """
    from rlhf_train.data import hub  # jobs without such models do not need it

    with suppress(OSError):  # a cache that cannot be read is reported when it is used
        cache = folder(Path(hub.constants.HF_HUB_CACHE))
        if not all(map(hub.is_here, models)) and Path(cache.found).stat().st_dev != Path(runs.found).stat().st_dev:
            return cache
    return None


def _may_write(path: Path) -> bool:
    mode = os.W_OK | os.X_OK if path.is_dir() else os.W_OK
    return os.access(path, mode, effective_ids=os.access in os.supports_effective_ids)


def _free_bytes(path: Path) -> int | None:
    try:
        room = os.statvfs(path)
    except OSError:
        return None
    return room.f_bavail * room.f_frsize
