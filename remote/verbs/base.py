"""The parts that all verbs share: boxes and settings, how a verb ends, and one box or several.

Each verb is thin: it reads flags, queries or changes a box through `BoxConnection`, and shows the
result. Data goes to standard output, everything else to standard error. A verb ends with one of the
exit codes of jobs/errors.py.
"""

from __future__ import annotations

import functools
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fabric import Connection, task
from fabric.main import program
from invoke import Context, Exit

from env.settings import Provider, Settings
from jobs.errors import ExitCode, ToolkitError, system_error
from remote import inventory
from remote.inventory import Box
from remote.output import Sayer
from remote.ssh.connection import BoxConnection
from remote.ssh.host_keys import NoSuchHost

if TYPE_CHECKING:
    from jobs.spec import Job

CHECKOUT = Path(__file__).parents[2]

HOST = "a name in boxes.yaml, or anything that ssh understands"
HOSTS = f"{HOST}; several with commas"
RUN = "the run (default: the running one, else the last)"
JSON = "for programs: JSON on standard output"
FLAVOUR = "the stack, a file of env/flavours: cu118 or cu130 (default: the first that drives the box's cards)"
DRY_RUN = "show the commands that would change something, and run none of them"


def read_settings() -> Settings:
    return Settings.from_environ(os.environ)


@dataclass(frozen=True)
class VerbContext:
    """The settings, boxes and providers that a verb works with."""

    settings: Settings
    boxes: Mapping[str, Box]
    providers: Mapping[str, Provider] = field(default_factory=Provider.load_all)
    dry_run: bool = False

    @classmethod
    def open(cls, *, dry_run: bool = False) -> VerbContext:
        settings = read_settings()
        return cls(settings, inventory.load_boxes(settings.boxes), dry_run=dry_run)

    @contextmanager
    def connection(self, box: Box, say: Sayer) -> Iterator[BoxConnection]:
        """Open a connection to a box when it is needed, and close it.

        Where a name that is not in boxes.yaml leads to no host, the error names those that are.
        """
        flag = program.args["ssh-config"].value if hasattr(program, "core") else None  # `fab -S FILE`
        config = Path(flag).expanduser() if flag else None
        try:
            with BoxConnection(
                box, self.settings.state, say=say, dry_run=self.dry_run, ssh_config=config
            ) as connection:
                yield connection
        except NoSuchHost as error:
            # Another host than the one that was typed comes from ~/.ssh/config, which has the name.
            is_as_typed = error.host.lower() == box.address.rpartition("@")[2].lower()
            known = inventory.meant(box.name, self.boxes) if is_as_typed else ""
            if not known:
                raise
            raise ToolkitError(error.what, why=error.why, hint=known, exit_code=error.exit_code) from None

    def box(self, name: str) -> Box:
        return inventory.find(name, self.boxes)

    def secrets(self, box: Box, job: Job | None = None) -> dict[str, str]:
        """Return the secrets that the box's entry names, from the environment or from secrets/.

        job: what is to run there, if it may need more.
        """
        found = {}
        for name in (*box.secrets, *(("WANDB_API_KEY",) if job and "wandb" in job.track else ())):
            file = CHECKOUT / "secrets" / name
            value = os.environ.get(name) or (file.read_text(encoding="utf-8").strip() if file.is_file() else "")
            if value:
                found[name] = value
        return found


def hosts_of(c: Context, host: str) -> list[str]:
    """Return the names given by `--host a,b`, or by Fabric's own `-H a,b`.

    Raises ToolkitError: no name, or the same name twice.
    """
    if host and isinstance(c, Connection):
        raise ToolkitError(
            "the box is named twice",
            why=f"by --host {host} and by -H {program.args.hosts.value}",
            hint="leave out one of them",
        )
    named = program.args.hosts.value if isinstance(c, Connection) else host
    names = [name.strip() for name in (named or "").split(",") if name.strip()]
    if not names:
        raise ToolkitError("which box?", hint="--host NAME: a name in boxes.yaml, or anything that ssh understands")
    if len({*names}) < len(names):
        raise ToolkitError(f"a box is named twice: {', '.join(names)}")
    return names


def one_host(c: Context, host: str) -> str:
    names = hosts_of(c, host)
    if len(names) > 1:
        raise ToolkitError(
            f"this verb takes one box, not {len(names)}", why=", ".join(names), hint="call it once for each box"
        )
    return names[0]


def verb(*, iterable: Sequence[str] = (), **texts: str) -> Callable[[Callable[..., ExitCode | int | None]], Any]:
    """Make a task that shows a ToolkitError as it is and ends with one of our exit codes.

    iterable: flags that may be repeated. Their default must be None, since Invoke takes any other
    default for the flag's type. texts: the help of each flag.

    With `-H a,b` Fabric calls the task once for each host. The first call handles all of them, as
    with `--host a,b`.
    """

    def decorate(body: Callable[..., ExitCode | int | None]) -> Any:
        @functools.wraps(body)
        def run(c: Context, *arguments: Any, **flags: Any) -> None:
            if (
                isinstance(c, Connection)
                and c.original_host != Connection(program.args.hosts.value.split(",")[0]).original_host
            ):
                return
            try:
                code = body(c, *arguments, **flags)
            except ToolkitError as error:
                if flags.get("json_"):
                    Sayer().data(to_json(error_as_json(error)))
                Sayer()(error)
                code = error.exit_code
            except BrokenPipeError:
                code = ExitCode.OK
            except OSError as error:
                Sayer()(system_error(error, ExitCode.INTERNAL))
                code = ExitCode.INTERNAL
            except KeyboardInterrupt:
                after_caret = "\n" if sys.stderr.isatty() else ""  # the terminal has shown a ^C
                Sayer()(f"{after_caret}stopped by Ctrl-C")
                code = ExitCode.INTERRUPTED
            if code:
                raise Exit(code=int(code))

        help_of = {name.removesuffix("_"): text for name, text in texts.items()}
        return task(auto_shortflags=False, iterable=list(iterable), help=help_of)(run)

    return decorate


# --- one box or several ---------------------------------------------------------------------------


def on_each(
    context: VerbContext, names: Sequence[str], work: Callable[[Box, Sayer], int], say: Sayer, *, as_json: bool = False
) -> int:
    """Do `work` on each box concurrently, and return the first exit code that is not 0.

    The first in the order of the names. The failure of one box hides nothing of another's output.
    as_json: print a line of JSON also for a box that fails.
    """
    if len(names) == 1:
        return work(context.box(names[0]), say)

    def guarded(name: str) -> int:
        say_of_box = say.of(name)
        try:
            return work(context.box(name), say_of_box)
        except ToolkitError as error:
            failed = error
        except OSError as error:
            failed = system_error(error, ExitCode.INTERNAL)
        if as_json:
            say.data(to_json({"host": name, **error_as_json(failed)}))
        say_of_box(failed)
        return failed.exit_code

    with ThreadPoolExecutor(len(names)) as pool:
        codes = list(pool.map(guarded, names))
    return next((code for code in codes if code), 0)


def error_as_json(error: ToolkitError) -> dict[str, Any]:
    return {"what": error.what, "why": error.why, "hint": error.hint, "exit_code": int(error.exit_code)}


def to_json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


# --- what several verbs need ----------------------------------------------------------------------


def is_number(text: str) -> bool:
    try:
        return float(text) >= 0
    except ValueError:
        return False
