"""The verb that says whether a run worked: report. It brings the events home, and no models."""

from __future__ import annotations

from pathlib import Path

from invoke import Context

from jobs.errors import ToolkitError
from jobs.run_dir import RUN_NAME, RunDir
from jobs.views.report.report_file import write_page
from jobs.views.report.run_page import Price, read_run
from jobs.views.report.verdict import verdict_of_run
from remote.output import Sayer
from remote.results import transfer
from remote.runs.deployed import find_deployment
from remote.runs.listing import read_listing
from remote.verbs.base import DRY_RUN, HOST, JSON, RUN, VerbContext, one_host, to_json, verb
from remote.verbs.results import fetch_run, newest_run


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
    if run and not RUN_NAME.fullmatch(run):
        raise ToolkitError(f"`{run}` cannot name a run")
    with context.connection(box, say) as connection:
        deployed, found = find_deployment(connection, context.providers), read_listing(connection, context.providers)
        name = run or newest_run(found, connection)
        target = Path(to).expanduser() if to else context.settings.runs / box.name / name
        what = transfer.FetchSelection(models=False)
        fetched = fetch_run(context, connection, deployed.root, name, target, what, say)
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
