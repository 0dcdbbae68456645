"""Checkpoints inside a step: all that it goes on from, so that nothing is lost and nothing is done twice.

A checkpoint is the state after a whole update: weights, optimizer and loss scale as whole tensors by parameter (any number
of ranks and any ZeRO stage reads them), the numbers of the step's loop, every random state. It is written beside, synced,
hashed, renamed and marked last; while it is written, training goes on, if the memory for a copy is there.

Where we differ from DeepSpeed's own checkpoints: those are partitions, one file a rank, that another number of ranks reads
only after a conversion which needs the room of a second checkpoint.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import os
import random
import shutil
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from jobs.errors import ExitCode, ToolkitError, system_error
from jobs.events import Checkpoint, Progress, Warning
from jobs.formatting import plural, size
from jobs.run_dir import StepDir
from rlhf_train.disk import read_json, rename, room, size_of, sync, write_json
from rlhf_train.host import free_memory_bytes

if TYPE_CHECKING:
    from rlhf_train.engine.deepspeed_engine import Engine
    from rlhf_train.steps.context import Session

SCHEMA = 1
SHARD_BYTES = 2**28  # tensors are put into files of about this size,
WRITERS = 3  # so many at a time
MOST_COST = 0.01  # of the training time that saving by the clock may take
COPIED_A_SECOND = 1.2e9  # bytes from the GPU into new memory; seen: 1.3e9 to 3e9 (one H200, OPT-1.3b's shape)
FILES = 64  # inodes that a checkpoint may need besides those of its shards, and a model in all
# Updates left out because of numbers that are not finite: so many in a row, or in a step, are no accident any more.
MOST_SKIPPED_IN_A_ROW, MOST_SKIPPED = 5, 50
PARTS = {1: "sft", 2: "reward", 3: "ppo"}


class Part(Protocol):
    """What has state of its own: an Engine, an Ema."""

    intact: bool  # false while an update is half made

    def numbers(self) -> dict[str, Any]: ...
    def tensors(self) -> Iterator[tuple[str, Tensor]]: ...
    def size_bytes(self) -> int: ...
    def restore(self, tensor: Callable[[str], Tensor], numbers: Mapping[str, Any]) -> None: ...


# --- on disk -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Saved:
    """A checkpoint that is complete on disk."""

    path: Path

    @cached_property
    def state(self) -> dict[str, Any]:
        return json.loads((self.path / "state.json").read_text(encoding="utf-8"))

    @property
    def update(self) -> int:
        return self.state["update"]

    @cached_property
    def _files(self) -> dict[str, Any]:
        """By the name of a tensor: the open file that it is in."""
        opened = [safe_open(str(file), "pt") for file in sorted(self.path.glob("*.safetensors"))]
        return {name: file for file in opened for name in file.keys()}  # noqa: SIM118 (not a dict)

    def tensor(self, name: str) -> Tensor:
        return self._files[name].get_tensor(name)

    def tensors(self, prefix: str) -> dict[str, Tensor]:
        """Copies of those named `prefix/...`, by the rest of their names."""
        return {name.removeprefix(f"{prefix}/"): self.tensor(name).clone() for name in self._files if name.startswith(f"{prefix}/")}

    def close(self) -> None:
        """Let go of the files: as long as they are mapped, their room is not free when they are removed."""
        self.__dict__.pop("_files", None)


def latest(
    step: StepDir, complain: Callable[[str], None], inputs: Mapping[str, str] | None = None, beat: Callable[[], None] = lambda: None
) -> Saved | None:
    """The newest checkpoint that was made from `inputs` (None: any) and whose every file is as it was written. Others are passed over, and
    complained of if they had been complete.
    """
    for folder in sorted(step.checkpoints.glob("update-*"), key=_update_of, reverse=True):
        marked = read_json(folder / "complete.json") if _update_of(folder) >= 0 else None
        if marked is None:
            continue
        damaged = [name for name, file in marked["files"].items() if _hash(folder / name, beat) != file["sha256"]]
        if damaged:
            complain(f"the checkpoint {folder} is damaged ({', '.join(damaged)}) and not used")
        elif inputs is not None and Saved(folder).state["inputs"] != inputs:
            complain(f"the checkpoint {folder} is not used: the steps before this one were done again since")
        else:
            return Saved(folder)
    return None


def _update_of(folder: Path) -> int:
    number = folder.name.removeprefix("update-")
    return int(number) if number.isdecimal() else -1


def _hash(path: Path, beat: Callable[[], None]) -> str:
    """sha256; "" if it cannot be read."""
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while block := file.read(2**22):
                digest.update(block)
                beat()
    except OSError:
        return ""
    return digest.hexdigest()


def write(folder: Path, tensors: Iterable[tuple[str, Tensor]], state: Mapping[str, Any], beat: Callable[[], None] = lambda: None) -> int:
    """A checkpoint in `folder`, complete or not there -> its size in bytes. Raises OSError, and then leaves nothing behind."""
    partial = folder.with_name(f"{folder.name}.partial")
    try:
        for stale in (partial, folder):
            shutil.rmtree(stale, ignore_errors=True)
        partial.mkdir(parents=True)
        files = _put_shards(partial, _shards(tensors), beat)
        files["state.json"] = _put(partial / "state.json", json.dumps(state).encode())
        sync(partial)
        rename(partial, folder)
        write_json(folder / "complete.json", {"schema": SCHEMA, "files": files})
    except OSError:
        for half in (partial, folder):
            shutil.rmtree(half, ignore_errors=True)
        raise
    return sum(file["size"] for file in files.values())


def _shards(tensors: Iterable[tuple[str, Tensor]]) -> Iterator[dict[str, Tensor]]:
    shard: dict[str, Tensor] = {}
    held = 0
    for name, tensor in tensors:
        shard[name] = tensor.to("cpu").contiguous()
        held += tensor.numel() * tensor.element_size()
        if held >= SHARD_BYTES:
            yield shard
            shard, held = {}, 0
    if shard:
        yield shard


def _put_shards(folder: Path, shards: Iterable[dict[str, Tensor]], beat: Callable[[], None]) -> dict[str, dict[str, Any]]:
    """A file each. Copying, hashing and syncing take turns in several threads, since each alone leaves the disk idle."""
    files: dict[str, dict[str, Any]] = {}
    written: deque[tuple[str, Future[dict[str, Any]]]] = deque()
    with ThreadPoolExecutor(WRITERS) as pool:
        for number, shard in enumerate(shards):
            beat()
            name = f"tensors-{number:03}.safetensors"
            written.append((name, pool.submit(lambda path, shard: _put(path, save(shard)), folder / name, shard)))
            if len(written) == WRITERS:  # no more in memory at once
                name, done = written.popleft()
                files[name] = done.result()
        files |= {name: done.result() for name, done in written}
    return files


def _put(path: Path, data: bytes) -> dict[str, Any]:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def remove_others(step: StepDir, keep: Path | None) -> None:
    """All in the folder of checkpoints but `keep`: older ones, and what a killed process left half-written."""
    for folder in step.checkpoints.glob("*"):
        if folder != keep:
            # Unmarked first: a removal that is cut short leaves nothing that looks complete.
            with suppress(OSError):
                (folder / "complete.json").unlink()
            shutil.rmtree(folder, ignore_errors=True)


# --- random states ---------------------------------------------------------------------------------------------------


def random_states(device: torch.device) -> dict[str, Any]:
    """Of every generator of this process: Python's, NumPy's, PyTorch's, the GPU's. Plain values."""
    version, numbers, gauss = random.getstate()
    of_numpy: Any = np.random.get_state()
    kind, keys, place, has_gauss, cached = of_numpy
    states = {
        "python": [version, list(numbers), gauss],
        "numpy": [kind, keys.tolist(), place, has_gauss, cached],
        "torch": _text(torch.get_rng_state()),
    }
    if device.type == "cuda":
        states["cuda"] = _text(torch.cuda.get_rng_state(device))
    return states


def set_random_states(states: Mapping[str, Any], device: torch.device) -> None:
    version, numbers, gauss = states["python"]
    random.setstate((version, tuple(numbers), gauss))
    kind, keys, place, has_gauss, cached = states["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), place, has_gauss, cached))
    torch.set_rng_state(_bytes(states["torch"]))
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(_bytes(states["cuda"]), device)


def _text(state: Tensor) -> str:
    return base64.b64encode(state.numpy().tobytes()).decode()


def _bytes(text: str) -> Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)


# --- numbers going wrong ---------------------------------------------------------------------------------------------


def diverged(step: int, update: int, why: str, last_good: str) -> ToolkitError:
    part = PARTS[step]
    hint = f"lower the learning rate or {part}.max_grad_norm, raise {part}.warmup_updates, or look for broken rows in the data"
    return ToolkitError(f"step {step} diverged at update {update}", why=why, hint=f"{hint}\n{last_good}", code=ExitCode.TRAINING)


def _named(saved_update: int | None) -> str:
    return "there is no checkpoint yet" if saved_update is None else f"the last good checkpoint is that of update {saved_update}"


def _free(free_bytes: int, inodes: int | None) -> str:
    counted = "" if inodes is None else f" and {plural(inodes, 'inodes')}"
    return f"{size(free_bytes)}{counted} are free"


# --- while a step trains ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Now:
    """The step after its last whole update."""

    update: int
    state: Mapping[str, Any]  # of the step's loop
    tensors: Mapping[str, Tensor]  # of the step's loop: a rollout that is not used up
    random: dict[str, Any]


class Keeper:
    """Makes a step's checkpoints, and goes on from the last: `resume` once, `after` each update, `close` when the model is saved. On all ranks."""

    def __init__(self, session: Session, step: int, updates: int, parts: Mapping[str, Part], *, rows: str, model_bytes: int) -> None:
        """parts: by name, what has state; rows: digest of those that the step learns from; model_bytes: of the model that it will write.
        Raises ToolkitError if the disk is too small.
        """
        self.session, self.step, self.updates, self.parts, self.rows = session, step, updates, parts, rows
        self.spec, self.folder = session.job.checkpoint, session.run.step(step)
        self.size_bytes = sum(part.size_bytes() for part in parts.values())
        self.inodes = FILES + self.size_bytes // SHARD_BYTES
        self.skipped_in_a_row = self.skipped_in_all = 0
        self.best_value: float | None = None
        self._best_update = 0
        self._now: _Now | None = None
        self._saved_update: int | None = None  # of the last one that is complete
        self._saved_at = time.monotonic()
        self._seconds: float | None = None  # that the last one took until it was on disk
        self._held_up_s = self.size_bytes / COPIED_A_SECOND  # that training waited for it; before there is one, a guess
        self._writing: threading.Thread | None = None
        self._writing_update: int | None = None
        self._tried: int = 0  # the update whose checkpoint was written, or not, last
        self._written: Checkpoint | Exception | None = None
        self._is_abandoned = self._has_warned = False
        self.loop_tensors: dict[str, Tensor] = {}  # of the step's loop, from the checkpoint
        session.stop.before_leaving, session.stop.finish_writing = self._leave, self._finish_writing
        session.pulse.is_patient = False  # all that may take long without a sign is over
        if session.world.is_main:
            remove_others(self.folder, session.saved.path if session.saved is not None else None)
            self._check_room(model_bytes)

    def _check_room(self, model_bytes: int) -> None:
        there = size_of(self.folder.checkpoints)
        best = 0 if self.spec.best_every_updates is None or self.folder.best.exists() else model_bytes
        needed = max(0, max(2 * self.size_bytes, self.size_bytes + model_bytes) + best - there)
        run = self.session.run.path
        free, inodes = room(run)
        self.session.doing(self.step, f"a checkpoint has {size(self.size_bytes)}: {size(needed)} are needed with the next one, {size(free)} free")
        if free < needed or (inodes is not None and inodes < 2 * self.inodes + FILES):
            raise ToolkitError(
                "the disk is too small for this step's checkpoints",
                why=f"{_free(free, inodes)} at {run}; a checkpoint has {size(self.size_bytes)},\n"
                f"a new one is written before the old one goes, and the model has {size(model_bytes)}",
                hint="make room, or choose an --output-dir on a larger disk; actor.lora makes checkpoints many times smaller",
                code=ExitCode.UNFIT,
            )

    def resume(self) -> dict[str, Any] | None:
        """The state of the step's loop, with all parts and random states restored; None: the step starts anew."""
        saved = self.session.saved
        if saved is None:
            return None
        self.session.doing(self.step, f"reading the checkpoint of update {saved.update}")
        rows = saved.state.get("rows", self.rows)  # older ones do not say
        if (saved.state["updates"], rows) != (self.updates, self.rows):
            counted = f"it has {plural(self.updates, 'updates')} now, and had {saved.state['updates']}"
            raise ToolkitError(
                f"the data of step {self.step} has changed since it was stopped",
                why="its rows, or the tokens that they become, are others" if saved.state["updates"] == self.updates else counted,
                hint=f"put the old rows back, or start the step anew: remove {self.folder.path}",
            )

        def read(name: str) -> Tensor:
            self.session.pulse.beat()  # a slow disk takes minutes for all of them
            return saved.tensor(name)

        for name, part in self.parts.items():
            part.restore(lambda key, name=name: read(f"{name}/{key}"), saved.state["parts"][name])  # type: ignore[misc]
        # With more ranks than before, the new ones take the others' states: no draw of ours depends on them (see rollout.py).
        states = saved.state["random"]
        set_random_states(states[self.session.world.rank % len(states)], self.session.world.device)
        self.skipped_in_a_row, self.skipped_in_all = saved.state["skipped"]
        self.best_value, self._best_update = saved.state["best"]
        self._saved_update, self._seconds = saved.update, saved.state["seconds"]
        self.loop_tensors = saved.tensors("loop")
        saved.close()
        self.session.pulse.has_trained = True
        return saved.state["loop"]

    def after(self, update: int, state: Mapping[str, Any], tensors: Mapping[str, Tensor] | None = None) -> None:
        """After every update, its events written: saves if it is time to. Raises Stopped if the run is to end, and what a save failed of."""
        self._now = _Now(update, state, tensors or {}, random_states(self.session.world.device))
        self.session.pulse.has_trained = True
        self.session.stop_if_asked()
        self._collect()
        if self.skipped_in_a_row == 0 and self._is_due(update):
            self._save()

    def _is_due(self, update: int) -> bool:
        if update == self.updates or (self.spec.every_updates and update % self.spec.every_updates == 0):
            return True
        if self.spec.every_minutes is None:
            return False
        pause_s = max(60 * self.spec.every_minutes, self._held_up_s / MOST_COST)
        is_time = self.session.world.is_main and self._writing is None and time.monotonic() - self._saved_at >= pause_s
        return self.session.world.any(is_time)

    def close(self) -> None:
        """The step's model is saved: a checkpoint that is still being written is worth nothing any more."""
        self._is_abandoned = True
        if self._writing is not None:
            self._writing.join()

    def _beat(self) -> None:
        """While a checkpoint is being written, before each file."""
        self.session.pulse.beat()
        if self._is_abandoned:
            raise InterruptedError

    # --- saving ---

    def _save(self, *, at_once: bool = False) -> None:
        """All ranks take part; rank 0 writes, beside the training if there is memory for a copy. Raises ToolkitError on rank 0."""
        assert self._now is not None
        now, start = self._now, time.perf_counter()
        self._wait()
        world = self.session.world
        self.session.pulse.beat(f"update {now.update}, checkpoint")
        randoms = world.gather(now.random)
        tensors = self._tensors(now)
        if not world.is_main:
            for _ in tensors:
                self.session.pulse.beat()
            return
        state = {
            "update": now.update,
            "updates": self.updates,
            "rows": self.rows,
            "loop": now.state,
            "parts": {name: part.numbers() for name, part in self.parts.items()},
            "random": randoms,
            "skipped": [self.skipped_in_a_row, self.skipped_in_all],
            "best": [self.best_value, self._best_update],
            "seconds": self._seconds,
            "inputs": self.session.inputs,
            "ranks": world.size,
        }
        aside = not at_once and free_memory_bytes() > 2 * self.size_bytes
        if aside:
            copies = [(name, tensor.to("cpu", copy=True)) for name, tensor in tensors]
            self._held_up_s = time.perf_counter() - start
            self._writing = threading.Thread(target=self._write, args=(now.update, copies, lambda: copies, state, start))
            self._writing_update = now.update
            self._writing.start()
        else:
            again = (lambda: self._tensors(now)) if world.size == 1 else None  # other ranks have given theirs
            self._write(now.update, tensors, again, state, start)
            for _ in tensors:  # after a failure: the other ranks go through all of them
                pass
            self._held_up_s = time.perf_counter() - start
            self._collect()

    def _tensors(self, now: _Now) -> Iterator[tuple[str, Tensor]]:
        for name, part in self.parts.items():
            for key, tensor in part.tensors():
                yield f"{name}/{key}", tensor
        for name, tensor in now.tensors.items():
            yield f"loop/{name}", tensor

    def _write(
        self,
        update: int,
        tensors: Iterable[tuple[str, Tensor]],
        again: Callable[[], Iterable[tuple[str, Tensor]]] | None,
        state: dict[str, Any],
        start: float,
    ) -> None:
        """Beside the training or not; the result waits in `_written`. again: the tensors for a second try, if they can be had."""
        folder = self.folder.checkpoint(update)
        self._tried = update
        self._tell_of_saving(True)
        try:
            self._make_room()
            self.session.run.path.stat()  # a disk that went away must not be made anew in the folder that it was mounted on
            with suppress(FileNotFoundError):
                sync(self.session.run.events)  # the curve up to here is on disk before the state that goes on from here
            try:
                written = write(folder, tensors, state, self._beat)
            except OSError:
                self.session.run.path.stat()
                if again is None or self._is_abandoned:
                    raise
                self._free_what_may_go()
                written = write(folder, again(), state, self._beat)
            if state["skipped"][0] == 0:  # else what comes of it is not known to be good
                remove_others(self.folder, folder)
            self._written = Checkpoint(step=self.step, update=update, path=str(folder), size_bytes=written, seconds=time.perf_counter() - start)
        except Exception as error:  # for the training thread to raise
            self._written = error
        finally:
            self._tell_of_saving(False)

    def _tell_of_saving(self, is_saving: bool) -> None:
        self.session.pulse.is_saving = is_saving
        self.session.pulse.beat()

    def _make_room(self) -> None:
        if not self._fits(*room(self.session.run.path)):
            self._free_what_may_go()

    def _fits(self, free_bytes: int, inodes: int | None) -> bool:
        """One more checkpoint."""
        return free_bytes >= self.size_bytes and (inodes is None or inodes >= self.inodes)

    def _free_what_may_go(self) -> None:
        """All that is neither the last good checkpoint nor a result."""
        keep = None if self._saved_update is None else self.folder.checkpoint(self._saved_update)
        remove_others(self.folder, keep)
        for step in (1, 2, 3):
            other = self.session.run.step(step)
            shutil.rmtree(other.model.with_name(f"{other.model.name}.partial"), ignore_errors=True)
            if step != self.step and other.complete.exists():
                shutil.rmtree(other.checkpoints, ignore_errors=True)

    def _wait(self) -> None:
        if self._writing is not None:
            self.session.pulse.beat("waiting for the disk")
            while self._writing.is_alive():
                self._writing.join(1.0)
        self._collect()

    def _collect(self) -> None:
        """Say that a checkpoint is on disk, or raise why it is not."""
        if self._writing is not None and self._writing.is_alive():
            return
        written, self._writing, self._writing_update, self._written = self._written, None, None, None
        if isinstance(written, OSError):
            raise self._failure(written, self._tried)
        if isinstance(written, Exception):
            raise written
        if written is not None:
            self._saved_update, self._seconds, self._saved_at = written.update, written.seconds, time.monotonic()
            self.session.emit(replace(written, held_up_s=self._held_up_s))
            self._warn_of_little_room()

    def _warn_of_little_room(self) -> None:
        with suppress(OSError):
            free, inodes = room(self.session.run.path)
            if not self._fits(free, inodes) and not self._has_warned:
                self._has_warned = True
                where = f"{_free(free, inodes)} at {self.session.run.path}"
                message = f"the next checkpoint will not fit: {where}, and it has {size(self.size_bytes)} in up to {self.inodes} files"
                self.session.emit(Warning(step=self.step, message=message, hint="make room while it trains"))

    def _failure(self, error: OSError, update: int) -> ToolkitError:
        run = self.session.run.path
        plain = system_error(error, ExitCode.TRAINING)
        if not run.is_dir():
            plain.what, plain.why = f"the run folder {run} is gone", "was its disk unmounted, or the folder moved or removed?"
            plain.hint = "bring it back; the same command goes on with it from its last checkpoint"
            return plain
        with suppress(OSError):
            plain.why += f"; {size(room(run)[0])} are free at {run}, and a checkpoint has {size(self.size_bytes)}"
        plain.what = f"the checkpoint of update {update} could not be written: {plain.what}"
        plain.hint = f"{self._last_good_here()}; {plain.hint}"
        return plain

    def last_good(self) -> str:
        """For an error that all ranks raise, by all of them: whichever ends first has its words heard, and takes rank 0 along, which writes."""
        with suppress(ToolkitError):  # of another failure: that is told
            self._wait()
        return _named(self.session.world.gather(self._saved_update)[0])

    def _last_good_here(self) -> str:
        """The same on rank 0 alone."""
        with suppress(ToolkitError):
            self._wait()
        return _named(self._saved_update)

    # --- leaving ---

    def _finish_writing(self) -> None:
        with suppress(Exception):  # of the disk: what the run ends for is told
            self._wait()

    def _leave(self, grace_s: float | None) -> None:
        """The run is to end: save the last whole update if that fits into `grace_s` (None: it is not limited)."""
        if self._now is None:
            return
        if not self._is_whole(self._now.update):
            self._say_nothing_is_saved("the update after it was half made")
            return
        if self.session.world.any(self._now.update in (self._saved_update, self._writing_update)):
            self._wait()
            return
        fits = grace_s is None or self._seconds is None or self._seconds * (2 if self._writing else 1) <= grace_s
        if self.session.world.any(self.session.world.is_main and fits):
            self._save(at_once=True)
        elif self.session.world.is_main:
            self._say_nothing_is_saved(f"{grace_s:.0f} s are left, and the last one took {self._seconds:.0f} s")
            self._wait()

    def _say_nothing_is_saved(self, why: str) -> None:
        assert self._now is not None
        message = f"no checkpoint of update {self._now.update}: {why}"
        hint = f"{self._last_good_here()}; checkpoint.grace_s says how long this machine waits after SIGTERM"
        self.session.emit(Warning(step=self.step, message=message, hint=hint))

    def _is_whole(self, update: int) -> bool:
        """No part is in the midst of an update, or ahead of the others."""
        return all(part.intact and part.numbers().get("update", update) == update for part in self.parts.values())

    # --- numbers going wrong ---

    def skipped(self, update: int, why: str) -> None:
        """An update was left out. Raises ToolkitError when that was once too often."""
        self.skipped_in_a_row += 1
        self.skipped_in_all += 1
        if self.skipped_in_a_row < MOST_SKIPPED_IN_A_ROW and self.skipped_in_all < MOST_SKIPPED:
            self.session.emit(Warning(step=self.step, message=f"update {update} is left out: {why} ({self.skipped_in_all} so far)"))
            return
        in_a_row = self.skipped_in_a_row >= MOST_SKIPPED_IN_A_ROW
        left_out = f"{self.skipped_in_a_row} updates in a row" if in_a_row else plural(self.skipped_in_all, "updates")
        raise diverged(self.step, update, f"{why}; {left_out} were left out", self.last_good())

    def check(self, numbers: Mapping[str, float]) -> None:
        """What was measured in the end. Raises ToolkitError when something is not finite: the last updates, too few to end the run, may
        all have been left out for that.
        """
        broken = [f"the {name} on held-out data is {value}" for name, value in numbers.items() if not math.isfinite(value)]
        if broken:
            raise diverged(self.step, self.updates, ", ".join(broken), self.last_good())

    def learn(self, *engines: Engine) -> list[float]:
        """Update all engines -> their gradient norms. One that is not finite is counted as a skipped update, unless float16's loss
        scale, which may be the reason, can still go lower.
        """
        norms = [engine.step() for engine in engines]
        spoiled = [norm for norm, engine in zip(norms, engines, strict=True) if engine.is_spoiled]
        if spoiled:
            raise diverged(self.step, engines[0].update, f"its gradient norm is {spoiled[0]}, and the weights have taken it", self.last_good())
        broken = [norm for norm, engine in zip(norms, engines, strict=True) if not math.isfinite(norm) and not engine.scale_can_fall]
        if broken:
            self.skipped(engines[0].update, f"its gradient norm is {broken[0]}")
        else:
            self.skipped_in_a_row = 0
        return norms

    # --- the best weights ---

    def wants_best(self, update: int) -> bool:
        """Before the update after `update`, also where a run goes on from there: measured there again, with the same result."""
        return self.spec.best_every_updates is not None and update > 0 and update % self.spec.best_every_updates == 0

    def offer(self, update: int, metric: str, value: float, *, lower_is_better: bool, save: Callable[[Path], None]) -> None:
        """Keep the weights of `update` if `value`, measured on held-out data, is the best so far; save(folder), by all ranks."""
        is_best = self.best_value is None or (value < self.best_value if lower_is_better else value > self.best_value)
        if is_best:
            self.best_value, self._best_update = value, update
            save(self.folder.best)
        else:
            best = f"{self.best_value:.6g} at update {self._best_update}"
            self.session.emit(Progress(step=self.step, doing=f"held-out {metric} at update {update}: {value:.6g} (best: {best})"))
