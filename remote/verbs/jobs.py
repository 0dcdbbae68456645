"""The verbs that say what runs, and end it: ps, status, cancel."""

from __future__ import annotations

from invoke import Context

from jobs.errors import ExitCode, ToolkitError
from remote.inventory import Box
from remote.output import Sayer
from remote.runs import listing
from remote.runs.cancel import cancel as cancel_job
from remote.verbs.base import (
    DRY_RUN,
    HOST,
    HOSTS,
    JSON,
    RUN,
    VerbContext,
    hosts_of,
    is_number,
    on_each,
    one_host,
    to_json,
    verb,
)


@verb(host=HOSTS, json_=JSON, dry_run=DRY_RUN)
def ps(c: Context, host: str = "", json_: bool = False, dry_run: bool = False) -> int:
    """List the runs of a box: state, progress, time and cost. Several boxes: --host a,b

    fab ps --host gpu-box
    """
    context, say = VerbContext.open(dry_run=dry_run), Sayer()
    rows: dict[str, list[tuple[str, ...]]] = {}

    def list_runs(box: Box, say: Sayer) -> int:
        with context.connection(box, say) as connection:
            found = listing.read_listing(connection, context.providers)
        now = found.clock or 0.0
        if json_:
            say.data(to_json(listing.as_json(box.name, found, now, box.price_per_hour, box.currency)))
        rows[box.name] = listing.rows(box.name, found, now, box.price_per_hour, box.currency)
        return ExitCode.OK

    names = hosts_of(c, host)
    code = on_each(context, names, list_runs, say, as_json=json_)
    table = [row for name in names for row in rows.get(name, [])]
    if not json_ and rows:
        say.data("\n".join(listing.columns([listing.HEAD, *table])) if table else f"no runs on {', '.join(rows)}")
    return code


@verb(host=HOSTS, run=RUN, json_=JSON, dry_run=DRY_RUN)
def status(c: Context, host: str = "", run: str = "", json_: bool = False, dry_run: bool = False) -> int:
    """Show one run and its box in full. Several boxes: --host a,b

    State, last event, cost, GPUs and disk.

    fab status --host gpu-box
    """
    context, names = VerbContext.open(dry_run=dry_run), hosts_of(c, host)

    def show_status(box: Box, say: Sayer) -> int:
        with context.connection(box, say) as connection:
            found = listing.read_listing(connection, context.providers)
        chosen = found.run(run) if run else found.newest()
        if run and chosen is None:
            known_runs = ", ".join(each.name for each in found.runs) or "none"
            raise ToolkitError(f"there is no run `{run}` on `{box.name}`", why=f"it has: {known_runs}")
        now = found.clock or 0.0
        if json_:
            tree = listing.as_json(box.name, found, now, box.price_per_hour, box.currency)
            runs = [each for each in tree["runs"] if chosen and each["name"] == chosen.name]
            say.data(to_json({**tree, "runs": runs}))
        else:
            facts = [("box", box.name), *listing.box_facts(found)]
            facts += listing.card(chosen, now, box.price_per_hour, box.currency) if chosen else []
            say.data("\n".join(listing.columns([("", ""), *facts])).strip("\n"))
        return ExitCode.OK

    return on_each(context, names, show_status, Sayer(), as_json=json_)


@verb(
    host=HOST,
    run="the run (default: the running one)",
    grace="seconds for a checkpoint before the job is killed (default: the job's own)",
    json_=JSON,
    dry_run=DRY_RUN,
)
def cancel(
    c: Context, host: str = "", run: str = "", grace: str = "", json_: bool = False, dry_run: bool = False
) -> int:
    """End a job, with time for a checkpoint, and prove that nothing of it is left.

    A job that has not ended when the grace is over is killed. The proof: none of its processes
    runs, and none holds GPU memory.

    fab cancel --host gpu-box
    """
    context, say = VerbContext.open(dry_run=dry_run), Sayer()
    if grace and not is_number(grace):
        raise ToolkitError(f"--grace {grace} is not a number of seconds")
    with context.connection(context.box(one_host(c, host)), say) as connection:
        ended = cancel_job(connection, context.providers, run or "-", grace or "-", say)
    if dry_run:
        return ExitCode.OK
    if json_:
        left = {"left": list(ended.left), "gpu_held": list(ended.gpu_held), "proven": ended.is_proven}
        say.data(
            to_json(
                {"host": connection.box.name, "run": ended.run or None, "how": ended.how, "exit": ended.exit, **left}
            )
        )
    else:
        say.data(ended.text())
    return ExitCode.OK if ended.is_proven else ExitCode.UNCERTAIN
