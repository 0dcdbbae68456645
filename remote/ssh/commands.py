"""Commands for a box, as lists of words.

Each function is pure and named after the command that it builds. The words are joined at the edge
(remote/ssh/connection.py), in a way that any login shell takes: it gets one line, and may be bash,
zsh, tcsh, fish or busybox, print something first, or run something else altogether.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence

# $1: a mark. It is said on both outputs before the command and after it, there with the exit code:
# so the box's answer is known from what a login prints, from a shell that runs something else, and
# from a connection that broke. No quote, backslash, exclamation mark or newline: see `one_line`.
MARKED = (
    'mark=$1; shift; echo "$mark"; echo "$mark" >&2; "$@"; code=$?; '
    'echo "$mark $code"; echo "$mark $code" >&2; exit "$code"'
)
LINE_WAS_RUN = "RLHF_BOX_LINE_WAS_RUN"
SCRIPT = ["sh", "-s", "--"]  # and the script's words; the script itself is standard input


def by_input(argv: Sequence[str]) -> tuple[str, bytes]:
    """Return a login shell's line and the standard input for a command that itself reads no input.

    All words travel in the input, as one command of a POSIX shell. A command that did read its
    input would find none there, so it never takes a part of a script for data, or the reverse. It
    takes three round trips, of which a line alone would save one: sshd takes no input before the
    command runs.

    The variable shows that the line was run. Where a login file says `exec fish`, that shell reads
    the input, and nothing may be done: it would take data for commands next.
    """
    guard = f'test "${LINE_WAS_RUN}" = yes && unset {LINE_WAS_RUN} && exec'
    text = f"{guard} {shlex.join(argv)} </dev/null\n"
    return f"env {LINE_WAS_RUN}=yes /bin/sh", text.encode("utf-8", "surrogateescape")


def with_script(argv: Sequence[str], script: bytes) -> list[str]:
    """Return the words of a `sh_script` with its script in them."""
    if argv[: len(SCRIPT)] != SCRIPT:
        raise ValueError(f"takes no script: {shlex.join(argv)}")
    return ["sh", "-c", script.decode(), "rlhf-box", *argv[len(SCRIPT) :]]


def marked(argv: Sequence[str], mark: str) -> list[str]:
    return ["sh", "-c", MARKED, "rlhf-box", mark, *argv]


def one_line(argv: Sequence[str]) -> str:
    """Join words to a line that every login shell splits into the same words.

    sh, bash, zsh, busybox, csh, tcsh and fish agree on single quotes around all but a quote, a
    backslash (fish) and an exclamation mark (csh), and on how each of these stands outside. A
    newline is kept by all but csh and tcsh, which have no quotes for it.
    """
    return " ".join(map(_quoted, argv))


def _quoted(word: str) -> str:
    if re.fullmatch(r"[A-Za-z0-9_/.:,+-][A-Za-z0-9_/.:,+@=-]*", word):
        return word
    parts = re.findall(r"'+|[\\!]|[^'\\!]+", word)
    quotes = {"\\": r"\\", "!": r"\!"}
    return "".join(quotes.get(part) or (f'"{part}"' if part[0] == "'" else f"'{part}'") for part in parts) or "''"


def sh_script(*words: str) -> list[str]:
    """Run a script that comes by standard input, with these arguments."""
    return [*SCRIPT, *words]


def sh_file(path: str, *words: str) -> list[str]:
    """Run a script that is on the box."""
    return ["sh", path, *words]


def shell(folder: str) -> list[str]:
    """Become an interactive shell in a folder; "": at home.

    In our folder the programs of the environment that is deployed are on the PATH.
    """
    environment = r"python=$(sed -n 's/^python //p' deployed 2>/dev/null); PATH=${python:+${python%/*}:}$PATH"
    return ["sh", "-c", f'cd ${{1:+"$1"}} && {environment} exec "${{SHELL:-sh}}" -i', "shell", folder]


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
    progress: bool = False,
    program: str = "rsync",
) -> list[str]:
    """Copy the files that `names` lists from the folder `source` here into `folder` on the box.

    names: a file with a NUL behind each name. like: a folder on the box, whose equal files are
    linked instead of sent. temporary: a folder on the box, where files are until they are whole.
    compare: by content, not by size and time. progress: say how many bytes are done, for
    `rsync_done`; it needs rsync 3.1 here. The owner of a file is not sent; modes become 644 and
    755.
    """
    words = [program, "--recursive", "--links", "--times", "--perms", "--chmod=a+rX,u+w,go-w,a-s"]
    words += ["--compress", "--partial", "--protect-args", "--from0"]
    words += [f"--files-from={names}", f"--temp-dir={temporary}", f"--rsh={shlex.join(shell)}"]
    words += ["--checksum"] if compare else []
    words += ["--info=progress2", "--no-human-readable"] if progress else []
    words += [f"--link-dest={like}"] if like else []
    return [*words, f"{source.rstrip('/')}/", f"{target}:{folder}/"]


def rsync_done(line: str) -> int | None:
    """Read how many bytes of the files are done: `  1234567  12%    1.20MB/s    0:00:10`."""
    found = re.match(r"\s*(\d+)\s+\d+%", line)
    return int(found[1]) if found else None


def tar_extract(folder: str) -> list[str]:
    """Unpack a compressed archive from standard input into a new folder, in place of an old one.

    The files belong to the user who is logged in, whoever packed them.
    """
    return ["sh", "-c", 'umask 022 && rm -rf -- "$1" && mkdir -- "$1" && exec tar -x -z -o -f - -C "$1"', "tar", folder]


def df(folder: str) -> list[str]:
    """Show the free bytes, then the free inodes, which not every file system counts."""
    return ["sh", "-c", 'df -P -k "$1" && { df -P -i "$1" || true; }', "sh", folder]


def environment(code: str, settings: Mapping[str, str]) -> list[str]:
    """Run remote/on_box/environment.sh of the code in a folder on the box."""
    return sh_file(f"{code}/remote/on_box/environment.sh", *(f"{name}={value}" for name, value in settings.items()))
