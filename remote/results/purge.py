"""Leaving a box as it was found: remove our folder and all that is ours in Docker, and prove it."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from jobs.errors import ExitCode, ToolkitError
from jobs.formatting import size
from remote.output import ticking
from remote.results.at_home import at_home
from remote.results.run_contents import FetchedRun, how_to_fetch, read_results, unfetched
from remote.scripts import script
from remote.ssh.commands import sh_script

if TYPE_CHECKING:
    from remote.ssh.connection import BoxConnection

Say = Callable[[str], None]
COUNT_S = 600.0  # to add up the sizes
PURGE_S = 1800.0  # an environment has some 100,000 files, and a network disk is slow


@dataclass(frozen=True)
class Proof:
    """One thing that was looked for after everything was removed."""

    name: str  # folder, processes, docker
    ok: bool
    text: str

    def __str__(self) -> str:
        return f"{'gone' if self.ok else 'LEFT'}  {self.name}: {self.text}"


@dataclass(frozen=True)
class Purged:
    removed: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    proofs: tuple[Proof, ...] = ()
    would: tuple[str, ...] = ()  # with --dry-run: what would go

    @property
    def is_clean(self) -> bool:
        return all(proof.ok for proof in self.proofs)


REFUSALS: dict[str, tuple[str, str, ExitCode]] = {  # what, hint, code
    "not_ours": ("this is not a folder of ours", "nothing was removed; look at it with fab shell", ExitCode.USAGE),
    "busy": ("a job runs there", "wait for its end, or end it with fab cancel", ExitCode.BUSY),
    "locked": ("a deploy is under way there", "wait for its end; if it is dead, fab unlock", ExitCode.BUSY),
    "mounted": (
        "another file system is mounted in it",
        "unmount it: purge never leaves the file system of its folder",
        ExitCode.USAGE,
    ),
}


def purge(
    connection: BoxConnection,
    root: str,
    copies: Mapping[str, Sequence[FetchedRun]],
    *,
    yes: bool = False,
    now: Say = lambda text: None,
) -> Purged:
    """Remove ROOT and our containers, images and volumes, and prove that they are gone.

    It may be run twice. With the connection's dry_run it only asks what would be removed, and notes
    what would be lost. copies: what was fetched, by run: one for each folder here. now: gets the
    passing state, and "" at the end.

    Raises ToolkitError: something is not fetched (unless `yes`), a job runs, the folder is not
    ours, something could not be removed.
    """
    host = connection.box.name
    with ticking(now, f"looking at the results on {host}"):
        found = read_results(connection, root)
    if found.running is not None:
        raise ToolkitError(
            f"cannot purge {host}: a job runs there",
            why=f"run `{found.running}`"
            + (f", on {found.elsewhere}, which shares the folder" if found.elsewhere else ""),
            hint=REFUSALS["busy"][1],
            exit_code=ExitCode.BUSY,
        )
    lost = unfetched(found, at_home(found, copies))
    if connection.dry_run:
        connection.change(sh_script("purge", root), stdin=script("results.sh"))  # shown
        with ticking(now, f"counting what is on {host}"):
            answer = connection.query(sh_script("would_purge", root), stdin=script("results.sh"), timeout_s=COUNT_S)
        would = parse(answer.out, host, root, is_proof_needed=False)
        needs_yes = [f"not fetched, so only --yes removes it: {each}" for each in lost if not yes]
        return replace(would, notes=(*needs_yes, *would.notes))
    if lost and not yes:
        raise ToolkitError(
            f"{host} has results that are nowhere else",
            why="\n".join(map(str, lost)),
            hint=f"{how_to_fetch(host, lost)}\nor --yes to delete them",
            exit_code=ExitCode.UNFIT,
        )
    freed = _Freed()
    with ticking(now, f"removing {root} from {host}", lambda: str(freed)):
        argv, stdin = sh_script("purge", root), script("results.sh")
        answer = connection.change(argv, stdin=stdin, timeout_s=PURGE_S, heard=freed)
    purged = parse(answer.out, host, root)
    if not purged.is_clean:
        raise ToolkitError(
            f"not everything could be removed from {host}",
            why="\n".join(proof.text for proof in purged.proofs if not proof.ok),
            hint="end what is named above; the same command removes the rest",
            exit_code=ExitCode.UNFIT,
        )
    return purged


class _Freed:
    """How much room the box says that there is by now, in its answer as it comes."""

    def __init__(self) -> None:
        self._last = b""

    def __call__(self, part: bytes) -> None:
        self._last = (self._last + part)[-4096:]

    def __str__(self) -> str:
        found = re.findall(rb"^freed ([0-9]{1,15})\n", self._last, re.MULTILINE)
        return f"{size(int(found[-1]) * 1024)} freed" if found else ""


def parse(text: str, host: str, root: str, *, is_proof_needed: bool = True) -> Purged:
    """Parse the box's answer. Raises ToolkitError: it refused, or the answer is not whole."""
    removed, would, notes, proofs = [], [], [], []
    lines = text.splitlines()
    for line in lines:
        word, _, rest = line.partition(" ")
        if word == "refused":
            reason, _, text = rest.partition(" ")
            what, hint, code = REFUSALS.get(reason, ("it was refused there", "", ExitCode.UNFIT))
            raise ToolkitError(
                f"cannot purge {host}: {what}",
                why=f"{root}: {text}" if root not in text else text,
                hint=hint,
                exit_code=code,
            )
        if word == "removed":
            removed.append(rest)
        elif word == "would":
            would.append(_with_size(rest))
        elif word == "note":
            notes.append(rest)
        elif word == "proof":
            name, state, detail = [*rest.split(" ", 2), "", ""][:3]
            proofs.append(Proof(name, state == "ok", detail))
    if not lines or lines[-1] != "end" or (is_proof_needed and not proofs):
        raise ToolkitError(
            f"it is uncertain whether {host} is clean",
            why="its answer was cut short",
            hint="the same command resumes",
            exit_code=ExitCode.UNCERTAIN,
        )
    return Purged(tuple(removed), tuple(notes), tuple(proofs), tuple(would))


def _with_size(text: str) -> str:
    """Write a size for a person: `/data/rlhf-box, 1234567 kB` -> `/data/rlhf-box, 1.3 GB`."""
    found = re.fullmatch(r"(.*), ([0-9]{1,15}) kB", text)
    return f"{found[1]}, {size(int(found[2]) * 1024)}" if found else text
