"""Commands for a box, as lists of words.

Each function is pure and named after the command that it builds. The words are joined at the edge
(remote/ssh/connection.py).
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence


def sh_script(*words: str) -> list[str]:
    """Run a script that comes by standard input, with these arguments."""
    return ["sh", "-s", "--", *words]


def sh_file(path: str, *words: str) -> list[str]:
    """Run a script that is on the box."""
    return ["sh", path, *words]


def mkdir(*folders: str) -> list[str]:
    return ["sh", "-c", 'umask 022 && mkdir -p -- "$@"', "mkdir", *folders]


def rsync(
    shell: Sequence[str],
    target: str,
    source: str,
    names: str,
    folder: str,
    *,
    temporary: str,
    like: str = "",
    compare: bool = False,
    program: str = "rsync",
) -> list[str]:
    """Copy the files that `names` lists from the folder `source` here into `folder` on the box.

    names: a file with a NUL behind each name. like: a folder on the box, whose equal files are
    linked instead of sent. temporary: a folder on the box, where files are until they are whole.
    compare: by content, not by size and time. The owner of a file is not sent; modes become 644 and
    755.
    """
    words = [program, "--recursive", "--links", "--times", "--perms", "--chmod=a+rX,u+w,go-w,a-s"]
    words += ["--compress", "--partial", "--protect-args", "--from0"]
    words += [f"--files-from={names}", f"--temp-dir={temporary}", f"--rsh={shlex.join(shell)}"]
    words += ["--checksum"] if compare else []
    words += [f"--link-dest={like}"] if like else []
    return [*words, f"{source.rstrip('/')}/", f"{target}:{folder}/"]


def tar_extract(folder: str) -> list[str]:
    """Unpack a compressed archive from standard input into a new folder, in place of an old one.

    The files belong to the user who is logged in, whoever packed them.
    """
    return ["sh", "-c", 'umask 022 && rm -rf -- "$1" && mkdir -- "$1" && exec tar -x -z -o -f - -C "$1"', "tar", folder]


def with_input(file: str, argv: Sequence[str]) -> list[str]:
    """Run a local command whose standard input is a file."""
    return ["sh", "-c", 'file=$1; shift; exec "$@" <"$file"', "sh", file, *argv]


def df(folder: str) -> list[str]:
    """Show the free bytes, then the free inodes, which not every file system counts."""
    return ["sh", "-c", 'df -P -k "$1" && { df -P -i "$1" || true; }', "sh", folder]


def environment(code: str, settings: Mapping[str, str]) -> list[str]:
    """Run remote/on_box/environment.sh of the code in a folder on the box."""
    return sh_file(f"{code}/remote/on_box/environment.sh", *(f"{name}={value}" for name, value in settings.items()))
