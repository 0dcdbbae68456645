"""Files that a crash does not tear: written beside, synced, renamed; and the room that there is for
them.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


def write_json(path: Path, value: Any) -> None:
    """Whole or as it was before. A link shared with another run is left to that run."""
    partial = path.with_name(path.name + ".partial")
    with partial.open("w", encoding="utf-8") as file:
        file.write(json.dumps(value, indent=1, ensure_ascii=False) + "\n")
        file.flush()
        os.fsync(file.fileno())
    rename(partial, path)


def read_json(path: Path) -> Any:
    """None: it is not there, or torn (a machine that lost its power leaves an empty file)."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None


def rename(partial: Path, path: Path) -> None:
    """`partial` becomes `path`, also after a loss of power."""
    partial.replace(path)
    sync(path.parent)


def sync(path: Path) -> None:
    """What the file or folder holds is on disk (of a folder: its names)."""
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def sync_files(folder: Path) -> None:
    """All files directly in the folder, and their names."""
    for file in folder.iterdir():
        sync(file)
    sync(folder)


def size_of(folder: Path) -> int:
    """Bytes of all files in it, at any depth; 0 if it is not there."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def room(folder: Path) -> tuple[int, int | None]:
    """-> (bytes, inodes) that are free for us where `folder` lies; None where the file system does
    not count inodes. Raises OSError.
    """
    found = os.statvfs(folder)
    return found.f_bavail * found.f_frsize, found.f_favail if found.f_files else None
