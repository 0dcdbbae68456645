"""Let a reward model with a tokenizer of its own read the actor's prompts and answers, as text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class TextReader:
    """Turns token ids of the actor into those of the reward model, by way of the text."""

    actor: Any  # the two tokenizers
    own: Any
    most_tokens: int | None  # of prompt and answer; what is longer loses its beginning; None: no limit

    def __call__(
        self, prompts: Sequence[np.ndarray], answers: Sequence[np.ndarray]
    ) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """Return the rows in ids of the reward model, for `Sequences`: all but the last, the last.

        Prompt and answer are tokenised as one text, without control tokens of the actor. An answer
        that ended gets the reward model's EOS.
        """
        rows = [self.read(prompt, answer) for prompt, answer in zip(prompts, answers, strict=True)]
        return [row[:-1] for row in rows], [row[-1:] for row in rows]

    def read(self, prompt: np.ndarray, answer: np.ndarray) -> np.ndarray:
        """Return one row's ids, at least two."""
        has_ended = len(answer) > 0 and answer[-1] == self.actor.eos_token_id
        text = self.actor.decode(np.concatenate([prompt, answer]).astype(int).tolist(), skip_special_tokens=True)
        ids = list(self.own(text)["input_ids"])
        eos = self.own.eos_token_id
        if len(ids) > 1 and ids[-1] == eos:  # a tokenizer may end each text with it
            ids.pop()
        if has_ended or len(ids) < 2:
            ids.append(eos)
        if len(ids) < 2:  # no text at all
            ids.append(eos)
        return np.array(ids if self.most_tokens is None else ids[-self.most_tokens :], dtype=np.int64)
