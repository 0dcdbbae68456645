"""What of a job lies on the laptop and has to be on the box: data sets and models that are local paths. They travel by their content's
hash, so that the same content travels once, and a run that goes on finds the same path in its job.
"""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from jobs.errors import ToolkitError
from jobs.spec import Job
from jobs.yaml12 import dump_yaml

SENT_WITH_THE_CODE = ("env", "jobs", "remote", "rlhf_train")  # folders of the checkout
HASH_DIGITS = 16


@dataclass(frozen=True)
class Luggage:
    """A local data set or model that a job names."""

    name: str  # as the job says it
    path: Path  # where it is here
    hash: str
    files: tuple[PurePosixPath, ...]  # below `path`; of a file, its own name alone
    size_bytes: int

    def folder(self, root: str) -> str:
        return f"{root}/inputs/{self.hash}"

    def on_box(self, root: str) -> str:
        """The path that the job says there."""
        return f"{self.folder(root)}/{self.path.name}"


def pack(job: Job, here: Path, checkout: Path) -> list[Luggage]:
    """All that has to travel. Names are looked up as training looks them up: in this folder, then in the checkout.

    Raises ToolkitError: a path that is not there, or that cannot be read.
    """
    models = [model for model in (job.actor.model, job.critic.model) if isinstance(model, str) and model != "actor"]
    names = [*dict.fromkeys((*job.data.datasets, *models))]
    return [luggage for name in names if (luggage := _luggage(name, here, checkout))]


def _luggage(name: str, here: Path, checkout: Path) -> Luggage | None:
    found = next((place for folder in (here, checkout) if os.path.lexists(place := folder / Path(name).expanduser())), None)
    if found is None:
        if name.startswith((".", "/", "~")) or name.endswith((".jsonl", ".json")):
            raise ToolkitError(f"there is no `{name}` here", why=f"neither in {here} nor in {checkout}", hint="mend the path in the job file")
        return None  # a name of the hub
    goes_with_the_code = Path(name).parts[:1] in {(part,) for part in SENT_WITH_THE_CODE} and found.resolve() == (checkout / name).resolve()
    return None if goes_with_the_code else _packed(name, found.resolve())


def _packed(name: str, path: Path) -> Luggage:
    digest, files, size_bytes = hashlib.sha256(), [], 0
    try:
        for relative in _files(path):
            file = path / relative if path.is_dir() else path
            content = hashlib.sha256()
            with file.open("rb") as opened:
                while block := opened.read(1 << 20):
                    content.update(block)
                    size_bytes += len(block)
            digest.update(os.fsencode(str(relative)) + b"\0" + content.digest())
            files.append(relative)
    except OSError as error:
        raise ToolkitError(
            f"cannot read `{name}`", why=f"{error.filename}: {error.strerror}", hint="mend it, or name another in the job file"
        ) from None
    if not files:
        raise ToolkitError(f"there is nothing in `{name}`", why=f"{path} is an empty folder", hint="name another in the job file")
    return Luggage(name, path, digest.hexdigest()[:HASH_DIGITS], tuple(files), size_bytes)


def _files(path: Path) -> Iterator[PurePosixPath]:
    """In an order of their own; hidden ones (.git, .cache, .DS_Store) stay at home."""
    if not path.is_dir():
        yield PurePosixPath(path.name)
        return
    for folder, folders, names in os.walk(path):
        folders[:] = sorted(each for each in folders if not each.startswith("."))
        for each in folders:
            if (link := Path(folder, each)).is_symlink():  # could lead round in a circle
                raise OSError(errno.ELOOP, "a link to a folder does not travel", str(link))
        below = Path(folder).relative_to(path)
        yield from (PurePosixPath(below / name) for name in sorted(names) if not name.startswith("."))


def job_on_box(job: Job, luggage: Sequence[Luggage], root: str) -> bytes:
    """The job file that training reads there: `--set` applied, every local path as it is on the box."""
    there = {each.name: each.on_box(root) for each in luggage}
    tree = job.dump()
    tree["data"]["datasets"] = [there.get(name, name) for name in tree["data"]["datasets"]]
    for part in ("actor", "critic"):
        model = tree[part]["model"]
        if isinstance(model, str):
            tree[part]["model"] = there.get(model, model)
    return dump_yaml(tree).encode()
