"""The verb that brings results home: fetch."""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path

from invoke import Context

from jobs.errors import ExitCode, ToolkitError
from jobs.formatting import duration, size
from jobs.run_dir import RUN_NAME
from remote.output import Sayer
from remote.results import run_contents, transfer
from remote.runs.deployed import find_deployment
from remote.runs.listing import Listing, read_listing
from remote.ssh.connection import BoxConnection
from remote.verbs.base import DRY_RUN, HOST, JSON, RUN, VerbContext, error_as_json, one_host, to_json, verb

DRAWN_EACH_S = 0.2


@verb(
    host=HOST,
    run=RUN,
    all_="bring every run of the box",
    checkpoints="also bring the newest complete checkpoint of each step",
    to="the folder for the results (default: runs/BOX/RUN); with --all, the folder for the runs' folders",
    json_=JSON,
    dry_run=DRY_RUN,
)
def fetch(
    c: Context,
    host: str = "",
    run: str = "",
    all_: bool = False,
    checkpoints: bool = False,
    to: str = "",
    json_: bool = False,
    dry_run: bool = False,
) -> int:
    """Bring models and events home, also while the job trains.

    Only complete models are brought, and each file is verified by its hash. A call that broke off
    resumes where it was. A folder that holds another run's results is refused.

    fab fetch --host gpu-box --run opt-1.3b
    """
    if all_ and run:
        raise ToolkitError("--all and --run are opposites", hint="leave out one of them")
    context, say = VerbContext.open(dry_run=dry_run), Sayer()
    code = 0
    with context.connection(context.box(one_host(c, host)), say) as connection:
        deployed = find_deployment(connection, context.providers)
        if all_:
            names = _all_runs(connection, deployed.root)
        else:
            names = [run or newest_run(read_listing(connection, context.providers), connection)]
        folder = Path(to).expanduser() if to else context.settings.runs / connection.box.name
        for name in names:
            if not RUN_NAME.fullmatch(name):
                raise ToolkitError(f"`{name}` cannot name a run")
            target = Path(to).expanduser() if to and not all_ else folder / name
            try:
                what = transfer.FetchSelection(checkpoints=checkpoints)
                fetched = fetch_run(context, connection, deployed.root, name, target, what, say)
            except ToolkitError as error:
                # The next one may do; but not if the box is gone.
                if len(names) == 1 or error.exit_code == ExitCode.UNREACHABLE:
                    raise
                if json_:
                    say.data(to_json({"host": connection.box.name, "run": name, **error_as_json(error)}))
                say(error)
                code = code or error.exit_code
                continue
            _show(fetched, connection.box.name, say, as_json=json_, dry_run=dry_run)
    return code


def fetch_run(
    context: VerbContext,
    connection: BoxConnection,
    root: str,
    run: str,
    target: Path,
    what: transfer.FetchSelection,
    say: Sayer,
) -> transfer.Fetched:
    progress = TransferProgress(say)
    return transfer.fetch(connection, root, run, target, state=context.settings.state, what=what, progress=progress)


def _show(fetched: transfer.Fetched, host: str, say: Sayer, *, as_json: bool, dry_run: bool) -> None:
    if as_json:
        say.data(to_json({"host": host, **asdict(fetched), "folder": str(fetched.folder)}))
        return
    for path in fetched.would:
        say.data(f"would fetch {path}")
    for path in fetched.placed:
        say.data(str(fetched.folder / path))
    for name in fetched.aside:
        say(f"{name.partition('.')[0]} was trained again: what was here is kept in {fetched.folder / name}")
    for reason in fetched.left:
        say(f"not fetched: {reason}")
    if not fetched.id:
        say(
            f"run `{fetched.run}` has no id, since it was begun by an older version: "
            "a later run of this name is known by its first event alone"
        )
    if not dry_run:
        came = f"{size(fetched.moved_bytes)} in {duration(fetched.seconds)}" if fetched.placed else "nothing new"
        say(f"{came}; {size(fetched.total_bytes)} of run `{fetched.run}` are here, verified: {fetched.folder}")


class TransferProgress:
    """Shows how far a transfer is."""

    def __init__(self, say: Sayer) -> None:
        self._say, self._at = say, 0.0

    def __call__(self, done: int, total: int, what: str) -> None:
        is_last, now = done >= total, time.monotonic()
        if not is_last and now - self._at < DRAWN_EACH_S:
            return
        self._at = now
        share = f"{100 * done // total:3d} %" if total else ""
        self._say.now("" if is_last else f"{share}  {size(done)} of {size(total)}  {what}")


def _all_runs(connection: BoxConnection, root: str) -> list[str]:
    names = [run.name for run in run_contents.read_results(connection, root).runs]
    if not names:
        raise _no_run(connection.box.name)
    return names


def newest_run(found: Listing, connection: BoxConnection) -> str:
    newest = found.newest()
    if newest is None:
        raise _no_run(connection.box.name)
    return newest.name


def _no_run(host: str) -> ToolkitError:
    return ToolkitError(f"there is no run on `{host}`", hint=f"fab train --host {host}")
