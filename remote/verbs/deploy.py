"""The verbs that make a box ready: deploy, unlock."""

from __future__ import annotations

from invoke import Context

from env.settings import Limits
from jobs.errors import ExitCode
from remote.deploy import deployment, lock
from remote.inventory import Box
from remote.output import Sayer
from remote.runs.deployed import our_root
from remote.verbs.base import (
    CHECKOUT,
    DRY_RUN,
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


@verb(host=HOSTS, json_=JSON, dry_run=DRY_RUN)
def deploy(c: Context, host: str = "", json_: bool = False, dry_run: bool = False) -> int:
    """Put code and environment on the box, ready to run. Several boxes: --host a,b

    If nothing has changed since the last deploy, it takes seconds.

    fab deploy --host gpu-box
    """
    context, limits = VerbContext.open(dry_run=dry_run), Limits.load()

    def deploy_to(box: Box, say: Sayer) -> int:
        with context.connection(box, say) as connection:
            done = deployment.deploy(
                connection,
                CHECKOUT,
                box,
                limits=limits,
                providers=context.providers,
                state=context.settings.state,
                say=_say_nothing if json_ else say,
                now=_say_nothing if json_ else say.now,
            )
        if json_:
            say.data(to_json({"host": box.name, **done.as_json()}))
        else:
            what = ("would be deployed" if dry_run else "deployed") if done.changed else "already up to date"
            plan = done.plan
            say.data(f"{box.name}: {what}, in {done.seconds:.1f} s ({plan.runtime}, code {plan.code}, {plan.root})")
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
