"""Leaving a box, and its meter: purge, stop."""

from __future__ import annotations

import time
from dataclasses import asdict

from invoke import Context

from remote.output import Sayer
from remote.results import purge as purging
from remote.results import run_contents, stop_card
from remote.runs import listing
from remote.runs.deployed import our_root
from remote.ssh.connection import BoxConnection
from remote.survey import probe_cache
from remote.survey.facts import provider_of
from remote.verbs.base import DRY_RUN, HOST, JSON, VerbContext, one_host, to_json, verb


@verb(host=HOST, yes="even though something is not fetched", json_=JSON, dry_run=DRY_RUN)
def purge(c: Context, host: str = "", yes: bool = False, json_: bool = False, dry_run: bool = False) -> None:
    """Leave nothing of ours on the box, and prove it.

    fab purge --host gpu-box
    """
    desk, say = VerbContext.open(dry_run=dry_run), Sayer()
    with desk.connection(desk.box(one_host(c, host)), say) as connection:
        root, _ = our_root(connection, desk.providers)
        purged = purging.purge(connection, root, run_contents.recall(desk.settings.state, connection.box.name), yes=yes)
    if not dry_run:
        probe_cache.file_of(desk.settings.state, connection.box.name).unlink(
            missing_ok=True
        )  # what was remembered of it holds no more
    if json_:
        say.data(to_json({"host": connection.box.name, "root": root, **asdict(purged)}))
    else:
        for each in (
            *(f"would remove {each}" for each in purged.would),
            *(f"removed {each}" for each in purged.removed),
            *purged.proofs,
        ):
            say.data(str(each))
        for note in purged.notes:
            say(note)


@verb(host=HOST, yes="even though something is not fetched, or a job runs", json_=JSON, dry_run=DRY_RUN)
def stop(c: Context, host: str = "", yes: bool = False, json_: bool = False, dry_run: bool = False) -> None:
    """Say what stopping means at this provider, for the meter and for the data; then stop the box,
    where that can be done from inside.

    fab stop --host gpu-box
    """
    desk, say = VerbContext.open(dry_run=dry_run), Sayer()
    with desk.connection(desk.box(one_host(c, host)), say) as connection:
        card = _stop_card(desk, connection)
        if json_:
            say.data(to_json(card.as_json()))
        else:
            say.data("\n".join(listing.columns([("", ""), *card.lines()])).strip("\n"))
        stopped = stop_card.stop(connection, card, yes=yes)
    if not dry_run:
        say(
            "the connection closed with the box"
            if stopped.broke
            else f"asked it to stop{f': {stopped.said}' if stopped.said else ''}"
        )


def _stop_card(desk: VerbContext, connection: BoxConnection) -> stop_card.StopCard:
    box, state = connection.box, desk.settings.state
    facts = (probe_cache.recall(state, box.name) or probe_cache.probe(connection, box, desk.providers)).facts
    root, is_there = our_root(connection, desk.providers)
    found = run_contents.read_results(connection, root) if is_there else run_contents.Results("")
    return stop_card.card_of(
        box.name,
        provider_of(facts, desk.providers, box.provider),
        found,
        run_contents.recall(state, box.name),
        home=facts.home,
        now=time.time(),
        price_per_hour=box.price_per_hour,
        currency=box.currency,
    )
