"""A rule of your own for `ppo.rule`: it says whether an answer is good.

The report shows the share of good answers.
"""

from __future__ import annotations


def is_good(prompt: str, response: str, ended: bool) -> bool:
    """Whether the answer is one or more whole sentences and ended by itself (not at the length
    limit).
    """
    text = response.strip()
    return ended and len(text.split()) >= 3 and text.endswith((".", "!", "?"))
