"""The OpenSSH client: how it resolves a name (`ssh -G`), and how it is called.

Commands, streams, rsync and jump hosts all take their settings from here, and OpenSSH alone reads
the user's configuration. There is no other way to a box: Fabric's own, paramiko, reads that
configuration by rules of its own. Where OpenSSH is missing, a verb says so and ends.

Host keys are always checked, against a file of our own for each name, not for each address: an
address with a port may belong to somebody else tomorrow.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import quote

from jobs.errors import ToolkitError
from remote.ssh.host_keys import KnownHosts

CONNECT_S = 10
LONGEST_CHAIN = 5  # jump hosts in a row; more than that is taken for a circle
RESOLVE_S = 20.0  # `Match exec` runs the user's own commands
BY_A_PERSON_S = 120  # to type a password or a code, or to touch a key
# Options that an older OpenSSH does not know. Each is set where `ssh -G` names it. The user's own
# word for it may take the input of our commands, send them to the background, or keep them from
# being run. A host key is known from our file alone.
FOR_KEYS = {"knownhostscommand": "none"}
FOR_INPUT = {"stdinnull": "no", "forkafterauthentication": "no"}
FOR_COMMANDS = {"sessiontype": "default"}
KEPT_S = 600  # a connection that is kept ends by itself after this time without a command


@dataclass(frozen=True)
class Target:
    """A machine as the user names it."""

    name: str  # its host key is kept under this
    address: str  # the word that ssh gets
    user: str | None = None
    port: int | None = None
    key: str | None = None
    # The jump hosts on the way, in the order of connecting; None: as its configuration has it.
    via: tuple[Target, ...] | None = None

    @classmethod
    def of_jump(cls, text: str, via: tuple[Target, ...] | None = None) -> Target:
        """Parse one word of ProxyJump: [user@]host[:port], or ssh://.

        It is named so that `fab trust --host NAME` uses the same known_hosts file.
        """
        match = re.fullmatch(r"(?:ssh://)?(?:(.+)@)?(\[[^\]]+\]|[^:]+)(?::(\d+))?/?", text.strip())
        user, host, port = match.groups() if match else (None, text.strip(), None)
        name = f"ssh://{f'{user}@' if user else ''}{host}{f':{port}' if port else ''}" if user or port else host
        return cls(name, host.strip("[]"), user, int(port) if port else None, via=via)


@dataclass(frozen=True)
class Resolved:
    """A target as ssh resolves it."""

    host: str
    port: int
    user: str
    keys: tuple[Path, ...]  # private keys that it would try; they need not be there
    proxy: str  # ProxyCommand for a shell, with %h and %p; ""
    jumps: tuple[Target, ...]  # ProxyJump, in the order of connecting
    options: frozenset[str]  # all that ssh named


@dataclass(frozen=True)
class OpenSSH:
    """The OpenSSH client with our settings.

    state: where the laptop keeps host keys. config: in place of the user's own (`ssh -F`).
    """

    state: Path
    config: Path | None = None
    connect_s: int = CONNECT_S
    _seen: dict[Target, Resolved] = field(default_factory=dict, compare=False, repr=False)

    def known_hosts(self, name: str) -> KnownHosts:
        return KnownHosts(self.state / "known_hosts" / quote(name, safe="@"), alias(name))

    def resolve(self, target: Target) -> Resolved:
        """Ask ssh for the settings of a target.

        Raises ToolkitError: there is no ssh; ssh refuses the name or its own configuration; the key
        file does not exist.
        """
        if target.key and "${" in target.key:  # where ssh puts in a variable, and nothing can prevent that
            what = f"ssh cannot read a key file at {target.key}"
            raise ToolkitError(what, hint="give it a plain name, and mend `key` in boxes.yaml")
        if target.key and not Path(target.key).is_file():  # ssh would only warn, and try other keys
            what = f"the key file of `{target.name}` does not exist"
            raise ToolkitError(what, why=target.key, hint="mend `key` in boxes.yaml")
        if target not in self._seen:
            self._seen[target] = self._ask(target)
        return self._seen[target]

    def _ask(self, target: Target) -> Resolved:
        # -N: with ForkAfterAuthentication, ssh wants to hear what it shall do.
        argv = ["ssh", "-G", "-N", *self._own_config(), *_named(target), "--", target.address]
        try:
            ended = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, timeout=RESOLVE_S, check=False)
        except FileNotFoundError:
            raise ToolkitError("there is no `ssh` on this machine", hint="install the OpenSSH client") from None
        except subprocess.TimeoutExpired:
            what = f"`{shlex.join(argv)}` does not end"
            raise ToolkitError(what, hint="look at `Match exec` in ~/.ssh/config") from None
        if ended.returncode:
            why = ended.stderr.decode(errors="replace").strip()
            raise ToolkitError(f"ssh does not take `{target.address}`", why=why, hint="mend ~/.ssh/config, or the name")
        return _resolved(os.fsdecode(ended.stdout), target.address)  # a path may hold bytes of any encoding

    def chain(self, target: Target) -> tuple[Target, ...]:
        """Return all jump hosts on the way, in the order of connecting.

        A ProxyCommand of the user's own is not counted.
        """
        return self._chain(target, ())

    def _chain(self, target: Target, behind: tuple[Target, ...]) -> tuple[Target, ...]:
        jumps = self.resolve(target).jumps if target.via is None else target.via
        if not jumps:
            return ()
        if len(behind) + len(jumps) > LONGEST_CHAIN:
            names = " -> ".join(jump.name for jump in (*jumps, *behind))
            raise ToolkitError(
                f"the jump hosts to `{(*behind, target)[-1].name}` form a circle",
                why=names,
                hint="look at ProxyJump in ~/.ssh/config",
            )
        return (*self._chain(jumps[0], (*jumps, *behind)), *jumps)

    def proxy(self, target: Target, *, batch: bool = True) -> str:
        """Return the ProxyCommand for a target that is not reached directly, with tokens.

        OpenSSH's own ProxyJump would check a jump host against the user's known_hosts. Here it is
        checked as the box is.
        """
        if chain := self.chain(target):
            last = chain[-1]
            known_hosts = self.known_hosts(last.name)
            # ssh does not make the folder, and would not keep the key.
            known_hosts.file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            argv = [
                "ssh",
                *self._own_config(),
                *_checked(known_hosts, first_contact=not known_hosts.keys),
                *_set(self._settings(batch) | self._newer(last, FOR_KEYS, FOR_INPUT)),
                *self._through(last, batch=batch),
                *_named(last),
            ]
            command, address = (text.replace("%", "%%") for text in (shlex.join(argv), shlex.quote(last.address)))
            return f"{command} -W '[%h]:%p' -- {address}"
        return self.resolve(target).proxy if target.via is None else ""

    def command(self, target: Target, *options: str, batch: bool = True, control: Path | None = None) -> list[str]:
        """Return ssh's argv up to the address, which the caller adds.

        batch: ssh asks nothing on the terminal. control: the socket of a connection that is kept,
        which the command uses if it is open.
        """
        newer = self._newer(target, FOR_KEYS, FOR_INPUT, {} if "-N" in options else FOR_COMMANDS)
        return [
            "ssh",
            *self._own_config(),
            *_checked(self.known_hosts(target.name)),
            *_set(self._settings(batch, control) | newer),
            *self._through(target, batch=batch),
            *options,
            *_named(target),
        ]

    def log_in(self, target: Target, control: Path, *, first_contact: bool, batch: bool = True) -> list[str]:
        """Return the argv that opens a connection and keeps it at the socket `control`.

        It ends when the login is over, with 0 if the box let us in, and what happened until then is
        on standard error. The connection stays, in a process of its own.
        """
        settings = {**self._settings(batch, control), "ControlMaster": "yes", "ControlPersist": str(KEPT_S)}
        settings |= {"LogLevel": "DEBUG1", "ClearAllForwardings": "yes", **self._newer(target, FOR_KEYS)}
        return [
            *("ssh", *self._own_config(), *_checked(self.known_hosts(target.name), first_contact=first_contact)),
            *(*_set(settings), *self._through(target, batch=batch), "-N", "-f", "-T", *_named(target)),
            *("--", target.address),
        ]

    def look(self, target: Target, known_hosts: KnownHosts, *, first_contact: bool) -> list[str]:
        """Return the argv that shows the box's host key and does not log in, so it always fails."""
        settings = {**self._settings(batch=True), "LogLevel": "DEBUG1", "PreferredAuthentications": "none"}
        settings |= self._newer(target, FOR_KEYS)
        return [
            *("ssh", *self._own_config(), *_checked(known_hosts, first_contact=first_contact), *_set(settings)),
            *(*self._through(target), "-T", *_named(target), "--", target.address, "exit"),
        ]

    def _through(self, target: Target, *, batch: bool = True) -> list[str]:
        """Return the options that say how a target is reached.

        A ProxyCommand, or `none`, since otherwise ssh would use the configuration's ProxyJump. For
        jump hosts ssh itself takes no notice of ProxyUseFdpass, which is for a ProxyCommand.
        """
        command = {"ProxyCommand": self.proxy(target, batch=batch) or "none"}
        return _set(command | ({"ProxyUseFdpass": "no"} if self.chain(target) else {}))

    def _newer(self, target: Target, *settings: Mapping[str, str]) -> dict[str, str]:
        """Return those settings that this ssh knows."""
        known = self.resolve(target).options
        return {key: value for each in settings for key, value in each.items() if key in known}

    def _settings(self, batch: bool, control: Path | None = None) -> dict[str, str]:
        return {
            "BatchMode": "yes" if batch else "no",
            "ForwardAgent": "no",
            "ForwardX11": "no",
            "PermitLocalCommand": "no",
            "RemoteCommand": "none",
            # Never the user's own: that connection was opened with other options.
            "ControlMaster": "no",
            "ControlPath": str(control or "none").replace("%", "%%"),
            # It also counts while a jump host on the way asks for something.
            "ConnectTimeout": str(self.connect_s if batch else BY_A_PERSON_S),
            "ServerAliveInterval": "5",
            "ServerAliveCountMax": "3",
            "LogLevel": "ERROR",
        }

    def _own_config(self) -> list[str]:
        return ["-F", str(self.config)] if self.config else []


def alias(name: str) -> str:
    """Return a name for a known_hosts file, in which commas, stars and capitals have a meaning."""
    return re.sub(r"[^a-z0-9._-]", "_", name.lower())


def over(control: Path, *words: str) -> list[str]:
    """Return the argv of a command over a connection that is kept, which never opens another.

    It reads no configuration: everything was settled when the connection was opened.
    """
    settings = {"ControlPath": str(control).replace("%", "%%"), "ProxyCommand": "false", "LogLevel": "ERROR"}
    return ["ssh", "-F", "/dev/null", *_set(settings), "-T", "-e", "none", *words]


def _checked(known: KnownHosts, *, first_contact: bool = False) -> list[str]:
    """Return the options that check host keys against a file of ours.

    first_contact: accept a key if none is known. A key of another sort than the known ones is never
    accepted.
    """
    file = str(known.file)
    if re.search(r'["$\n]', file):
        raise ToolkitError(
            f"ssh cannot read a known_hosts file at {file}", hint="set XDG_STATE_HOME to a folder with a plain name"
        )
    return _set(
        {
            "StrictHostKeyChecking": "accept-new" if first_contact else "yes",
            "UserKnownHostsFile": '"' + file.replace("%", "%%") + '"',
            "GlobalKnownHostsFile": "/dev/null",
            "HostKeyAlias": known.alias,
            "HashKnownHosts": "no",
            "UpdateHostKeys": "no",
            "CheckHostIP": "no",
            "VerifyHostKeyDNS": "no",
        }
    )


def _set(settings: Mapping[str, str]) -> list[str]:
    return [word for key, value in settings.items() for word in ("-o", f"{key}={value}")]


def _named(target: Target) -> list[str]:
    return [
        *(["-p", str(target.port)] if target.port else []),
        *(["-l", target.user] if target.user else []),
        *([*_key(target.key), "-o", "IdentitiesOnly=yes"] if target.key else []),
    ]


def _key(file: str) -> list[str]:
    """Return the option for a private key's file. ssh sees `%` as a token, and -i takes no `%%`."""
    return ["-o", f'IdentityFile="{file.replace("%", "%%")}"'] if "%" in file else ["-i", file]


def _resolved(text: str, address: str) -> Resolved:
    """Parse the output of `ssh -G`, a keyword and its value on each line. address: that ssh got."""
    lines = [line.partition(" ") for line in text.splitlines()]
    values = {key.lower(): value for key, _, value in reversed(lines)}
    user, host = values.get("user", ""), values.get("hostname", "")
    tokens = {"%": "%", "h": host, "n": address, "p": values.get("port", "22"), "r": user}
    jumps = _filled(values.get("proxyjump", "none"), tokens)
    proxy = values.get("proxycommand", "none")
    files = [value for key, _, value in lines if key == "identityfile" and value != "none"]
    return Resolved(
        host=host,
        port=int(values.get("port", 22)),
        user=user,
        keys=tuple(Path(_filled(file, {**tokens, "d": str(Path.home())})).expanduser() for file in files),
        proxy="" if proxy == "none" else proxy,
        jumps=() if jumps == "none" else _jumps(jumps.split(",")),
        options=frozenset(values),
    )


def _jumps(texts: Sequence[str]) -> tuple[Target, ...]:
    """Parse ProxyJump's list.

    The first is reached as its own configuration says, each other one through those before it.
    """
    jumps: tuple[Target, ...] = ()
    for text in texts:
        jumps = (*jumps, Target.of_jump(text, via=jumps or None))
    return jumps


def _filled(text: str, tokens: Mapping[str, str]) -> str:
    """Put the values of tokens, such as `%h`, into a text of the configuration."""
    return re.sub("%(.)", lambda token: tokens.get(token[1], token[0]), text)
