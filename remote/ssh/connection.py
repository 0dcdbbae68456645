"""The connection to one box over SSH: commands with a deadline, and OpenSSH's argv for streams.

One connection of the OpenSSH client is opened when it is first needed, and kept until the end of a
verb, at a socket in a folder that only this user may enter. Commands, streams and rsync go over it,
so that a verb logs in once: OpenSSH asks for a password or a code, and for the touch of a security
key, as it always does. All settings come from the user's own ssh configuration (openssh.py).

A silent peer is noticed after some 15 s, so each command has its own deadline, too.
"""

from __future__ import annotations

import contextlib
import re
import secrets
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, TYPE_CHECKING, Any

from jobs.errors import ExitCode, ToolkitError
from jobs.formatting import one_line as on_one_line
from remote.inventory import Box
from remote.output import EACH_S, Sayer, waiting
from remote.ssh import commands
from remote.ssh.host_keys import HostKey, KnownHosts, NoSuchHost, changed, unreachable
from remote.ssh.link import Link
from remote.ssh.local import LAST_LINES, CommandResult, NotingSsh, exchange, run_here, short
from remote.ssh.login import LoginNotes, key_state, refused
from remote.ssh.openssh import BY_A_PERSON_S, CONNECT_S, OpenSSH, Resolved, Target, over

if TYPE_CHECKING:
    from typing_extensions import Self

# After a connection was dropped before it began: a box that is being scanned does that
# (MaxStartups).
RETRY_PAUSE_S = 0.5
CLOSE_S = 2.0
PAUSE_S = 0.01  # between two looks at a login that is under way, at its exit code
LOOK_S = 0.1  # and at its notes
NOTICE_S = 0.5  # for the local client to notice that a connection ended, after a command was cut off
COMMAND = ("-T", "-e", "none", "-o", "ClearAllForwardings=yes")  # options for one that needs no terminal
# Of several threads with a box each, one asks on the terminal.
TERMINAL = threading.Lock()
Heard = Callable[[bytes], None]


class CommandFailed(ToolkitError):
    def __init__(self, host: str, argv: Sequence[str], answer: CommandResult) -> None:
        lines = (answer.err.strip() or answer.out.strip()).splitlines()[-LAST_LINES:]
        super().__init__(
            f"a command failed on `{host}` with exit code {answer.code}",
            why="\n".join([*lines, f"the command: {short(argv)}"]),
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
        self._folder: Path | None = None  # with the socket of the connection that is kept
        self._login: _Login | None = None  # that was begun, and not waited for yet
        self._seconds: float | None = None  # of the last connection
        self.was_asked = False  # a person had to help the last login, at the terminal
        self._key_was: str = "unknown"
        self._fingerprint = ""  # that the box showed last

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # --- commands there

    def query(
        self,
        argv: Sequence[str],
        *,
        stdin: bytes = b"",
        timeout_s: float = 30.0,
        check: bool = True,
        heard: Heard | None = None,
    ) -> CommandResult:
        """Run a command that changes nothing on the box, with --dry-run too.

        It is repeated once if a connection that was open before turns out to be broken. heard: gets
        its standard output as it comes.

        Raises ToolkitError: UNREACHABLE, also after `timeout_s`; with `check`, CommandFailed for an
        exit code other than 0.
        """
        if self.dry_run:
            self.say.command(self.box.name, argv, stdin)
        was_open = self.is_open
        try:
            answer = self._run(argv, stdin, timeout_s, heard)
        except _Broke:
            if not was_open:
                raise
            answer = self._run(argv, stdin, timeout_s, heard)
        return self._checked(argv, answer, check)

    def change(
        self,
        argv: Sequence[str],
        *,
        stdin: bytes = b"",
        timeout_s: float = 60.0,
        check: bool = True,
        heard: Heard | None = None,
    ) -> CommandResult:
        """Run a command that changes something on the box; --dry-run only shows it.

        It is never repeated. heard: as in `query`.
        """
        if self.dry_run:
            self.say.command(self.box.name, argv, stdin)
            return CommandResult(0, "", "", 0.0)
        return self._checked(argv, self._run(argv, stdin, timeout_s, heard), check)

    def long_change(self, argv: Sequence[str], heard: Callable[[str], None], *, stdin: bytes = b"") -> CommandResult:
        """Run a command that changes something and takes long, as `change` without `check`.

        It has no deadline: a broken connection ends it with 255. heard: gets each whole line of its
        output as it comes.
        """
        if self.dry_run:
            self.say.command(self.box.name, argv, stdin)
            return CommandResult(0, "", "", 0.0)
        stream, sent = (self.stream(argv), stdin) if stdin else self.script_stream(argv)
        return self.local(stream, changes=True, stdin=sent, check=False, heard=heard)

    def _checked(self, argv: Sequence[str], answer: CommandResult, check: bool) -> CommandResult:
        if check and answer.code:
            raise CommandFailed(self.box.name, argv, answer)
        return answer

    def _run(self, argv: Sequence[str], stdin: bytes, timeout_s: float, heard: Heard | None) -> CommandResult:
        self.connect()
        started, mark = time.monotonic(), f"rlhf-box-{secrets.token_hex(8)}"
        if list(argv[: len(commands.SCRIPT)]) == commands.SCRIPT:
            line, sent = commands.by_input(commands.marked(commands.with_script(argv, stdin), mark))
        elif stdin:
            line, sent = commands.one_line(commands.marked(argv, mark)), stdin
        else:
            line, sent = commands.by_input(commands.marked(argv, mark))
        kept = over(self._socket, "--", "box", line)
        client, out, err = self._exchanged(kept, argv, sent, mark, timeout_s, heard)
        if client == 255 and not out.has_begun and not err.has_begun and self._stays_open():
            # The box allows few sessions over one connection (MaxSessions), and streams have them.
            alone = self._client(COMMAND, "--", self.box.address, line, own=True)
            client, out, err = self._exchanged(alone, argv, sent, mark, timeout_s, heard)
        code = out.code if out.code is not None else err.code
        if code is None:
            code = self._cut_off(argv, client, out, err)
        seconds = time.monotonic() - started
        return CommandResult(code, out.text.decode(errors="replace"), err.text.decode(errors="replace"), seconds)

    def _exchanged(
        self,
        client: Sequence[str],
        argv: Sequence[str],
        sent: bytes,
        mark: str,
        timeout_s: float,
        heard: Heard | None,
    ) -> tuple[int | None, _Answer, _Answer]:
        """Run `argv` by a local client, and return the client's exit code and both outputs."""
        done = exchange(client, sent, re.compile(rb"%s (\d+)\n" % mark.encode()), timeout_s, heard)
        if not done.in_time:
            self.close()
            raise self._late(argv, timeout_s)
        return done.code, _Answer.of(done.out, mark), _Answer.of(done.err, mark)

    def _stays_open(self) -> bool:
        """Whether the kept connection is still open, after ssh had time to notice its end."""
        until = time.monotonic() + NOTICE_S
        while self.is_open and time.monotonic() < until:
            time.sleep(0.02)
        return self.is_open

    def _cut_off(self, argv: Sequence[str], client: int | None, out: _Answer, err: _Answer) -> int:
        """Return the exit code of a command that did not say that it ended.

        Raises ToolkitError: the connection broke; the box's login shell runs no commands of ours.
        """
        if not (self._stays_open() if client == 255 else self.is_open):
            self.close()
            raise self._broke(argv, err.text.decode(errors="replace").strip())
        if not out.has_begun and not err.has_begun:
            raise no_shell(self.box.name, client, out.text, err.text)
        return 255  # a signal ended the shell that ran it

    def _late(self, argv: Sequence[str], timeout_s: float) -> ToolkitError:
        return unreachable(
            f"`{self.box.name}` gave no answer within {timeout_s:g} s",
            why=f"the command: {short(argv)}",
            hint=f"it may be busy or frozen: fab doctor --host {shlex.quote(self.box.name)}",
        )

    def _broke(self, argv: Sequence[str], why: str) -> _Broke:
        return _Broke(
            f"the connection to `{self.box.name}` broke",
            why=f"{on_one_line(why) or 'it was closed'}, during this command: {short(argv)}",
            hint="the same command resumes when the box is back",
            exit_code=ExitCode.UNREACHABLE,
        )

    # --- OpenSSH

    def stream(
        self, argv: Sequence[str] = (), *, tty: bool = False, forward: Sequence[str] = (), asks: bool = False
    ) -> list[str]:
        """Return the argv of a local OpenSSH client that runs `argv` on the box.

        For a command that gets data or a terminal, and for tunnels. The client ends by itself if
        the connection breaks. It uses the connection that is kept, if there is one, else its own.

        argv: empty for the user's shell, or with `forward` for nothing. forward:
        `[address:]port:host:port` each, as for `ssh -L`; the address should be 127.0.0.1. asks: ssh
        may ask for a password or a code on the terminal. Opens the connection once if the box's
        host key is not known yet.
        """
        self._meet()
        options = ["-tt" if tty else "-T", "-e", "none"]
        if forward:
            options += ["-o", "ExitOnForwardFailure=yes", *(word for each in forward for word in ("-L", each))]
            options += [] if argv else ["-N"]
        else:
            options += ["-o", "ClearAllForwardings=yes"]
        line = [commands.one_line(argv)] if argv else []
        return self._client(options, "--", self.box.address, *line, own=bool(forward), asks=asks)

    def script_stream(self, argv: Sequence[str], script: bytes = b"") -> tuple[list[str], bytes]:
        """Return the argv of a local OpenSSH client, and what it gets as its standard input.

        As `stream`, for a command that reads no input. script: of an argv that `sh_script` made.
        """
        self._meet()
        line, sent = commands.by_input(commands.with_script(argv, script) if script else argv)
        return self._client(COMMAND, "--", self.box.address, line), sent

    def rsync_shell(self) -> list[str]:
        """Return the argv for `rsync -e`, which the caller joins into one word.

        rsync itself adds the address, which is `target`.
        """
        self._meet()
        return self._client(COMMAND)

    def _client(self, options: Sequence[str], *words: str, own: bool = False, asks: bool = False) -> list[str]:
        control = self._socket if self.is_open and not own else None
        return [*self.openssh.command(self._address, *options, batch=not asks, control=control), *words]

    @property
    def target(self) -> str:
        """The box's address for `rsync ... TARGET:PATH`. The user's name is in rsync_shell()."""
        return f"[{self.box.address}]" if ":" in self.box.address else self.box.address

    def with_password(self, argv: Sequence[str]) -> tuple[list[str], bytes]:
        """Return the argv and input of an OpenSSH client that logs in with a password.

        ssh asks for it on the terminal, once, and offers no key. Only `install_key` in host_keys.py
        uses this.
        """
        self._meet(log_in=False)
        options = ["-T", "-o", "ClearAllForwardings=yes", "-o", "PubkeyAuthentication=no"]
        options += ["-o", "NumberOfPasswordPrompts=1"]
        options += ["-o", "PreferredAuthentications=password,keyboard-interactive"]
        line, sent = commands.by_input(argv)
        return [*self.openssh.command(self._address, *options, batch=False), "--", self.box.address, line], sent

    def _meet(self, *, log_in: bool = True) -> None:
        """Make the first contact, if a host key on the way to the box is not known yet.

        The clients of streams accept no unknown key: it is accepted here, where it is shown.
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
        stdin: bytes | IO[bytes] = b"",
        timeout_s: float | None = None,
        check: bool = True,
        heard: Callable[[str], None] | None = None,
        line_end: bytes = b"\n",
        asks: bool = False,
    ) -> CommandResult:
        """Run a command on this machine, such as rsync.

        Ctrl-C and `timeout_s` end it together with its children, which are in a group of their own.
        stdin: a file is shared, so its position here is how far the command has read it. heard:
        gets each whole line of standard output as it comes. asks: the command may ask on the
        terminal. Raises ToolkitError: the program is not installed, `timeout_s` is over; with
        `check`, CommandFailed.
        """
        if self.dry_run:
            if isinstance(stdin, bytes):
                self.say.command("here", argv, stdin)
            else:
                self.say.command("here", argv, file=str(stdin.name))
            if changes:
                return CommandResult(0, "", "", 0.0)
        answer = run_here(argv, stdin, timeout_s, heard, own_group=not asks, line_end=line_end)
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
        key: Any = self._key_was
        if error is None:
            return Link(seconds=self._seconds, host_key=key, fingerprint=self._fingerprint)
        why = f"{error.what}: {error.why}" if error.why else error.what
        return Link(False, None, why, error.hint, key, self._fingerprint)

    @property
    def _socket(self) -> Path:
        assert self._folder is not None
        return self._folder / "s"

    @property
    def is_open(self) -> bool:
        """Whether the connection that is kept still is."""
        if self._folder is None:
            return False
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as client:
            client.connect(str(self._socket))
            return True
        return False

    def begin(self) -> None:
        """Begin to log in, if the connection is not open; `connect` waits for the end of it.

        A verb may do something else meanwhile. Raises ToolkitError: ssh does not take the address.
        """
        if self._login is not None or self.is_open:
            return
        self.close()
        started = time.monotonic()
        chain = self.openssh.chain(self._address)
        keys = {jump: self.openssh.known_hosts(jump.name).keys for jump in chain}
        keys[self._address] = self.known_hosts.keys
        self._key_was = "known" if keys[self._address] else "new"
        self.known_hosts.file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        # Of mode 0700. A socket's path may have some 100 bytes, and ssh first makes a longer one; a
        # space, a quote or a dollar sign would end it, or mean something else.
        base = tempfile.gettempdir()
        is_plain = len(base) <= 60 and re.fullmatch(r"[A-Za-z0-9/._+-]*", base)
        self._folder = Path(tempfile.mkdtemp(prefix="rlhf-", dir=base if is_plain else "/tmp"))
        try:
            self._login = _Login(self._start_login(batch=True), keys, started)
        except BaseException:
            self.close()
            raise

    def connect(self, *, ask: bool = True) -> None:
        """Open the connection, if it is not open.

        ask: if the box wants a password or a code, and there is a terminal, ssh asks for it there.
        Raises ToolkitError: no such host, no answer, another host key, a refused key.
        """
        self.begin()
        login = self._login
        if login is None:
            return
        try:
            self._open(login.ssh, ask)
        except BaseException:
            self.close()
            raise
        finally:
            self._login = None
            self._tell_new_keys(login.keys)
        self._seconds = time.monotonic() - login.started

    def _tell_new_keys(self, before: Mapping[Target, Sequence[HostKey]]) -> None:
        """Show the host keys that were accepted. before: those of the box and of each jump host."""
        for target, keys in before.items():
            is_box = target == self._address
            for key in self.openssh.known_hosts(target.name).keys:
                if key not in keys and not (is_box and keys):
                    where = self.box.name if is_box else f"{target.name}, on the way to {self.box.name}"
                    self.say(f"{where}: {_new_key(key)}")

    def _open(self, ssh: NotingSsh, ask: bool) -> None:
        for is_last in (False, True):
            ssh = self._start_login(batch=True) if is_last else ssh
            started = ssh.started
            code, notes = self._watched(ssh, self._login_limit_s)
            self.was_asked = bool(code) and ask and self._may_ask(notes)
            if self.was_asked:
                with TERMINAL:
                    asking = self._start_login(batch=False)
                    code, notes = self._watched(asking, self._login_limit_s + BY_A_PERSON_S)
            self._fingerprint = notes.host_key or self._fingerprint
            if code == 0:
                return
            if notes.methods is not None and code is not None:
                raise refused(self.box.name, self.resolved, notes)
            self._check_host_key(notes)
            self._explain(notes, time.monotonic() - started, is_last)
            time.sleep(RETRY_PAUSE_S)

    def _may_ask(self, notes: LoginNotes) -> bool:
        """Whether a person at the terminal may help a login that failed.

        By a password, a code, or the passphrase of a key; for the box, or for a jump host.
        """
        if not sys.stdin.isatty():
            return False
        is_locked = any(key_state(file) == "locked" for file in self.resolved.keys)
        at_a_jump = not notes.spoke and bool(self.openssh.chain(self._address))
        return notes.can_be_asked_for or at_a_jump or (is_locked and notes.methods is not None)

    def _start_login(self, *, batch: bool) -> NotingSsh:
        first_contact = not self.known_hosts.keys
        argv = self.openssh.log_in(self._address, self._socket, first_contact=first_contact, batch=batch)
        return NotingSsh(argv, has_terminal=not batch)

    @property
    def _login_limit_s(self) -> float:
        return self.openssh.connect_s * (2.0 + len(self.openssh.chain(self._address)))

    def _watched(self, ssh: NotingSsh, limit_s: float) -> tuple[int | None, LoginNotes]:
        """Wait until ssh ends; return its exit code and notes. None: it took too long."""
        has_told, shown, looked = False, 0, time.monotonic()
        try:
            while (code := ssh.ended_within(PAUSE_S)) is None and time.monotonic() < ssh.started + limit_s:
                seconds = time.monotonic() - ssh.started
                if not ssh.has_terminal and seconds > (shown + 1) * EACH_S:  # else ssh may ask there
                    shown += 1
                    self.say.now(waiting(f"reaching {self.box.name}", seconds))
                if not has_told and time.monotonic() - looked > LOOK_S:
                    looked = time.monotonic()
                    if LoginNotes.of(ssh.notes).wants_touch:
                        has_told, limit_s = True, limit_s + BY_A_PERSON_S
                        self.say(f"{self.box.name}: touch your security key")
            return code, LoginNotes.of(ssh.notes)
        finally:
            ssh.close()
            if shown:
                self.say.now("")

    def _check_host_key(self, notes: LoginNotes) -> None:
        """Raise ToolkitError if the box showed another key than the known ones."""
        known = self.known_hosts.keys
        if notes.host_key and known and notes.host_key not in [key.fingerprint for key in known]:
            self._key_was = "changed"
            raise changed(self.box.name, notes.host_key, notes.host_key_sort, known)

    def close(self) -> None:
        """Close the connection, if it is open."""
        if self._login is not None:
            self._login.ssh.close()
            self._login = None
        if self._folder is None:
            return
        if self._socket.exists():
            with contextlib.suppress(subprocess.TimeoutExpired, OSError):
                subprocess.run(
                    over(self._socket, "-O", "exit", "--", "box"),
                    stdin=subprocess.DEVNULL, capture_output=True, timeout=CLOSE_S, check=False,
                )  # fmt: skip
        shutil.rmtree(self._folder, ignore_errors=True)
        self._folder = None

    def offered_key(self) -> HostKey:
        """Return the host key that the box shows now, trusted or not. Does not log in."""
        known = self.known_hosts
        for is_last in (False, True):
            started = time.monotonic()
            if known.keys:  # of several keys, ssh asks for one that is known
                notes = self._look(known, first_contact=False)
                for key in known.keys:
                    if key.fingerprint == notes.host_key:
                        return key
            with tempfile.TemporaryDirectory(prefix="rlhf-") as folder:
                seen = KnownHosts(Path(folder) / "seen", known.alias)
                notes = self._look(seen, first_contact=True)
                if seen.keys:
                    self._fingerprint = seen.keys[0].fingerprint
                    return seen.keys[0]
            self._explain(notes, time.monotonic() - started, is_last)
            time.sleep(RETRY_PAUSE_S)
        raise AssertionError("the loop has returned or raised")

    def _look(self, known: KnownHosts, *, first_contact: bool) -> LoginNotes:
        argv = self.openssh.look(self._address, known, first_contact=first_contact)
        return self._watched(NotingSsh(argv), self._login_limit_s)[1]

    def _accept(self, key: HostKey) -> None:
        known = self.known_hosts.keys
        if key in known:
            return
        if known or not self.known_hosts.keep(key):
            self._key_was = "changed"
            raise changed(self.box.name, key.fingerprint, key.sort, self.known_hosts.keys)
        self.say(f"{self.box.name}: {_new_key(key)}")

    # --- why there is no connection

    def _explain(self, notes: LoginNotes, seconds: float, is_last: bool) -> None:
        """Raise ToolkitError for a connection that failed before the login.

        It returns if one more attempt is due: the box dropped the connection before it began.
        """
        self._look_at_jumps()
        if seconds >= self.openssh.connect_s * 0.9:
            raise self._silent()
        if self.openssh.proxy(self._address):
            # While a connection is kept, ssh does not show what a proxy command says.
            words = "" if notes.spoke else self._look(self.known_hosts, first_contact=False).words
            if words:
                hint = "the proxy command printed this: try it by itself, with `ssh`"
                raise unreachable(f"cannot reach `{self.box.name}`", why=f"{self._where()}: {words}", hint=hint)
        elif not notes.connected:
            self._try_port()
        if not notes.spoke:
            if not is_last:
                return
            why = f"{self._where()} closed the connection before it began, twice"
            hint = "try again in a minute, since a busy box drops some connections; is this its SSH port?"
            raise unreachable(f"cannot reach `{self.box.name}`", why=why, hint=hint)
        hint = "try again; if it fails again: is this an SSH port, and is the box's SSH server newer than 2015?"
        why = f"{self._where()}: {notes.words or 'ssh ended without a word'}"
        raise unreachable(f"cannot speak SSH with `{self.box.name}`", why=why, hint=hint)

    def _try_port(self) -> None:
        """Connect to the box's port, since ssh says in words for people alone why it could not.

        Raises ToolkitError: there is no such host, nobody listens, no answer.
        """
        wait_s = self.openssh.connect_s
        host, port = self.resolved.host, self.resolved.port
        try:
            socket.create_connection((host, port), timeout=wait_s).close()
        except socket.gaierror as error:
            raise NoSuchHost(host, why=error.strerror or "") from None
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


@dataclass(frozen=True)
class _Login:
    """A login that was begun."""

    ssh: NotingSsh
    keys: Mapping[Target, Sequence[HostKey]]  # that were known before it, of the box and the jump hosts
    started: float


class _Broke(ToolkitError):
    """The connection broke during a command."""


class _Answer:
    """What one output of a command on the box said, without our marks and what came before them."""

    def __init__(self, text: bytes, has_begun: bool, code: int | None) -> None:
        self.text, self.has_begun, self.code = text, has_begun, code

    @classmethod
    def of(cls, output: bytes, mark: str) -> _Answer:
        before, begin, rest = output.partition(f"{mark}\n".encode())
        if not begin:
            return cls(before, False, None)
        text, end, code = rest.rpartition(f"{mark} ".encode())
        return cls(text, True, int(code.split()[0])) if end and code.strip().isdigit() else cls(rest, True, None)


def no_shell(name: str, code: int | None, out: bytes, err: bytes) -> ToolkitError:
    """Make the error for a box where another program ran in place of our command."""
    lines = [line for text in (out, err) for line in text.decode(errors="replace").splitlines() if line.strip()]
    if any(commands.LINE_WAS_RUN in line for line in lines):
        printed = "it took for its own what was meant for /bin/sh"
    else:
        printed = f"it printed: {on_one_line(lines[-1])[:200]}" if lines else "it printed nothing"
    host = shlex.quote(name)
    return ToolkitError(
        f"`{name}` runs no commands: after the login, another program ran in place of /bin/sh",
        why=f"{printed} (exit code {code})",
        hint="it may be nologin, a forced command of authorized_keys, or a line such as `exec fish` in a file that the "
        "login shell reads (.bashrc); guard that line: `case $- in *i*) exec fish ;; esac`\n"
        f"`ssh {host} /bin/true` must end with 0",
        exit_code=ExitCode.UNFIT,
    )


def _new_key(key: HostKey) -> str:
    return f"new host key {key.fingerprint} ({key.sort}), kept from now on"
