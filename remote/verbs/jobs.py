"""The verbs that start, watch and end a job: train, logs, ps, status, cancel."""

from __future__ import annotations

import re
import secrets as tokens
import shlex
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from invoke import Context

from jobs.errors import ExitCode, ToolkitError
from jobs.spec import NAME, load_job, settings_of_deployment, steps_of
from remote.deploy.sync import checkout_tree
from remote.inventory import Box
from remote.output import Sayer, ticking
from remote.runs import frames, listing, start, views, watch
from remote.runs.cancel import cancel as cancel_job
from remote.runs.deployed import NOT_DEPLOYED, Deployment, dispatch, find_deployment, not_deployed, open_stream
from remote.runs.inputs import READS_INPUTS, job_on_box, pack
from remote.runs.prefetch import send_inputs
from remote.ssh.connection import BoxConnection
from remote.ssh.login import BY_A_PERSON
from remote.verbs.base import (
    CHECKOUT,
    DRY_RUN,
    HOST,
    HOSTS,
    JSON,
    RUN,
    VerbContext,
    hosts_of,
    is_number,
    list_jobs,
    on_each,
    one_host,
    to_json,
    verb,
)

DEFAULT_JOB = "opt-1.3b"  # the same as rlhf-train's


@verb(
    host=HOST,
    job=f"a name of jobs/ or a YAML file (default: {DEFAULT_JOB})",
    step="1, 2, 3, several with commas, or all (default)",
    set_="change a field of the job: --set ppo.kl_coef=0.05; repeatable",
    run="the run's name (default: the job's)",
    from_="take over the steps of this run whose settings are the same",
    redo="train complete steps again",
    deployment_type="single_gpu or single_node",
    detach="start the job and return immediately",
    wait="show plain lines until the job has ended; the exit code is the job's, except after Ctrl-C",
    json_="the events as they come, for programs; with --detach, what was started",
    dry_run=DRY_RUN,
    iterable=["set_"],
)
def train(
    c: Context,
    host: str = "",
    job: str = DEFAULT_JOB,
    step: str = "all",
    set_: list[str] | None = None,
    run: str = "",
    from_: str = "",
    redo: bool = False,
    deployment_type: str = "",
    detach: bool = False,
    wait: bool = False,
    json_: bool = False,
    dry_run: bool = False,
) -> int:
    """Start a job on the box, and follow it. The job keeps running without you.

    Ctrl-C stops the watching, not the job.

    fab train --host gpu-box --job opt-1.3b --step all
    """
    if detach and wait:
        raise ToolkitError("--detach and --wait are opposites", hint="leave out one of them")
    steps = steps_of([step])
    wanted = load_job(job, [*(settings_of_deployment(deployment_type) if deployment_type else []), *(set_ or [])])
    name = run or wanted.name
    for run_name in filter(None, (name, from_)):
        if not NAME.fullmatch(run_name):
            hint = "use letters, digits, dots, dashes and underscores, 64 at most"
            raise ToolkitError(f"`{run_name}` cannot name a run", hint=hint)
    with ticking(Sayer().now, READS_INPUTS):
        inputs = pack(wanted, Path.cwd(), CHECKOUT)
    context = VerbContext.open(dry_run=dry_run)
    box = context.box(one_host(c, host))
    secrets = context.secrets(box, wanted)
    say = Sayer(secrets.values())
    with context.connection(box, say) as connection:
        deployed = find_deployment(connection, context.providers)
        if deployed.slot:
            say(f"{box.name} is held by run `{deployed.slot}`")
        _warn_of_other_code(deployed, say)
        send_inputs(connection, deployed, inputs, say=say, now=say.now)
        arguments = (
            "--step",
            ",".join(map(str, steps)),
            *(("--from", from_) if from_ else ()),
            *(("--redo",) if redo else ()),
        )
        job_file = job_on_box(wanted, inputs, deployed.root)
        request = start.Request(tokens.token_hex(8), name, arguments, job_file, wanted.checkpoint.grace_s)
        start.start(connection, deployed, request, secrets, say)
        if dry_run:
            return ExitCode.OK
        say(f"run `{name}` was started on {box.name}; it keeps running without this connection")
        if detach:
            say(f"watch it: fab logs --follow --host {shlex.quote(box.name)} --run {shlex.quote(name)}")
            if json_:
                say.data(to_json({"host": box.name, "run": name, "request": request.id, "state": "started"}))
            return ExitCode.OK
        left = tuple(each for each in steps if each not in wanted.own_models)
        at = views.WatchedRun(box.name, name, box.price_per_hour, box.currency, left)
        watched = _follow(context, connection, at, views.view_of(at, as_json=json_, live=not wait))
        return _code_of(watched, context, connection, name, say)


def _warn_of_other_code(deployed: Deployment, say: Sayer) -> None:
    local_code = checkout_tree(CHECKOUT).key
    if deployed.code != local_code:
        say.warning(
            f"the box has the code of its last deploy ({deployed.code}), not this checkout's ({local_code}): "
            "`fab deploy` updates it"
        )


def _follow(
    context: VerbContext,
    connection: BoxConnection,
    at: views.WatchedRun,
    view: views.View,
    *,
    once: bool = False,
    limits: frames.StreamTimeouts = watch.LIMITS,
    lines: int = 0,
) -> watch.Watched:
    return watch.follow(
        open_stream(connection, context.providers),
        view,
        at,
        once=once,
        refused=_refused(connection),
        limits=limits,
        lines=lines,
    )


def _refused(connection: BoxConnection) -> Callable[[int, str], ToolkitError | None]:
    """Make a function that recognises an end of the connection after which retrying is useless.

    It returns the error to raise, from ssh's exit code and last words, or None.
    """

    box = connection.box

    def judge(code: int, last_words: str) -> ToolkitError | None:
        key_changed = "Host key verification failed" in last_words or "HOST IDENTIFICATION HAS CHANGED" in last_words
        if code == NOT_DEPLOYED:
            return not_deployed(box)
        if code == 255 and key_changed:
            what = f"`{box.name}` shows another host key"
            hint = (
                f"if the box was set up again, `fab trust --host {box.name} --replace`; "
                "if not, do not continue: somebody may be intercepting the connection"
            )
        elif code == 255 and "Permission denied" in last_words and connection.was_asked:
            what = f"the connection to `{box.name}` broke, and only you can log in there"
            hint = f"the job is not affected; to watch it again: fab logs --follow --host {shlex.quote(box.name)}"
        elif code == 255 and "Permission denied" in last_words:
            what, host = f"`{box.name}` refuses your key", shlex.quote(box.name)
            hint = f"fab doctor --host {host} says which keys were offered"
            methods = re.findall(r"Permission denied \(([^)]*)\)", last_words)
            if {*",".join(methods).split(",")} & {*BY_A_PERSON}:  # with which `fab trust` could log in
                hint = f"fab trust --host {host}"
        else:
            return None
        return ToolkitError(what, why=last_words.strip(), hint=hint, exit_code=ExitCode.UNREACHABLE)

    return judge


def _code_of(watched: watch.Watched, context: VerbContext, connection: BoxConnection, run: str, say: Sayer) -> int:
    """Say what to do next, and return the job's own exit code if its end was seen."""
    if not watched.done:
        return ExitCode.INTERRUPTED if watched.stopped and not watched.job else ExitCode.OK
    code = watched.exit if watched.exit is not None else int(ExitCode.LOST)
    host = shlex.quote(connection.box.name)
    if code == ExitCode.OK:
        say(f"bring the results home: fab fetch --host {host} --run {shlex.quote(run)}")
        if watched.last is None or watched.last.get("step") != 2:  # the reward model answers nothing
            say(f"talk to it: fab chat --host {host} --run {shlex.quote(run)}")
    elif watched.last is None:
        say("the job ended before it could train; its output:")
        at = views.WatchedRun(connection.box.name, run)
        _follow(context, connection, at, views.RawLog(sys.stderr, "output"), once=True)
    elif code in (ExitCode.PREEMPTED, ExitCode.LOST):
        say("the same command resumes it")
    return code


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
    if run and not NAME.fullmatch(run):
        raise ToolkitError(f"`{run}` cannot name a run")
    if tail < 0:
        raise ToolkitError(f"--tail {tail} is not a number of lines", hint="e.g. --tail 100")
    at = views.WatchedRun(box.name, run, box.price_per_hour, box.currency)
    view = views.view_of(at, as_json=json_, raw=raw, live=follow, since=views.parse_since(since) if since else None)
    with context.connection(box, say) as connection:
        if dry_run:
            words = ("follow", run or "-", view.file, str(-tail))
            say.command(box.name, dispatch(box, context.providers, *words))
            return ExitCode.OK
        # If the box never answers, the connection is not broken: the address may be wrong.
        limits = replace(watch.LIMITS, first_tries=2)
        watched = _follow(context, connection, at, view, once=not follow, limits=limits, lines=tail)
        if raw and not watched.offset and not watched.stopped:  # the job ended before there was a log
            _follow(context, connection, at, views.RawLog(sys.stdout, "output"), once=True)
        run = run or (watched.job.words.get("run", "") if watched.job else "")
        return _code_of(watched, context, connection, run, say) if follow else ExitCode.OK


@verb(host=HOSTS, json_=JSON, dry_run=DRY_RUN)
def ps(c: Context, host: str = "", json_: bool = False, dry_run: bool = False) -> int:
    """List the runs of a box: state, progress, time and cost. Several boxes: --host a,b

    fab ps --host gpu-box
    """
    context, say = VerbContext.open(dry_run=dry_run), Sayer()
    rows: dict[str, list[tuple[str, ...]]] = {}

    def list_runs(box: Box, say: Sayer) -> int:
        with context.connection(box, say) as connection:
            found = list_jobs(context, connection)
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
            found = list_jobs(context, connection)
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
