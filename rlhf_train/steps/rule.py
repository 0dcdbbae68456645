"""Load the rule of `ppo.rule`, which judges answers independently of the reward model."""

from __future__ import annotations

import importlib
from collections.abc import Callable

from jobs.errors import ToolkitError

Rule = Callable[[str, str, bool], bool]  # (prompt, response, ended) -> good
HINT = "name a function as module:function, importable from the checkout: f(prompt, response, ended) -> bool"


def load_rule(name: str | None) -> Rule | None:
    """Import the rule `module:function`. Raises ToolkitError if it cannot be imported."""
    if name is None:
        return None
    module, _, function = name.partition(":")
    try:
        rule = getattr(importlib.import_module(module), function)
    except Exception as error:  # an import runs the user's own module, which may raise anything
        why = f"{type(error).__name__}: {error}"
        raise ToolkitError(f"ppo.rule {name} cannot be imported", why=why, hint=HINT) from None
    if not callable(rule):
        raise ToolkitError(f"ppo.rule {name} is not a function", why=f"it is {type(rule).__name__}", hint=HINT)
    return rule
