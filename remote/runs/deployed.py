"""What is deployed on a box, and how its supervisor is called.

One command finds our folder on the box by itself, so that it works from any laptop.
"""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from env.settings import OUR_FOLDER, Provider
from jobs.errors import ExitCode, ToolkitError
from remote.inventory import Box
from remote.scripts import dispatch_script
from remote.ssh.connection import BoxConnection, CommandResult
from remote.ssh.local import start

NOT_DEPLOYED = 3


def roots(box: Box, providers: Mapping[str, Provider]) -> list[str]:
    """Return the paths where our folder may be on the box.

    Where boxes.yaml says; else on its provider's data disk; else in any provider's place.
    """
    if box.data_folder:
        folders = [box.data_folder]
    else:
        known = [providers[box.provider]] if box.provider else list(providers.values())
        folders = [*(folder for each in known for folder in each.data_folders), "$HOME"]
    return [*dict.fromkeys(f"{folder.rstrip('/')}/{OUR_FOLDER}" for folder in folders)]


def dispatch(box: Box, providers: Mapping[str, Provider], verb: str, *arguments: str) -> list[str]:
    """Call `supervisor.sh VERB ROOT ARGUMENT...` of the code that was deployed last."""
    return ["sh", "-c", dispatch_script(), "rlhf-box", *roots(box, providers), "--", verb, *arguments]


@dataclass(frozen=True)
class Deployment:
    root: str
    facts: Mapping[str, str] = field(default_factory=dict)  # the lines of ROOT/deployed
    inputs: frozenset[str] = frozenset()  # hashes of the inputs that are on the box
    slot: str = ""  # the run that holds the box

    @property
    def code(self) -> str:
        return self.facts["code"]

    def supervisor(self, verb: str, *arguments: str) -> list[str]:
        return ["sh", f"{self.root}/code/{self.code}/remote/on_box/supervisor.sh", verb, self.root, *arguments]


def find_deployment(connection: BoxConnection, providers: Mapping[str, Provider]) -> Deployment:
    """Ask the box what is deployed, in one round trip. Raises ToolkitError: nothing is deployed."""
    answer = connection.query(dispatch(connection.box, providers, "where"), check=False)
    check(connection.box, answer)
    lines = [text.partition(" ") for text in answer.out.splitlines()]
    facts = {key: value for key, _, value in lines if key not in ("root", "input", "slot")}
    named = {key: value for key, _, value in lines if key in ("root", "slot")}
    inputs = frozenset(value for key, _, value in lines if key == "input")
    return Deployment(named.get("root", ""), facts, inputs, named.get("slot", ""))


def our_root(connection: BoxConnection, providers: Mapping[str, Provider]) -> tuple[str, bool]:
    """Return our folder's path on the box, and whether it exists; a deploy may be unfinished."""
    answer = connection.query(dispatch(connection.box, providers, "root"))
    for line in answer.out.splitlines():
        word, _, path = line.partition(" ")
        if line.startswith(("root ", "would ")):
            return path, word == "root"
    what = f"`{connection.box.name}` did not say where our folder is"
    raise ToolkitError(what, why=answer.out[-300:], exit_code=ExitCode.INTERNAL)


def open_stream(
    connection: BoxConnection, providers: Mapping[str, Provider]
) -> Callable[[str, str, int], subprocess.Popen[bytes]]:
    """Make the function with which remote.runs.watch.follow opens its streams.

    The ssh process gets its own session, so that Ctrl-C at the terminal reaches us alone. The first
    login is made here, since its errors are better than those of a stream. A later stream follows
    one that broke or fell silent: it gets a connection of its own immediately, since the kept one
    may take some time to notice that.
    """
    connection.connect()
    has_opened = False

    def opened(run: str, file: str, offset: int) -> subprocess.Popen[bytes]:
        nonlocal has_opened
        if has_opened:
            connection.close()
        has_opened = True
        argv = dispatch(connection.box, providers, "follow", run or "-", file, str(offset))
        return start(*connection.script_stream(argv))

    return opened


def check(box: Box, answer: CommandResult) -> None:
    """Raise ToolkitError if nothing is deployed, or the command failed."""
    output = answer.err.strip() or answer.out.strip()
    if answer.code == NOT_DEPLOYED and "not_deployed" in answer.out.split():
        raise not_deployed(box)
    if answer.code == ExitCode.USAGE:  # an error that the supervisor wrote for a person
        raise ToolkitError(f"`{box.name}`: {output.removeprefix('error: ')}", hint=f"fab ps --host {box.name}")
    if answer.code:
        what = f"`{box.name}` answered with exit code {answer.code}"
        raise ToolkitError(what, why=last_lines(output), exit_code=ExitCode.INTERNAL)


def not_deployed(box: Box) -> ToolkitError:
    return ToolkitError(
        f"nothing is deployed on `{box.name}`", hint=f"fab deploy --host {box.name}", exit_code=ExitCode.UNFIT
    )


def last_lines(text: str) -> str:
    return "\n".join(text.strip().splitlines()[-10:])
