"""The list of `fab`'s verbs, which are defined in remote/verbs, one file for each subject."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module

from invoke import Collection

FILES = {
    "add": "boxes",
    "trust": "boxes",
    "doctor": "doctor",
    "deploy": "deploy",
    "unlock": "deploy",
    "train": "train",
    "logs": "logs",
    "ps": "jobs",
    "status": "jobs",
    "cancel": "jobs",
    "fetch": "results",
    "report": "report",
    "chat": "access",
    "tunnel": "access",
    "shell": "access",
    "exec": "access",
    "purge": "money",
    "stop": "money",
}


def verbs(words: Sequence[str] = ()) -> Collection:
    """Return the verbs that stand among the words of a call; all of them if none does.

    Only their files are read: all together they take longer to import than most verbs take on the
    box.
    """
    named = [name for name in FILES if name in words] or FILES
    return Collection(*(getattr(import_module(f"remote.verbs.{FILES[name]}"), name) for name in named))
