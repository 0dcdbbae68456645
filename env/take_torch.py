"""Take the packages of a lock, PyTorch, from the Python that runs this into another environment.

    THEIRS/bin/python3.10 env/take_torch.py env/pins/torch-cu118.txt OURS/lib/python/site-packages

Providers' images often have PyTorch, which takes longest to download. It is taken only if it is the
locked version and each of its files is as its own record says. Files are linked where that works,
else copied. If something is not as it should be, no file is left behind; that is not an error.
"""

from __future__ import annotations

import base64
import hashlib
import importlib.metadata
import os
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path


class NotTheSame(Exception):
    pass


def files_of(name: str, version: str) -> Iterator[tuple[str, Path]]:
    """Yield (place in site-packages, file) of an installed package, all of them verified."""
    try:
        package = importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
        raise NotTheSame(f"{name} is not installed") from None
    if package.version != version:
        raise NotTheSame(f"{name} is {package.version}, not {version}")
    if not package.files:
        raise NotTheSame(f"{name} has no record of its files")
    for file in package.files:
        # Programs outside of site-packages name the Python that they were installed for, and
        # Python writes bytecode again.
        if file.parts[0] == ".." or file.suffix == ".pyc":
            continue
        found = Path(str(package.locate_file(file)))
        if file.hash is not None and digest(found, file.hash.mode) != file.hash.value:
            raise NotTheSame(f"{found} is not as it was installed")
        yield str(file), found


def digest(file: Path, mode: str) -> str:
    made = hashlib.new(mode)
    try:
        with file.open("rb") as content:
            while piece := content.read(2**20):
                made.update(piece)
    except OSError as error:
        raise NotTheSame(f"{file}: {error.strerror}") from None
    return base64.urlsafe_b64encode(made.digest()).rstrip(b"=").decode()


def take(lock: str, target: Path) -> list[str]:
    """Put what the lock names into `target`, and return it as name==version."""
    wanted = re.findall(r"^([A-Za-z0-9_.-]+)==([^\s;\\]+)", lock, re.MULTILINE)
    # By place: several packages may have the same file, such as nvidia/__init__.py.
    found = {place: file for name, version in wanted for place, file in files_of(name, version)}
    try:
        for place, file in found.items():
            put(file, target / place)
    except OSError:
        for place in found:
            (target / place).unlink(missing_ok=True)
        raise
    return [f"{name}=={version}" for name, version in wanted]


def put(file: Path, place: Path) -> None:
    place.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(file, place)
    except OSError:  # another disk
        shutil.copy2(file, place)


def main(lock: str, target: str) -> None:
    try:
        taken = take(Path(lock).read_text(encoding="utf-8"), Path(target))
    except (NotTheSame, OSError) as reason:
        print(f"not taken from {sys.executable}: {reason}")
    else:
        print(f"{', '.join(taken)} taken from {sys.executable}, which has the locked version")


if __name__ == "__main__":
    main(*sys.argv[1:])
