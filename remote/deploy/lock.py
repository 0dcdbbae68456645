"""The lock that lets one deploy at a time change a box.

It is a folder on the box that says who holds it, since when, why and until when. land.sh makes it
and removes it. It is held only around what changes something, and work on the box renews it as long
as it runs. A dead lock is taken over, and this is shown. It is dead when it has expired, when the
box was restarted, or when its deploy ran on this laptop and is gone.
"""

from __future__ import annotations

import getpass
import os
import secrets
import socket
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from jobs.errors import ExitCode, ToolkitError
from jobs.formatting import duration, one_line
from remote.scripts import script
from remote.ssh import commands

if TYPE_CHECKING:
    from remote.ssh.connection import BoxConnection, CommandResult

EXPIRES_S = 600  # between two signs of life
SLOW_LINE = 50_000  # bytes a second: the slowest connection for which the lock lasts


@dataclass(frozen=True)
class Owner:
    """Who has the lock, as written on the box; times are the box's."""

    who: str = "?"
    why: str = "?"
    laptop: str = ""
    pid: int = 0
    when: int = 0
    expires: int = 0
    token: str = ""
    worker: int = 0  # a process on the box that works for it; 0: none
    now: int = 0  # when this was read

    @property
    def age_s(self) -> int:
        return max(0, self.now - self.when) if self.when else 0

    def __str__(self) -> str:
        if not self.now:  # the lock was just removed, so its times do not matter any more
            return f"{self.who} ({self.why})"
        since = f", {duration(self.age_s)} ago" if self.when else ""
        left = self.expires - self.now
        until = f"; it expires in {duration(left)}" if left > 0 else "; it has expired"
        return f"{self.who} ({self.why}){since}{until}{'; its work is still running there' if self.worker else ''}"


def owner_of(lines: Iterable[str], now: int = 0) -> Owner | None:
    """Read the lock's owner from land.sh's answer; None if nobody holds the lock."""
    fields: dict[str, str] = {}
    for line in lines:
        word, _, rest = line.partition(" ")
        if word == "clock" and rest.isdecimal():
            now = int(rest)
        if word == "lock":
            key, _, value = rest.partition(" ")
            fields[key] = value
    if not fields:
        return None
    return Owner(
        who=one_line(fields.get("who", "?")),
        why=one_line(fields.get("why", "?")),
        laptop=fields.get("laptop", ""),
        pid=_number(fields, "pid"),
        when=_number(fields, "when"),
        expires=max(_number(fields, "expires"), _number(fields, "renewed")),
        token=fields.get("token", ""),
        worker=_number(fields, "worker"),
        now=now,
    )


def _number(fields: Mapping[str, str], key: str) -> int:
    value = fields.get(key, "")
    return int(value) if value.isdecimal() and len(value) < 16 else 0


def laptop_id(state: Path) -> str:
    """Return a random name of this laptop, which is made once and kept."""
    file = state / "laptop"
    with suppress(OSError):
        if known := file.read_text(encoding="ascii").strip():
            return known
    state.mkdir(parents=True, exist_ok=True)
    with suppress(FileExistsError), file.open("x", encoding="ascii") as new:
        new.write(secrets.token_hex(8))
    return file.read_text(encoding="ascii").strip() or "?"


def is_gone(owner: Owner | None, laptop: str) -> bool:
    """Tell whether the owner's deploy ran on this laptop, and its process has ended."""
    if owner is None or not owner.pid or owner.laptop != laptop:
        return False
    try:
        os.kill(owner.pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return False


@dataclass(frozen=True)
class Lock:
    root: str
    token: str
    took_over: str = ""  # from whom, and why it was dead


def take(
    connection: BoxConnection,
    root: str,
    code: str,
    *,
    why: str,
    laptop: str,
    seen: Owner | None = None,
    size_bytes: int = 0,
) -> Lock:
    """Take the lock, and make our folder and an empty place for `code`, if they do not exist.

    seen: who held the lock a moment ago. size_bytes: what will be sent. Raises ToolkitError: BUSY
    if another deploy holds it; UNFIT if the folder is not ours or its disk is full.
    """
    token = secrets.token_hex(8)
    dead = seen.token if seen is not None and seen.token and is_gone(seen, laptop) else "-"
    who = f"{_user()}@{socket.gethostname()}"
    lines = [f"who {one_line(who)}", f"why {one_line(why)}", f"laptop {laptop}", f"pid {os.getpid()}"]
    seconds = EXPIRES_S + size_bytes // SLOW_LINE
    argv = commands.sh_script("lock", root, token, dead, str(seconds), code, *lines)
    answer = connection.change(argv, stdin=script("land.sh"), timeout_s=60.0, check=False)
    output = answer.out.splitlines()
    if "busy" in output:
        raise busy(connection.box.name, owner_of(output))
    if "locked" not in output and not connection.dry_run:
        raise refused(connection.box.name, "take the lock", answer)
    taken = next((text.removeprefix("took_over ") for text in output if text.startswith("took_over ")), "")
    before = owner_of(output)
    return Lock(root, token, f"{before.who if before else '?'}: {taken}" if taken else "")


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a uid without a name
        return str(os.getuid())


def release(connection: BoxConnection, lock: Lock) -> None:
    """Release the lock, if it is still ours.

    It is tried twice: the first time may find out that the connection is broken.
    """
    argv = commands.sh_script("unlock", lock.root, lock.token)
    try:
        connection.change(argv, stdin=script("land.sh"), timeout_s=10.0, check=False)
    except ToolkitError:
        connection.close()
        connection.change(argv, stdin=script("land.sh"), timeout_s=10.0, check=False)


def unlock(connection: BoxConnection, root: str) -> Owner | None:
    """Remove the lock, end what works for it on the box, and return who held it (`fab unlock`)."""
    answer = connection.change(commands.sh_script("unlock", root, "any"), stdin=script("land.sh"), timeout_s=30.0)
    return owner_of(answer.out.splitlines())


def holder(connection: BoxConnection, root: str) -> Owner | None:
    """Return who holds the lock; changes nothing."""
    answer = connection.query(commands.sh_script("look", root, "-", "-", "-"), stdin=script("land.sh"))
    return owner_of(answer.out.splitlines())


def busy(name: str, owner: Owner | None) -> ToolkitError:
    return ToolkitError(
        f"cannot deploy to `{name}`: another deploy holds the lock",
        why=str(owner) if owner else "",
        hint=f"wait, or run `fab unlock --host {name}` if that deploy is dead",
        exit_code=ExitCode.BUSY,
    )


def lost(name: str, owner: Owner | None) -> ToolkitError:
    return ToolkitError(
        f"this deploy lost the lock of `{name}`: nothing was changed",
        why=f"now it is held by {owner}" if owner else "somebody removed it",
        hint="run the same command again",
        exit_code=ExitCode.BUSY,
    )


def refused(name: str, what: str, answer: CommandResult) -> ToolkitError:
    """Make the error from land.sh's `refused` and `hint`, or without them from its last lines."""
    words = dict(line.partition(" ")[::2] for line in answer.out.splitlines())
    if "refused" in words:
        what, hint = f"`{name}`: {one_line(words['refused'])}", one_line(words.get("hint", ""))
        return ToolkitError(what, hint=hint, exit_code=ExitCode.UNFIT)
    why = "\n".join((answer.err.strip() or answer.out.strip()).splitlines()[-10:])
    return ToolkitError(
        f"`{name}`: cannot {what} (exit code {answer.code})",
        why=why,
        hint="check that the box's disk is there, and try again",
        exit_code=ExitCode.INTERNAL,
    )
