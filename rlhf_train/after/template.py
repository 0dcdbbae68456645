"""Write a conversation as the model reads it: by its own chat template, or as Human/Assistant.

Only the template makes control tokens. What somebody typed stays text, also where it looks like a
control token: then a token boundary stands inside it, as in rlhf_train/data/dataset.py.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jobs.errors import ToolkitError

Message = Mapping[str, str]  # role (system, user or assistant) and content
CUT = "\ufdd0"  # no character: no text contains it


class HumanAssistant:
    """The form of the demo's rows and of Anthropic's: `\\n\\nHuman: ...\\n\\nAssistant:`."""

    name = "Human/Assistant"
    stop_texts = ("\n\nHuman:",)

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer, self._control = tokenizer, _control_tokens(tokenizer)
        bare, framed = (tokenizer("a", add_special_tokens=special)["input_ids"] for special in (False, True))
        self._front = next(framed[:i] for i in range(len(framed)) if framed[i : i + len(bare)] == bare)

    def ids(self, messages: Sequence[Message]) -> np.ndarray:
        """Return the tokens that an answer follows; an earlier answer keeps its own first space."""
        forms = {"system": "{}", "user": "\n\nHuman: {}", "assistant": "\n\nAssistant:{}"}
        text = "".join(forms[message["role"]].format(message["content"]) for message in messages)
        pieces = _cut(text + "\n\nAssistant:", self._control).split(CUT)
        return _joined([self._front, *(_encode(self._tokenizer, piece) for piece in pieces)])


class OwnTemplate:
    """The chat template that the tokenizer brings."""

    name = "the tokenizer's own"
    stop_texts = ()

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer, self._control = tokenizer, _control_tokens(tokenizer)

    def ids(self, messages: Sequence[Message]) -> np.ndarray:
        """Return the tokens that an answer follows. Raises ToolkitError: they are refused."""
        from jinja2.exceptions import TemplateError

        cut = [{**message, "content": _cut(message["content"], self._control)} for message in messages]
        try:
            text = self._tokenizer.apply_chat_template(cut, tokenize=False, add_generation_prompt=True)
        except TemplateError as error:
            raise ToolkitError(
                "the model's chat template refuses this conversation",
                why=str(error),
                hint="/system without a text, /reset, or --template human",
            ) from None
        # The template writes what stands in front of a text itself.
        return _joined([_encode(self._tokenizer, piece) for piece in text.split(CUT)])


Template = HumanAssistant | OwnTemplate


def template_of(tokenizer: Any, wish: str = "auto") -> Template:
    """Return the template that is asked for; `auto`: the tokenizer's own where it has one."""
    has_own = bool(getattr(tokenizer, "chat_template", None))
    if wish == "own" and not has_own:
        raise ToolkitError("the model's tokenizer has no chat template", hint="leave out `--template own`")
    return OwnTemplate(tokenizer) if has_own and wish != "human" else HumanAssistant(tokenizer)


def fitted(
    template: Template, messages: Sequence[Message], *, positions: int | None, answer: int
) -> tuple[np.ndarray, int]:
    """Leave out the oldest turns until conversation and answer fit into the positions.

    answer: tokens of the answer, at most; it gets no more than half of the positions for that.
    Returns the tokens, and how many questions were left out with their answers.
    Raises ToolkitError: the last message alone is too long.
    """
    system = [message for message in messages if message["role"] == "system"]
    turns = [message for message in messages if message["role"] != "system"]
    dropped = 0
    while True:
        ids = template.ids([*system, *turns])
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


def _control_tokens(tokenizer: Any) -> list[str]:
    """Return the tokens that typed text must not become; unknown text may become `unk`."""
    special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    return sorted(special - {tokenizer.unk_token})


def _cut(text: str, control: Sequence[str]) -> str:
    """Mark a boundary behind the first character of whatever looks like a control token."""
    text = text.replace(CUT, "")
    inside = "|".join(f"(?<={re.escape(token[0])})(?={re.escape(token[1:])})" for token in control if len(token) > 1)
    return re.sub(inside, CUT, text) if inside else text


def _encode(tokenizer: Any, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def _joined(parts: Sequence[Sequence[int]]) -> np.ndarray:
    return np.array([token for part in parts for token in part], dtype=np.int64)
