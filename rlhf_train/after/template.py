"""Choose what a model reads in a chat: its template, and as much of the conversation as fits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from jobs.errors import ToolkitError
from rlhf_train.data.chat import HUMAN, ChatTemplate, Message, own_template


def template_of(tokenizer: Any, wish: str = "auto") -> ChatTemplate:
    """Return the template that is asked for; `auto`: the tokenizer's own where it has one.

    Raises ToolkitError: it has none, or it is one that refuses a plain question.
    """
    has_own = own_template(tokenizer) is not None
    if wish == "own" and not has_own:
        raise ToolkitError("the model's tokenizer has no chat template", hint="leave out `--template own`")
    if not has_own or wish == "human":
        return ChatTemplate.human(tokenizer)
    try:
        return ChatTemplate.of(tokenizer)
    except ToolkitError as error:
        raise ToolkitError(error.what, why=error.why, hint="take --template human") from None


def label(template: ChatTemplate) -> str:
    return HUMAN if template.name == HUMAN else "the tokenizer's own"


def stop_texts(template: ChatTemplate) -> tuple[str, ...]:
    """Return the texts that end an answer, since a model may write the next question, too."""
    return ("\n\nHuman:",) if template.name == HUMAN else ()


def fitted(
    template: ChatTemplate, messages: Sequence[Message], *, positions: int | None, answer: int
) -> tuple[np.ndarray, int]:
    """Leave out the oldest turns until conversation and answer fit into the positions.

    answer: tokens of the answer, at most; it gets no more than half of the positions for that.
    Returns the tokens, and how many questions were left out with their answers.
    Raises ToolkitError: the last message alone is too long.
    """
    system = [message for message in messages if message.role == "system"]
    turns = [message for message in messages if message.role != "system"]
    dropped = 0
    while True:
        ids = _ids(template, [*system, *turns])
        if positions is None or len(ids) + min(answer, positions // 2) <= positions:
            return ids, dropped
        if len(turns) == 1:
            break
        turns, dropped = turns[2:], dropped + 1
    if len(ids) < positions:
        return ids, dropped
    raise ToolkitError(
        "the message is too long for the model",
        why=f"it has {len(ids)} tokens with its form, and the model has {positions} positions",
        hint="write a shorter one",
    )


def _ids(template: ChatTemplate, messages: Sequence[Message]) -> np.ndarray:
    try:
        return np.array(template.prompt(messages), dtype=np.int64)
    except ToolkitError as error:
        raise ToolkitError(
            "the model's chat template refuses this conversation",
            why=error.why,
            hint="/system without a text, /reset, or --template human",
        ) from None
