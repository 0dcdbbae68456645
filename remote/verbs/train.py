"""The verb that starts a job: train."""

from __future__ import annotations

import secrets as tokens
import shlex
from pathlib import Path

from invoke import Context

from jobs.errors import ExitCode, ToolkitError
from jobs.flavours import refuse_flavour
from jobs.run_dir import RUN_NAME
from jobs.spec import Job, load_job, settings_of_deployment, steps_of
from remote.deploy.sync import checkout_tree
from remote.output import Sayer, ticking
from remote.runs import start, views
from remote.runs.deployed import Deployment, find_deployment
from remote.runs.inputs import READS_INPUTS, job_on_box, pack
from remote.runs.prefetch import send_inputs
from remote.verbs.base import (
    CHECKOUT,
    DRY_RUN,
    HOST,
    VerbContext,
    one_host,
    to_json,
    verb,
)
from remote.verbs.following import code_of, follow_run

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
        if not RUN_NAME.fullmatch(run_name):
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
        refuse_other_flavour(box.name, deployed, wanted)
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
        watched = follow_run(context, connection, at, views.view_of(at, as_json=json_, live=not wait))
        return code_of(watched, context, connection, name, say)


def refuse_other_flavour(box: str, deployed: Deployment, job: Job) -> None:
    """Raise ToolkitError (UNFIT) if the box has a flavour that does not run the job."""
    deploy = f"fab deploy --host {shlex.quote(box)} --flavour"
    refuse_flavour(job, deployed.facts.get("flavour", ""), f"`{box}`", lambda flavour: f"{deploy} {flavour}")


def _warn_of_other_code(deployed: Deployment, say: Sayer) -> None:
    local_code = checkout_tree(CHECKOUT).key
    if deployed.code != local_code:
        say.warning(
            f"the box has the code of its last deploy ({deployed.code}), not this checkout's ({local_code}): "
            "`fab deploy` updates it"
        )
