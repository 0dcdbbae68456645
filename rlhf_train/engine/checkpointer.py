"""A step's checkpointer decides when to save and whether the disk has room, and resumes a step.

A checkpoint is the state after a whole update: weights, optimizer and loss scale as whole tensors
by parameter (any number of ranks and any ZeRO stage reads them), the numbers of the step's loop,
every random state. Training continues while it is written, if there is memory for a copy.
`checkpoint_files.py` writes and reads its files.

Where we differ from DeepSpeed's own checkpoints: those are partitions, one file a rank. Another
number of ranks reads them only after a conversion, which needs disk space for a second checkpoint.
"""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from jobs import spec
from jobs.errors import ExitCode, ToolkitError, system_error
from jobs.events import Checkpoint, Event, Progress, Warning
from jobs.formatting import plural, size
from jobs.run_dir import RunDir
from jobs.steps import label_of
from rlhf_train import compat
from rlhf_train.disk import room, size_of, sync
from rlhf_train.engine import checkpoint_files
from rlhf_train.engine.checkpoint_files import Saved, random_states, remove_others, set_random_states
from rlhf_train.engine.divergence import Skips
from rlhf_train.host import free_memory_bytes
from rlhf_train.ranks.collectives import World
from rlhf_train.ranks.heartbeat import Heartbeat

MOST_COST = 0.01  # of the training time that timed checkpoints may take
# Bytes from the GPU into new memory; measured: 1.3e9 to 3e9 (one H200, OPT-1.3b's shape).
COPIED_A_SECOND = 1.2e9
FILES = 64  # inodes that a checkpoint may need besides those of its shards, and a whole model


class Stateful(Protocol):
    """A part of a step with a state of its own: an Engine or an Ema."""

    intact: bool  # false while an update is half made

    def numbers(self) -> dict[str, Any]: ...
    def tensors(self) -> Iterator[tuple[str, Tensor]]: ...
    def size_bytes(self) -> int: ...
    def restore(self, tensor: Callable[[str], Tensor], numbers: Mapping[str, Any]) -> None: ...


@dataclass(frozen=True)
class RunSurroundings:
    """The run and the step that a checkpointer works for."""

    step: int
    run: RunDir
    settings: spec.CheckpointSchedule
    world: World
    emit: Callable[[Event], None]
    heartbeat: Heartbeat
    # Called on all ranks. It raises to end the run, after a checkpoint if there is time for one.
    stop_if_asked: Callable[[], None]
    saved: Saved | None  # the checkpoint to resume from
    inputs: Mapping[str, str]  # what the step starts from: hashes of the steps before it


@dataclass(frozen=True)
class _WholeUpdate:
    """The step's state after its last whole update."""

    update: int
    state: Mapping[str, Any]  # of the step's loop
    tensors: Mapping[str, Tensor]  # of the step's loop: a rollout whose updates are not all made
    random: dict[str, Any]


class Checkpointer:
    """Makes a step's checkpoints and resumes from the last one.

    Every rank has one. Call `resume` once, `after` each update, `close` when the model is saved.
    """

    def __init__(
        self,
        surroundings: RunSurroundings,
        updates: int,
        parts: Mapping[str, Stateful],
        *,
        rows: str,
        model_bytes: int,
    ) -> None:
        """Prepare to save and resume a step, and remove what no checkpoint needs.

        updates: of the whole step. parts: what has state, by name.
        rows: digest of the rows that the step learns from.
        model_bytes: size of the model that the step will write.
        Raises ToolkitError if the disk is too small.
        """
        self.surroundings = surroundings
        self.run = surroundings.run
        self.world = surroundings.world
        self.heartbeat = surroundings.heartbeat
        self.emit = surroundings.emit
        self.step = surroundings.step
        self.updates = updates
        self.parts = parts
        self.rows = rows
        self.spec: spec.CheckpointSchedule = surroundings.settings
        self.folder = self.run.step(self.step)
        self.size_bytes = sum(part.size_bytes() for part in parts.values())
        self.inodes = FILES + self.size_bytes // checkpoint_files.SHARD_BYTES
        self.skips = Skips()  # for Divergence to count; saved with each checkpoint
        self.best_value: float | None = None
        self._best_update = 0
        self._last_update: _WholeUpdate | None = None
        self._saved_update: int | None = None  # of the last one that is complete
        self._saved_at = time.monotonic()
        self._seconds: float | None = None  # that the last one took until it was on disk
        self._held_up_s = self.size_bytes / COPIED_A_SECOND  # that training waited; at first a guess
        self._writing: threading.Thread | None = None
        self._writing_update: int | None = None
        self._tried: int = 0  # the update of the last attempt to write a checkpoint
        self._written: Checkpoint | Exception | None = None
        self._is_abandoned = False
        self._has_warned = False
        self.loop_tensors: dict[str, Tensor] = {}  # of the step's loop, from the checkpoint
        self.heartbeat.is_patient = False  # from now on, signs of life come often
        if self.world.is_main:
            remove_others(self.folder, surroundings.saved.path if surroundings.saved is not None else None)
            self._check_room(model_bytes)

    def _check_room(self, model_bytes: int) -> None:
        on_disk = size_of(self.folder.checkpoints)
        best = 0 if self.spec.best_every_updates is None or self.folder.best.exists() else model_bytes
        needed = max(0, max(2 * self.size_bytes, self.size_bytes + model_bytes) + best - on_disk)
        run = self.run.path
        free, inodes = room(run)
        disk = f"{size(needed)} are needed for the old and the new one, {size(free)} are free"
        self._doing(f"a checkpoint has {size(self.size_bytes)}: {disk}")
        if free < needed or (inodes is not None and inodes < 2 * self.inodes + FILES):
            raise ToolkitError(
                "the disk is too small for this step's checkpoints",
                why=f"{_free(free, inodes)} at {run}; a checkpoint has {size(self.size_bytes)},\n"
                f"a new one is written before the old one is removed, and the model has {size(model_bytes)}",
                hint="make room, or choose an --output-dir on a larger disk; "
                "actor.lora makes checkpoints many times smaller",
                exit_code=ExitCode.UNFIT,
            )

    def resume(self) -> dict[str, Any] | None:
        """Restore all parts and random states, and return the numbers of the step's loop.

        None: the step starts from scratch. The loop's tensors are put in `loop_tensors`.
        Raises ToolkitError if the data has changed.
        """
        saved = self.surroundings.saved
        if saved is None:
            return None
        self._doing(f"reading the checkpoint of update {saved.update}")
        rows = saved.state.get("rows", self.rows)  # older ones do not say
        if (saved.state["updates"], rows) != (self.updates, self.rows):
            counted = f"it has {plural(self.updates, 'updates')} now, and had {saved.state['updates']}"
            is_same_count = saved.state["updates"] == self.updates
            raise ToolkitError(
                f"the data of step {self.step} has changed since it was stopped",
                why="its rows, or their tokens, are different" if is_same_count else counted,
                hint=f"put the old rows back, or start the step from scratch: remove {self.folder.path}",
            )

        def read(name: str) -> Tensor:
            self.heartbeat.beat()  # a slow disk takes minutes for all tensors
            return saved.tensor(name)

        for name, part in self.parts.items():
            part.restore(lambda key, name=name: read(f"{name}/{key}"), saved.state["parts"][name])  # type: ignore[misc]
        # With more ranks than before, the added ranks take the states of others: none of our draws
        # depends on them (see rollout.py).
        self._tell_of_other_versions(saved.state.get("versions", {}))
        states = saved.state["random"]
        set_random_states(states[self.world.rank % len(states)], self.world.device)
        self.skips.in_a_row, self.skips.in_all = saved.state["skipped"]
        self.best_value, self._best_update = saved.state["best"]
        self._saved_update, self._seconds = saved.update, saved.state["seconds"]
        self.loop_tensors = saved.tensors("loop")
        saved.close()
        self.heartbeat.has_trained = True
        return saved.state["loop"]

    def _tell_of_other_versions(self, before: Mapping[str, str]) -> None:
        """Warn if other libraries compute from here on.

        before: the versions of a checkpoint; {}: it names none.
        """
        now = compat.versions()
        changes = [f"{name} {before[name]} -> {now[name]}" for name in now if before.get(name, now[name]) != now[name]]
        if changes:
            message = f"other libraries than before resume it: {', '.join(changes)}"
            hint = "they round otherwise, so the numbers are not those of a run that was not moved, to the last digit"
            self.emit(Warning(step=self.step, message=message, hint=hint))

    def after(self, update: int, state: Mapping[str, Any], tensors: Mapping[str, Tensor] | None = None) -> None:
        """Save a checkpoint if one is due.

        Call it after every update, when the update's events are written.
        state, tensors: of the step's loop.
        Raises what `stop_if_asked` raises, and the error of a save that failed.
        """
        self._last_update = _WholeUpdate(update, state, tensors or {}, random_states(self.world.device))
        self.heartbeat.has_trained = True
        self.surroundings.stop_if_asked()
        self._collect()
        if self.skips.in_a_row == 0 and self._is_due(update):
            self._save()

    def _is_due(self, update: int) -> bool:
        if update == self.updates or (self.spec.every_updates and update % self.spec.every_updates == 0):
            return True
        if self.spec.every_minutes is None:
            return False
        pause_s = max(60 * self.spec.every_minutes, self._held_up_s / MOST_COST)
        is_time = self.world.is_main and self._writing is None and time.monotonic() - self._saved_at >= pause_s
        return self.world.any(is_time)

    def close(self) -> None:
        """Give up a checkpoint that is still being written: the saved model replaces it."""
        self._is_abandoned = True
        if self._writing is not None:
            self._writing.join()

    def _beat(self) -> None:
        """Give a sign of life before each file that is written.

        Raises InterruptedError if the checkpoint was given up.
        """
        self.heartbeat.beat()
        if self._is_abandoned:
            raise InterruptedError

    def _doing(self, what: str) -> None:
        self.heartbeat.beat(what)
        self.emit(Progress(step=self.step, doing=what))

    # --- saving ---

    def _save(self, *, wait_for_disk: bool = False) -> None:
        """Save the last whole update.

        All ranks take part, and rank 0 writes. Unless `wait_for_disk`, training continues meanwhile
        if there is memory for a copy. Raises ToolkitError on rank 0.
        """
        assert self._last_update is not None
        last, start = self._last_update, time.perf_counter()
        self._wait()
        world = self.world
        self.heartbeat.beat(f"update {last.update}, checkpoint")
        randoms = world.gather(last.random)
        tensors = self._tensors(last)
        if not world.is_main:
            for _ in tensors:
                self.heartbeat.beat()
            return
        state = {
            "update": last.update,
            "updates": self.updates,
            "rows": self.rows,
            "loop": last.state,
            "parts": {name: part.numbers() for name, part in self.parts.items()},
            "random": randoms,
            "skipped": [self.skips.in_a_row, self.skips.in_all],
            "best": [self.best_value, self._best_update],
            "seconds": self._seconds,
            "inputs": self.surroundings.inputs,
            "ranks": world.size,
            "versions": compat.versions(),
        }
        in_background = not wait_for_disk and free_memory_bytes() > 2 * self.size_bytes
        if in_background:
            copies = [(name, tensor.to("cpu", copy=True)) for name, tensor in tensors]
            self._held_up_s = time.perf_counter() - start
            work = (last.update, copies, lambda: copies, state, start)
            self._writing = threading.Thread(target=self._write, args=work)
            self._writing_update = last.update
            self._writing.start()
        else:
            # With several ranks there is no second try: the others gather their tensors only once.
            second_try = (lambda: self._tensors(last)) if world.size == 1 else None
            self._write(last.update, tensors, second_try, state, start)
            for _ in tensors:  # after a failure: the other ranks gather all tensors
                pass
            self._held_up_s = time.perf_counter() - start
            self._collect()

    def _tensors(self, last: _WholeUpdate) -> Iterator[tuple[str, Tensor]]:
        for name, part in self.parts.items():
            for key, tensor in part.tensors():
                yield f"{name}/{key}", tensor
        for name, tensor in last.tensors.items():
            yield f"loop/{name}", tensor

    def _write(
        self,
        update: int,
        tensors: Iterable[tuple[str, Tensor]],
        second_try: Callable[[], Iterable[tuple[str, Tensor]]] | None,
        state: dict[str, Any],
        start: float,
    ) -> None:
        """Write a checkpoint, in this thread or its own, and leave the result in `_written`.

        second_try: returns the tensors again; None: they cannot be had again.
        """
        folder = self.folder.checkpoint(update)
        self._tried = update
        self._tell_of_saving(True)
        try:
            self._make_room()
            # Fail if the disk is gone: else the run folder would be made again at its mount point.
            self.run.path.stat()
            with suppress(FileNotFoundError):
                sync(self.run.events)  # events must be on disk before the state that follows them
            try:
                written = checkpoint_files.write(folder, tensors, state, self._beat)
            except OSError:
                self.run.path.stat()
                if second_try is None or self._is_abandoned:
                    raise
                self._free_what_may_go()
                written = checkpoint_files.write(folder, second_try(), state, self._beat)
            if state["skipped"][0] == 0:  # else the new checkpoint may be of a run that diverges
                remove_others(self.folder, folder)
            self._written = Checkpoint(
                step=self.step,
                update=update,
                path=str(folder),
                size_bytes=written,
                seconds=time.perf_counter() - start,
            )
        except Exception as error:  # for the training thread to raise
            self._written = error
        finally:
            self._tell_of_saving(False)

    def _tell_of_saving(self, is_saving: bool) -> None:
        self.heartbeat.is_saving = is_saving
        self.heartbeat.beat()

    def _make_room(self) -> None:
        if not self._fits(*room(self.run.path)):
            self._free_what_may_go()

    def _fits(self, free_bytes: int, inodes: int | None) -> bool:
        """Return whether one more checkpoint fits."""
        return free_bytes >= self.size_bytes and (inodes is None or inodes >= self.inodes)

    def _free_what_may_go(self) -> None:
        """Remove all that is neither the last good checkpoint nor a result."""
        keep = None if self._saved_update is None else self.folder.checkpoint(self._saved_update)
        remove_others(self.folder, keep)
        for step in (1, 2, 3):
            other = self.run.step(step)
            shutil.rmtree(other.model.with_name(f"{other.model.name}.partial"), ignore_errors=True)
            if step != self.step and other.complete.exists():
                shutil.rmtree(other.checkpoints, ignore_errors=True)

    def _wait(self) -> None:
        if self._writing is not None:
            self.heartbeat.beat("waiting for the disk")
            while self._writing.is_alive():
                self._writing.join(1.0)
        self._collect()

    def _collect(self) -> None:
        """Emit that a checkpoint is on disk, or raise why it is not."""
        if self._writing is not None and self._writing.is_alive():
            return
        written, self._writing, self._writing_update, self._written = self._written, None, None, None
        if isinstance(written, OSError):
            raise self._failure(written, self._tried)
        if isinstance(written, Exception):
            raise written
        if written is not None:
            self._saved_update, self._seconds, self._saved_at = written.update, written.seconds, time.monotonic()
            self.emit(replace(written, held_up_s=self._held_up_s))
            self._warn_of_little_room()

    def _warn_of_little_room(self) -> None:
        with suppress(OSError):
            free, inodes = room(self.run.path)
            if not self._fits(free, inodes) and not self._has_warned:
                self._has_warned = True
                where = f"{_free(free, inodes)} at {self.run.path}"
                needed = f"{size(self.size_bytes)} in up to {self.inodes} files"
                message = f"the next checkpoint will not fit: {where}, and it has {needed}"
                self.emit(Warning(step=self.step, message=message, hint="make room while it trains"))

    def _failure(self, error: OSError, update: int) -> ToolkitError:
        run = self.run.path
        plain = system_error(error, ExitCode.TRAINING)
        if not run.is_dir():
            plain.what = f"the run folder {run} is gone"
            plain.why = "was its disk unmounted, or the folder moved or removed?"
            plain.hint = "bring it back; the same command resumes it from its last checkpoint"
            return plain
        with suppress(OSError):
            plain.why += f"; {size(room(run)[0])} are free at {run}, and a checkpoint has {size(self.size_bytes)}"
        plain.what = f"the checkpoint of update {update} could not be written: {plain.what}"
        plain.hint = f"{self._last_good_here()}; {plain.hint}"
        return plain

    def last_good(self) -> str:
        """Name the last good checkpoint, for an error that all ranks raise.

        All ranks call it before they raise. The first rank to end has its error shown, and rank 0,
        which writes the checkpoint, is ended with it: so the checkpoint has to be complete here.
        """
        with suppress(ToolkitError):  # the other error is the one to report
            self._wait()
        return _named(self.world.gather(self._saved_update)[0])

    def _last_good_here(self) -> str:
        """Name the last good checkpoint, on rank 0 alone."""
        with suppress(ToolkitError):
            self._wait()
        return _named(self._saved_update)

    # --- leaving ---

    def finish_writing(self) -> None:
        """Wait for a checkpoint that this rank is writing, before the run ends with an error."""
        with suppress(Exception):  # of the disk: the error that ends the run is the one to report
            self._wait()

    def leave(self, grace_s: float | None) -> None:
        """Save the last whole update before the run ends, if there is time for it.

        grace_s: the time that is left; None: no limit.
        """
        if self._last_update is None:
            return
        if not self._is_whole(self._last_update.update):
            self._say_nothing_is_saved("the update after it was only half done")
            return
        if self.world.any(self._last_update.update in (self._saved_update, self._writing_update)):
            self._wait()
            return
        saves = 2 if self._writing else 1  # the one under way has to end first
        fits = grace_s is None or self._seconds is None or self._seconds * saves <= grace_s
        if self.world.any(self.world.is_main and fits):
            self._save(wait_for_disk=True)
        elif self.world.is_main:
            self._say_nothing_is_saved(f"{grace_s:.0f} s are left, and the last one took {self._seconds:.0f} s")
            self._wait()

    def _say_nothing_is_saved(self, why: str) -> None:
        assert self._last_update is not None
        message = f"no checkpoint of update {self._last_update.update}: {why}"
        hint = f"{self._last_good_here()}; checkpoint.grace_s says how long this machine waits after SIGTERM"
        self.emit(Warning(step=self.step, message=message, hint=hint))

    def _is_whole(self, update: int) -> bool:
        """Return whether no part is in the middle of an update or ahead of the others."""
        return all(part.intact and part.numbers().get("update", update) == update for part in self.parts.values())

    # --- the best weights ---

    @property
    def keeps_best(self) -> bool:
        return self.spec.best_every_updates is not None

    def wants_best(self, update: int) -> bool:
        """Return whether to measure the weights of `update`.

        A run that resumes from this update measures again, with the same result.
        """
        return self.spec.best_every_updates is not None and update > 0 and update % self.spec.best_every_updates == 0

    def offer(
        self,
        update: int,
        metric: str,
        value: float,
        *,
        lower_is_better: bool,
        save: Callable[[Path], None],
    ) -> None:
        """Keep the weights of `update` if `value`, measured on held-out data, is the best so far.

        save: writes them to a folder, on all ranks.
        """
        is_best = self.best_value is None or (value < self.best_value if lower_is_better else value > self.best_value)
        if is_best:
            self.best_value, self._best_update = value, update
            save(self.folder.best)
        else:
            best = f"{self.best_value:.6g} at update {self._best_update}"
            doing = f"held-out {label_of(metric)} at update {update}: {value:.6g} (best: {best})"
            self.emit(Progress(step=self.step, doing=doing))


def _named(saved_update: int | None) -> str:
    if saved_update is None:
        return "there is no checkpoint yet"
    return f"the last good checkpoint is that of update {saved_update}"


def _free(free_bytes: int, inodes: int | None) -> str:
    counted = "" if inodes is None else f" and {plural(inodes, 'inodes')}"
    return f"{size(free_bytes)}{counted} are free"
