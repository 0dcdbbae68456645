"""What of a job lies on the laptop and has to be on the box: data sets and models that are local
paths. They travel by their content's hash, so that the same content travels once, and a run that
goes on finds the same path in its job.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from jobs.errors import ToolkitError
from jobs.spec import Job
from jobs.yaml12 import dump_yaml
from remote.deploy.sync import ALWAYS, Tree, tree_of


@dataclass(frozen=True)
class JobInput:
    """A local data set or model that a job names."""

    name: str  # as the job says it
    path: Path  # where it is here
    tree: Tree  # its files, under its own name

    def folder(self, root: str) -> str:
        return f"{root}/inputs/{self.tree.key}"

    def on_box(self, root: str) -> str:
        """The path that the job says there."""
        return f"{self.folder(root)}/{self.path.name}"


def pack(job: Job, here: Path, checkout: Path) -> list[JobInput]:
    """All that has to travel.

    Names are looked up as training looks them up: in this folder, then in the checkout.

    Raises ToolkitError: a path that is not there, or that cannot be read.
    """
    models = [model for model in (job.actor.model, job.critic.model) if isinstance(model, str) and model != "actor"]
    names = [*dict.fromkeys((*job.data.datasets, *models))]
    return [luggage for name in names if (luggage := _luggage(name, here, checkout))]


def _luggage(name: str, here: Path, checkout: Path) -> JobInput | None:
    found = next(
        (place for folder in (here, checkout) if os.path.lexists(place := folder / Path(name).expanduser())), None
    )
    if found is None:
        if name.startswith((".", "/", "~")) or name.endswith((".jsonl", ".json")):
            raise ToolkitError(
                f"there is no `{name}` here",
                why=f"neither in {here} nor in {checkout}",
                hint="mend the path in the job file",
            )
        return None  # a name of the hub
    path = found.resolve()
    goes_with_the_code = Path(name).parts[:1] in {(part,) for part in ALWAYS} and path == (checkout / name).resolve()
    return None if goes_with_the_code else JobInput(name, path, _tree(name, path))


def _tree(name: str, path: Path) -> Tree:
    files = list(_files(path)) if path.is_dir() else [path]
    if not files:
        raise ToolkitError(
            f"there is nothing in `{name}`", why=f"{path} is an empty folder", hint="name another in the job file"
        )
    return tree_of(path.parent, [str(file.relative_to(path.parent)) for file in files])


def _files(folder: Path) -> Iterator[Path]:
    """Hidden ones (.git, .cache, .DS_Store) stay at home.

    Raises ToolkitError for a link, whose target stays there, too.
    """
    for above, folders, names in os.walk(folder):
        folders[:] = [each for each in folders if not each.startswith(".")]
        for path in (Path(above, each) for each in (*folders, *names) if not each.startswith(".")):
            if path.is_symlink():
                raise ToolkitError(
                    f"{path} is a link, and what it leads to does not travel",
                    hint="copy the folder with `cp -rL`, and name the copy",
                )
            if path.is_file():
                yield path


def job_on_box(job: Job, luggage: Sequence[JobInput], root: str) -> bytes:
    """The job file that training reads there: `--set` applied, every local path as it is on the
    box.
    """
    there = {each.name: each.on_box(root) for each in luggage}
    tree = job.dump()
    tree["data"]["datasets"] = [there.get(name, name) for name in tree["data"]["datasets"]]
    for part in ("actor", "critic"):
        model = tree[part]["model"]
        if isinstance(model, str):
            tree[part]["model"] = there.get(model, model)
    return dump_yaml(tree).encode()
