"""The verbs that leave a box: purge removes our files, stop ends the cost."""

from __future__ import annotations

import time
from dataclasses import asdict

from invoke import Context

from remote.output import Sayer
from remote.results import purge as purging
from remote.results import run_contents, stop_card
from remote.results.at_home import at_home
from remote.runs import listing
from remote.runs.deployed import our_root
from remote.ssh.connection import BoxConnection
from remote.survey import probe_cache
from remote.survey.facts import provider_of
from remote.verbs.base import DRY_RUN, HOST, JSON, VerbContext, one_host, to_json, verb


@verb(host=HOST, yes="purge even if something is not fetched", json_=JSON, dry_run=DRY_RUN)
def purge(c: Context, host: str = "", yes: bool = False, json_: bool = False, dry_run: bool = False) -> None:
    """Remove everything of ours from the box, and prove it.

    fab purge --host gpu-box
    """
    context, say = VerbContext.open(dry_run=dry_run), Sayer()
    with context.connection(context.box(one_host(c, host)), say) as connection:
        root, _ = our_root(connection, context.providers)
        copies = run_contents.recall_copies(context.settings.state, connection.box.name)
        purged = purging.purge(connection, root, copies, yes=yes, now=say.now)
    if not dry_run:  # what was remembered of the box holds no more
        probe_cache.file_of(context.settings.state, connection.box.name).unlink(missing_ok=True)
    if json_:
        say.data(to_json({"host": connection.box.name, "root": root, **asdict(purged)}))
    else:
        would = [f"would remove {each}" for each in purged.would]
        removed = [f"removed {each}" for each in purged.removed]
        for line in (*would, *removed, *purged.proofs):
            say.data(str(line))
        for note in purged.notes:
            say(note)


@verb(host=HOST, yes="stop even if something is not fetched, or a job runs", json_=JSON, dry_run=DRY_RUN)
def stop(c: Context, host: str = "", yes: bool = False, json_: bool = False, dry_run: bool = False) -> None:
    """Show what a stop means for cost and data at this provider, then stop the box if it can.

    Some boxes cannot stop themselves; then it says how to stop the box by hand.

    fab stop --host gpu-box
    """
    context, say = VerbContext.open(dry_run=dry_run), Sayer()
    with context.connection(context.box(one_host(c, host)), say) as connection:
        card = _stop_card(context, connection)
        if json_:
            say.data(to_json(card.as_json()))
        else:
            say.data("\n".join(listing.columns([("", ""), *card.lines()])).strip("\n"))
        stopped = stop_card.stop(connection, card, yes=yes)
    if not dry_run:
        answer = f": {stopped.said}" if stopped.said else ""
        say("the box is going down: it closed the connection" if stopped.broke else f"asked the box to stop{answer}")


def _stop_card(context: VerbContext, connection: BoxConnection) -> stop_card.StopCard:
    box, state = connection.box, context.settings.state
    facts = (probe_cache.recall(state, box.name) or probe_cache.probe(connection, box, context.providers)).facts
    root, exists = our_root(connection, context.providers)
    found = run_contents.read_results(connection, root) if exists else run_contents.Results("")
    return stop_card.card_of(
        box.name,
        provider_of(facts, context.providers, box.provider),
        found,
        at_home(found, run_contents.recall_copies(state, box.name)),
        home=facts.home,
        now=time.time(),
        price_per_hour=box.price_per_hour,
        currency=box.currency,
    )
