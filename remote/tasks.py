"""The list of `fab`'s verbs, which are defined in remote/verbs, one file for each subject."""

from __future__ import annotations

from invoke import Collection

from remote.verbs.access import chat, exec, shell, tunnel
from remote.verbs.boxes import add, doctor, trust
from remote.verbs.deploy import deploy, unlock
from remote.verbs.jobs import cancel, logs, ps, status, train
from remote.verbs.money import purge, stop
from remote.verbs.results import fetch, report

VERBS = (
    add,
    trust,
    doctor,
    deploy,
    unlock,
    train,
    logs,
    ps,
    status,
    cancel,
    fetch,
    report,
    chat,
    tunnel,
    shell,
    exec,
    purge,
    stop,
)
ns = Collection(*VERBS)
