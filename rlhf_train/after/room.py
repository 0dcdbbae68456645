"""Choose where a model to talk to is held: on a GPU, in main memory, or nowhere.

While a run trains on this machine, its memory comes first. It is found by its lock: in the folders
where runs of this machine are known to be, and in any other whose process is seen. Rollouts take
what is free on the run's GPUs, so chat takes none of that: only a GPU that the run does not use. In
main memory chat leaves as much as the run holds now, since a later step has more networks.
"""

from __future__ import annotations

import fcntl
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from env.settings import OUR_FOLDER, Provider
from jobs.errors import ExitCode, ToolkitError
from jobs.events import read_events
from jobs.formatting import size
from jobs.run_dir import RunDir
from rlhf_train.data import hub
from rlhf_train.disk import read_json
from rlhf_train.host import free_memory_bytes, holders, open_files, resident_bytes
from rlhf_train.plan.machine import gpu_memory

CHECKOUT = Path(__file__).parents[2]
SPARE_BYTES = 2**30  # for libraries, the KV cache of one conversation, and what a forward pass needs
LEAST_RESERVE_BYTES = 2 * 2**30  # left to a run that trains, however little it holds now
EMPTY_GPU_BYTES = 2**30  # a GPU with less in use has no job: the driver's own tables are smaller
ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class Training:
    """A run that trains on this machine now."""

    name: str
    ranks: int | None  # on GPUs 0 to ranks - 1; 0: on the CPU; None: not known yet
    held_bytes: int | None  # of main memory; None: its processes are not seen from here


@dataclass(frozen=True)
class Weights:
    """How large a model is before it is loaded, and the dtype that it was saved in."""

    bytes_saved: int
    dtype: str

    def bytes_in(self, dtype: str) -> int:
        return self.bytes_saved // ITEM_BYTES[self.dtype] * ITEM_BYTES[dtype]


@dataclass(frozen=True)
class Room:
    device: torch.device
    dtype: torch.dtype
    note: str = ""  # why it is not where one would expect it


def find_room(models: Sequence[str], runs: Sequence[Path]) -> Room:
    """Choose the device for models that are held together. Raises ToolkitError: no room.

    runs: the folders in which chat looks for runs to talk to.
    """
    weights = [weights_of(model) for model in models]
    trainings = trainings_in([*runs, *folders_of_this_machine()])
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    used = gpu_memory()[0] if gpus and any(training.ranks != 0 for training in trainings) else None
    may_use = free_gpus(gpus, trainings, used)
    # Not by torch's is_bf16_supported: it may make a tensor on the first GPU, which a run may have.
    has_bfloat16 = bool(may_use) and all(torch.cuda.get_device_capability(gpu)[0] >= 8 for gpu in may_use)
    name = dtype_on_gpu({each.dtype for each in weights}, has_bfloat16)
    bytes_on_gpu = sum(each.bytes_in(name) for each in weights) + SPARE_BYTES
    for gpu in may_use:
        if free_on_gpu(gpu) >= bytes_on_gpu:
            torch.cuda.set_device(gpu)  # else libraries take some of the first GPU, too
            check_memory(bytes_on_gpu, free_memory_bytes(), trainings)  # the weights pass through it
            return Room(torch.device("cuda", gpu), getattr(torch, name))
    bytes_in_memory = sum(each.bytes_in("float32") for each in weights) + SPARE_BYTES
    note = ""
    if gpus:
        on_gpus = [training.name for training in trainings if training.ranks != 0]
        busy = f"run `{on_gpus[0]}` trains on the GPU" if len(may_use) < gpus else ""
        note = f"on the CPU: {busy or f'no GPU has {size(bytes_on_gpu)} free'}"
    check_memory(bytes_in_memory, free_memory_bytes(), trainings)
    return Room(torch.device("cpu"), torch.float32, note)


def dtype_on_gpu(saved: set[str], has_bfloat16: bool) -> str:
    """Return the dtype on a GPU: the saved one, which was trained; float32 for several."""
    name = next(iter(saved)) if len(saved) == 1 else "float32"
    return "float32" if name == "bfloat16" and not has_bfloat16 else name


def free_gpus(count: int, trainings: Sequence[Training], used: Sequence[int | None] | None) -> list[int]:
    """List the GPUs that no run can need.

    used: bytes in use on each, by nvidia-smi; it may number them otherwise than the run does, so
    next to a run only an empty GPU is taken.
    """
    on_gpus = [training for training in trainings if training.ranks != 0]
    if not on_gpus:
        return list(range(count))
    first = max(count if training.ranks is None else training.ranks for training in on_gpus)
    in_use = list(used or [])
    return [
        gpu
        for gpu in range(first, count)
        if gpu < len(in_use) and (held := in_use[gpu]) is not None and held < EMPTY_GPU_BYTES
    ]


def free_on_gpu(gpu: int) -> int:
    """Return the bytes that are free on a GPU, whoever holds the others.

    0: other processes leave no room even to ask, which takes some hundred MB, or the GPU is one
    process's alone.
    """
    try:
        return int(torch.cuda.mem_get_info(gpu)[0])
    except RuntimeError:
        return 0


def check_memory(needed: int, free: int, trainings: Sequence[Training]) -> None:
    """Raise ToolkitError if main memory has no room for chat, next to the runs that train.

    free: 0: not known.
    """
    reserve = sum(reserve_of(training, free) for training in trainings)
    if not free or needed + reserve <= free:
        return
    if not trainings:
        raise ToolkitError(
            "there is no room for the model in memory",
            why=f"it needs {size(needed)}, and {size(free)} are free",
            hint="end other programs, or talk to a smaller model",
            exit_code=ExitCode.UNFIT,
        )
    names = " and ".join(f"`{training.name}`" for training in trainings)
    raise ToolkitError(
        f"there is no room to chat while run {names} trains here",
        why=f"chat needs {size(needed)}, the run may still need {size(reserve)}, and {size(free)} are free",
        hint="wait until the run has ended; or chat on another machine with a copy of the model's folder",
        exit_code=ExitCode.UNFIT,
    )


def reserve_of(training: Training, free: int) -> int:
    """Return the bytes of main memory that a run may still take.

    It is what the run holds now, since step 3 has two to four networks where step 1 has one; or
    half of what is free, where the run's processes are not seen.
    """
    return max(LEAST_RESERVE_BYTES, free // 2 if training.held_bytes is None else training.held_bytes)


def folders_of_this_machine() -> list[Path]:
    """Return the folders where runs of this machine are, if it has any: ./runs, and those of a box.

    On a box our code lies in `code/KEY`, next to `runs`; and a checkout of one's own may be there
    as well as what was deployed.
    """
    homes = {folder for provider in Provider.load_all().values() for folder in provider.data_folders}
    deployed = [CHECKOUT.parents[1] / "runs"] if CHECKOUT.parent.name == "code" else []
    boxes = [Path(home.replace("$HOME", str(Path.home())), OUR_FOLDER, "runs") for home in sorted(homes)]
    return [Path("runs"), *deployed, *boxes]


def trainings_in(folders: Sequence[Path]) -> list[Training]:
    """List the runs that train now: those of the folders, and those whose process is seen."""
    runs = []
    for folder in folders:
        with suppress(OSError):  # it is not there, or another user's
            runs += [RunDir(path) for path in sorted(folder.iterdir())]
    runs += [RunDir(lock.parents[1]) for lock in open_files(f"/{RunDir(Path()).lock}")]
    # One run may be found by several paths.
    found = {run.lock.resolve(): run for run in reversed(runs) if is_training(run)}
    return [_training(run) for run in reversed(found.values())]


def is_training(run: RunDir) -> bool:
    """Return whether a process holds the run's lock, here or in a container of this machine."""
    try:
        with run.lock.open() as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # no such file; or a file system without locks, where nobody can tell
        pass
    return False


def _training(run: RunDir) -> Training:
    plans = [event for event in read_events(run.events)[0] if event["kind"] == "plan"]
    ranks = None
    if plans:
        ranks = int(plans[-1].get("ranks", 1)) if str(plans[-1].get("device")).startswith("cuda") else 0
    processes = [process for process, _ in holders(run.lock)]
    return Training(run.name, ranks, sum(map(resident_bytes, processes)) if processes else None)


def weights_of(model: str) -> Weights:
    """Return the size of a model's weights; a hub model is fetched first. Raises ToolkitError."""
    folder = Path(hub.model(model, hub.model_files))
    config: dict[str, Any] = read_json(folder / "config.json") or {}
    dtype = str(config.get("dtype") or config.get("torch_dtype") or "float32").removeprefix("torch.")
    names = [str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()]
    total = 0
    for name in hub.weight_files(names):
        with suppress(OSError):
            total += (folder / name).stat().st_size
    return Weights(total, dtype if dtype in ITEM_BYTES else "float32")
