"""One deploy at a time: a folder on the box that says who has it, since when, why and until when.
land.sh makes it and takes it away.

It is held only around what changes something. A dead one is taken over, and that is said: when it
has expired, when the box was started anew, or when its deploy ran on this laptop and is gone. What
runs on the box keeps it alive as long as it runs.
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
SLOW_LINE = 50_000  # bytes a second: what is sent takes no longer than over such a connection


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
        if not self.now:  # of a lock that was just taken away: nobody asks any more how long it would have held
            return f"{self.who} ({self.why})"
        since = f", {duration(self.age_s)} ago" if self.when else ""
        left = self.expires - self.now
        until = f"; it expires in {duration(left)}" if left > 0 else "; it has expired"
        return f"{self.who} ({self.why}){since}{until}{'; its work continues there' if self.worker else ''}"


def owner_of(lines: Iterable[str], now: int = 0) -> Owner | None:
    """Of land.sh's answer; None if nobody has it."""
    said: dict[str, str] = {}
    for line in lines:
        word, _, rest = line.partition(" ")
        if word == "clock" and rest.isdecimal():
            now = int(rest)
        if word == "lock":
            key, _, value = rest.partition(" ")
            said[key] = value
    if not said:
        return None
    expires = max(_number(said, "expires"), _number(said, "renewed"))
    return Owner(
        who=one_line(said.get("who", "?")),
        why=one_line(said.get("why", "?")),
        laptop=said.get("laptop", ""),
        pid=_number(said, "pid"),
        when=_number(said, "when"),
        expires=expires,
        token=said.get("token", ""),
        worker=_number(said, "worker"),
        now=now,
    )


def _number(said: Mapping[str, str], key: str) -> int:
    value = said.get(key, "")
    return int(value) if value.isdecimal() and len(value) < 16 else 0


def laptop_id(state: Path) -> str:
    """Written once: names this laptop without saying anything of it."""
    file = state / "laptop"
    with suppress(OSError):
        if known := file.read_text(encoding="ascii").strip():
            return known
    state.mkdir(parents=True, exist_ok=True)
    with suppress(FileExistsError), file.open("x", encoding="ascii") as new:
        new.write(secrets.token_hex(8))
    return file.read_text(encoding="ascii").strip() or "?"


def is_gone(owner: Owner | None, laptop: str) -> bool:
    """Its deploy ran on this laptop, and no process has its number any more."""
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
    took_over: str = ""  # from whom, and why that could be


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
    """Our folder is made with it, if it is not there yet, and an empty place for `code`. seen: who
    had it a moment ago.

    Raises ToolkitError: BUSY, if somebody else has it; UNFIT, if the folder is not ours or its disk
    is full.
    """
    token = secrets.token_hex(8)
    dead = seen.token if seen is not None and seen.token and is_gone(seen, laptop) else "-"
    who = f"{_user()}@{socket.gethostname()}"
    lines = [f"who {one_line(who)}", f"why {one_line(why)}", f"laptop {laptop}", f"pid {os.getpid()}"]
    seconds = EXPIRES_S + size_bytes // SLOW_LINE
    argv = commands.sh_script("lock", root, token, dead, str(seconds), code, *lines)
    answer = connection.change(argv, stdin=script("land.sh"), timeout_s=60.0, check=False)
    said = answer.out.splitlines()
    if "busy" in said:
        raise busy(connection.box.name, owner_of(said))
    if "locked" not in said and not connection.dry_run:
        raise refused(connection.box.name, "take the lock", answer)
    taken = next((text.removeprefix("took_over ") for text in said if text.startswith("took_over ")), "")
    before = owner_of(said)
    return Lock(root, token, f"{before.who if before else '?'}: {taken}" if taken else "")


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a uid without a name
        return str(os.getuid())


def release(connection: BoxConnection, lock: Lock) -> None:
    """Gives it back, if it is still ours.

    Asked twice: the first time may be what finds out that the connection is broken.
    """
    argv = commands.sh_script("unlock", lock.root, lock.token)
    try:
        connection.change(argv, stdin=script("land.sh"), timeout_s=10.0, check=False)
    except ToolkitError:
        connection.close()
        connection.change(argv, stdin=script("land.sh"), timeout_s=10.0, check=False)


def unlock(connection: BoxConnection, root: str) -> Owner | None:
    """`fab unlock`: takes it from whoever has it, and ends what works for it there. -> who had it."""
    answer = connection.change(commands.sh_script("unlock", root, "any"), stdin=script("land.sh"), timeout_s=30.0)
    return owner_of(answer.out.splitlines())


def holder(connection: BoxConnection, root: str) -> Owner | None:
    """Who has it; changes nothing."""
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
        f"the lock of `{name}` is not ours any more: nothing was changed",
        why=f"now {owner} has it" if owner else "somebody took it away",
        hint="the same command tries again",
        exit_code=ExitCode.BUSY,
    )


def refused(name: str, what: str, answer: CommandResult) -> ToolkitError:
    """land.sh's `refused` and `hint`; without them what was said last."""
    said = dict(line.partition(" ")[::2] for line in answer.out.splitlines())
    if "refused" in said:
        return ToolkitError(
            f"`{name}`: {one_line(said['refused'])}", hint=one_line(said.get("hint", "")), exit_code=ExitCode.UNFIT
        )
    why = "\n".join((answer.err.strip() or answer.out.strip()).splitlines()[-10:])
    return ToolkitError(
        f"`{name}`: cannot {what} (exit code {answer.code})",
        why=why,
        hint="see that its disk is there, and try again",
        exit_code=ExitCode.INTERNAL,
    )
