"""The verbs that introduce a box: add, trust."""

from __future__ import annotations

from pathlib import Path

from invoke import Context

from jobs.errors import ToolkitError
from remote import inventory
from remote.output import Sayer
from remote.ssh import host_keys
from remote.verbs.base import (
    DRY_RUN,
    HOST,
    JSON,
    VerbContext,
    is_number,
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
