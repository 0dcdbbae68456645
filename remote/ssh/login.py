"""What became of a login, from what `ssh -v` noted, and what to do if the box refused it.

That ssh failed is known by its exit code. Its notes say how far it came: the keys that it offered,
what the box would still take.
"""

from __future__ import annotations

import base64
import contextlib
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jobs.errors import ExitCode
from remote.ssh.host_keys import KeyRefused
from remote.ssh.local import LAST_LINES
from remote.ssh.openssh import Resolved

BY_A_PERSON = ("password", "keyboard-interactive")  # methods at which ssh asks on the terminal


@dataclass(frozen=True)
class LoginNotes:
    """What `ssh -v` noted."""

    connected: bool = False  # the box's port was reached, without a proxy command
    spoke: bool = False  # the box said that it speaks SSH
    host_key: str = ""  # the fingerprint that it showed
    host_key_sort: str = ""
    tried: tuple[str, ...] = ()  # keys that ssh offered, by file or comment
    methods: tuple[str, ...] | None = None  # with which one may log in yet; None: it did not come to that
    wants_more: bool = False  # it took a key, and wants more than that
    was_ended: bool = False  # the box ended the connection at the key that was offered last
    wants_touch: bool = False  # a key of a security key, which the box takes
    words: str = ""  # what ssh and a ProxyCommand said for people

    @classmethod
    def of(cls, text: str) -> LoginNotes:
        lines = text.splitlines()
        notes = [line.removeprefix("debug1: ") for line in lines if line.startswith("debug1: ")]
        words = [line for line in lines if line.strip() and not re.match(r"debug\d: |OpenSSH_|Authenticated ", line)]
        host_key = re.search(r"^Server host key: (\S+) (SHA256:\S+)", "\n".join(notes), re.MULTILINE)
        left = [line.split(": ", 1)[1] for line in notes if line.startswith("Authentications that can continue: ")]
        offers = [line for line in notes if line.startswith(("Offering public key: ", "Authentications that can"))]
        accepted = [line for line in notes if line.startswith("Server accepts key: ")]
        return cls(
            connected="Connection established." in notes,
            spoke=any(line.startswith("Remote protocol version ") for line in notes),
            host_key=host_key[2] if host_key else "",
            host_key_sort=host_key[1] if host_key else "",
            tried=tuple(_key_of(line) for line in notes if line.startswith("Offering public key: ")),
            methods=tuple(left[-1].split(",")) if left else None,
            wants_more=any(" with partial success" in line for line in lines),
            was_ended=bool(offers) and offers[-1].startswith("Offering") and not accepted,
            wants_touch=bool(accepted) and "-SK " in accepted[-1],
            words="\n".join(words[-LAST_LINES:]),
        )

    @property
    def can_be_asked_for(self) -> bool:
        """Whether a person at a terminal could help the login: by a password, a code."""
        return self.methods is not None and any(method in BY_A_PERSON for method in self.methods)


def _key_of(line: str) -> str:
    """Return NAME of `Offering public key: NAME SORT FINGERPRINT [explicit] [agent]`."""
    name, _, rest = line.partition(": ")[2].rpartition(" SHA256:")
    name = name.rpartition(" ")[0] or name
    return f"{name} of the agent" if "agent" in rest.split() else name


def refused(name: str, resolved: Resolved, notes: LoginNotes) -> KeyRefused:
    """Make the error for a login that the box refused. name: of the box."""
    methods, keys = notes.methods or (), resolved.keys
    locked, unusable, open_to_all = (
        [file for file in keys if key_state(file) == state] for state in ("locked", "unusable", "open to others")
    )
    tried = f"tried: {', '.join(dict.fromkeys(notes.tried)) or 'no key was found'}"
    page = "paste your public key on the provider's page; or name the key in boxes.yaml"
    by_person = ", ".join(method for method in methods if method in BY_A_PERSON)
    terminal = "run the same command in a terminal, where ssh can ask for it, once in each call"
    what = f"{resolved.user}@{resolved.host} takes none of your keys"
    if notes.wants_more:
        what = f"`{name}` wants more than your key"
        lines, hint = [f"besides the key it wants: {', '.join(methods)}"], terminal
    elif methods and "publickey" not in methods:
        what = f"`{name}` takes no keys"
        lines, hint = (
            [f"it takes: {', '.join(methods)}"],
            terminal if by_person else "choose another way to log in there",
        )
    elif notes.was_ended:
        lines = [f"{tried}; then the box ended the connection"]
        hint = f"run the same command again; else {page}"
        if len(notes.tried) > 1:
            lines[0] += ", since it allows only so many tries"
            hint = "name the right key: `key` in boxes.yaml, or IdentityFile with `IdentitiesOnly yes` in ~/.ssh/config"
    else:
        lines, hint = [tried], page
        if by_person:
            hint = f"fab trust --host {shlex.quote(name)} puts your key on the box after one password; or {page}"
        if locked:
            lines.append(f"locked by a passphrase, and no agent holds it: {_names(locked)}")
            hint = f"ssh-add {shlex.quote(str(locked[0]))}, then the same command; else {hint}"
        elif open_to_all:
            lines.append(f"others may read it, so ssh does not use it: {_names(open_to_all)}")
            hint = f"chmod 600 {shlex.quote(str(open_to_all[0]))}, then the same command; else {hint}"
        elif unusable:
            lines.append(f"cannot be read as a private key: {_names(unusable)}")
    error = KeyRefused(what, why="\n".join(lines), hint=hint, exit_code=ExitCode.UNREACHABLE)
    error.wants_more = notes.wants_more or "publickey" not in methods
    error.trust_helps = bool(by_person) and not error.wants_more
    return error


def _names(files: Sequence[Path]) -> str:
    return ", ".join(map(str, files))


def key_state(file: Path) -> str:
    """Return what is wrong with a private key's file: locked, unusable, open to others; or ""."""
    try:
        data = file.read_bytes()
        mode = file.stat().st_mode
    except OSError:
        return ""
    if file.suffix == ".pub":  # its private half is in an agent
        return ""
    if b" PRIVATE KEY-----" not in data:
        return "unusable"
    if mode & 0o077:
        return "open to others"
    if b"-----BEGIN ENCRYPTED PRIVATE KEY" in data or b"Proc-Type: 4,ENCRYPTED" in data:
        return "locked"
    body = b"".join(data.split(b"-----")[2].split()) if data.count(b"-----") > 3 else b""
    with contextlib.suppress(ValueError):
        # PROTOCOL.key of OpenSSH: a magic word, then the length and name of the cipher.
        opening = base64.b64decode(body[:64])
        if opening.startswith(b"openssh-key-v1\0") and not opening[15:].startswith(b"\0\0\0\4none"):
            return "locked"
    return ""
