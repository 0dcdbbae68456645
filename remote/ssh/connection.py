"""The connection to one box over SSH: commands with a deadline, and OpenSSH's argv for streams.

Fabric holds one connection for short commands. All its settings come from `ssh -G` (openssh.py), so
that Fabric, rsync and the printed commands reach the box in the same way. Fabric notices only after
minutes that a peer fell silent, so each command has its own deadline. Streams go through the
OpenSSH client, which notices a silent peer by itself.
"""

from __future__ import annotations

import base64
import contextlib
import logging
import select
import shlex
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import paramiko
from fabric import Config, Connection
from paramiko.agent import AgentSSH
from paramiko.ssh_exception import AuthenticationException, BadHostKeyException, SSHException

from jobs.errors import ExitCode, ToolkitError
from remote.inventory import Box
from remote.output import Sayer
from remote.ssh.host_keys import HostKey, HostKeyChanged, KeyRefused, KnownHosts, changed, unreachable
from remote.ssh.link import Link
from remote.ssh.local import LAST_LINES, LINGER_S, TAKES, CommandResult, Proxy, run_here, short
from remote.ssh.openssh import CONNECT_S, OpenSSH, Resolved, Target

if TYPE_CHECKING:
    from typing_extensions import Self

# After a connection was dropped before it began: a box that is being scanned does that
# (MaxStartups).
RETRY_PAUSE_S = 0.5
KEEPALIVE_S = 15


class CommandFailed(ToolkitError):
    def __init__(self, host: str, argv: Sequence[str], answer: CommandResult) -> None:
        lines = (answer.err.strip() or answer.out.strip()).splitlines()[-LAST_LINES:]
        super().__init__(
            f"a command failed on `{host}` with exit code {answer.code}",
            why="\n".join([shlex.join(argv), *lines]),
            exit_code=ExitCode.INTERNAL,
        )
        self.answer = answer


class BoxConnection:
    """The connection to one box, for one thread.

    It is opened when first needed, opened again if it broke, and closed at the end of a `with`.
    """

    def __init__(
        self,
        box: Box,
        state: Path,
        *,
        say: Sayer | None = None,
        dry_run: bool = False,
        ssh_config: Path | None = None,
        connect_s: int = CONNECT_S,
    ) -> None:
        """Prepare a connection without opening it.

        state: Settings.state, where host keys are kept. ssh_config: in place of the user's own.
        connect_s: the limit for each stage of connecting.
        """
        self.box, self.dry_run, self.say = box, dry_run, say or Sayer()
        self.openssh = OpenSSH(state, ssh_config, connect_s)
        self._address = Target(box.name, box.address, box.user, box.port, box.key)
        self._connection: Connection | None = None
        self._proxy: Proxy | None = None
        self._seconds: float | None = None  # of the last connection
        self._key_was: str = "unknown"
        self._offered: HostKey | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # --- commands there

    def query(
        self, argv: Sequence[str], *, stdin: bytes = b"", timeout_s: float = 30.0, check: bool = True
    ) -> CommandResult:
        """Run a command that changes nothing on the box, with --dry-run too.

        It is repeated once if a connection that was open before turns out to be broken.

        Raises ToolkitError: UNREACHABLE, also after `timeout_s`; with `check`, CommandFailed for an
        exit code other than 0.
        """
        if self.dry_run:
            self.say.command(self.box.name, argv, stdin)
        was_open = self._alive()
        try:
            answer = self._run(argv, stdin, timeout_s)
        except _Broke:
            if not was_open:
                raise
            answer = self._run(argv, stdin, timeout_s)
        return self._checked(argv, answer, check)

    def change(
        self, argv: Sequence[str], *, stdin: bytes = b"", timeout_s: float = 60.0, check: bool = True
    ) -> CommandResult:
        """Run a command that changes something on the box; --dry-run only shows it.

        It is never repeated.
        """
        if self.dry_run:
            self.say.command(self.box.name, argv, stdin)
            return CommandResult(0, "", "", 0.0)
        return self._checked(argv, self._run(argv, stdin, timeout_s), check)

    def _checked(self, argv: Sequence[str], answer: CommandResult, check: bool) -> CommandResult:
        if check and answer.code:
            raise CommandFailed(self.box.name, argv, answer)
        return answer

    def _run(self, argv: Sequence[str], stdin: bytes, timeout_s: float) -> CommandResult:
        self.connect()
        assert self._connection is not None
        started, late = time.monotonic(), threading.Event()
        transport = self._connection.transport

        def expire() -> None:
            late.set()
            transport.close()  # not politely: a silent peer would not answer that either

        deadline = threading.Timer(timeout_s, expire)
        deadline.daemon = True
        deadline.start()
        try:
            with transport.open_session(timeout=timeout_s) as channel:
                channel.exec_command(shlex.join(argv).encode("utf-8", "surrogateescape"))
                code, out, err = _converse(channel, stdin)
        except (SSHException, OSError, EOFError) as error:
            self.close()
            raise self._late(argv, timeout_s) if late.is_set() else self._broke(argv, str(error)) from None
        finally:
            deadline.cancel()
        if code is None:
            self.close()
            raise self._late(argv, timeout_s) if late.is_set() else self._broke(argv, "")
        seconds = time.monotonic() - started
        return CommandResult(code, out.decode(errors="replace"), err.decode(errors="replace"), seconds)

    def _late(self, argv: Sequence[str], timeout_s: float) -> ToolkitError:
        return unreachable(
            f"`{self.box.name}` gave no answer within {timeout_s:g} s",
            why=f"the command: {short(argv)}",
            hint=f"it may be busy or frozen: fab doctor --host {shlex.quote(self.box.name)}",
        )

    def _broke(self, argv: Sequence[str], why: str) -> _Broke:
        return _Broke(
            f"the connection to `{self.box.name}` broke",
            why=f"{why or 'it was closed'}, during this command: {short(argv)}",
            hint="the same command resumes when the box is back",
            exit_code=ExitCode.UNREACHABLE,
        )

    # --- OpenSSH

    def stream(self, argv: Sequence[str] = (), *, tty: bool = False, forward: Sequence[str] = ()) -> list[str]:
        """Return the argv of a local OpenSSH client that runs `argv` on the box.

        For logs, tunnels and a shell. The client ends by itself if the connection breaks.

        argv: empty for the user's shell, or with `forward` for nothing. forward:
        `[address:]port:host:port` each, as for `ssh -L`; the address should be 127.0.0.1. Opens the
        connection once if the box's host key is not known yet.
        """
        self._meet()
        options = ["-tt" if tty else "-T", "-e", "none"]
        if forward:
            options += ["-o", "ExitOnForwardFailure=yes", *(word for each in forward for word in ("-L", each))]
            options += [] if argv else ["-N"]
        else:
            options += ["-o", "ClearAllForwardings=yes"]
        command = [shlex.join(argv)] if argv else []
        return [*self.openssh.command(self._address, *options), "--", self.box.address, *command]

    def rsync_shell(self) -> list[str]:
        """Return the argv for `rsync -e`, which the caller joins into one word.

        rsync itself adds the address, which is `target`.
        """
        self._meet()
        return self.openssh.command(self._address, "-T", "-e", "none", "-o", "ClearAllForwardings=yes")

    @property
    def target(self) -> str:
        """The box's address for `rsync ... TARGET:PATH`. The user's name is in rsync_shell()."""
        return f"[{self.box.address}]" if ":" in self.box.address else self.box.address

    def with_password(self, argv: Sequence[str]) -> list[str]:
        """Return the argv of an OpenSSH client that logs in with a password.

        ssh asks for it on the terminal, once, and offers no key. Only `install_key` in host_keys.py
        uses this.
        """
        self._meet(log_in=False)
        options = ["-T", "-o", "ClearAllForwardings=yes", "-o", "PubkeyAuthentication=no"]
        options += ["-o", "NumberOfPasswordPrompts=1"]
        options += ["-o", "PreferredAuthentications=password,keyboard-interactive"]
        return [*self.openssh.command(self._address, *options, batch=False), "--", self.box.address, shlex.join(argv)]

    def _meet(self, *, log_in: bool = True) -> None:
        """Make the first contact, if a host key on the way to the box is not known yet.

        OpenSSH accepts no unknown key, so the key is accepted here, where its fingerprint is shown.
        """
        known_hosts = [self.known_hosts]
        known_hosts += [self.openssh.known_hosts(jump.name) for jump in self.openssh.chain(self._address)]
        if any(not each.keys for each in known_hosts):
            if log_in:
                self.connect()
            else:
                self._accept(self.offered_key())

    # --- commands here

    def local(
        self,
        argv: Sequence[str],
        *,
        changes: bool,
        stdin: bytes = b"",
        timeout_s: float | None = None,
        check: bool = True,
        heard: Callable[[str], None] | None = None,
        asks: bool = False,
    ) -> CommandResult:
        """Run a command on this machine, such as rsync.

        Ctrl-C and `timeout_s` end it together with its children, which are in a group of their own.
        heard: gets each whole line of standard output as it comes. asks: the command may ask on the
        terminal. Raises ToolkitError: the program is not installed, `timeout_s` is over; with
        `check`, CommandFailed.
        """
        if self.dry_run:
            self.say.command("here", argv, stdin)
            if changes:
                return CommandResult(0, "", "", 0.0)
        answer = run_here(argv, stdin, timeout_s, heard, own_group=not asks)
        if check and answer.code:
            raise CommandFailed(f"this machine, for {self.box.name}", argv, answer)
        return answer

    # --- the connection

    @property
    def known_hosts(self) -> KnownHosts:
        return self.openssh.known_hosts(self.box.name)

    @property
    def resolved(self) -> Resolved:
        return self.openssh.resolve(self._address)

    @property
    def link(self) -> Link:
        """How the box is reached, for doctor.

        It connects if necessary. For a box that cannot be reached it raises no ToolkitError.
        """
        error: ToolkitError | None = None
        try:
            self.connect()
        except ToolkitError as refused:
            error = refused
        fingerprint = self._offered.fingerprint if self._offered else ""
        key: Any = self._key_was
        if error is None:
            return Link(seconds=self._seconds, host_key=key, fingerprint=fingerprint)
        why = f"{error.what}: {error.why}" if error.why else error.what
        return Link(False, None, why, error.hint, key, fingerprint)

    def _alive(self) -> bool:
        return self._connection is not None and self._connection.is_connected

    def connect(self) -> None:
        """Open the connection, if it is not open.

        Raises ToolkitError: no such host, no answer, another host key, a refused key.
        """
        if self._alive():
            return
        self.close()
        started = time.monotonic()
        jumps = {jump: self.openssh.known_hosts(jump.name).keys for jump in self.openssh.chain(self._address)}
        try:
            self._open()
        finally:
            for jump, before in jumps.items():
                for key in self.openssh.known_hosts(jump.name).keys:
                    if key not in before:
                        self.say(f"{jump.name}, on the way to {self.box.name}: {_new_key(key)}")
        self._seconds = time.monotonic() - started

    def _open(self) -> None:
        _quiet()
        sock = self._dial()
        wait_s = self.openssh.connect_s
        keys = _Keys(self.resolved, wait_s)
        connection = Connection(
            self.known_hosts.alias,
            user=self.resolved.user,
            port=22,  # so that Fabric looks up only the alias in known_hosts
            config=Config(lazy=True, ssh_config=paramiko.SSHConfig()),  # empty: all settings come from ssh -G
            forward_agent=False,
            connect_kwargs={
                "sock": sock,
                "auth_strategy": keys,
                **{f"{stage}timeout": wait_s for stage in ("", "banner_", "auth_", "channel_")},
            },
        )
        known = self.known_hosts.keys
        for key in known:
            # Suppressed: a sort of key that paramiko lacks; see _accept.
            with contextlib.suppress(SSHException, ValueError, paramiko.pkey.UnknownKeyType):
                loaded = paramiko.PKey.from_type_string(key.sort, key.blob)
                connection.client.get_host_keys().add(self.known_hosts.alias, key.sort, loaded)
        connection.client.set_missing_host_key_policy(_Meet(self._first_seen))
        self._key_was = "known" if known else "new"
        self._connection = connection
        started = time.monotonic()
        try:
            connection.open()
        except BadHostKeyException as error:
            self.close()
            self._key_was, self._offered = "changed", _host_key(error.key)
            raise changed(self.box.name, self._offered, known) from None
        except (KeyRefused, HostKeyChanged):
            self.close()
            raise
        except _Silent:
            self.close()
            raise self._silent() from None
        except (SSHException, OSError, EOFError) as error:
            raise self._failed(error, time.monotonic() - started) from None
        except BaseException:
            self.close()
            raise
        transport = connection.transport
        transport.set_keepalive(KEEPALIVE_S)
        self._offered = _host_key(transport.get_remote_server_key())

    def close(self) -> None:
        """Close the connection, if it is open."""
        connection, proxy = self._connection, self._proxy
        self._connection = self._proxy = None
        if connection is not None:
            connection.client.close()
        if proxy is not None:
            proxy.close()

    def offered_key(self) -> HostKey:
        """Return the host key that the box shows now, trusted or not. Does not log in."""
        _quiet()
        transport = paramiko.Transport(self._dial())
        started = time.monotonic()
        try:
            transport.banner_timeout = self.openssh.connect_s
            sorts = [key.sort for key in self.known_hosts.keys]
            options = transport.get_security_options()
            options.key_types = sorted(options.key_types, key=lambda sort: _plain(sort) not in sorts)
            transport.start_client(timeout=self.openssh.connect_s)
            return _host_key(transport.get_remote_server_key())
        except (SSHException, OSError, EOFError) as error:
            raise self._failed(error, time.monotonic() - started) from None
        finally:
            transport.close()
            self.close()

    def _first_seen(self, key: HostKey) -> None:
        self._offered = key
        self._accept(key)

    def _accept(self, key: HostKey) -> None:
        known = self.known_hosts.keys
        if key in known:
            return
        if known or not self.known_hosts.keep(key):
            self._key_was = "changed"
            raise changed(self.box.name, key, self.known_hosts.keys)
        self.say(f"{self.box.name}: {_new_key(key)}")

    # --- the socket

    def _dial(self) -> socket.socket:
        """Return a socket on which the box has begun to speak SSH.

        It tries a second time if the first connection was dropped before that.
        """
        for last in (False, True):
            sock = self._socket()
            try:
                if sock.recv(1, socket.MSG_PEEK):
                    return sock
                error: OSError | None = None
            except TimeoutError:
                sock.close()
                self.close()
                raise self._silent() from None
            except OSError as refused:
                error = refused
            sock.close()
            last_words = self._last_words()
            if last:
                raise self._dropped(error, last_words)
            time.sleep(RETRY_PAUSE_S)
        raise AssertionError("the loop has returned or raised")

    def _socket(self) -> socket.socket:
        wait_s = self.openssh.connect_s
        proxy = self.openssh.proxy(self._address)
        if proxy:
            self._proxy = Proxy(replace(self.resolved, proxy=proxy).proxy_command())
            self._proxy.socket.settimeout(wait_s * (1 + max(1, len(self.openssh.chain(self._address)))))
            return self._proxy.socket
        host, port = self.resolved.host, self.resolved.port
        try:
            sock = socket.create_connection((host, port), timeout=wait_s)
            # paramiko leaves it off. Each small message then waits until the one before it is
            # acknowledged, a round trip of its own.
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            return sock
        except socket.gaierror as error:
            hint = "check the name (`fab add` takes what the rental page shows), and the network of this machine"
            raise unreachable(f"there is no host `{host}`", why=error.strerror or "", hint=hint) from None
        except ConnectionRefusedError:
            why = f"{host} refuses connections at port {port}"
            hint = (
                f"is the box running, and is {port} its SSH port now? "
                "It changes when a rented box is started again: see boxes.yaml"
            )
            raise unreachable(f"cannot reach `{self.box.name}`", why=why, hint=hint) from None
        except TimeoutError:
            raise self._silent() from None
        except (OSError, UnicodeError) as error:
            why = f"{host} port {port}: {getattr(error, 'strerror', None) or error}"
            hint = "check the network of this machine, and the address"
            raise unreachable(f"cannot reach `{self.box.name}`", why=why, hint=hint) from None

    def _where(self) -> str:
        jumps = self.openssh.chain(self._address)
        through = f" through {', '.join(jump.name for jump in jumps)}" if jumps else ""
        return f"{self.resolved.user}@{self.resolved.host} port {self.resolved.port}{through}"

    def _silent(self) -> ToolkitError:
        return unreachable(
            f"no answer from `{self.box.name}` within {self.openssh.connect_s} s",
            why=self._where(),
            hint="is the box running, is the address right, and does a firewall block it? "
            "Restart a frozen box on the provider's page",
        )

    def _dropped(self, error: OSError | None, last_words: str) -> ToolkitError:
        self._look_at_jumps()
        what = f"cannot reach `{self.box.name}`"
        if last_words:
            hint = "the proxy command printed this: try it by itself, with `ssh`"
            return unreachable(what, why=f"{self._where()}: {last_words}", hint=hint)
        reason = f": {error.strerror}" if error else " closed the connection before it began, twice"
        hint = "try again in a minute, since a busy box drops some connections; is this its SSH port?"
        return unreachable(what, why=f"{self._where()}{reason}", hint=hint)

    def _failed(self, error: BaseException, seconds: float) -> ToolkitError:
        last_words = self._last_words()
        if seconds >= self.openssh.connect_s * 0.9:
            return self._silent()
        why = last_words or str(error) or type(error).__name__
        hint = "try again; if it fails again: is this an SSH port, and is the box's SSH server newer than 2015?"
        return unreachable(f"cannot speak SSH with `{self.box.name}`", why=f"{self._where()}: {why}", hint=hint)

    def _last_words(self) -> str:
        """Close the connection, and return the last lines that the ProxyCommand printed, if any."""
        last_words = self._proxy.last_words() if self._proxy else ""
        self.close()
        return last_words

    def _look_at_jumps(self) -> None:
        """Connect to each jump host by itself, which raises ToolkitError for the one that fails.

        The text that ssh prints about a jump host in a ProxyCommand is made for people, not for
        programs.
        """
        for jump in self.openssh.chain(self._address):
            with BoxConnection(
                Box(name=jump.name, address=jump.address),
                self.openssh.state,
                say=self.say,
                ssh_config=self.openssh.config,
                connect_s=self.openssh.connect_s,
            ) as connection:
                connection._address = jump
                connection.connect()


class _Broke(ToolkitError):
    """The connection broke during a command."""


class _Silent(Exception):
    """No answer came in time during the login."""


def _new_key(key: HostKey) -> str:
    return f"new host key {key.fingerprint} ({key.sort}), kept from now on"


def _quiet() -> None:
    """Silence paramiko's log, which prints the errors that we report ourselves, with tracebacks."""
    logging.getLogger("paramiko").setLevel(logging.CRITICAL + 1)


def _plain(sort: str) -> str:
    return "ssh-rsa" if sort.startswith("rsa-sha2-") else sort


def _host_key(key: paramiko.PKey) -> HostKey:
    return HostKey(key.get_name(), key.asbytes())


class _Meet(paramiko.MissingHostKeyPolicy):
    def __init__(self, seen: Callable[[HostKey], None]) -> None:
        self._seen = seen

    def missing_host_key(self, client: paramiko.SSHClient, hostname: str, key: paramiko.PKey) -> None:
        self._seen(_host_key(key))


def _converse(channel: paramiko.Channel, stdin: bytes) -> tuple[int | None, bytes, bytes]:
    """Return exit code, output and errors of the channel's command.

    The code is None if the connection ended first. One thread sends and receives in turn, so that
    the two sides never wait for each other.
    """
    out, err, left, ended_at = bytearray(), bytearray(), memoryview(stdin), None
    ready, shut = channel.fileno(), False
    while True:
        moved = False
        while channel.recv_ready():
            out += channel.recv(TAKES)
            moved = True
        while channel.recv_stderr_ready():
            err += channel.recv_stderr(TAKES)
            moved = True
        while left and not channel.closed and channel.send_ready():
            try:
                left = left[channel.send(left[:TAKES]) :]
            except OSError:  # the command reads no more
                left = left[len(left) :]
        if not left and not shut and not channel.closed:
            with contextlib.suppress(OSError, EOFError):
                channel.shutdown_write()
            shut = True
        if moved:
            continue
        if channel.closed or (channel.eof_received and channel.exit_status_ready()):
            break
        if channel.exit_status_ready():
            ended_at = ended_at or time.monotonic()
            if time.monotonic() - ended_at > LINGER_S:
                break
        if channel.eof_received:
            channel.status_event.wait(0.05)
        else:
            select.select([ready], [], [], 0.02 if left or ended_at else 0.25)
    while channel.recv_ready():
        out += channel.recv(TAKES)
    while channel.recv_stderr_ready():
        err += channel.recv_stderr(TAKES)
    if channel.exit_status != -1:
        return channel.exit_status, bytes(out), bytes(err)
    was_killed = channel.eof_received and channel.get_transport().is_active()
    return (255 if was_killed else None), bytes(out), bytes(err)


# --- keys -----------------------------------------------------------------------------------------


class _Agent(AgentSSH):
    """An agent at a socket that the configuration names; paramiko only knows the environment's."""

    def __init__(self, path: str) -> None:
        super().__init__()
        sock = socket.socket(socket.AF_UNIX)
        sock.settimeout(10)
        sock.connect(path)
        self._connect(sock)


class _Keys:
    """Logs in with keys in OpenSSH's order, and never with a password.

    First the agent's keys that the configuration names, then the agent's others, then key files.
    """

    def __init__(self, resolved: Resolved, wait_s: float) -> None:
        self._resolved, self._wait_s = resolved, wait_s
        self._locked: list[Path] = []
        self._unusable: list[Path] = []
        self._tried: list[str] = []
        self._agent: AgentSSH | None = None

    def authenticate(self, transport: paramiko.Transport) -> list[str]:
        try:
            return self._authenticate(transport)
        finally:
            if self._agent is not None:
                self._agent._close()

    def _authenticate(self, transport: paramiko.Transport) -> list[str]:
        for name, key in self._candidates():
            started = time.monotonic()
            self._tried.append(name)
            try:
                more = transport.auth_publickey(self._resolved.user, key)
            except AuthenticationException:
                if time.monotonic() - started >= self._wait_s * 0.9:
                    raise _Silent from None
                if not transport.is_active():
                    raise self._refused(
                        f"tried: {', '.join(self._tried)}; then the box ended the connection",
                        "run the same command again; else: ",
                    ) from None
                continue
            if more:
                raise self._refused(f"besides the key it wants: {', '.join(more)}")
            return []
        raise self._refused()

    def _candidates(self) -> Iterator[tuple[str, paramiko.PKey]]:
        files = [file for file in self._resolved.keys if file.is_file()]
        agent = self._agent_keys()
        wanted = {blob: file for file in files if (blob := _public_blob(file))}
        held = {wanted[key.asbytes()] for key in agent if key.asbytes() in wanted}
        for key in sorted(agent, key=lambda key: key.asbytes() not in wanted):
            if key.asbytes() in wanted or not self._resolved.only_these:
                yield f"{wanted.get(key.asbytes(), 'a key')} of the agent", key
        for file in files:
            if file not in held and (loaded := self._loaded(file)) is not None:
                yield str(file), loaded

    def _agent_keys(self) -> list[paramiko.PKey]:
        if self._resolved.agent == "none":
            return []
        with contextlib.suppress(SSHException, OSError):
            self._agent = _Agent(self._resolved.agent) if self._resolved.agent else paramiko.Agent()
            return list(self._agent.get_keys())
        return []

    def _loaded(self, file: Path) -> paramiko.PKey | None:
        try:
            return paramiko.PKey.from_path(file)
        except (TypeError, paramiko.PasswordRequiredException):
            self._locked.append(file)
        except (OSError, ValueError, SSHException, paramiko.pkey.UnknownKeyType):
            self._unusable.append(file)
        return None

    def _refused(self, why: str = "", first: str = "") -> KeyRefused:
        """Make the error for a refused login. first: what to do before all else."""
        lines = [why or f"tried: {', '.join(dict.fromkeys(self._tried)) or 'no key was found'}"]
        hint = (
            "fab trust puts your key on the box after one password; or paste your public key on the provider's page; "
            "or name the key in boxes.yaml"
        )
        if self._locked:
            lines.append(f"locked by a passphrase, and no agent holds it: {', '.join(map(str, self._locked))}")
            hint = f"ssh-add {shlex.quote(str(self._locked[0]))}, then the same command; else {hint}"
        elif self._unusable:
            lines.append(f"cannot be read as a private key: {', '.join(map(str, self._unusable))}")
        return KeyRefused(
            f"{self._resolved.user}@{self._resolved.host} takes none of your keys",
            why="\n".join(lines),
            hint=first + hint,
            exit_code=ExitCode.UNREACHABLE,
        )


def _public_blob(file: Path) -> bytes:
    """Read the public key that belongs to a key file; b"" if there is none.

    It is FILE.pub, usually next to FILE, or FILE itself if that is a public key. For a locked key
    nothing else is known.
    """
    public = file if file.suffix == ".pub" else file.with_name(f"{file.name}.pub")
    with contextlib.suppress(OSError, ValueError, IndexError):
        return base64.b64decode(public.read_text(encoding="utf-8").split()[1], validate=True)
    return b""
