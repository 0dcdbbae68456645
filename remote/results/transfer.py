"""Bringing results home, also while the job trains.

Results are the events, the log, saved chats, the models of complete steps and, if asked for,
complete checkpoints. The box reports what is complete, with hashes (results.sh). What is not here
yet comes over one stream, each file from the byte where an earlier call stopped. It is verified
here before a rename gives it its name; a model or a checkpoint gets its name as a whole.

rsync is not used. Weights neither compress nor resemble older ones, so it could save nothing. A
partial file is known by its hash, so it resumes at its byte without being read again on the box.
And boxes and laptops need no rsync.
"""

from __future__ import annotations

import fcntl
import hashlib
import itertools
import os
import shlex
import shutil
import subprocess
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING

from jobs.errors import ExitCode, ToolkitError, system_error
from jobs.formatting import plural, size
from remote.results.local_run import BLOCK, LocalRun
from remote.results.manifest import (
    MODELS,
    TEXTS,
    Manifest,
    ManifestReader,
    Progress,
    RemoteFile,
    Unit,
    models_digest,
    silent,
)
from remote.results.run_contents import (
    FetchedCheckpoint,
    FetchedRun,
    FetchedStep,
    is_run_name,
    memory_file,
    recall_copies,
    remember,
)
from remote.scripts import script
from remote.ssh.commands import sh_script

if TYPE_CHECKING:
    from remote.ssh.connection import BoxConnection

ROUNDS = 4  # manifests that are read, at most, while files change on the box
RECONNECTS = 3  # after a connection that broke, if it had brought some bytes
LAST_WORDS_S = 2.0  # to wait for ssh's message about a connection that broke
GREETING_LINES = 1000  # that a login may print
MOST_ARGUMENTS = 64 * 1024  # bytes of one command, well below what a shell takes as one word
SPARE_BYTES = 64 << 20  # that must stay free here


# --- the connection -------------------------------------------------------------------------------


class TransferCut(Exception):
    """The connection ended before the whole answer had come."""


@contextmanager
def _answer_stream(connection: BoxConnection, argv: Sequence[str]) -> Iterator[IO[bytes]]:
    """Run results.sh on the box, and yield its output as it comes.

    Raises TransferCut; ToolkitError if the box cannot be reached at all.
    """
    stream, sent = connection.script_stream(argv, script("results.sh"))
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(
            stream,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            start_new_session=True,  # so that Ctrl-C reaches us alone
        )
        assert process.stdin is not None and process.stdout is not None
        try:
            with suppress(BrokenPipeError):
                process.stdin.write(sent)
                process.stdin.close()
            yield process.stdout
        except TransferCut as cut:
            with suppress(subprocess.TimeoutExpired):
                process.wait(LAST_WORDS_S)
            errors.seek(0)
            words = errors.read().decode("utf-8", "replace").strip().splitlines()
            raise TransferCut(words[-1] if words else str(cut) or "nothing more came") from None
        finally:
            process.kill()
            process.wait()
            process.stdout.close()


def _cut(connection: BoxConnection, why: object, done: str) -> ToolkitError:
    return ToolkitError(
        f"the connection to {connection.box.name} broke during the fetch",
        why=f"{why}; {done}",
        hint="the same command resumes at that byte; a running job is not affected",
        exit_code=ExitCode.UNREACHABLE,
    )


def ask_manifest(
    connection: BoxConnection, root: str, run: str, *, checkpoints: bool = False, progress: Progress = silent
) -> Manifest:
    """Ask the box what it has of a run, in one round trip.

    Raises ToolkitError: no such run, our folder is gone, the connection broke.
    """
    argv = sh_script("manifest", root, run, *(["checkpoints"] if checkpoints else []))
    try:
        with _answer_stream(connection, argv) as stream:
            manifest = ManifestReader(stream, progress).read()
            if manifest is None:
                raise TransferCut
    except TransferCut as cut:
        raise _cut(connection, cut, "nothing was fetched yet") from None
    if manifest.problem == "no_root":
        raise ToolkitError(
            f"our folder is gone on {connection.box.name}",
            why=f"{root} is not there, or has lost its mark: its disk is not mounted, or the box was set up again",
            hint="look at the box's page; what was fetched before is untouched",
            exit_code=ExitCode.LOST,
        )
    if manifest.problem == "no_run":
        raise ToolkitError(
            f"there is no run `{run}` on {connection.box.name}", why=f"it has: {', '.join(manifest.others) or 'none'}"
        )
    return manifest


# --- fetch ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FetchSelection:
    models: bool = True
    checkpoints: bool = False


@dataclass(frozen=True)
class Fetched:
    run: str
    folder: Path
    placed: tuple[str, ...] = ()  # what is new here: files, and folders that came whole
    same: tuple[str, ...] = ()  # what was here already
    moved_bytes: int = 0  # that came over the connection
    total_bytes: int = 0  # of all that is here now
    seconds: float = 0.0
    steps: tuple[int, ...] = ()  # complete ones, whose models are here
    left: tuple[str, ...] = ()  # what was not fetched from the box, each with its reason
    would: tuple[str, ...] = ()  # with --dry-run: what would come
    id: str = ""  # of the run; "": it was begun before there were ids
    aside: tuple[str, ...] = ()  # folders here to which steps that were trained again have moved


@dataclass
class _Call:
    """One call of `fetch`, over all its rounds."""

    connection: BoxConnection
    root: str
    run: str
    here: LocalRun
    what: FetchSelection
    progress: Progress
    placed: dict[str, None] = field(default_factory=dict)
    moved_bytes: int = 0
    # Files whose part here proved not to be their beginning; they start from byte 0 next time.
    again: set[str] = field(default_factory=set)
    mismatched: dict[str, str] = field(default_factory=dict)  # files that came whole, but not with this hash
    damaged: dict[str, str] = field(default_factory=dict)  # the same, twice
    aside: list[str] = field(default_factory=list)
    changed: list[str] = field(default_factory=list)  # in this round: gone on the box, or not as listed


def fetch(
    connection: BoxConnection,
    root: str,
    run: str,
    target: Path,
    *,
    state: Path,
    what: FetchSelection = FetchSelection(),
    progress: Progress = silent,
) -> Fetched:
    """Bring what is complete of ROOT/runs/RUN to `target`, and remember it in `state`.

    Raises ToolkitError. What had come by then stays, and the next call resumes from there.
    """
    try:
        return _fetch(connection, root, run, target, state, what, progress)
    except OSError as error:
        raise system_error(error, ExitCode.USAGE) from None


def _fetch(
    connection: BoxConnection, root: str, run: str, target: Path, state: Path, what: FetchSelection, progress: Progress
) -> Fetched:
    if not is_run_name(run):
        raise ToolkitError(f"`{run}` cannot name a run", hint="fab ps lists the runs of the box")
    start = time.monotonic()
    if connection.dry_run:
        connection.say.command(connection.box.name, sh_script("manifest", root, run), script("results.sh"))
        here = LocalRun(target)
        manifest = ask_manifest(connection, root, run, checkpoints=what.checkpoints, progress=progress)
        _refuse_other_run(connection.box.name, run, here, manifest, what)
        units = _wanted(manifest, what)
        coming = [unit.path for unit in units if not here.has(unit)]
        same = [unit.path for unit in units if unit.path not in coming]
        return Fetched(
            run, target, same=tuple(same), would=tuple(coming), left=tuple(_left(manifest, what)), id=manifest.id
        )
    with (
        _lock(memory_file(state, connection.box.name), f"another `fab fetch` from {connection.box.name} is running"),
        _lock(target_file(state, target), f"another `fab fetch` into {target} is running"),
    ):
        call = _Call(connection, root, run, LocalRun(target), what, progress)
        call.here.put_back()
        for number in range(ROUNDS):
            manifest = ask_manifest(connection, root, run, checkpoints=what.checkpoints, progress=progress)
            _refuse_other_run(connection.box.name, run, call.here, manifest, what)
            try:
                _bring(call, manifest)
            finally:  # whatever has its name by now is recorded, even if the rest failed
                _remember(call.here, manifest, state, connection.box.name, run)
            if not call.changed and not manifest.changed:
                break
            if number + 1 == ROUNDS:
                changed = call.changed or [f"step {step}" for step in manifest.changed]
                raise ToolkitError(
                    f"run `{run}` changes faster than it can be fetched",
                    why=f"changed during the fetch: {', '.join(changed)}",
                    hint="fetch when the step is complete, or save checkpoints less often (checkpoint.every_minutes)",
                    exit_code=ExitCode.BUSY,
                )
        call.here.clear(keep_checkpoints=not what.checkpoints)
    units = _wanted(manifest, what)
    if call.damaged:
        raise ToolkitError(
            f"{plural(len(call.damaged), 'files')} on {connection.box.name} cannot be trusted",
            why="they came twice with bytes that do not match their hash: " + ", ".join(call.damaged),
            hint="the box's disk or memory is broken, or the file was written to; all else was fetched",
            exit_code=ExitCode.UNFIT,
        )
    return Fetched(
        run,
        target,
        tuple(call.placed),
        tuple(unit.path for unit in units if unit.path not in call.placed),
        call.moved_bytes,
        sum(file.size_bytes for unit in units for file in unit.files),
        time.monotonic() - start,
        tuple(sorted(manifest.steps)) if what.models else (),
        tuple(_left(manifest, what)),
        id=manifest.id,
        aside=tuple(call.aside),
    )


def _refuse_other_run(box: str, run: str, here: LocalRun, manifest: Manifest, what: FetchSelection) -> None:
    """Raise ToolkitError if the folder holds results of another run than the box's."""
    if not here.is_of_another_run(manifest):
        return
    target = here.target
    names = (target.with_name(f"{target.name}-{number}") for number in itertools.count(2))
    free = next(
        path for path in names if not os.path.lexists(path) or (manifest.id and LocalRun(path).id == manifest.id)
    )
    verb, flag = "fetch" if what.models else "report", " --checkpoints" if what.checkpoints else ""
    raise ToolkitError(
        f"{target} holds the results of another run",
        why=f"`{run}` on {box} is {_named(manifest.id)}, and here lies {_named(here.id)}: "
        "results of two runs are never mixed",
        hint=f"fab {verb} --host {shlex.quote(box)} --run {shlex.quote(run)} --to {shlex.quote(str(free))}{flag}",
    )


def _named(run_id: str) -> str:
    return f"run {run_id}" if run_id else "one without an id, which began at another time"


def target_file(state: Path, target: Path) -> Path:
    """Return a path, without suffix, that belongs to one folder here, whatever it is called."""
    return state / "fetched" / "into" / hashlib.sha256(os.fsencode(target.resolve())).hexdigest()[:16]


@contextmanager
def _lock(path: Path, what: str) -> Iterator[None]:
    """Allow one fetch at a time to use a file; `what` is said to the second one.

    All fetches from a box record their results in the same file; and two boxes may be fetched into
    the same folder. Raises ToolkitError.
    """
    path = path.with_suffix(".lock")
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ToolkitError(what, hint="wait for its end", exit_code=ExitCode.BUSY) from None
        yield


def _wanted(manifest: Manifest, what: FetchSelection) -> list[Unit]:
    def is_wanted(unit: Unit) -> bool:
        if "/checkpoints/" in unit.path:
            return what.checkpoints
        step = int(unit.path[4]) if unit.path.startswith("step") else 0
        return what.models or step not in manifest.steps

    return [unit for unit in manifest.units() if is_wanted(unit)]


def _left(manifest: Manifest, what: FetchSelection) -> Iterator[str]:
    if what.checkpoints and not manifest.checkpoints and not manifest.changed:
        complete = "there is no checkpoint now: a complete step keeps none"
        yield complete if manifest.steps else "there is no checkpoint yet"
    for step, saved in sorted(manifest.checkpoints.items()):
        if not what.checkpoints:
            checkpoint = f"the checkpoint of step {step}, update {saved.update}, {size(saved.size_bytes)}"
            yield f"{checkpoint}: --checkpoints brings it"
    if not what.models:
        yield from (f"the models of step {step}: they were not asked for" for step in sorted(manifest.steps))
    if manifest.odd:
        yield f"{plural(manifest.odd, 'files')} whose names or marks are not those of a run"


def _tidy(here: LocalRun, manifest: Manifest) -> None:
    """Remove what was fetched earlier and is no longer on the box.

    These are models of an earlier training, and checkpoints from which nothing resumes any more.
    """
    remote_paths = {unit.path for unit in manifest.units()}
    for step in manifest.steps:
        if here.is_complete(step, manifest.steps[step]):
            for name in MODELS:
                if f"step{step}/{name}" not in remote_paths:
                    here.drop(f"step{step}/{name}")
            here.drop_checkpoints(step)
    for step, saved in manifest.checkpoints.items():
        if (here.target / f"step{step}/checkpoints/update-{saved.update}/complete.json").exists():
            here.drop_checkpoints(step, keep=saved.update)


def _remember(here: LocalRun, manifest: Manifest, state: Path, box: str, run: str) -> None:
    """Record what was fetched: only what is here, with every byte verified."""
    local_units = [unit for unit in manifest.units() if here.has(unit)]
    paths = {unit.path for unit in local_units}
    steps = {}
    for step, mark in manifest.steps.items():
        in_step = [unit.path for unit in manifest.units() if unit.path.startswith(f"step{step}/")]
        names = {path for path in in_step if "/checkpoints/" not in path}
        if names <= paths:
            files = [file for unit in local_units if unit.path in names for file in unit.files]
            steps[step] = FetchedStep(mark, models_digest((each.path, each.size_bytes, each.sha256) for each in files))
    folder = str(here.target.absolute())
    copies = recall_copies(state, box).get(run, [])
    before = next((each for each in copies if each.folder == folder and each.id == manifest.id), FetchedRun())
    checkpoints = {step: each for step, each in before.checkpoints.items() if step not in manifest.steps}
    for step, saved in manifest.checkpoints.items():
        if f"step{step}/checkpoints/update-{saved.update}" in paths:
            checkpoints[step] = FetchedCheckpoint(saved.update, saved.complete)
    texts = {unit.path: unit.files[0].size_bytes for unit in manifest.units() if unit.path in TEXTS}
    events_bytes = texts.get("events.jsonl", 0) if texts.keys() <= paths else before.events_bytes
    remember(state, box, run, FetchedRun(folder, time.time(), events_bytes, steps, checkpoints, manifest.id))


@dataclass
class _Move:
    """One file that is being transferred."""

    unit: Unit
    file: RemoteFile
    offset: int  # the byte to resume from


def _bring(call: _Call, manifest: Manifest) -> None:
    """Bring all units that are not here yet, and put each in its place when it is whole.

    Raises ToolkitError: the connection broke, the disk is full, or a place is taken.
    """
    here, call.changed = call.here, []
    missing = [unit for unit in _wanted(manifest, call.what) if not here.has(unit)]
    for unit in missing:
        here.check(unit)
    lacking = {
        unit.path: {file.path: file for file in unit.files if here.sha256(file.path) != file.sha256} for unit in missing
    }
    here.clear(
        {here.part(file) for files in lacking.values() for file in files.values()},
        keep_checkpoints=not call.what.checkpoints,
    )
    here.staging.mkdir(parents=True, exist_ok=True)
    moves = [
        _Move(unit, file, here.begin(file, afresh=path in call.again))
        for unit in missing
        for path, file in lacking[unit.path].items()
        if call.damaged.get(path) != file.sha256
    ]
    _check_room(here, moves)
    arrived: dict[str, dict[str, Path]] = {unit.path: {} for unit in missing}

    def arrive(move: _Move) -> None:
        """Take a file that is whole and verified, and place its unit if that is whole, too."""
        unit = move.unit
        arrived[unit.path][move.file.path] = here.part(move.file)
        if arrived[unit.path].keys() == lacking[unit.path].keys():
            _place(call, manifest, unit, arrived[unit.path])

    for unit in missing:
        if not lacking[unit.path]:  # nothing is missing: only files that the unit lost have to go
            _place(call, manifest, unit, {})
    for move in moves:
        if move.file.content is not None:
            here.part(move.file).write_bytes(move.file.content)
            arrive(move)
    _receive(call, [move for move in moves if move.file.content is None], arrive)
    _tidy(here, manifest)


def _place(call: _Call, manifest: Manifest, unit: Unit, parts: Mapping[str, Path]) -> None:
    step, is_mark = unit.path[:5], unit.path.endswith("/complete.json")
    if is_mark and any(
        other.path.startswith(f"{step}/") and other != unit and not call.here.has(other)
        for other in _wanted(manifest, call.what)
    ):
        call.changed.append(unit.path)  # a part of the step is missing here, so it is not marked complete
        return
    # A complete step here that the box has trained again is kept, under a name of its own.
    complete = call.here.sha256(f"{step}/complete.json") if step.startswith("step") else ""
    if complete and complete != manifest.steps.get(int(step[4])):
        call.aside.append(call.here.set_aside(int(step[4])))
    call.here.place(unit, parts)
    call.placed[unit.path] = None


def _check_room(here: LocalRun, moves: Sequence[_Move]) -> None:
    needed = sum(move.file.size_bytes - move.offset for move in moves if move.file.content is None)
    free = shutil.disk_usage(here.staging).free
    if needed and needed + SPARE_BYTES > free:
        raise ToolkitError(
            "the disk of this machine is too small for the results",
            why=f"{size(needed)} are to come, and {size(free)} are free at {here.staging.parent}",
            hint="make room, or fetch into another folder with --to or RLHF_RUNS",
        )


@dataclass
class _Counter:
    progress: Progress
    done: int  # bytes that are here
    total: int
    come: int = 0  # over the connection

    def add(self, count: int, what: str) -> None:
        self.done, self.come = self.done + count, self.come + count
        self.progress(self.done, self.total, what)


def _receive(call: _Call, moves: Sequence[_Move], arrive: Callable[[_Move], None]) -> None:
    """Receive all files, and reconnect if the connection breaks, as long as it brings something."""
    counter = _Counter(call.progress, sum(move.offset for move in moves), sum(move.file.size_bytes for move in moves))
    left, tries = deque(moves), RECONNECTS
    while left:
        before = counter.come
        try:
            _receive_some(call, left, arrive, counter)
        except TransferCut as cut:
            if counter.come == before or not tries:
                raise _cut(call.connection, cut, f"{size(counter.done)} of {size(counter.total)} are here") from None
            tries -= 1
        finally:
            call.moved_bytes += counter.come - before


def _receive_some(call: _Call, left: deque[_Move], arrive: Callable[[_Move], None], counter: _Counter) -> None:
    """Receive as many files as one command takes.

    A file is removed from `left` when it has come or is gone on the box. Raises TransferCut.
    """
    batch: list[_Move] = []
    words: list[str] = []
    for move in left:
        more = [str(move.offset), str(move.file.size_bytes), move.file.path]
        if batch and len(shlex.join([*words, *more]).encode()) > MOST_ARGUMENTS:
            break
        batch.append(move)
        words += more
    with _answer_stream(call.connection, sh_script("send", call.root, call.run, *words)) as stream:
        _skip_greeting(stream)
        for index, move in enumerate(batch):
            header = stream.readline().decode("utf-8", "replace")
            if header == f"gone {index}\n":
                call.changed.append(move.file.path)
            elif header != f"bytes {index} {move.file.size_bytes - move.offset}\n":
                raise TransferCut(
                    "the answer was not the file asked for" if header.endswith("\n") else "nothing more came"
                )
            else:
                _take(call, move, stream, counter, arrive)
            left.popleft()
        if stream.readline() != b"end\n":
            raise TransferCut("the answer had no end")


def _skip_greeting(stream: IO[bytes]) -> None:
    for _ in range(GREETING_LINES):
        line = stream.readline()
        if line == b"begin\n":
            return
        if not line:
            break
    raise TransferCut("nothing came")


def _take(call: _Call, move: _Move, stream: IO[bytes], counter: _Counter, arrive: Callable[[_Move], None]) -> None:
    """Receive the rest of one file, and verify it.

    Raises TransferCut. All that came stays, and `move.offset` says how much that is.
    """
    path, file = call.here.part(move.file), move.file
    resumed, digest = move.offset, hashlib.sha256()
    with path.open("r+b" if resumed else "w+b") as part:
        for block in iter(lambda: part.read(BLOCK), b""):
            digest.update(block)
        while move.offset < file.size_bytes:
            block = stream.read(min(BLOCK, file.size_bytes - move.offset))
            if not block:
                raise TransferCut("nothing more came")
            part.write(block)
            part.flush()  # otherwise a full disk would show too late to know how much is here
            digest.update(block)
            move.offset += len(block)
            counter.add(len(block), file.path)
        os.fsync(part.fileno())
    if digest.hexdigest() == file.sha256:
        arrive(move)
        return
    path.unlink()
    if resumed:  # the part that was here may not have been its beginning
        call.again.add(file.path)
        call.changed.append(file.path)
    elif not file.grows and call.mismatched.get(file.path) == file.sha256:
        call.damaged[file.path] = file.sha256
    else:
        call.mismatched[file.path] = file.sha256
        call.changed.append(file.path)
