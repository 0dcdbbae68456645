"""The commands that a page for people names."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator


def commands_of(text: str) -> Iterator[list[str]]:
    """The commands of console blocks, in words; one line may hold several."""
    for block in re.findall(r"^```console\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE):
        for line in re.findall(r"^\$ (.*)$", block, flags=re.MULTILINE):
            words: list[str] = []
            for word in [*shlex.split(line, comments=True), "&&"]:
                if word != "&&":
                    words.append(word)
                elif words:
                    yield words
                    words = []
