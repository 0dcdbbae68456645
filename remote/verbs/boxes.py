"""The verbs that introduce a box: add, trust, doctor."""

from __future__ import annotations

from pathlib import Path

from invoke import Context

from env.settings import Limits
from jobs.errors import ExitCode, ToolkitError
from jobs.spec import Job, load_job
from remote import inventory
from remote.inventory import Box
from remote.output import Sayer
from remote.ssh import host_keys
from remote.ssh.connection import BoxConnection
from remote.ssh.link import Link
from remote.survey import probe_cache
from remote.survey.doctor import Diagnosis, diagnose
from remote.survey.facts import clock_offset, provider_of
from remote.verbs.base import (
    DRY_RUN,
    HOST,
    HOSTS,
    JSON,
    VerbContext,
    hosts_of,
    is_number,
    on_each,
    one_host,
    read_settings,
    to_json,
    verb,
)


@verb(
    name="what you will call it: small letters, digits and dashes",
    command="what the rental page shows, quoted: 'ssh -p 41022 root@host'",
    provider="a file of env/providers: autodl, vast, runpod, lambda, generic (default: detected)",
    price="per hour, from which `fab logs` and `fab ps` compute the cost",
    currency="a sign or a word, e.g. ¥ or EUR",
    data_folder="the folder on the box that survives a stop (default: the provider's)",
    mirror="a file of env/mirrors, e.g. cn (default: measured)",
    json_=JSON,
    dry_run=DRY_RUN,
)
def add(
    c: Context,
    name: str,
    command: str,
    provider: str = "",
    price: str = "",
    currency: str = "",
    data_folder: str = "",
    mirror: str = "",
    json_: bool = False,
    dry_run: bool = False,
) -> None:
    """Write a box into boxes.yaml, from what the rental page shows.

    fab add gpu-box 'ssh -p 41022 root@connect.example.com' --price 1.98 --currency ¥
    """
    settings = read_settings()
    if price and not is_number(price):
        raise ToolkitError(f"--price {price} is not a number", hint="per hour, e.g. --price 1.98")
    more = {
        "provider": provider or None, "price_per_hour": float(price) if price else None, "currency": currency or None,
        "data_folder": data_folder or None, "mirror": mirror or None,
    }  # fmt: skip
    added = inventory.add_box(settings.boxes, name, command, dry_run=dry_run, **more)
    say = Sayer()
    if json_:
        say.data(to_json(added.box.model_dump(mode="json", exclude_defaults=True)))
    else:
        say.data(added.text.rstrip())
        boxes = settings.boxes
        say(f"would be added to {boxes}" if dry_run else f"added to {boxes}; next: fab trust --host {name}")


@verb(
    host=HOST,
    replace="trust the key that the box shows now, in place of the known one",
    host_key="SHA256:..., if the rental page shows it",
    key="the .pub file of your key (default: the first that ssh would use)",
    json_=JSON,
    dry_run=DRY_RUN,
)
def trust(
    c: Context,
    host: str = "",
    replace: bool = False,
    host_key: str = "",
    key: str = "",
    json_: bool = False,
    dry_run: bool = False,
) -> None:
    """Show the box's host key and keep it, and put your public key on the box.

    If the box does not take your key yet, ssh asks for the box's password, once.

    fab trust --host gpu-box
    """
    context, say = VerbContext.open(dry_run=dry_run), Sayer()
    with context.connection(context.box(one_host(c, host)), say) as connection:
        trusted = host_keys.trust(connection, replace=replace, host_key=host_key)
        if not json_:
            say.data(str(trusted))
        installed = host_keys.install_key(connection, Path(key).expanduser() if key else None)
    if json_:
        host_key_fields = {"host_key": trusted.key.fingerprint, "status": trusted.status}
        say.data(to_json({"host": connection.box.name, **host_key_fields, "your_key": installed.status}))
    else:
        say.data(str(installed))


@verb(
    host=HOSTS,
    job="the job that the box shall run: a name of jobs/ or a YAML file",
    set_="change a field of the job; repeatable",
    json_=JSON,
    dry_run=DRY_RUN,
    iterable=["set_"],
)
def doctor(
    c: Context, host: str = "", job: str = "", set_: list[str] | None = None, json_: bool = False, dry_run: bool = False
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
            diagnosis = _examined(context, connection, link, wanted, limits, say)
        if json_:
            say.data(to_json({"host": box.name, **diagnosis.as_json()}))
        else:
            say.data("\n".join([*([f"== {box.name}"] if len(names) > 1 else []), *diagnosis.lines()]))
        if not link.reached and (known := inventory.meant(box.name, context.boxes)):
            say(known)
        return ExitCode.OK if diagnosis.fit else ExitCode.UNFIT if link.reached else ExitCode.UNREACHABLE

    return on_each(context, names, examine, Sayer(), as_json=json_)


def _examined(
    context: VerbContext, connection: BoxConnection, link: Link, job: Job | None, limits: Limits, say: Sayer
) -> Diagnosis:
    box, facts, offset = connection.box, None, None
    if link.reached:
        seen = probe_cache.probe_again(connection, box, context.providers, context.settings.state, say.now)
        facts, offset = seen.facts, clock_offset(seen.facts, seen.sent, seen.received)
    provider = provider_of(facts, context.providers, box.provider)
    prefer = "mirror" if box.mirror not in ("", "default") else ""
    return diagnose(facts, job, limits, provider, link, offset=offset, data_folder=box.data_folder, prefer_route=prefer)
