"""The local data sets and models of a job, which have to be sent to the box.

Their folder on the box is named by the hash of their content. So the same content is sent once, and
a run that resumes finds the same path in its job.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from jobs.errors import ToolkitError
from jobs.spec import Job
from jobs.yaml12 import dump_yaml
from remote.deploy.sync import ALWAYS, Tree, tree_of

READS_INPUTS = "reading the job's data sets and models"  # while `pack` runs: some GB take a while
MODEL_FIELDS = (
    ("actor", "model"), ("actor", "sft_model"), ("critic", "model"), ("critic", "reward_model"), ("ppo", "judge_model"),
)  # fmt: skip
LFS_POINTER = b"version https://git-lfs"  # how the text begins that Git has in place of a large file


@dataclass(frozen=True)
class JobInput:
    """A local data set or model that a job names."""

    name: str  # as the job says it
    path: Path  # where it is here
    tree: Tree  # its files, under its own name

    def folder(self, root: str) -> str:
        return f"{root}/inputs/{self.tree.key}"

    def on_box(self, root: str) -> str:
        """Return the path that the job file on the box names."""
        return f"{self.folder(root)}/{self.path.name}"


def pack(job: Job, here: Path, checkout: Path) -> list[JobInput]:
    """Find all inputs that have to be sent.

    Names are looked up as training looks them up: in this folder, then in the checkout. Raises
    ToolkitError: a path does not exist or cannot be read, or a file is only Git LFS's pointer.
    """
    models = [model for model in job.sources if isinstance(model, str)]
    names = [*dict.fromkeys((*job.data.names, *models))]
    return [job_input for name in names if (job_input := _job_input(name, here, checkout))]


def _job_input(name: str, here: Path, checkout: Path) -> JobInput | None:
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
    is_in_code = Path(name).parts[:1] in {(part,) for part in ALWAYS} and path == (checkout / name).resolve()
    return None if is_in_code else JobInput(name, path, _tree(name, path))


def _tree(name: str, path: Path) -> Tree:
    files = list(_files(path)) if path.is_dir() else [path]
    if not files:
        raise ToolkitError(
            f"there is nothing in `{name}`", why=f"{path} is an empty folder", hint="name another in the job file"
        )
    if pointers := [file for file in files if _is_lfs_pointer(file)]:
        more = f", and {len(pointers) - 1} more" if len(pointers) > 1 else ""
        raise ToolkitError(
            f"{pointers[0]} is a pointer of Git LFS, not the file itself{more}",
            why="its repository was cloned without its large files",
            hint=f"git -C {shlex.quote(str(pointers[0].parent))} lfs pull (it needs git-lfs), then the same command",
        )
    return tree_of(path.parent, [str(file.relative_to(path.parent)) for file in files])


def _is_lfs_pointer(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(len(LFS_POINTER)) == LFS_POINTER
    except OSError:
        return False  # `tree_of` says why it cannot be read


def _files(folder: Path) -> Iterator[Path]:
    """Yield the files of a folder, without hidden ones (.git, .cache, .DS_Store).

    Raises ToolkitError for a link, since its target would not be sent.
    """
    for above, folders, names in os.walk(folder):
        folders[:] = [each for each in folders if not each.startswith(".")]
        for path in (Path(above, each) for each in (*folders, *names) if not each.startswith(".")):
            if path.is_symlink():
                raise ToolkitError(
                    f"{path} is a link, and its target would not be sent",
                    hint="copy the folder with `cp -rL`, and name the copy",
                )
            if path.is_file():
                yield path


def job_on_box(job: Job, inputs: Sequence[JobInput], root: str) -> bytes:
    """Write the job file for the box: `--set` applied, and local paths replaced by those there."""
    paths = {each.name: each.on_box(root) for each in inputs}
    tree = job.dump()
    tree["data"]["datasets"] = [
        paths.get(each, each)
        if isinstance(each, str)
        else each.model_dump(mode="json") | {"name": paths.get(each.name, each.name)}
        for each in job.data.datasets
    ]
    for part, field in MODEL_FIELDS:
        model = tree[part][field]
        if isinstance(model, str):
            tree[part][field] = paths.get(model, model)
    return dump_yaml(tree).encode()
