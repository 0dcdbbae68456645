"""Host keys, kept by a box's name, and the user's public key, installed after one password.

A key that is not known yet is kept, and its fingerprint shown. If the box shows another key later,
every verb stops until `fab trust --replace`.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import hashlib
import os
import re
import shlex
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from jobs.errors import ExitCode, ToolkitError

if TYPE_CHECKING:
    from remote.ssh.connection import BoxConnection

FINGERPRINT = re.compile(r"SHA256:[A-Za-z0-9+/]{43}")
PASSWORD_S = 120.0  # to type it


class HostKeyChanged(ToolkitError):
    """The host key differs from the trusted one: it may be another machine that answers."""


class KeyRefused(ToolkitError):
    """The box does not let the user in by a key alone."""

    trust_helps = False  # the box may take a key that was put there with a password
    wants_more = False  # it wants something besides a key, or takes no keys


class NoSuchHost(ToolkitError):
    """A name does not lead to any address."""

    def __init__(self, host: str, *, why: str) -> None:
        hint = "check the name (`fab add` takes what the rental page shows), and the network of this machine"
        super().__init__(f"there is no host `{host}`", why=why, hint=hint, exit_code=ExitCode.UNREACHABLE)
        self.host = host


def unreachable(what: str, *, why: str = "", hint: str = "") -> ToolkitError:
    return ToolkitError(what, why=why, hint=hint, exit_code=ExitCode.UNREACHABLE)


# --- host keys ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class HostKey:
    sort: str  # as known_hosts has it: ssh-ed25519
    blob: bytes

    @property
    def fingerprint(self) -> str:
        """The fingerprint, as `ssh-keygen -l` shows it."""
        return "SHA256:" + base64.b64encode(hashlib.sha256(self.blob).digest()).decode().rstrip("=")

    def line(self, alias: str) -> str:
        return f"{alias} {self.sort} {base64.b64encode(self.blob).decode()}\n"


@dataclass(frozen=True)
class KnownHosts:
    """The known_hosts file of one name, as OpenSSH reads it."""

    file: Path
    alias: str  # the first word of its lines

    @property
    def keys(self) -> tuple[HostKey, ...]:
        try:
            lines = self.file.read_text(encoding="utf-8", errors="replace").splitlines()
        except OSError:
            return ()
        return tuple(key for line in lines if (key := self._parsed(line.split())) is not None)

    def _parsed(self, words: Sequence[str]) -> HostKey | None:
        if len(words) < 3 or self.alias not in words[0].split(","):
            return None
        with contextlib.suppress(binascii.Error):
            return HostKey(words[1], base64.b64decode(words[2], validate=True))
        return None

    def keep(self, key: HostKey) -> bool:
        """Keep a key for a name that has none; False if another key was kept meanwhile."""
        return self._write(key, over=False) or key in self.keys

    def replace(self, key: HostKey) -> None:
        self._write(key, over=True)

    def _write(self, key: HostKey, *, over: bool) -> bool:
        """Write the file as a whole or not at all; of two concurrent calls, one is first."""
        self.file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        handle, partial = tempfile.mkstemp(dir=self.file.parent, prefix=".new-")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as stream:
                stream.write(key.line(self.alias))
            if over or not self.keys:
                with contextlib.suppress(FileExistsError):
                    if not over:
                        os.link(partial, self.file)
                        return True
                if over or not self.keys:  # an empty file is no key
                    os.replace(partial, self.file)
                    return True
            return False
        finally:
            Path(partial).unlink(missing_ok=True)


def changed(name: str, fingerprint: str, sort: str, known: Sequence[HostKey]) -> HostKeyChanged:
    trusted = ", ".join(key.fingerprint for key in known)
    return HostKeyChanged(
        f"the host key of `{name}` has changed",
        why=f"it shows {fingerprint} ({sort}), but the trusted key is {trusted}",
        hint="if the box was set up again, or its address now leads to another box of yours: "
        f"fab trust --host {shlex.quote(name)} --replace\n"
        "if not, do not continue: somebody may be intercepting the connection",
        exit_code=ExitCode.UNREACHABLE,
    )


@dataclass(frozen=True)
class Trusted:
    status: Literal["known", "new", "replaced"]
    key: HostKey
    before: tuple[HostKey, ...] = ()  # those that were replaced

    def __str__(self) -> str:
        status = {"known": "known", "new": "new, kept from now on", "replaced": "replaced"}[self.status]
        was = f" (was {', '.join(key.fingerprint for key in self.before)})" if self.before else ""
        return f"host key {self.key.fingerprint} ({self.key.sort}): {status}{was}"


def trust(connection: BoxConnection, *, replace: bool = False, host_key: str = "") -> Trusted:
    """Look at the key that the box shows now, and keep it if none is known or `replace` is set.

    host_key: the fingerprint that it must have, from the rental page. Raises ToolkitError: it shows
    another one, or the key has changed. With the connection's dry_run nothing is kept.
    """
    if host_key and not FINGERPRINT.fullmatch(host_key):
        hint = "it is SHA256: and 43 characters, as `ssh-keygen -l` shows it"
        raise ToolkitError(f"`{host_key}` is not a fingerprint", hint=hint)
    connection.close()
    offered, known = connection.offered_key(), connection.known_hosts.keys
    if host_key and offered.fingerprint != host_key:
        raise HostKeyChanged(
            f"`{connection.box.name}` shows another host key than {host_key}",
            why=f"it shows {offered.fingerprint} ({offered.sort})",
            hint="check address and port; if they are right, do not continue: "
            "somebody may be intercepting the connection",
            exit_code=ExitCode.UNREACHABLE,
        )
    if offered in known:
        return Trusted("known", offered)
    if known and not replace:
        raise changed(connection.box.name, offered.fingerprint, offered.sort, known)
    if not connection.dry_run:
        if known:
            connection.known_hosts.replace(offered)
        elif not connection.known_hosts.keep(offered):
            raise changed(connection.box.name, offered.fingerprint, offered.sort, connection.known_hosts.keys)
    return Trusted("replaced" if known else "new", offered, known)


# --- the user's key -------------------------------------------------------------------------------

# $1: the line for authorized_keys; $2: its key alone, since the line may already be there with
# options or another comment.
INSTALL = """
umask 077
cd && mkdir -p .ssh || exit 1
file=.ssh/authorized_keys
if [ -f "$file" ] && grep -v '^[[:space:]]*#' "$file" | grep -qF -- "$2"; then exit 0; fi
if [ -s "$file" ] && [ -n "$(tail -c 1 "$file")" ]; then echo >>"$file" || exit 1; fi
printf '%s\\n' "$1" >>"$file" || exit 1
if command -v restorecon >/dev/null 2>&1; then restorecon -F .ssh "$file" >/dev/null 2>&1; fi
exit 0
"""


# Whether ssh can ask for a password: on the terminal, else by a program (SSH_ASKPASS) if there is a
# display. ssh itself decides it in the same way.
CAN_BE_ASKED = """
(: </dev/tty) 2>/dev/null || case ${SSH_ASKPASS_REQUIRE:-} in
    force) ;;
    never) exit 1 ;;
    *) [ -n "${DISPLAY:-}${WAYLAND_DISPLAY:-}" ] ;;
esac
"""


@dataclass(frozen=True)
class Installed:
    status: Literal["there", "installed", "shown"]  # shown: --dry-run
    key: str = ""  # the file of the public key; "" if the box takes a key already

    def __str__(self) -> str:
        return {
            "there": "your key is already on the box",
            "installed": f"{self.key} was added to authorized_keys on the box",
            "shown": f"{self.key} would be added to authorized_keys on the box",
        }[self.status]


def install_key(connection: BoxConnection, public_key: Path | None = None) -> Installed:
    """Put the user's public key on the box, which asks for the password once.

    If the box takes a key already, nothing is done. public_key: None for the first key that ssh
    would use. ssh itself asks for the password: we never see it.

    Raises ToolkitError: there is no key, the box wants more than one or takes no password, nobody
    can be asked, or the password was wrong.
    """
    refusal: KeyRefused | None = None
    try:
        connection.connect(ask=False)
        return Installed("there")
    except KeyRefused as refused:
        refusal = refused
    if refusal.wants_more:
        raise refusal
    file = public_key or _first_public(connection)
    words = _public_line(file)
    by_hand = f"paste this line there as an SSH key:\n{' '.join(words)}"
    if not refusal.trust_helps:
        raise ToolkitError(
            f"cannot put your key on `{connection.box.name}`: it takes no password",
            why=f"{refusal.what}\n{refusal.why}",
            hint=f"on the provider's page, {by_hand}",
            exit_code=ExitCode.UNREACHABLE,
        )
    can_be_asked = ["sh", "-c", CAN_BE_ASKED]
    if not connection.dry_run and connection.local(can_be_asked, changes=False, check=False, asks=True).code:
        raise ToolkitError(
            f"cannot put your key on `{connection.box.name}`: there is no terminal on which to ask for its password",
            why="the box takes none of your keys yet, and ssh asks for a password on a terminal",
            hint=f"run the same command in a terminal, once; or {by_hand}",
            exit_code=ExitCode.UNREACHABLE,
        )
    argv, stdin = connection.with_password(["sh", "-c", INSTALL, "rlhf-box", " ".join(words), words[1]])
    answer = connection.local(argv, changes=True, stdin=stdin, timeout_s=PASSWORD_S, check=False, asks=True)
    if connection.dry_run:
        return Installed("shown", str(file))
    if answer.code:
        raise ToolkitError(
            f"cannot put your key on `{connection.box.name}`",
            why=answer.err or f"ssh ended with exit code {answer.code}",
            hint=f"the rental page shows the password; or {by_hand}",
            exit_code=ExitCode.UNREACHABLE,
        )
    connection.connect()  # fails if the box does not read that file
    return Installed("installed", str(file))


def _first_public(connection: BoxConnection) -> Path:
    for file in (key.with_name(f"{key.name}.pub") for key in connection.resolved.keys):
        if file.is_file():
            return file
    raise ToolkitError(
        "you have no SSH key yet", why="none of those that ssh would use has a .pub file", hint="ssh-keygen -t ed25519"
    )


def _public_line(file: Path) -> list[str]:
    """Read sort, key and comment. Raises ToolkitError: not a public key, maybe the private one."""
    try:
        words = file.read_text(encoding="utf-8", errors="replace").strip().split(None, 2)
    except OSError as error:
        raise ToolkitError(
            f"cannot read {file}", why=error.strerror or str(error), hint="name the .pub file of your key"
        ) from None
    if (
        len(words) < 2
        or not re.fullmatch(r"[A-Za-z0-9@.-]+", words[0])
        or not re.fullmatch(r"[A-Za-z0-9+/]{40,}=*", words[1])
        or "\n" in words[-1]
    ):
        raise ToolkitError(
            f"{file} is not a public key",
            hint="name the .pub file of your key; the private key never leaves this machine",
        )
    return words
