"""The verb that watches a run: logs."""

from __future__ import annotations

from invoke import Context

from jobs.errors import ExitCode, ToolkitError
from jobs.run_dir import RUN_NAME
from remote.output import Sayer
from remote.runs.deployed import dispatch
from remote.verbs.base import DRY_RUN, HOST, RUN, VerbContext, one_host, verb


@verb(
    host=HOST,
    run=RUN,
    follow="watch until the job has ended, and reconnect when the connection breaks; Ctrl-C stops only the watching",
    raw="everything that the ranks and their libraries print, byte for byte",
    tail="only the last N events, or with --raw the last N lines",
    since="only what is newer: 90s, 10m, 2h, 1d, or a time such as 2025-01-05T12:00:00Z",
    json_="the event lines, byte for byte",
    dry_run=DRY_RUN,
)
def logs(
    c: Context,
    host: str = "",
    run: str = "",
    follow: bool = False,
    raw: bool = False,
    tail: int = 0,
    since: str = "",
    json_: bool = False,
    dry_run: bool = False,
) -> int:
    """Show what a run has done; with --follow, keep watching it.

    With --follow it is a live panel on a terminal, and lines on a pipe.

    fab logs --follow --host gpu-box
    """
    context, say = VerbContext.open(dry_run=dry_run), Sayer()
    box = context.box(one_host(c, host))
    if run and not RUN_NAME.fullmatch(run):
        raise ToolkitError(f"`{run}` cannot name a run")
    if tail < 0:
        raise ToolkitError(f"--tail {tail} is not a number of lines", hint="e.g. --tail 100")
    with context.connection(box, say) as connection:
        if not dry_run:
            connection.begin()
        # What draws takes a while to import: ssh logs in meanwhile.
        from remote.runs import views
        from remote.verbs.following import show

        at = views.WatchedRun(box.name, run, box.price_per_hour, box.currency)
        view = views.view_of(at, as_json=json_, raw=raw, live=follow, since=views.parse_since(since) if since else None)
        if dry_run:
            words = ("follow", run or "-", view.file, str(-tail))
            say.command(box.name, dispatch(box, context.providers, *words))
            return ExitCode.OK
        return show(context, connection, at, view, say, follow=follow, raw=raw, lines=tail)
