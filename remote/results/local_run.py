"""A run folder of the laptop, into which fetch puts results.

A file or folder gets its name only when it is whole, and nothing else in the run folder is touched.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import shutil
from collections.abc import Collection, Mapping
from contextlib import suppress
from pathlib import Path
from typing import IO, Any
from urllib.parse import quote, unquote

from jobs.errors import ToolkitError
from remote.results.manifest import Manifest, RemoteFile, Unit
from remote.results.run_contents import run_id, write_json

BLOCK = 1 << 20
_CHECKPOINT, _OLD = "checkpoint-", "old-"


class LocalRun:
    """The run folder `target`, and a staging folder next to it for files that are on their way.

    Both are on the same file system, so that a rename is enough.
    """

    def __init__(self, target: Path) -> None:
        self.target = target
        self.staging = target.with_name(f".{target.name}.fetch")
        self._placed: dict[str, dict[str, Any]] = _read_json(self._record) or {}
        self._aside: dict[str, str] = {}  # step folders that this call has moved: their new names

    @property
    def _record(self) -> Path:
        """The file that records, by path, what was fetched: hashes (latest last), size, time."""
        return self.target / ".fetched.json"

    def sha256(self, path: str) -> str:
        """Return the hash of the file under its final name; "" if it is not there.

        A file whose size and time are unchanged since it was fetched is not hashed again.
        """
        place = self.target / path
        try:
            found = place.lstat()
            if not place.is_file() or place.is_symlink():
                return "something else"
            known = self._placed.get(path, {})
            if known.get("stat") == [found.st_size, found.st_mtime_ns] and known.get("sha256"):
                return str(known["sha256"][-1])
            with place.open("rb") as file:
                return _hash(file)
        except (FileNotFoundError, NotADirectoryError):
            return ""

    def was_changed(self, path: str) -> bool:
        """Tell whether a file was changed or removed since it was fetched, if that is recorded."""
        hashes = self._placed.get(path, {}).get("sha256", [])
        return bool(hashes) and self.sha256(path) != hashes[-1]

    @property
    def id(self) -> str:
        """The id of the run whose results are here; "": there is none."""
        try:
            return run_id((self.target / "id").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return ""

    def first_event(self) -> str:
        """Return the hash of the first event's line; "" if there is no whole line."""
        try:
            with (self.target / "events.jsonl").open("rb") as file:
                line = file.readline()
        except OSError:
            return ""
        return hashlib.sha256(line).hexdigest() if line.endswith(b"\n") else ""

    def is_of_another_run(self, manifest: Manifest) -> bool:
        """Tell whether the results here are those of another run than the box's.

        The ids decide. Where one of the two has none, the first event decides, which has the time
        at which the run began: a newer version gives an id to the run that it resumes. Two runs
        without an id and without a first event cannot be told apart.
        """
        if self.id and manifest.id:
            return self.id != manifest.id
        first_event = self.first_event()
        if first_event and manifest.first_event:
            return first_event != manifest.first_event
        return bool(self.id)

    def names_of_step(self, step: int) -> list[str]:
        """List the files of a step that were fetched, or if that is not recorded, all of them.

        Without its checkpoints.
        """
        known = [path for path in self._placed if path.startswith(f"step{step}/")]
        found = known or self._inside(Unit(f"step{step}", ()))
        return [path for path in found if not path.startswith(f"step{step}/checkpoints/")]

    def set_aside(self, step: int) -> str:
        """Move a step's folder to a name of its own, and return that name.

        Its complete.json is part of the name: each training of a step has another one.
        """
        place = self.target / f"step{step}"
        name = f"{place.name}.earlier-{self.sha256(f'{place.name}/complete.json')[:8]}"
        tries = (name if number == 1 else f"{name}-{number}" for number in itertools.count(1))
        new = next(each for each in tries if not os.path.lexists(self.target / each))
        place.replace(self.target / new)
        self._aside[place.name] = new
        _sync(self.target)
        self._placed = {path: known for path, known in self._placed.items() if not path.startswith(f"{place.name}/")}
        self._save()
        return new

    def has(self, unit: Unit) -> bool:
        return all(self.sha256(file.path) == file.sha256 for file in unit.files) and not self._surplus(unit)

    def _inside(self, unit: Unit) -> list[str]:
        """List all files that are under the unit's name."""
        place = self.target / unit.path
        if place.is_dir() and not place.is_symlink():
            return [
                path.relative_to(self.target).as_posix()
                for path in place.rglob("*")
                if not path.is_dir() or path.is_symlink()
            ]
        return [unit.path] if os.path.lexists(place) else []

    def _surplus(self, unit: Unit) -> list[str]:
        return sorted({*self._inside(unit)} - {file.path for file in unit.files})

    def check(self, unit: Unit) -> None:
        """Raise ToolkitError if something is in the unit's place that no fetch has put there."""
        coming = {file.path: file.sha256 for file in unit.files}
        for path in self._inside(unit):
            if self.sha256(path) not in (coming.get(path), *self._placed.get(path, {}).get("sha256", [])):
                raise ToolkitError(
                    f"{self.target / path} is not what was fetched",
                    why="it was changed or written by something else; it is not overwritten",
                    hint="move it away, then the same command resumes",
                )

    def place(self, unit: Unit, parts: Mapping[str, Path]) -> None:
        """Move a unit into its place, and replace what was fetched earlier.

        parts: the verified files, by path. If it is stopped in the middle, the old or the new unit
        is in place; for a folder, once `put_back` was called.
        """
        place, made, old = self.target / unit.path, self.staging / "placing", self._old(unit.path)
        _remove(made)
        for path, part in parts.items():
            file = made / path
            file.parent.mkdir(parents=True, exist_ok=True)
            part.replace(file)
        for each in unit.files:
            if each.path not in parts:  # it was fetched earlier
                (made / each.path).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(self._source(each.path), made / each.path)
        self.check(unit)  # again, since the copy may have taken long
        for each in unit.files:
            file = made / each.path
            file.chmod(0o644)
            hashes = [*self._placed.get(each.path, {}).get("sha256", []), each.sha256]
            found = file.stat()
            self._placed[each.path] = {
                "sha256": list(dict.fromkeys(hashes[::-1]))[:4][::-1],
                "stat": [found.st_size, found.st_mtime_ns],
            }
        self._save()  # before the rename, so that the file is known to be ours as soon as it exists
        place.parent.mkdir(parents=True, exist_ok=True)
        if unit.is_folder:
            for folder in sorted({(made / each.path).parent for each in unit.files}):
                _sync(folder)
            if os.path.lexists(place):
                place.replace(old)
        (made / unit.path).replace(place)
        _sync(place.parent)
        inside = [path for path in self._placed if path.startswith(f"{unit.path}/")]
        for path in [path for path in inside if not (self.target / path).exists()]:
            del self._placed[path]
        self._save()
        _remove(old)

    def _source(self, path: str) -> Path:
        """Return where a file lies that was here when this call began."""
        step, _, rest = path.partition("/")
        aside = self.target / self._aside.get(step, step) / rest
        return aside if aside.exists() else self.target / path

    def _old(self, path: str) -> Path:
        """Return where a unit is kept while a new one replaces it."""
        return self.staging / f"{_OLD}{quote(path, safe='')}"

    def put_back(self) -> None:
        """Put back units that a stopped call had moved away and not yet replaced."""
        for old in self.staging.glob(f"{_OLD}*"):
            place = self.target / unquote(old.name.removeprefix(_OLD))
            if not os.path.lexists(place):
                old.replace(place)

    def drop(self, path: str) -> None:
        """Remove a folder or file that was fetched earlier, unless it was changed since."""
        place, old = self.target / path, self.staging / "dropped"
        paths = self._inside(Unit(path, ()))
        if not paths or not all(self.sha256(each) in self._placed.get(each, {}).get("sha256", []) for each in paths):
            return
        _remove(old)
        old.parent.mkdir(parents=True, exist_ok=True)
        place.replace(old)
        _remove(old)
        self._placed = {each: known for each, known in self._placed.items() if each not in paths}
        self._save()

    def drop_checkpoints(self, step: int, keep: int | None = None) -> None:
        folder = self.target / f"step{step}" / "checkpoints"
        for each in folder.glob("update-*"):
            if each.name != f"update-{keep}":
                self.drop(each.relative_to(self.target).as_posix())
        with suppress(OSError):
            folder.rmdir()

    def is_complete(self, step: int, mark: str) -> bool:
        """Tell whether all of the step is here. mark: the hash of complete.json, which is last."""
        return self.sha256(f"step{step}/complete.json") == mark

    def _save(self) -> None:
        self.target.mkdir(parents=True, exist_ok=True)
        write_json(self._record, self._placed)

    def clear(self, keep: Collection[Path] = (), *, keep_checkpoints: bool = False) -> None:
        """Remove from the staging folder what is no longer needed."""
        for path in self.staging.iterdir() if self.staging.is_dir() else ():
            if path not in keep and not (keep_checkpoints and path.name.startswith(_CHECKPOINT)):
                _remove(path)
        with suppress(OSError):
            self.staging.rmdir()

    # --- parts ---

    def part(self, file: RemoteFile) -> Path:
        """Return where a file is put together.

        The name holds the file's hash, so that a partial file can only be its beginning. A file
        that grows has its own name instead.
        """
        if file.grows:
            return self.staging / f"growing-{file.path}"
        name = hashlib.sha256(file.path.encode()).hexdigest()[:8]  # the same content may be wanted twice
        return self.staging / f"{_CHECKPOINT if '/checkpoints/' in file.path else ''}{file.sha256}-{name}"

    def begin(self, file: RemoteFile, *, afresh: bool = False) -> int:
        """Return the byte from which the transfer of a file resumes; 0 if `afresh`.

        The part of a growing file that was fetched earlier is its beginning, unless the file was
        written again from scratch.
        """
        part, place = self.part(file), self.target / file.path
        if afresh:
            part.unlink(missing_ok=True)
        elif file.grows and not part.exists() and place.is_file() and place.stat().st_size <= file.size_bytes:
            shutil.copyfile(place, part)
        part_bytes = part.stat().st_size if part.exists() else 0
        if part_bytes > file.size_bytes:
            part.unlink()
            return 0
        return part_bytes


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _hash(file: IO[bytes]) -> str:
    digest = hashlib.sha256()
    while block := file.read(BLOCK):
        digest.update(block)
    return digest.hexdigest()


def _sync(folder: Path) -> None:
    opened = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)
