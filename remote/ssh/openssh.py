"""The OpenSSH client: how it resolves a name (`ssh -G`), and how it is called.

Fabric, streams, rsync and jump hosts all take their settings from here. Host keys are always
checked, against a file of our own for each name, not for each address: an address with a port may
belong to somebody else tomorrow.
"""

from __future__ import annotations

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
    only_these: bool  # IdentitiesOnly: use only those keys of the agent
    agent: str  # the socket that IdentityAgent names; "": the environment's; "none"
    proxy: str  # ProxyCommand for a shell, with %h and %p; ""
    jumps: tuple[Target, ...]  # ProxyJump, in the order of connecting

    def proxy_command(self) -> str:
        """Return `proxy` with its tokens filled in."""
        values = {"%": "%", "h": self.host, "n": self.host, "p": str(self.port), "r": self.user}
        return re.sub("%(.)", lambda token: values.get(token[1], token[0]), self.proxy)


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
        if target.key and not Path(target.key).is_file():  # ssh would only warn, and try other keys
            what = f"the key file of `{target.name}` does not exist"
            raise ToolkitError(what, why=target.key, hint="mend `key` in boxes.yaml")
        if target not in self._seen:
            self._seen[target] = self._ask(target)
        return self._seen[target]

    def _ask(self, target: Target) -> Resolved:
        argv = ["ssh", "-G", *self._own_config(), *_named(target), "--", target.address]
        try:
            ended = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, timeout=RESOLVE_S, check=False)
        except FileNotFoundError:
            raise ToolkitError("there is no `ssh` on this machine", hint="install the OpenSSH client") from None
        except subprocess.TimeoutExpired:
            what = f"`{shlex.join(argv)}` does not end"
            raise ToolkitError(what, hint="look at `Match exec` in ~/.ssh/config") from None
        if ended.returncode:
            why = ended.stderr.decode(errors="replace")
            raise ToolkitError(f"ssh does not take `{target.address}`", why=why, hint="mend ~/.ssh/config, or the name")
        return _resolved(ended.stdout.decode(errors="replace"))

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

    def proxy(self, target: Target) -> str:
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
                *self.strict(last.name, first_contact=not known_hosts.keys),
                *_proxied(self.proxy(last)),
                *_named(last),
            ]
            command, address = (text.replace("%", "%%") for text in (shlex.join(argv), shlex.quote(last.address)))
            return f"{command} -W '[%h]:%p' -- {address}"
        return self.resolve(target).proxy if target.via is None else ""

    def command(self, target: Target, *options: str, batch: bool = True) -> list[str]:
        """Return ssh's argv up to the address, which the caller adds.

        batch: ssh asks nothing on the terminal.
        """
        return [
            "ssh",
            *self._own_config(),
            *self.strict(target.name, batch=batch),
            *_proxied(self.proxy(target)),
            *options,
            *_named(target),
        ]

    def strict(self, name: str, *, first_contact: bool = False, batch: bool = True) -> list[str]:
        """Return the options that check host keys against our own file.

        first_contact: accept a key if none is known. A key of another sort than the known ones is
        never accepted.
        """
        known = self.known_hosts(name)
        file = str(known.file)
        if re.search(r'["$\n]', file):
            raise ToolkitError(
                f"ssh cannot read a known_hosts file at {file}", hint="set XDG_STATE_HOME to a folder with a plain name"
            )
        settings = {
            "BatchMode": "yes" if batch else "no",
            "StrictHostKeyChecking": "accept-new" if first_contact else "yes",
            "UserKnownHostsFile": '"' + file.replace("%", "%%") + '"',
            "GlobalKnownHostsFile": "/dev/null",
            "HostKeyAlias": known.alias,
            "HashKnownHosts": "no",
            "UpdateHostKeys": "no",
            "CheckHostIP": "no",
            "VerifyHostKeyDNS": "no",
            "ForwardAgent": "no",
            "ForwardX11": "no",
            "PermitLocalCommand": "no",
            "RemoteCommand": "none",
            "ControlMaster": "no",  # a shared connection was opened with other options
            "ControlPath": "none",
            "ConnectTimeout": str(self.connect_s),
            "ServerAliveInterval": "5",
            "ServerAliveCountMax": "3",
            "LogLevel": "ERROR",
        }
        return _set(settings)

    def _own_config(self) -> list[str]:
        return ["-F", str(self.config)] if self.config else []


def alias(name: str) -> str:
    """Return a name for a known_hosts file, in which commas, stars and capitals have a meaning."""
    return re.sub(r"[^a-z0-9._-]", "_", name.lower())


def _set(settings: Mapping[str, str]) -> list[str]:
    return [word for key, value in settings.items() for word in ("-o", f"{key}={value}")]


def _proxied(command: str) -> list[str]:
    """Set the ProxyCommand; `none`, since otherwise ssh would use the configuration's ProxyJump."""
    return ["-o", f"ProxyCommand={command or 'none'}"]


def _named(target: Target) -> list[str]:
    return [
        *(["-p", str(target.port)] if target.port else []),
        *(["-l", target.user] if target.user else []),
        *(["-i", target.key, "-o", "IdentitiesOnly=yes"] if target.key else []),
    ]


def _resolved(text: str) -> Resolved:
    """Parse the output of `ssh -G`, a keyword and its value on each line."""
    lines = [line.partition(" ") for line in text.splitlines()]
    values = {key.lower(): value for key, _, value in reversed(lines)}
    user, host = values.get("user", ""), values.get("hostname", "")
    jumps = values.get("proxyjump", "none")
    proxy = values.get("proxycommand", "none")
    agent = values.get("identityagent", "")
    if agent in ("SSH_AUTH_SOCK", "$SSH_AUTH_SOCK"):
        agent = ""
    elif agent and agent != "none":
        agent = str(_expanded(agent, host, user))
    files = [value for key, _, value in lines if key == "identityfile" and value != "none"]
    return Resolved(
        host=host,
        port=int(values.get("port", 22)),
        user=user,
        keys=tuple(_expanded(file, host, user) for file in files),
        only_these=values.get("identitiesonly") == "yes",
        agent=agent,
        proxy="" if proxy == "none" else proxy,
        jumps=() if jumps == "none" else _jumps(jumps.split(",")),
    )


def _jumps(texts: Sequence[str]) -> tuple[Target, ...]:
    """Parse ProxyJump's list.

    The first is reached as its own configuration says, each other one through those before it.
    """
    jumps: tuple[Target, ...] = ()
    for text in texts:
        jumps = (*jumps, Target.of_jump(text, via=jumps or None))
    return jumps


def _expanded(text: str, host: str, user: str) -> Path:
    values = {"%": "%", "d": str(Path.home()), "h": host, "r": user, "n": host}
    return Path(re.sub("%(.)", lambda token: values.get(token[1], token[0]), text)).expanduser()
