"""The verbs that bring results home: fetch, and report, which needs the events alone."""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path

from invoke import Context

from jobs.errors import ExitCode, ToolkitError
from jobs.formatting import duration, size
from jobs.run_dir import RunDir
from jobs.spec import NAME
from jobs.views.report.report_file import write_page
from jobs.views.report.run_page import Price, read_run
from jobs.views.report.verdict import verdict_of_run
from remote.output import Sayer
from remote.results import run_contents, transfer
from remote.runs.deployed import find_deployment
from remote.runs.listing import Listing
from remote.ssh.connection import BoxConnection
from remote.verbs.base import DRY_RUN, HOST, JSON, RUN, VerbContext, error_as_json, list_jobs, one_host, to_json, verb

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
            names = [run or _newest(list_jobs(context, connection), connection)]
        folder = Path(to).expanduser() if to else context.settings.runs / connection.box.name
        for name in names:
            if not NAME.fullmatch(name):
                raise ToolkitError(f"`{name}` cannot name a run")
            target = Path(to).expanduser() if to and not all_ else folder / name
            try:
                what = transfer.FetchSelection(checkpoints=checkpoints)
                fetched = _fetched(context, connection, deployed.root, name, target, what, say)
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


def _fetched(
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


@verb(
    host=HOST,
    run=RUN,
    to="the folder for the events and the page (default: runs/BOX/RUN)",
    json_=JSON,
    dry_run=DRY_RUN,
)
def report(c: Context, host: str = "", run: str = "", to: str = "", json_: bool = False, dry_run: bool = False) -> None:
    """Write a page that says whether a run worked, also while it trains.

    It brings the events home, not the models, and makes the page here: curves, answers, alarms, and
    the cost by the price of boxes.yaml.

    fab report --host gpu-box
    """
    context, say = VerbContext.open(dry_run=dry_run), Sayer()
    box = context.box(one_host(c, host))
    if run and not NAME.fullmatch(run):
        raise ToolkitError(f"`{run}` cannot name a run")
    with context.connection(box, say) as connection:
        deployed, found = find_deployment(connection, context.providers), list_jobs(context, connection)
        name = run or _newest(found, connection)
        target = Path(to).expanduser() if to else context.settings.runs / box.name / name
        what = transfer.FetchSelection(models=False)
        fetched = _fetched(context, connection, deployed.root, name, target, what, say)
    if dry_run:
        for path in fetched.would:
            say.data(f"would fetch {path}")
        return
    at_home, remote_run = RunDir(target), found.run(name)
    price = Price(box.price_per_hour, box.currency)
    page = read_run(at_home, state=remote_run.state if remote_run else None, price=price)
    write_page([page], at_home.report)
    if json_:
        verdict = verdict_of_run(page.history, page.state)
        fields = {"verdict": verdict.tone, "sentence": verdict.sentence, "page": str(at_home.report)}
        say.data(to_json({"host": box.name, "run": name, "state": page.state, **fields}))
    else:
        say.data(str(at_home.report))


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


def _newest(found: Listing, connection: BoxConnection) -> str:
    newest = found.newest()
    if newest is None:
        raise _no_run(connection.box.name)
    return newest.name


def _no_run(host: str) -> ToolkitError:
    return ToolkitError(f"there is no run on `{host}`", hint=f"fab train --host {host}")
