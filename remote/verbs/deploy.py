"""Getting a box ready: deploy, unlock."""

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


def _drop(text: object) -> None:
    """Says nothing."""


@verb(host=HOSTS, json_=JSON, dry_run=DRY_RUN)
def deploy(c: Context, host: str = "", json_: bool = False, dry_run: bool = False) -> int:
    """Code and environment onto the box, ready to run.

    Again with nothing changed: seconds. Several boxes: --host a,b

    fab deploy --host gpu-box
    """
    desk, limits = VerbContext.open(dry_run=dry_run), Limits.load()

    def one(box: Box, say: Sayer) -> int:
        with desk.connection(box, say) as connection:
            hear, now = (_drop, _drop) if json_ else (say, say.now)
            done = deployment.deploy(
                connection,
                CHECKOUT,
                box,
                limits=limits,
                providers=desk.providers,
                state=desk.settings.state,
                say=hear,
                now=now,
            )
        if json_:
            say.data(to_json({"host": box.name, **done.as_json()}))
        else:
            what = ("would be deployed" if dry_run else "deployed") if done.changed else "already up to date"
            say.data(
                f"{box.name}: {what}, in {done.seconds:.1f} s ({done.plan.runtime}, code {done.plan.code}, {done.plan.root})"
            )
        return ExitCode.OK

    return on_each(desk, hosts_of(c, host), one, Sayer(), as_json=json_)


@verb(host=HOST, json_=JSON, dry_run=DRY_RUN)
def unlock(c: Context, host: str = "", json_: bool = False, dry_run: bool = False) -> None:
    """Take away the lock of a deploy that is dead, and say whose it was.

    fab unlock --host gpu-box
    """
    desk, say = VerbContext.open(dry_run=dry_run), Sayer()
    with desk.connection(desk.box(one_host(c, host)), say) as connection:
        root = our_root(connection, desk.providers)[0]
        owner = lock.holder(connection, root) if dry_run else None
        owner = lock.unlock(connection, root) or owner
    if json_:
        say.data(to_json({"host": connection.box.name, "lock": str(owner) if owner else None}))
    else:
        say.data(
            f"{'would be' if dry_run else ''} taken from {owner}".lstrip()
            if owner
            else "nobody holds it; nothing to unlock"
        )
