"""The verbs that make a box ready: deploy, unlock."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from invoke import Context

from env.settings import Limits
from jobs.errors import ExitCode, ToolkitError
from jobs.formatting import duration
from jobs.spec import load_job
from remote.deploy import deployment, lock
from remote.inventory import Box
from remote.output import Sayer, ticking
from remote.runs.deployed import Deployment, find_deployment, our_root
from remote.runs.inputs import READS_INPUTS, pack
from remote.runs.prefetch import prefetch
from remote.verbs.base import (
    CHECKOUT,
    DRY_RUN,
    FLAVOUR,
    HOST,
    HOSTS,
    JSON,
    VerbContext,
    hosts_of,
    on_each,
    one_host,
    to_json,
    verb,
)


def _say_nothing(text: object) -> None:
    pass


@verb(
    host=HOSTS,
    job="also fetch what this job needs: its models and data sets, into the box's cache, verified; needs no GPU",
    flavour=FLAVOUR,
    set_="with --job: change a field of the job: --set actor.model=facebook/opt-350m; repeatable",
    json_=JSON,
    dry_run=DRY_RUN,
    iterable=["set_"],
)
def deploy(
    c: Context,
    host: str = "",
    job: str = "",
    flavour: str = "",
    set_: list[str] | None = None,
    json_: bool = False,
    dry_run: bool = False,
) -> int:
    """Put code and environment on the box, ready to run. Several boxes: --host a,b

    If nothing has changed since the last deploy, it takes seconds. With --job, `fab train` then
    downloads nothing: where a box costs less without a GPU, the download belongs there. A download
    that broke off resumes with the same command.

    fab deploy --host gpu-box --job opt-1.3b
    """
    if set_ and not job:
        raise ToolkitError("--set changes a job, and no job is named", hint="--job NAME, or leave out --set")
    wanted = load_job(job, set_ or []) if job else None
    with ticking(Sayer().now, READS_INPUTS):
        inputs = pack(wanted, Path.cwd(), CHECKOUT) if wanted else []
    context, limits = VerbContext.open(dry_run=dry_run), Limits.load()

    def deploy_to(box: Box, say: Sayer) -> int:
        secrets = context.secrets(box) if wanted else {}
        say.hide(*secrets.values())
        tell, show = (_say_nothing, _say_nothing) if json_ else (say, say.now)
        with context.connection(box, say) as connection:
            done = deployment.deploy(
                connection,
                CHECKOUT,
                box,
                limits=limits,
                providers=context.providers,
                state=context.settings.state,
                say=tell,
                now=show,
                job=wanted,
                flavour=flavour,
            )
            if not json_:
                what = ("would be deployed" if dry_run else "deployed") if done.changed else "already up to date"
                plan = done.plan
                say.data(f"{box.name}: {what}, in {done.seconds:.1f} s ({plan.runtime}, code {plan.code}, {plan.root})")
            downloaded = None
            if wanted is not None:
                place = Deployment(done.plan.root, {"code": done.plan.code})
                place = place if dry_run else find_deployment(connection, context.providers)
                downloaded = prefetch(connection, place, wanted, inputs, secrets, say=tell, now=show)
        if json_:
            more = {"download": asdict(downloaded)} if downloaded else {}
            say.data(to_json({"host": box.name, **done.as_json(), **more}))
        elif downloaded and not dry_run:
            took = duration(downloaded.seconds)
            say.data(f"{box.name}: has what `{job}` needs, in {took}; `fab train` downloads nothing")
        return ExitCode.OK

    return on_each(context, hosts_of(c, host), deploy_to, Sayer(), as_json=json_)


@verb(host=HOST, json_=JSON, dry_run=DRY_RUN)
def unlock(c: Context, host: str = "", json_: bool = False, dry_run: bool = False) -> None:
    """Remove the lock of a dead deploy, and say whose it was.

    fab unlock --host gpu-box
    """
    context, say = VerbContext.open(dry_run=dry_run), Sayer()
    with context.connection(context.box(one_host(c, host)), say) as connection:
        root = our_root(connection, context.providers)[0]
        owner = lock.holder(connection, root) if dry_run else None
        owner = lock.unlock(connection, root) or owner
    if json_:
        say.data(to_json({"host": connection.box.name, "lock": str(owner) if owner else None}))
    else:
        outcome = "would be unlocked" if dry_run else "unlocked"
        say.data(f"{outcome}; the lock was held by {owner}" if owner else "not locked; nothing to unlock")
