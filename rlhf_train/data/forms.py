"""Tell the form of a data set's rows, and turn each row into a prompt and its answers.

Text stays text. All other forms become messages, which the tokenizer's chat template renders:
ShareGPT's `from` and `value`, Alpaca's instruction, and lists of `role` and `content`. Whole
dialogues as text (Anthropic/hh-rlhf) stay text: the prompt is what chosen and rejected share, up to
the last "Assistant:". A row has one fate: it is used, it is left out and counted under a name, or
it is a mistake, for which the file is refused.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from jobs.formatting import shown
from rlhf_train.data.chat import Message

Turns = tuple[Message, ...]

FIRST_ROWS = 8  # the form is told from these
ASSISTANT, HUMAN = "\n\nAssistant:", "\n\nHuman:"  # of whole dialogues as text
JOIN = "\n\n"  # between two turns of one role that follow each other
DIALOGUE_COLUMNS = ("messages", "conversations", "conversation")
ANSWER_COLUMNS = ("response", "completion")
ROLES = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "model", "bot", "chatgpt", "bard", "bing"), "assistant"),
    **dict.fromkeys(("tool", "function", "observation", "ipython", "tool_response", "function_response"), "tool"),
}
# How turns begin in the published chat templates: text that somebody has rendered beforehand.
RENDERED = re.compile(
    r"<\|im_start\|>|<\|start_header_id\|>|<start_of_turn>|\[INST\]|<\|(?:user|assistant|system|User|Assistant)\|>"
    r"|<｜(?:User|Assistant)｜>|<\|(?:start_of_role|turn)\|?>"
)


class Row(NamedTuple):
    """A prompt and answers to it: all of them text, or all of them messages.

    A prompt of messages is a tuple of them, an answer is one. None: there is no such column.
    """

    prompt: str | Turns
    response: str | Message | None  # what step 1 learns; `chosen`, where there is no such column
    chosen: str | Message | None
    rejected: str | Message | None


class Made(NamedTuple):
    """What became of a raw row."""

    row: Row | None  # None: left out
    counted: tuple[str, ...] = ()  # why it is left out, or what was changed


class BadRow(Exception):
    """Raised for a bad row; its arguments are the mistakes."""


class _LeftOut(Exception):
    """Raised for a row that is left out; its argument is the name under which it is counted."""


Make = Callable[[Mapping[str, Any]], Made]


@dataclass(frozen=True)
class Form:
    """One of the forms that rows have."""

    title: str  # of many rows
    wanted: str  # what every row needs
    steps: tuple[int, ...]  # that learn from it, if nothing else is said
    columns: tuple[str, ...]  # of Row that it fills
    is_text: bool
    make: Make


def recognise(rows: Sequence[Mapping[str, Any]]) -> Form | None:
    """Return the form of the first rows; None if they have none that is known."""
    found = [form for row in rows[:FIRST_ROWS] if (form := form_of(row))]
    if not found:
        # What stands in the columns is wrong; which columns are wanted is clear.
        return TEXT_PAIRS if any({"prompt", "chosen", "rejected"} <= row.keys() for row in rows) else None
    return DIALOGUES if found[0] is PROMPTS_OF_DIALOGUES and DIALOGUES in found else found[0]


def form_of(row: Mapping[str, Any]) -> Form | None:
    """Return the form of one row, by the columns that it has and what stands in them."""
    has = {name for name, value in row.items() if value is not None}
    dialogue = next((column for column in DIALOGUE_COLUMNS if column in has and _is_list(row[column])), None)
    if {"chosen", "rejected"} <= has:
        if any(_is_list(row[column]) or isinstance(row[column], Mapping) for column in ("chosen", "rejected")):
            return MESSAGE_PAIRS
        if dialogue or _is_list(row.get("prompt")):
            return MESSAGE_PAIRS
        if "prompt" in row:
            return TEXT_PAIRS
        if "instruction" in has:
            return ALPACA_PAIRS
        return TEXT_DIALOGUES if any(ASSISTANT in str(row[column]) for column in ("chosen", "rejected")) else None
    if dialogue:
        return DIALOGUES if _has_assistant(row[dialogue]) else PROMPTS_OF_DIALOGUES
    if "instruction" in has:
        return ALPACA if "output" in has else ALPACA_PROMPTS
    if "prompt" in has and not {"chosen", "rejected"} & row.keys():
        is_list = _is_list(row["prompt"])
        if any(column in has for column in ANSWER_COLUMNS):
            return MESSAGE_ANSWERS if is_list else TEXT_ANSWERS
        return MESSAGE_PROMPTS if is_list else TEXT_PROMPTS
    return None


def check_row(value: Any, form: Form) -> Mapping[str, Any]:
    """Return the row. Raises BadRow: it is no object, or of another form than the first rows."""
    if not isinstance(value, Mapping):
        raise BadRow(f"column 1: a row is an object with {form.wanted}, not {shown(value)}")
    other = form_of(value)
    if other is not None and other is not form and not {other, form} <= {DIALOGUES, PROMPTS_OF_DIALOGUES}:
        raise BadRow(f"{other.title}, where the first rows are {form.title}: one file has one form")
    return value


def make(value: Any, form: Form) -> Made:
    """Turn a raw row into a Row, or leave it out. Raises BadRow."""
    try:
        return form.make(check_row(value, form))
    except _LeftOut as left_out:
        return Made(None, left_out.args)


def is_blank(text: str | Turns | Message) -> bool:
    """Tell whether there is nothing in a prompt or answer.

    Of messages the last one counts; a call of a tool needs no text.
    """
    if isinstance(text, str):
        return not text.strip()
    last = text if isinstance(text, Message) else text[-1] if text else None
    return last is None or not (last.content.strip() or last.tool_calls)


def texts_of(part: str | Turns | Message | None) -> list[str]:
    """Return the texts of a prompt or answer."""
    if part is None:
        return []
    if isinstance(part, str):
        return [part]
    return [part.content] if isinstance(part, Message) else [turn.content for turn in part]


def key_of(part: str | Turns | Message | None) -> str:
    """Return text that is the same for equal prompts or answers of one data set."""
    return part if isinstance(part, str) else json.dumps(part)


# --- text -----------------------------------------------------------------------------------------


def _texts(row: Mapping[str, Any], columns: Sequence[str]) -> list[str]:
    """Return the texts of the columns. Raises BadRow with the mistakes of all."""
    mistakes = []
    for column in columns:
        if column not in row:
            mistakes.append(f"column `{column}`: missing; the row has {', '.join(row) or 'none'}")
        elif not isinstance(row[column], str):
            mistakes.append(f"column `{column}`: text is wanted, not {shown(row[column])}")
        elif wrong := _half_character(row[column]):
            mistakes.append(f"column `{column}`: {wrong}")
    if mistakes:
        raise BadRow(*mistakes)
    return [row[column] for column in columns]


def _one(row: Mapping[str, Any], column: str) -> str:
    [text] = _texts(row, (column,))
    return text


def _half_character(text: str) -> str:
    half = re.search("[\ud800-\udfff]", text)
    return f"{shown(half[0])} is half a character (a lone surrogate)" if half else ""


def _text(row: Row) -> Made:
    rendered = any(RENDERED.search(text) for part in row for text in texts_of(part))
    return Made(row, ("rendered_template",) if rendered else ())


def _text_pair(row: Mapping[str, Any]) -> Made:
    has_response = "response" in row
    columns = ("prompt", *(["response"] if has_response else []), "chosen", "rejected")
    prompt, *response, chosen, rejected = _texts(row, columns)
    return _text(Row(prompt, response[0] if response else chosen, chosen, rejected))


def _text_dialogues(row: Mapping[str, Any]) -> Made:
    chosen, rejected = _texts(row, ("chosen", "rejected"))
    start = chosen.rfind(ASSISTANT)
    while start >= 0 and not rejected.startswith(chosen[: start + len(ASSISTANT)]):
        start = chosen.rfind(ASSISTANT, 0, start)
    end = start + len(ASSISTANT)
    answers = chosen[end:], rejected[end:]
    if start < 0 or any(HUMAN in answer for answer in answers):
        raise _LeftOut("different_prompts")
    return _text(Row(chosen[:end], answers[0], *answers))


def _answer_column(row: Mapping[str, Any]) -> str:
    if row.get("label") is False:  # of TRL's rows for KTO: an answer that is not to be learned
        raise _LeftOut("label_is_false")
    return next((column for column in ANSWER_COLUMNS if row.get(column) is not None), ANSWER_COLUMNS[0])


def _text_answer(row: Mapping[str, Any]) -> Made:
    prompt, response = _texts(row, ("prompt", _answer_column(row)))
    return _text(Row(prompt, response, None, None))


def _text_prompt(row: Mapping[str, Any]) -> Made:
    return _text(Row(_one(row, "prompt"), None, None, None))


# --- messages -------------------------------------------------------------------------------------


def _decoded(value: Any) -> Any:
    """Return the list that a cell of a csv file holds as text, JSON's or Python's."""
    if isinstance(value, str) and re.match(r"\s*\[\s*\{", value):
        for parse in (json.loads, ast.literal_eval):
            try:
                found = parse(value)
            except (ValueError, SyntaxError, RecursionError, MemoryError):
                continue
            if isinstance(found, list) and all(isinstance(turn, Mapping) for turn in found):
                return found
    if isinstance(value, Mapping) and value and all(isinstance(each, list) for each in value.values()):
        # `datasets` keeps some lists of fields as fields of lists.
        return [dict(zip(value, each, strict=True)) for each in zip(*value.values(), strict=False)]
    return value


def _is_list(value: Any) -> bool:
    return isinstance(_decoded(value), list)


def _has_assistant(value: Any) -> bool:
    turns = [turn for turn in _decoded(value) if isinstance(turn, Mapping)]
    return any(ROLES.get(str(_first(turn, "role", "from")).strip().lower()) == "assistant" for turn in turns)


def _first(turn: Mapping[str, Any], *names: str) -> Any:
    return next((turn[name] for name in names if turn.get(name) is not None), None)


def _messages(row: Mapping[str, Any], column: str) -> list[Message]:
    """Return the messages of a column. Raises BadRow with the mistakes of all of them."""
    if column not in row:
        raise BadRow(f"column `{column}`: missing; the row has {', '.join(row) or 'none'}")
    value = _decoded(row[column])
    if isinstance(value, Mapping):
        value = [value]
    if not isinstance(value, list):
        raise BadRow(f"column `{column}`: a list of messages is wanted, not {shown(value)}")
    found, mistakes = [], []
    for place, turn in enumerate(value, 1):
        try:
            found.append(_message(turn))
        except BadRow as bad:
            mistakes += [f"column `{column}`, message {place}: {mistake}" for mistake in bad.args]
    if mistakes:
        raise BadRow(*mistakes)
    return found


def _message(turn: Any) -> Message:
    if not isinstance(turn, Mapping):
        raise BadRow(f"an object with role and content is wanted, not {shown(turn)}")
    role, calls = _first(turn, "role", "from"), turn.get("tool_calls") or ()
    if not isinstance(role, str):
        raise BadRow(f"it has no role; it has {', '.join(turn) or 'nothing'}")
    if role.strip().lower() == "function_call":  # ShareGPT's: the call as text
        role = "assistant"
    known = ROLES.get(role.strip().lower())
    if known is None:
        raise BadRow(
            f"role {shown(role)} is not known: system, user, assistant and tool are, or ShareGPT's human and gpt"
        )
    content = _first(turn, "content", "value", "text")
    if content is None and calls and known == "assistant":
        content = ""
    if isinstance(content, list):
        content = "".join(map(_part, content))
    if not isinstance(content, str):
        raise BadRow(f"its content is {shown(content)}, not text")
    if wrong := _half_character(content):
        raise BadRow(wrong)
    return Message(known, content, tuple(calls)) if calls else Message(known, content)


def _part(part: Any) -> str:
    """Return the text of one part of a message's content."""
    if isinstance(part, str):
        return part
    if isinstance(part, Mapping) and isinstance(part.get("text"), str) and part.get("type", "text") == "text":
        return str(part["text"])
    kind = part.get("type") if isinstance(part, Mapping) else part
    raise BadRow(f"a part of its content is {shown(kind)}: only text can be learned")


def _tidy(turns: Sequence[Message]) -> tuple[list[Message], set[str]]:
    """Return turns as a chat template takes them, and what was changed.

    Turns of user or assistant that follow one of the same role are joined; what an assistant says
    before the first question is left away.
    """
    found: list[Message] = []
    counted: set[str] = set()
    for turn in turns:
        last = found[-1] if found else None
        if turn.role == "assistant" and (last is None or last.role == "system"):
            counted.add("assistant_first")
        elif last is not None and last.role == turn.role and turn.role != "tool" and not last.tool_calls:
            found[-1] = turn._replace(content=f"{last.content}{JOIN}{turn.content}")
            counted.add("turns_joined")
        else:
            found.append(turn)
    return found, counted


def _answered(turns: Sequence[Message]) -> tuple[Turns, Message, set[str]]:
    """Cut a dialogue in front of its last answer; questions behind it are left away."""
    tidy, counted = _tidy(turns)
    end = max((place for place, turn in enumerate(tidy, 1) if turn.role == "assistant"), default=0)
    if not end:
        is_asked = any(turn.role == "user" for turn in tidy)
        raise _LeftOut("empty_prompt" if turns and not is_asked else "no_answer")
    if end < len(tidy):
        counted.add("unanswered_end")
    return tuple(tidy[: end - 1]), tidy[end - 1], counted


def _asked(turns: Sequence[Message]) -> tuple[Turns, set[str]]:
    """Return a dialogue up to its last question."""
    tidy, counted = _tidy(turns)
    end = max((place for place, turn in enumerate(tidy, 1) if turn.role in ("user", "tool")), default=0)
    if not end:
        raise _LeftOut("empty_prompt")
    return tuple(tidy[:end]), counted


def _system(row: Mapping[str, Any], turns: list[Message]) -> list[Message]:
    """Put a column `system` in front."""
    if not row.get("system") or (turns and turns[0].role == "system"):
        return turns
    return [Message("system", _one(row, "system")), *turns]


def _answer(row: Mapping[str, Any], column: str) -> list[Message]:
    """Return the messages of an answer, which may be text."""
    value = row.get(column)
    is_text = isinstance(value, str) and not _is_list(value)
    return [Message("assistant", _one(row, column))] if is_text else _messages(row, column)


def _message_pair(row: Mapping[str, Any]) -> Made:
    chosen, rejected = _answer(row, "chosen"), _answer(row, "rejected")
    column = next((name for name in ("prompt", *DIALOGUE_COLUMNS) if _is_list(row.get(name))), None)
    whole = any(turn.role == "user" for turn in chosen)
    if whole:  # UltraFeedback: the prompt stands in the dialogues, too
        start = _messages(row, column) if column == "prompt" else []
        start = [] if chosen[: len(start)] == start else start
    elif column:
        start = _messages(row, column)
    else:
        start = [Message("user", _one(row, "prompt"))]
    start = _system(row, start)
    prompt, good, counted = _answered([*start, *chosen])
    other, bad, also = _answered([*start, *rejected])
    if prompt != other:
        raise _LeftOut("different_prompts")
    return Made(Row(prompt, good, good, bad), tuple(sorted(counted | also)))


def _dialogue(row: Mapping[str, Any]) -> Made:
    column = next((name for name in DIALOGUE_COLUMNS if row.get(name) is not None), DIALOGUE_COLUMNS[0])
    prompt, answer, counted = _answered(_system(row, _messages(row, column)))
    return Made(Row(prompt, answer, None, None), tuple(sorted(counted)))


def _prompt_of_dialogue(row: Mapping[str, Any]) -> Made:
    column = next((name for name in DIALOGUE_COLUMNS if row.get(name) is not None), DIALOGUE_COLUMNS[0])
    prompt, counted = _asked(_system(row, _messages(row, column)))
    return Made(Row(prompt, None, None, None), tuple(sorted(counted)))


def _message_answer(row: Mapping[str, Any]) -> Made:
    turns = [*_messages(row, "prompt"), *_answer(row, _answer_column(row))]
    prompt, answer, counted = _answered(_system(row, turns))
    return Made(Row(prompt, answer, None, None), tuple(sorted(counted)))


def _message_prompt(row: Mapping[str, Any]) -> Made:
    prompt, counted = _asked(_system(row, _messages(row, "prompt")))
    return Made(Row(prompt, None, None, None), tuple(sorted(counted)))


def _instruction(row: Mapping[str, Any]) -> Turns:
    """Return Alpaca's prompt: instruction and input are one turn, `history` stands before it."""
    turns = []
    history = row.get("history") or []
    if not isinstance(history, list) or not all(
        isinstance(pair, list | tuple) and len(pair) == 2 and all(isinstance(text, str) for text in pair)
        for pair in history
    ):
        raise BadRow(f"column `history`: pairs of texts are wanted, not {shown(history)}")
    for asked, answered in history:
        turns += [Message("user", asked), Message("assistant", answered)]
    parts = _texts(row, ("instruction", "input") if row.get("input") is not None else ("instruction",))
    turns.append(Message("user", "\n".join(part for part in parts if part.strip())))
    return tuple(_system(row, turns))


def _alpaca(row: Mapping[str, Any]) -> Made:
    return Made(Row(_instruction(row), Message("assistant", _one(row, "output")), None, None))


def _alpaca_pair(row: Mapping[str, Any]) -> Made:
    prompt = _instruction(row)
    good, bad = (Message("assistant", text) for text in _texts(row, ("chosen", "rejected")))
    return Made(Row(prompt, good, good, bad))


def _alpaca_prompt(row: Mapping[str, Any]) -> Made:
    return Made(Row(_instruction(row), None, None, None))


def _pairs(title: str, wanted: str, make: Make, *, is_text: bool = False) -> Form:
    return Form(title, wanted, (1, 2, 3), Row._fields, is_text, make)


def _answers(title: str, wanted: str, make: Make, *, is_text: bool = False) -> Form:
    return Form(title, wanted, (1,), ("prompt", "response"), is_text, make)


def _prompts(title: str, wanted: str, make: Make, *, is_text: bool = False) -> Form:
    return Form(title, wanted, (3,), ("prompt",), is_text, make)


TEXT_PAIRS = _pairs("pairs of text", "prompt, chosen, rejected", _text_pair, is_text=True)
TEXT_DIALOGUES = _pairs("pairs of whole dialogues as text", "chosen, rejected", _text_dialogues, is_text=True)
MESSAGE_PAIRS = _pairs("pairs of messages", "chosen, rejected", _message_pair)
ALPACA_PAIRS = _pairs("pairs with an instruction", "instruction, chosen, rejected", _alpaca_pair)
DIALOGUES = _answers("dialogues of messages", "messages or conversations", _dialogue)
ALPACA = _answers("instructions with an output", "instruction, output", _alpaca)
TEXT_ANSWERS = _answers("responses as text", "prompt, response or completion", _text_answer, is_text=True)
MESSAGE_ANSWERS = _answers("responses as messages", "prompt, response or completion", _message_answer)
TEXT_PROMPTS = _prompts("prompts as text", "prompt", _text_prompt, is_text=True)
MESSAGE_PROMPTS = _prompts("prompts as messages", "prompt", _message_prompt)
PROMPTS_OF_DIALOGUES = _prompts("dialogues without answers", "messages or conversations", _prompt_of_dialogue)
ALPACA_PROMPTS = _prompts("instructions", "instruction", _alpaca_prompt)
