"""A job and what becomes of it: train, logs, ps, status, cancel."""

from __future__ import annotations

import secrets as tokens
import shlex
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from invoke import Context

from jobs.errors import ExitCode, ToolkitError
from jobs.spec import NAME, load_job, settings_of_deployment, steps_of
from remote.deploy.sync import checkout_tree, send_whole
from remote.inventory import Box
from remote.output import Sayer
from remote.runs import frames, listing, start, views, watch
from remote.runs.cancel import cancel as cancel_job
from remote.runs.deployed import NOT_DEPLOYED, Deployment, dispatch, find_deployment, not_deployed, open_stream
from remote.runs.inputs import job_on_box, pack
from remote.ssh.connection import BoxConnection
from remote.verbs.base import (
    CHECKOUT,
    DRY_RUN,
    HOST,
    HOSTS,
    JSON,
    VerbContext,
    hosts_of,
    is_number,
    list_jobs,
    on_each,
    one_host,
    to_json,
    verb,
)

DEFAULT_JOB = "opt-1.3b"  # as rlhf-train's


@verb(
    host=HOST,
    job=f"a name of jobs/ or a YAML file (default: {DEFAULT_JOB})",
    step="1, 2, 3, several with commas, or all (default)",
    set_="change a field of the job: --set ppo.kl_coef=0.05; repeatable",
    run="the run's name (default: the job's)",
    from_="take over the steps of this run whose settings are the same",
    redo="do the steps again that are complete",
    deployment_type="single_gpu or single_node",
    detach="start it and come back at once",
    wait="plain lines until it has ended; Ctrl-C apart, the exit code is the job's own",
    json_="the events as they come, for programs; with --detach, what was started",
    dry_run=DRY_RUN,
    iterable=["set_"],
)
def train(
    c: Context, host: str = "", job: str = DEFAULT_JOB, step: str = "all", set_: list[str] | None = None, run: str = "", from_: str = "",
    redo: bool = False, deployment_type: str = "", detach: bool = False, wait: bool = False, json_: bool = False, dry_run: bool = False,
) -> int:  # fmt: skip
    """Start a job on the box, where it keeps running without you, and follow it.

    Ctrl-C stops the watching, not the job.

    fab train --host gpu-box --job opt-1.3b --step all
    """
    if detach and wait:
        raise ToolkitError("--detach and --wait are opposites", hint="leave out one of them")
    steps = steps_of([step])
    wanted = load_job(job, [*(settings_of_deployment(deployment_type) if deployment_type else []), *(set_ or [])])
    name = run or wanted.name
    for named in filter(None, (name, from_)):
        if not NAME.fullmatch(named):
            raise ToolkitError(
                f"`{named}` cannot name a run", hint="use letters, digits, dots, dashes and underscores, 64 at most"
            )
    luggage = pack(wanted, Path.cwd(), CHECKOUT)
    desk = VerbContext.open(dry_run=dry_run)
    box = desk.box(one_host(c, host))
    secrets = desk.secrets(box)
    say = Sayer(secrets.values())
    with desk.connection(box, say) as connection:
        deployed = find_deployment(connection, desk.providers)
        if deployed.slot:
            say(f"{box.name} has run `{deployed.slot}` in its slot")
        _warn_of_other_code(deployed, say)
        for each in luggage:
            if each.tree.key not in deployed.inputs:
                say(f"sending `{each.name}`: {each.tree}")
                send_whole(connection, each.tree, each.folder(deployed.root))
        arguments = (
            "--step",
            ",".join(map(str, steps)),
            *(("--from", from_) if from_ else ()),
            *(("--redo",) if redo else ()),
        )
        request = start.Request(
            tokens.token_hex(8), name, arguments, job_on_box(wanted, luggage, deployed.root), wanted.checkpoint.grace_s
        )
        start.start(connection, deployed, request, secrets, say)
        if dry_run:
            return ExitCode.OK
        say(f"run `{name}` was started on {box.name}; it runs on without this connection")
        if detach:
            say(f"watch it: fab logs --follow --host {shlex.quote(box.name)} --run {shlex.quote(name)}")
            if json_:
                say.data(to_json({"host": box.name, "run": name, "request": request.id, "state": "started"}))
            return ExitCode.OK
        at = views.WatchedRun(box.name, name, box.price_per_hour, box.currency, tuple(steps))
        watched = _follow(desk, connection, at, views.view_of(at, as_json=json_, live=not wait))
    return _code_of(watched, desk, connection, name, say)


def _warn_of_other_code(deployed: Deployment, say: Sayer) -> None:
    here = checkout_tree(CHECKOUT).key
    if deployed.code != here:
        say.warning(
            f"the box has the code of its last deploy ({deployed.code}), which is not this checkout's ({here}): `fab deploy` brings it"
        )


def _follow(
    desk: VerbContext,
    connection: BoxConnection,
    at: views.WatchedRun,
    view: views.View,
    *,
    once: bool = False,
    limits: frames.StreamTimeouts = watch.LIMITS,
) -> watch.Watched:
    connection.close()  # watching has a connection of its own
    return watch.follow(
        open_stream(connection, desk.providers), view, at, once=once, refused=_refused(connection.box), limits=limits
    )


def _refused(box: Box) -> Callable[[int, str], ToolkitError | None]:
    """Whether there is no use in trying again: by what the box said, or by what ssh says of its
    key.
    """

    def judge(code: int, said: str) -> ToolkitError | None:
        if code == NOT_DEPLOYED:
            return not_deployed(box)
        if code == 255 and ("Host key verification failed" in said or "HOST IDENTIFICATION HAS CHANGED" in said):
            hint = f"if the box was made anew, `fab trust --host {box.name} --replace`; else do not continue: somebody is in between"
            return ToolkitError(
                f"`{box.name}` shows another host key", why=said.strip(), hint=hint, exit_code=ExitCode.UNREACHABLE
            )
        if code == 255 and "Permission denied" in said:
            return ToolkitError(
                f"`{box.name}` refuses your key",
                why=said.strip(),
                hint=f"fab trust --host {box.name}",
                exit_code=ExitCode.UNREACHABLE,
            )
        return None

    return judge


def _code_of(watched: watch.Watched, desk: VerbContext, connection: BoxConnection, run: str, say: Sayer) -> int:
    """The job's own code if its end was seen, and where its results are."""
    if not watched.done:
        return ExitCode.INTERRUPTED if watched.stopped and not watched.job else ExitCode.OK
    code = watched.exit if watched.exit is not None else int(ExitCode.LOST)
    host = shlex.quote(connection.box.name)
    if code == ExitCode.OK:
        say(f"take it home: fab fetch --host {host} --run {shlex.quote(run)}")
    elif watched.last is None:
        say("it ended before it could train; what it said:")
        _follow(
            desk, connection, views.WatchedRun(connection.box.name, run), views.RawLog(sys.stderr, "output"), once=True
        )
    elif code in (ExitCode.PREEMPTED, ExitCode.LOST):
        say("the same command resumes it")
    return code


@verb(
    host=HOST,
    run="which run (default: the one that runs, else the last)",
    follow="until the job has ended, through every break of the connection; Ctrl-C stops the watching alone",
    raw="everything that the ranks and their libraries print, byte for byte",
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
    since: str = "",
    json_: bool = False,
    dry_run: bool = False,
) -> int:
    """What a run has done, and with --follow what it does: a live view on a terminal, lines on a
    pipe.

    fab logs --follow --host gpu-box
    """
    desk, say = VerbContext.open(dry_run=dry_run), Sayer()
    box = desk.box(one_host(c, host))
    if run and not NAME.fullmatch(run):
        raise ToolkitError(f"`{run}` cannot name a run")
    at = views.WatchedRun(box.name, run, box.price_per_hour, box.currency)
    view = views.view_of(at, as_json=json_, raw=raw, live=follow, since=views.parse_since(since) if since else None)
    with desk.connection(box, say) as connection:
        if dry_run:
            say.command("here", connection.stream(dispatch(box, desk.providers, "follow", run or "-", view.file, "0")))
            return ExitCode.OK
        # A box that never answered is no broken connection: its address may be a wrong one.
        watched = _follow(desk, connection, at, view, once=not follow, limits=replace(watch.LIMITS, first_tries=2))
        if raw and not watched.offset and not watched.stopped:  # it ended before there was a log
            _follow(desk, connection, at, views.RawLog(sys.stdout, "output"), once=True)
        run = run or (watched.job.words.get("run", "") if watched.job else "")
    return _code_of(watched, desk, connection, run, say) if follow else ExitCode.OK


@verb(host=HOSTS, json_=JSON, dry_run=DRY_RUN)
def ps(c: Context, host: str = "", json_: bool = False, dry_run: bool = False) -> int:
    """The runs of a box: state, where they are, time and cost. Several boxes: --host a,b

    fab ps --host gpu-box
    """
    desk, say = VerbContext.open(dry_run=dry_run), Sayer()
    rows: dict[str, list[tuple[str, ...]]] = {}

    def one(box: Box, say: Sayer) -> int:
        with desk.connection(box, say) as connection:
            found = list_jobs(desk, connection)
        now = found.clock or 0.0
        if json_:
            say.data(to_json(listing.as_json(box.name, found, now, box.price_per_hour, box.currency)))
        rows[box.name] = listing.rows(box.name, found, now, box.price_per_hour, box.currency)
        return ExitCode.OK

    names = hosts_of(c, host)
    code = on_each(desk, names, one, say, as_json=json_)
    table = [row for name in names for row in rows.get(name, [])]
    if not json_ and rows:
        say.data("\n".join(listing.columns([listing.HEAD, *table])) if table else f"no run on {', '.join(rows)}")
    return code


@verb(host=HOSTS, run="which run (default: the one that runs, else the last)", json_=JSON, dry_run=DRY_RUN)
def status(c: Context, host: str = "", run: str = "", json_: bool = False, dry_run: bool = False) -> int:
    """One run and its box in full: state, last event, cost, cards, disk. Several boxes: --host a,b

    fab status --host gpu-box
    """
    desk, names = VerbContext.open(dry_run=dry_run), hosts_of(c, host)

    def one(box: Box, say: Sayer) -> int:
        with desk.connection(box, say) as connection:
            found = list_jobs(desk, connection)
        chosen = found.run(run) if run else found.newest()
        if run and chosen is None:
            known_runs = ", ".join(each.name for each in found.runs) or "none"
            raise ToolkitError(f"there is no run `{run}` on `{box.name}`", why=f"it has: {known_runs}")
        now = found.clock or 0.0
        if json_:
            whole = listing.as_json(box.name, found, now, box.price_per_hour, box.currency)
            say.data(
                to_json({**whole, "runs": [each for each in whole["runs"] if chosen and each["name"] == chosen.name]})
            )
        else:
            facts = [
                ("box", box.name),
                *listing.box_facts(found),
                *(listing.card(chosen, now, box.price_per_hour, box.currency) if chosen else []),
            ]
            say.data("\n".join(listing.columns([("", ""), *facts])).strip("\n"))
        return ExitCode.OK

    return on_each(desk, names, one, Sayer(), as_json=json_)


@verb(
    host=HOST,
    run="which run (default: the one that runs)",
    grace="seconds for a checkpoint before it is killed (default: the job's own)",
    json_=JSON,
    dry_run=DRY_RUN,
)
def cancel(
    c: Context, host: str = "", run: str = "", grace: str = "", json_: bool = False, dry_run: bool = False
) -> int:
    """End a job: it may write a checkpoint, then it is killed; and prove that nothing of it is left
    on the cards.

    fab cancel --host gpu-box
    """
    desk, say = VerbContext.open(dry_run=dry_run), Sayer()
    if grace and not is_number(grace):
        raise ToolkitError(f"--grace {grace} is not a number of seconds")
    with desk.connection(desk.box(one_host(c, host)), say) as connection:
        ended = cancel_job(connection, desk.providers, run or "-", grace or "-", say)
    if dry_run:
        return ExitCode.OK
    if json_:
        fields = {
            "how": ended.how,
            "exit": ended.exit,
            "left": list(ended.left),
            "gpu_held": list(ended.gpu_held),
            "proven": ended.is_proven,
        }
        say.data(to_json({"host": connection.box.name, **fields}))
    else:
        say.data(ended.text())
    return ExitCode.OK if ended.is_proven else ExitCode.UNCERTAIN
