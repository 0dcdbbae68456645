"""What a box has of a run, as `results.sh manifest` reports it: files with sizes and hashes.

The files are grouped into units, each of which gets its name as a whole. The box may belong to
anybody, so only names that a run can have are accepted.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import IO

from remote.results.run_contents import SHA256, NewestCheckpoint, run_id

NAME_BYTES = 255  # of a file's name, as file systems have it
TEXTS = ("events.jsonl", "train.log", "job.yaml")  # of a run; they count as fetched together
MODELS = ("model", "model_ema", "best")

# Bytes that are here, bytes in all, the file that comes. While the box hashes: 0, 0, the file.
Progress = Callable[[int, int, str], None]


def silent(_done: int, _total: int, _what: str) -> None:
    pass


@dataclass(frozen=True)
class RemoteFile:
    path: str  # below the run folder, with `/`
    size_bytes: int
    sha256: str  # of its first `size_bytes`
    grows: bool = False
    content: bytes | None = None  # of a small file that came with the list


@dataclass(frozen=True)
class Unit:
    """A file, or a folder with all its files, that gets its name here in one rename."""

    path: str
    files: tuple[RemoteFile, ...]

    @property
    def is_folder(self) -> bool:
        return any(file.path != self.path for file in self.files)


@dataclass(frozen=True)
class Manifest:
    """What the box has of a run. A step or a checkpoint is in it as a whole, or not at all."""

    files: tuple[RemoteFile, ...] = ()
    steps: Mapping[int, str] = field(default_factory=dict)  # complete ones: the hash of complete.json
    checkpoints: Mapping[int, NewestCheckpoint] = field(default_factory=dict)
    changed: tuple[int, ...] = ()  # steps that were written to meanwhile
    odd: int = 0  # files whose names hold control characters
    others: tuple[str, ...] = ()  # runs that are on the box
    problem: str = ""  # no_root, no_run
    id: str = ""  # of the run; "": it was begun before there were ids
    first_event: str = ""  # the hash of the first event's line

    def units(self) -> list[Unit]:
        """Group the files into units, in the order of transfer.

        Small files first, of them the run's id, then each step, its complete.json last.
        """
        folders: dict[str, list[RemoteFile]] = {}
        for file in self.files:
            folders.setdefault(_unit_of(file.path), []).append(file)

        def order(unit: Unit) -> tuple[bool, bool, str, bool, str]:
            path = unit.path
            return path != "id", path[:4] == "step", path[:5], path.endswith("complete.json"), path

        return sorted((Unit(path, tuple(files)) for path, files in folders.items()), key=order)


def models_digest(files: Iterable[tuple[str, int, str]]) -> str:
    """Hash the names, sizes and hashes of all files of a step's models."""
    lines = sorted(f"{sha256} {size_bytes} {path}" for path, size_bytes, sha256 in files)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _unit_of(path: str) -> str:
    parts = path.split("/")
    if parts[0] == "tokenizer":
        return parts[0]
    if len(parts) > 2 and parts[1] in MODELS:
        return "/".join(parts[:2])
    return "/".join(parts[:3]) if len(parts) > 3 else path


_ONE = r"(?!\.{1,2}(?:/|$))[^/]+"
_KNOWN = re.compile(
    rf"id|events\.jsonl|train\.log|job\.yaml|format|chats/{_ONE}|tokenizer(?:/{_ONE})+"
    rf"|step[123]/(?:complete\.json|fields\.json|(?:model|model_ema|best)(?:/{_ONE})+"
    rf"|checkpoints/update-[0-9]{{1,15}}/{_ONE})"
)


def is_safe(path: str) -> bool:
    """Tell whether a run may hold a file of this path; a hostile box may name any path."""
    odd = re.search("[\x00-\x1f\x7f\ufffd]", path)
    return (
        not odd
        and _KNOWN.fullmatch(path) is not None
        and all(len(part.encode()) <= NAME_BYTES for part in path.split("/"))
    )


class ManifestReader:
    """Reads the answer of `results.sh manifest` as it comes."""

    def __init__(self, stream: IO[bytes], progress: Progress = silent) -> None:
        self._stream, self._progress = stream, progress
        self._files: dict[str, RemoteFile] = {}
        self._steps: dict[int, str] = {}
        self._checkpoints: dict[int, NewestCheckpoint] = {}
        self._changed: list[int] = []
        self._others: list[str] = []
        self._problem, self._odd, self._first_event = "", 0, ""

    def read(self) -> Manifest | None:
        """Read the manifest; None if the connection ended before the answer."""
        while line := self._stream.readline():
            if not line.endswith(b"\n"):
                return None
            word, _, rest = line[:-1].decode("utf-8", "replace").partition(" ")
            if word == "end":
                return self._manifest()
            self._take(word, rest)
        return None

    def _take(self, word: str, rest: str) -> None:
        if word == "hashing":
            self._progress(0, 0, rest.partition(" ")[2])
        elif word in ("file", "grown") and (found := re.fullmatch(r"([0-9]{1,15}) ([0-9a-f]{64}) (.+)", rest)):
            self._add(RemoteFile(found[3], int(found[1]), found[2], grows=word == "grown"))
        elif word == "text" and (found := re.fullmatch(r"([0-9]{1,9}) (.+)", rest)):
            data = self._stream.read(int(found[1]))
            self._add(RemoteFile(found[2], len(data), hashlib.sha256(data).hexdigest(), content=data))
            if "/checkpoints/" in found[2]:
                self._of_checkpoint(found[2], data)
        elif word == "began" and SHA256.fullmatch(rest):
            self._first_event = rest
        elif word == "step" and (found := re.fullmatch(r"([123]) ([0-9a-f]{64})", rest)):
            self._steps[int(found[1])] = found[2]
        elif word == "checkpoint" and (
            found := re.fullmatch(r"([123]) ([0-9]{1,15}) ([0-9a-f]{64}) ([0-9]{1,15})", rest)
        ):
            self._checkpoints[int(found[1])] = NewestCheckpoint(int(found[2]), found[3], int(found[4]))
        elif word == "changed" and rest in ("1", "2", "3"):
            self._changed.append(int(rest))
        elif word in ("no_root", "no_run"):
            self._problem = word
        elif word == "has":
            self._others.append(rest)
        elif word == "odd" and rest.isdigit():
            self._odd += int(rest)

    def _add(self, file: RemoteFile) -> None:
        if is_safe(file.path):
            self._files[file.path] = file
        else:
            self._odd += 1

    def _of_checkpoint(self, path: str, data: bytes) -> None:
        """Add the files that a checkpoint's complete.json names."""
        try:
            listed = json.loads(data)["files"]
            files = [(name, file["size"], file["sha256"]) for name, file in listed.items()]
        except (ValueError, KeyError, TypeError, AttributeError):
            files = []
        if not files or not all(
            type(bytes_) is int and bytes_ >= 0 and SHA256.fullmatch(str(sha)) and "/" not in name
            for name, bytes_, sha in files
        ):
            self._files.pop(path, None)  # useless: the checkpoint's files cannot be verified
            self._odd += 1
            return
        for name, bytes_, sha in files:
            self._add(RemoteFile(f"{path.rpartition('/')[0]}/{name}", bytes_, sha))

    def _manifest(self) -> Manifest:
        def is_whole(file: RemoteFile) -> bool:
            step = int(file.path[4]) if file.path.startswith("step") else 0
            return not step or step in self._steps or (step in self._checkpoints and step not in self._changed)

        return Manifest(
            files=tuple(file for file in self._files.values() if is_whole(file)),
            steps=self._steps,
            checkpoints=self._checkpoints,
            changed=tuple(self._changed),
            odd=self._odd,
            others=tuple(self._others),
            problem=self._problem,
            id=run_id((self._files["id"].content or b"").decode("ascii", "replace")) if "id" in self._files else "",
            first_event=self._first_event,
        )
