"""The verb that brings results home: fetch."""

from __future__ import annotations

import sys
import time
from dataclasses import asdict
from pathlib import Path

from invoke import Context

from jobs.errors import ToolkitError
from jobs.formatting import duration, size, visible
from jobs.spec import NAME
from remote.output import Sayer
from remote.results import transfer
from remote.runs.deployed import find_deployment
from remote.ssh.connection import BoxConnection
from remote.verbs.base import DRY_RUN, HOST, JSON, RUN, VerbContext, list_jobs, one_host, to_json, verb


@verb(
    host=HOST,
    run=RUN,
    checkpoints="also bring the newest complete checkpoint of each step",
    to="the folder for the results (default: runs/BOX/RUN)",
    json_=JSON,
    dry_run=DRY_RUN,
)
def fetch(
    c: Context,
    host: str = "",
    run: str = "",
    checkpoints: bool = False,
    to: str = "",
    json_: bool = False,
    dry_run: bool = False,
) -> None:
    """Bring models and events home, also while the job trains.

    Only complete models are brought, and each file is verified by its hash. A call that broke off
    resumes where it was.

    fab fetch --host gpu-box --run opt-1.3b
    """
    context, say = VerbContext.open(dry_run=dry_run), Sayer()
    with context.connection(context.box(one_host(c, host)), say) as connection:
        deployed = find_deployment(connection, context.providers)
        name = run or _newest(context, connection)
        if not NAME.fullmatch(name):
            raise ToolkitError(f"`{name}` cannot name a run")
        target = Path(to).expanduser() if to else context.settings.runs / connection.box.name / name
        shown = TransferProgress(say)
        what = transfer.FetchSelection(checkpoints=checkpoints)
        fetched = transfer.fetch(
            connection, deployed.root, name, target, state=context.settings.state, what=what, progress=shown
        )
    if json_:
        say.data(to_json({"host": connection.box.name, **asdict(fetched), "folder": str(fetched.folder)}))
        return
    for path in fetched.would:
        say.data(f"would fetch {path}")
    for path in fetched.placed:
        say.data(str(fetched.folder / path))
    for reason in fetched.left:
        say(f"not fetched: {reason}")
    if not dry_run:
        came = f"{size(fetched.moved_bytes)} in {duration(fetched.seconds)}" if fetched.placed else "nothing new"
        say(f"{came}; {size(fetched.total_bytes)} of run `{name}` are here, verified: {fetched.folder}")


class TransferProgress:
    """How far a transfer is: a line that is redrawn on a terminal, elsewhere one every 30 s."""

    def __init__(self, say: Sayer) -> None:
        self._say, self._is_drawn, self._at = say, sys.stderr.isatty(), 0.0

    def __call__(self, done: int, total: int, what: str) -> None:
        is_last, now = done >= total, time.monotonic()
        if not is_last and now - self._at < (0.2 if self._is_drawn else 30.0):
            return
        self._at = now
        share = f"{100 * done // total:3d} %" if total else ""
        amount = f"{share}  {size(done)} of {size(total)}"
        if self._is_drawn:
            sys.stderr.write("\r\x1b[2K" + ("" if is_last else f"{amount}  {visible(what)[:60]}"))
            sys.stderr.flush()
        elif not is_last:
            self._say(f"{amount}  {what}")


def _newest(context: VerbContext, connection: BoxConnection) -> str:
    newest = list_jobs(context, connection).newest()
    if newest is None:
        raise ToolkitError(
            f"there is no run on `{connection.box.name}`", hint=f"fab train --host {connection.box.name}"
        )
    return newest.name
