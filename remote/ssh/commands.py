"""What is run for a box, as lists of words: pure, named after the command that they build, joined
at the edge (remote/ssh/connection.py).
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence


def sh_script(*words: str) -> list[str]:
    """A script that comes by standard input; after it its own words."""
    return ["sh", "-s", "--", *words]


def sh_file(path: str, *words: str) -> list[str]:
    """A script that is on the box."""
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
    """The files that `names` lists, with a NUL behind each, from the folder `source` here into
    `folder` on the box.

    like: a folder on the box, whose equal files are linked instead of sent. temporary: where files
    lie there until they are whole.
    compare: by content, not by size and time. Who owns a file here is nothing to the box; modes
    become 644 and 755.
    """
    words = [
        program,
        "--recursive",
        "--links",
        "--times",
        "--perms",
        "--chmod=a+rX,u+w,go-w,a-s",
        "--compress",
        "--partial",
    ]
    words += [
        "--protect-args",
        "--from0",
        f"--files-from={names}",
        f"--temp-dir={temporary}",
        f"--rsh={shlex.join(shell)}",
    ]
    words += ["--checksum"] if compare else []
    words += [f"--link-dest={like}"] if like else []
    return [*words, f"{source.rstrip('/')}/", f"{target}:{folder}/"]


def tar_extract(folder: str) -> list[str]:
    """What comes by standard input, compressed, into a folder made anew; as the user who is logged
    in, whoever packed it.
    """
    return ["sh", "-c", 'umask 022 && rm -rf -- "$1" && mkdir -- "$1" && exec tar -x -z -o -f - -C "$1"', "tar", folder]


def with_input(file: str, argv: Sequence[str]) -> list[str]:
    """A local command whose standard input is a file."""
    return ["sh", "-c", 'file=$1; shift; exec "$@" <"$file"', "sh", file, *argv]


def df(folder: str) -> list[str]:
    """Bytes, then inodes, which not every file system counts."""
    return ["sh", "-c", 'df -P -k "$1" && { df -P -i "$1" || true; }', "sh", folder]


def environment(code: str, settings: Mapping[str, str]) -> list[str]:
    """remote/on_box/environment.sh of the code in a folder on the box."""
    return sh_file(f"{code}/remote/on_box/environment.sh", *(f"{name}={value}" for name, value in settings.items()))
