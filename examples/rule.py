"""This is an example of a rule of your own for `ppo.rule`, which says whether an answer is good.

The report shows the share of good answers.
"""

from __future__ import annotations


def is_good(prompt: str, response: str, ended: bool) -> bool:
    """Return whether the answer is whole sentences and ended before the length limit."""
    text = response.strip()
    return ended and len(text.split()) >= 3 and text.endswith((".", "!", "?"))
