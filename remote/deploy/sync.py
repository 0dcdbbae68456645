"""Sending files from here to a folder on the box, as a whole or not at all.

A checkout is sent as git's own rules define it, with as few bytes over the connection as possible.
The files go to FOLDER.partial. The box itself computes the fingerprint of what is there, and
renames the folder only if the fingerprint is ours.

rsync sends the files, and links equal files from the code that is on the box already. tar is used
if one of the two sides has no rsync, or if the one here is too old (macOS).
"""

from __future__ import annotations

import hashlib
import os
import re
import stat
import subprocess
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, TYPE_CHECKING, Literal

from jobs.errors import ExitCode, ToolkitError
from jobs.formatting import one_line, plural, size
from remote.output import ticking
from remote.scripts import script
from remote.ssh import commands

if TYPE_CHECKING:
    from remote.ssh.connection import BoxConnection, CommandResult

Say = Callable[[str], None]

# Sent whatever an ignore file says: some people call their virtual environment `env`.
ALWAYS = ("jobs", "env", "remote", "rlhf_train")
KEY_DIGITS = 16

# Our own code is 2 MB. More than this is a data set, a model or a run that is in the checkout by
# mistake.
ADVISED_BYTES, MOST_BYTES = 50_000_000, 1_000_000_000
ADVISED_FILES, MOST_FILES = 5_000, 50_000

PROGRESS_RSYNC = (3, 1)  # the first that says how many bytes of all files are done
OLDEST_RSYNC = (3, 0)  # macOS has 2.6.9 (no --protect-args), or openrsync, which calls itself 2.6.9
# Exit codes of rsync. 2, 4: it does not know an option; 12, 127: there is no rsync on the other
# side (or the connection broke).
RSYNC_NOT_THERE = (2, 4, 12, 14, 127)
RSYNC_CHANGED = (23, 24)  # files vanished, or could not be read
RSYNC_LINE = (5, 10, 12, 30, 35, 255)

# Left out where there is no git: what no program needs.
JUNK = re.compile(
    r"\.git|\.hg|\.venv|venv|\.tox|node_modules|__pycache__|.*\.py[co]|.*\.egg-info"
    r"|\.(mypy|pytest|ruff)_cache|\.DS_Store|\.idea|\.vscode"
)
JUNK_AT_TOP = re.compile(r"\.env(\.new)?|\.venv\.lock|build|boxes\.yaml|(runs|cache|data|secrets)/(?!\.gitkeep$).*")


@dataclass(frozen=True)
class File:
    """A file or a symbolic link of a tree."""

    name: str  # below the tree's base, with `/`
    size_bytes: int = 0
    executable: bool = False
    target: str | None = None  # of a link


@dataclass(frozen=True)
class Tree:
    """Files to be sent, and the fingerprint of them all."""

    base: Path
    files: tuple[File, ...]  # in the order of their names' bytes; names are decoded by os.fsdecode
    fingerprint: str  # 64 hex digits: names, what is executable, contents, targets of links
    left_out: tuple[str, ...] = ()  # other repositories inside, which git lists as one name

    @property
    def key(self) -> str:
        return self.fingerprint[:KEY_DIGITS]

    @property
    def size_bytes(self) -> int:
        return sum(file.size_bytes for file in self.files)

    def __str__(self) -> str:
        return f"{plural(len(self.files), 'files')}, {size(self.size_bytes)}"


def _silent(text: str) -> None:
    pass


@dataclass(frozen=True)
class Sent:
    how: Literal["rsync", "tar", "shown"]
    seconds: float
    why: str = ""  # not rsync


class UploadDiffers(ToolkitError):
    """The files that arrived differ from those that were read before."""


# --- what is sent ---------------------------------------------------------------------------------


def checkout_tree(checkout: Path) -> Tree:
    """Read the files of a checkout: those that git tracks or would track, and our four packages.

    Without git: all files but JUNK. Raises ToolkitError: git fails, a file cannot be read, or the
    checkout is too large.
    """
    names, left_out = _git_names(checkout) if (checkout / ".git").exists() else (set(_walked(checkout)), ())
    names = {*names, *(name for package in ALWAYS for name in _walked(checkout, package))}
    tree = tree_of(checkout, names, left_out=left_out)
    missing = [package for package in ALWAYS if not any(file.name.startswith(f"{package}/") for file in tree.files)]
    if missing:
        raise ToolkitError(
            f"{checkout} is not a whole checkout",
            why=f"no file in {', '.join(missing)}",
            hint="run `fab` in the checkout of rlhf-box",
        )
    check_size(tree)
    return tree


def tree_of(base: Path, names: Iterable[str], *, left_out: Sequence[str] = ()) -> Tree:
    """Read the named files below `base`, each once.

    Names of missing files, of folders, and of files behind a link are skipped.
    """
    plain_folders = {".": True}
    files, content = [], hashlib.sha256()
    for name in sorted(set(names), key=os.fsencode):
        path = base / name
        try:
            if not _is_plain(base, PurePosixPath(name).parent, plain_folders):
                continue
            status = path.lstat()
            if stat.S_ISLNK(status.st_mode):
                files.append(File(name, target=os.readlink(path)))  # noqa: PTH115 - pathlib normalizes a target
            elif stat.S_ISREG(status.st_mode):
                files.append(File(name, _read_into(content, path), bool(status.st_mode & 0o111)))
        except (FileNotFoundError, NotADirectoryError):
            continue  # deleted here, but still known to git
        except OSError as error:
            what, why = f"cannot read {one_line(path)}", error.strerror or str(error)
            raise ToolkitError(what, why=why, hint="mend its permissions, or put it into .gitignore") from None
    return Tree(base, tuple(files), _fingerprint(files, content.hexdigest()), tuple(left_out))


def _is_plain(base: Path, folder: PurePosixPath, known: dict[str, bool]) -> bool:
    """Tell whether all parts of a path are real folders: git takes files behind a link for gone."""
    name = str(folder)
    if name not in known:
        known[name] = _is_plain(base, folder.parent, known) and stat.S_ISDIR((base / folder).lstat().st_mode)
    return known[name]


def _read_into(content: hashlib._Hash, path: Path) -> int:
    read = 0
    with path.open("rb") as file:
        while block := file.read(2**20):
            content.update(block)
            read += len(block)
    return read


def _fingerprint(files: Sequence[File], content: str) -> str:
    """Compute a tree's fingerprint, in the same way as land.sh does on the box.

    It hashes lists of names, each with a NUL behind; sizes; all contents in a row; targets of
    links. Together they define what each file holds, and no name has to be parsed from a line of
    text.
    """
    plain = [file for file in files if file.target is None]
    links = [file for file in files if file.target is not None]
    parts = [
        _digest(names_of(plain)),
        _digest(names_of(file for file in plain if file.executable)),
        _digest(b"".join(b"%d\n" % file.size_bytes for file in plain)),
        content,
        _digest(names_of(links)),
        _digest(b"".join(os.fsencode(file.target or "") + b"\n" for file in links)),
    ]
    return _digest("".join(f"{part}\n" for part in parts).encode())


def names_of(files: Iterable[File]) -> bytes:
    return b"".join(b"./" + os.fsencode(file.name) + b"\0" for file in files)


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _git_names(checkout: Path) -> tuple[set[str], tuple[str, ...]]:
    """Ask git for the checkout's files, and for the names of other repositories inside.

    git lists an untracked repository with a slash at its end, and a submodule as a folder.
    """
    command = ["git", "-C", str(checkout), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        listed = subprocess.run(command, capture_output=True, check=False)
    except FileNotFoundError:
        what = "there is no `git` on this machine, and this is a git checkout"
        raise ToolkitError(what, why="git knows which files belong to it", hint="install git") from None
    if listed.returncode:
        raise ToolkitError(
            "git cannot list the files of the checkout",
            why=listed.stderr.decode("utf-8", "replace").strip(),
            hint="see what `git status` says",
        )
    names = {os.fsdecode(name) for name in listed.stdout.split(b"\0") if name}
    folders = {name for name in names if (checkout / name).is_dir() and not (checkout / name).is_symlink()}
    repositories = folders | {name for name in names if name.endswith("/")}
    return names - repositories, tuple(sorted(repositories))


def _walked(checkout: Path, package: str = "") -> Iterator[str]:
    """Yield all files but JUNK, below the checkout or one of its folders."""
    for folder, folders, files in os.walk(checkout / package):
        below = Path(folder).relative_to(checkout)
        prefix = "" if below == Path() else f"{below}/"
        linked = [name for name in folders if (Path(folder) / name).is_symlink()]
        folders[:] = [name for name in folders if name not in linked and not _is_junk(prefix, name)]
        yield from (prefix + name for name in (*files, *linked) if not _is_junk(prefix, name))


def _is_junk(prefix: str, name: str) -> bool:
    return bool(JUNK.fullmatch(name) or JUNK_AT_TOP.fullmatch(prefix + name))


def check_size(tree: Tree) -> str:
    """Return a note if the checkout is large, else "".

    Raises ToolkitError: it is too large to be code.
    """
    if tree.size_bytes > MOST_BYTES or len(tree.files) > MOST_FILES:
        raise ToolkitError(
            f"the checkout is too large to be sent: {tree}",
            why=f"at most {MOST_FILES} files of {size(MOST_BYTES)} are taken for code; the largest are:\n"
            + "\n".join(largest(tree)),
            hint="put what is not code into .gitignore; data sets and models that a job names are sent with the job",
        )
    if tree.size_bytes > ADVISED_BYTES or len(tree.files) > ADVISED_FILES:
        mostly = ", ".join(largest(tree, 3))
        return f"the checkout is large ({tree}), mostly {mostly}; put what is not code into .gitignore"
    return ""


def largest(tree: Tree, count: int = 8) -> list[str]:
    """List the largest folders and files of two levels: `runs2/model: 3 files, 5.2 GB`."""
    groups: dict[str, list[File]] = {}
    for file in tree.files:
        groups.setdefault("/".join(file.name.split("/")[:2]), []).append(file)
    # 1000 bytes more for each file: even an empty one costs time.
    ordered = sorted(groups.items(), key=lambda item: -sum(file.size_bytes + 1000 for file in item[1]))
    sizes = {name: size(sum(file.size_bytes for file in files)) for name, files in ordered[:count]}
    return [f"{one_line(name)}: {plural(len(groups[name]), 'files')}, {sizes[name]}" for name in sizes]


# --- how it is sent -------------------------------------------------------------------------------


def send(
    connection: BoxConnection,
    tree: Tree,
    folder: str,
    *,
    like: str = "",
    rsync_there: bool,
    rsync: str = "rsync",
    compare: bool = False,
    what: str = "sending",
    now: Say = _silent,
) -> Sent:
    """Send a tree into FOLDER.partial on the box, which exists, as does FOLDER.temp.

    `land` then makes it FOLDER. like: a whole folder on the box with mostly the same files. rsync:
    the local program; "" if there is none. what, now: how it is called, and who gets how far it is.
    Raises ToolkitError: the connection broke, the box's disk is full; UploadDiffers: files changed
    here meanwhile.
    """
    progress = _Progress(tree.size_bytes)
    with ticking(_silent if connection.dry_run else now, what, lambda: str(progress)):
        return _send(connection, tree, folder, progress, like, rsync_there, rsync, compare)


class _Progress:
    """How far a tree is sent."""

    def __init__(self, total: int) -> None:
        self._total, self._done = total, 0
        self._archive: IO[bytes] | None = None
        self._is_packed = False

    def rsync_says(self, line: str) -> None:
        done = commands.rsync_done(line)
        self._done = self._done if done is None else done

    def pack(self, archive: IO[bytes]) -> None:
        self._archive, self._done = archive, 0

    def send_archive(self) -> None:
        self._is_packed = True  # from now on a process reads it, which shares its position

    def __str__(self) -> str:
        if self._archive is None:
            return f"{size(self._done)} of {size(self._total)}"
        packed = size(os.fstat(self._archive.fileno()).st_size)
        if not self._is_packed:
            return f"packing, {packed} by now"
        return f"{size(os.lseek(self._archive.fileno(), 0, os.SEEK_CUR))} of {packed}, packed"


def _send(
    connection: BoxConnection,
    tree: Tree,
    folder: str,
    progress: _Progress,
    like: str,
    rsync_there: bool,
    rsync: str,
    compare: bool,
) -> Sent:
    started = time.monotonic()
    why = "" if rsync_there else "no rsync on the box"
    version = rsync_version(rsync) if rsync and not why else (0, 0)
    why = why or ("" if version >= OLDEST_RSYNC else "no rsync here, or an old one")
    if not why:
        with tempfile.NamedTemporaryFile(prefix="rlhf-box-") as names:
            names.write(names_of(tree.files))
            names.flush()
            argv = commands.rsync(
                connection.rsync_shell(), connection.target, str(tree.base.absolute()), names.name, f"{folder}.partial",
                temporary=f"{folder}.temp", like=like, compare=compare, program=rsync,
                progress=version >= PROGRESS_RSYNC,
            )  # fmt: skip
            answer = connection.local(argv, changes=True, check=False, heard=progress.rsync_says, line_end=b"\r")
        if not answer.code:
            return Sent("shown" if connection.dry_run else "rsync", time.monotonic() - started)
        why = _rsync_failed(connection, folder, answer)
    with tempfile.NamedTemporaryFile(prefix="rlhf-box-", suffix=".tar.gz") as packed:
        if not connection.dry_run:
            progress.pack(packed.file)
            pack(tree, Path(packed.name))
            progress.send_archive()
        argv = connection.stream(commands.tar_extract(f"{folder}.partial"))
        answer = connection.local(argv, changes=True, stdin=packed.file, check=False)
    if answer.code:
        raise _not_sent(connection, folder, answer, "tar", answer.code == 255)
    return Sent("shown" if connection.dry_run else "tar", time.monotonic() - started, why)


def _rsync_failed(connection: BoxConnection, folder: str, answer: CommandResult) -> str:
    """Return the reason to try tar, or raise the error that tar would meet, too."""
    if answer.code in RSYNC_CHANGED and not _is_full(connection, folder):
        raise UploadDiffers(
            "files of the checkout could not be read, or disappeared while they were sent",
            why=_last(answer),
            hint="the same command sends what is there now",
        )
    # 12 may also mean a broken connection: then tar fails, too, and reports it.
    if answer.code in RSYNC_NOT_THERE and not _is_full(connection, folder):
        return f"rsync ended with {answer.code}: {_last(answer, 1)}"
    raise _not_sent(connection, folder, answer, "rsync", answer.code in RSYNC_LINE)


def _not_sent(
    connection: BoxConnection, folder: str, answer: CommandResult, program: str, broken: bool
) -> ToolkitError:
    again = "the same command resumes; the deploy before it is unchanged"
    if not broken and _is_full(connection, folder):
        return ToolkitError(
            f"the disk of `{connection.box.name}` is full",
            why=f"at {folder}: {_last(answer, 1)}",
            hint=f"make room there; {again}",
            exit_code=ExitCode.UNFIT,
        )
    if broken:
        return ToolkitError(
            f"the connection to `{connection.box.name}` broke while code was sent",
            why=_last(answer),
            hint=again,
            exit_code=ExitCode.UNREACHABLE,
        )
    return ToolkitError(
        f"{program} ended with {answer.code} on the way to `{connection.box.name}`",
        why=_last(answer),
        hint=again,
        exit_code=ExitCode.INTERNAL,
    )


def _last(answer: CommandResult, count: int = 10) -> str:
    return "\n".join((answer.err.strip() or answer.out.strip()).splitlines()[-count:])


def _is_full(connection: BoxConnection, folder: str) -> bool:
    """Tell whether a folder's disk on the box has no free bytes or inodes; no, if unknown."""
    answer = connection.query(commands.df(str(PurePosixPath(folder).parent)), check=False)
    rows = re.findall(r"\s([0-9]+)\s+[0-9]+\s+(-?[0-9]+)\s+[0-9-]+%?\s+/", answer.out) if not answer.code else []
    return any(int(total) and int(free) <= least for (total, free), least in zip(rows, (1024, 0), strict=False))


def rsync_version(program: str) -> tuple[int, int]:
    """Return rsync's version such as (3, 2); (0, 0) if there is no rsync.

    openrsync counts as the 2.6.9 that it claims to be compatible with.
    """
    try:
        output = subprocess.run([program, "--version"], capture_output=True, check=False).stdout
    except OSError:
        return 0, 0
    found = re.search(rb"^rsync +version +v?([0-9]+)\.([0-9]+)", output, re.MULTILINE)
    return (int(found[1]), int(found[2])) if found else (0, 0)


def pack(tree: Tree, archive: Path) -> None:
    """Pack a tree in GNU's format.

    Both GNU tar and busybox read it, and names may have any length and any bytes.
    """
    with tarfile.open(
        archive, "w:gz", compresslevel=6, format=tarfile.GNU_FORMAT, encoding="utf-8", errors="surrogateescape"
    ) as tar:
        for file in tree.files:
            entry = tarfile.TarInfo(f"./{file.name}")
            entry.mode = 0o755 if file.executable else 0o644
            if file.target is not None:
                entry.type, entry.linkname = tarfile.SYMTYPE, file.target
                tar.addfile(entry)
                continue
            try:
                with (tree.base / file.name).open("rb") as content:
                    entry.mtime, entry.size = int(os.fstat(content.fileno()).st_mtime), file.size_bytes
                    tar.addfile(entry, content)
            except OSError as error:  # gone, or shorter than it was
                raise UploadDiffers(
                    f"{one_line(file.name)} changed while it was sent",
                    why=str(error),
                    hint="the same command sends what is there now",
                ) from None


# --- what arrived ---------------------------------------------------------------------------------


def land(
    connection: BoxConnection, tree: Tree, folder: str, *more: str, check: bool = True, now: Say = _silent
) -> CommandResult:
    """Let the box verify FOLDER.partial, and rename it to FOLDER if it is the tree.

    more: ROOT, TOKEN and lines of `deployed` (land.sh). now: gets the passing state. Raises
    UploadDiffers: it is not the tree.
    """
    argv = commands.sh_script("land", folder, tree.fingerprint, *more)
    with ticking(_silent if connection.dry_run else now, f"the box verifies {tree}"):
        answer = connection.change(argv, stdin=script("land.sh"), timeout_s=600.0, check=False)
    if "differs" in answer.out.split():
        raise UploadDiffers(
            "what arrived is not what was sent",
            why=f"its fingerprint is not {tree.key}",
            hint="the same command sends it again",
        )
    if answer.code and check and "lost" not in answer.out.split():
        raise ToolkitError(
            f"cannot put the files in their place on `{connection.box.name}`",
            why=_last(answer),
            hint="check that the box's disk is there and not full",
            exit_code=ExitCode.UNFIT,
        )
    return answer


def send_whole(
    connection: BoxConnection,
    tree: Tree,
    folder: str,
    *,
    rsync_there: bool = True,
    rsync: str = "rsync",
    what: str = "sending",
    now: Say = _silent,
) -> Sent:
    """Send a job's input into a folder that is named by its content, as a whole or not at all.

    It resumes what an earlier call left unfinished. what, now: as in `send`. Raises ToolkitError:
    as `send` and `land` do.
    """
    connection.change(commands.mkdir(f"{folder}.partial", f"{folder}.temp"))

    def send_it(*, compare: bool) -> Sent:
        return send(connection, tree, folder, rsync_there=rsync_there, rsync=rsync, compare=compare, what=what, now=now)

    sent = send_it(compare=False)
    try:
        land(connection, tree, folder, now=now)
    except UploadDiffers:  # left by an earlier call, or changed within a second: compare contents
        again = send_it(compare=True)
        land(connection, tree, folder, now=now)
        return Sent(again.how, sent.seconds + again.seconds, again.why)
    return sent
