"""The verb that checks a box: doctor."""

from __future__ import annotations

from invoke import Context

from env.settings import Limits
from jobs.errors import ExitCode
from jobs.spec import Job, load_job
from remote import inventory
from remote.inventory import Box
from remote.output import Sayer
from remote.ssh.connection import BoxConnection
from remote.ssh.link import Link
from remote.survey import probe_cache
from remote.survey.doctor import Diagnosis, diagnose
from remote.survey.facts import clock_offset, provider_of
from remote.verbs.base import (
    DRY_RUN,
    FLAVOUR,
    HOSTS,
    JSON,
    VerbContext,
    hosts_of,
    on_each,
    to_json,
    verb,
)


@verb(
    host=HOSTS,
    job="the job that the box shall run: a name of jobs/ or a YAML file",
    flavour=FLAVOUR,
    set_="change a field of the job; repeatable",
    json_=JSON,
    dry_run=DRY_RUN,
    iterable=["set_"],
)
def doctor(
    c: Context,
    host: str = "",
    job: str = "",
    flavour: str = "",
    set_: list[str] | None = None,
    json_: bool = False,
    dry_run: bool = False,
) -> int:
    """Check whether a box is fit for a job, before money is spent. Several boxes: --host a,b

    One line for each check. It takes one round trip and changes nothing.

    fab doctor --host gpu-box --job opt-1.3b
    """
    context, names = VerbContext.open(dry_run=dry_run), hosts_of(c, host)
    wanted = load_job(job, set_ or []) if job or set_ else None
    limits = Limits.load()

    def examine(box: Box, say: Sayer) -> int:
        with context.connection(box, say) as connection:
            link = connection.link
            diagnosis = _examined(context, connection, link, wanted, limits, say, flavour)
        if json_:
            say.data(to_json({"host": box.name, **diagnosis.as_json()}))
        else:
            say.data("\n".join([*([f"== {box.name}"] if len(names) > 1 else []), *diagnosis.lines()]))
        if not link.reached and (known := inventory.meant(box.name, context.boxes)):
            say(known)
        return ExitCode.OK if diagnosis.fit else ExitCode.UNFIT if link.reached else ExitCode.UNREACHABLE

    return on_each(context, names, examine, Sayer(), as_json=json_)


def _examined(
    context: VerbContext,
    connection: BoxConnection,
    link: Link,
    job: Job | None,
    limits: Limits,
    say: Sayer,
    flavour: str,
) -> Diagnosis:
    box, facts, offset = connection.box, None, None
    if link.reached:
        seen = probe_cache.probe_again(connection, box, context.providers, context.settings.state, say.now)
        facts, offset = seen.facts, clock_offset(seen.facts, seen.sent, seen.received)
    provider = provider_of(facts, context.providers, box.provider)
    prefer = "mirror" if box.mirror not in ("", "default") else ""
    return diagnose(
        facts,
        job,
        limits,
        provider,
        link,
        offset=offset,
        data_folder=box.data_folder,
        prefer_route=prefer,
        flavour=flavour or box.build.get("FLAVOUR", ""),
    )
