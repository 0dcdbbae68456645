"""Files are written so that a crash does not tear them: under another name, synced, renamed."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


def write_json(path: Path, value: Any) -> None:
    """Write a file whole, or leave it as it was.

    A hard link that is shared with another run is not written to: that run keeps the old file.
    """
    write_line(path, json.dumps(value, indent=1, ensure_ascii=False))


def write_line(path: Path, text: str) -> None:
    """Write a file of this text and a newline whole, or leave it as it was."""
    partial = path.with_name(path.name + ".partial")
    with partial.open("w", encoding="utf-8") as file:
        file.write(text + "\n")
        file.flush()
        os.fsync(file.fileno())
    rename(partial, path)


def read_json(path: Path) -> Any:
    """Read a file; None: it is missing, or torn (a loss of power leaves an empty file)."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None


def rename(partial: Path, path: Path) -> None:
    """Rename `partial` to `path`, so that it lasts after a loss of power."""
    partial.replace(path)
    sync(path.parent)


def sync(path: Path) -> None:
    """Wait until the content of the file is on disk; of a folder, the names in it."""
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def sync_files(folder: Path) -> None:
    """Wait until all files directly in the folder, and their names, are on disk."""
    for file in folder.iterdir():
        sync(file)
    sync(folder)


def size_of(folder: Path) -> int:
    """Return the bytes of all files in the folder, at any depth; 0 if it does not exist."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def room(folder: Path) -> tuple[int, int | None]:
    """Return the (bytes, inodes) that are free for us on the disk of `folder`.

    Inodes are None where the file system does not count them. Raises OSError.
    """
    found = os.statvfs(folder)
    return found.f_bavail * found.f_frsize, found.f_favail if found.f_files else None
