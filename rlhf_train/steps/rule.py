"""The independent rule of `ppo.rule`: what counts as a good answer, by something that is not the
reward model.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable

from jobs.errors import ToolkitError

Rule = Callable[[str, str, bool], bool]  # (prompt, response, ended) -> good
HINT = "name a function as module:function, importable from the checkout: f(prompt, response, ended) -> bool"


def load_rule(name: str | None) -> Rule | None:
    """`module:function`, imported. Raises ToolkitError when it is not there."""
    if name is None:
        return None
    module, _, function = name.partition(":")
    try:
        rule = getattr(importlib.import_module(module), function)
    except Exception as error:  # a person's own module: an import runs it, and may raise anything
        raise ToolkitError(
            f"ppo.rule {name} cannot be imported", why=f"{type(error).__name__}: {error}", hint=HINT
        ) from None
    if not callable(rule):
        raise ToolkitError(f"ppo.rule {name} is not a function", why=f"it is {type(rule).__name__}", hint=HINT)
    return rule
