"""Expected rows are written by hand, from the forms as their projects publish them."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from jobs.errors import ExitCode, ToolkitError
from jobs.spec import DataSet
from rlhf_train.data import forms, reading
from rlhf_train.data.chat import Message
from rlhf_train.data.forms import BadRow, Form, Row

pytestmark = pytest.mark.pinned


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


def says(who: str, text: Any) -> dict[str, Any]:
    return {"from": who, "value": text}


Q, Q2, A, A2, BAD, SYSTEM = (
    Message("user", "Why?"),
    Message("user", "And then?"),
    Message("assistant", "So."),
    Message("assistant", "That."),
    Message("assistant", "No."),
    Message("system", "Be kind."),
)
PAIR = Row((Q,), A, A, BAD)
LEARNED = Row((Q,), A, None, None)
ASKED = Row((Q,), None, None, None)
HUMAN = "\n\nHuman: Hi\n\nAssistant: Hello.\n\nHuman: Why?\n\nAssistant:"

ACCEPTED: list[tuple[str, dict[str, Any], Form, Row]] = [
    ("pairs", {"prompt": "p", "chosen": "c", "rejected": "r"}, forms.TEXT_PAIRS, Row("p", "c", "c", "r")),
    (
        "pairs with a response",
        {"prompt": "p", "response": "s", "chosen": "c", "rejected": "r"},
        forms.TEXT_PAIRS,
        Row("p", "s", "c", "r"),
    ),
    (
        "hh-rlhf",
        {"chosen": f"{HUMAN} So.", "rejected": f"{HUMAN} No."},
        forms.TEXT_DIALOGUES,
        Row(HUMAN, " So.", " So.", " No."),
    ),
    (
        "TRL, explicit prompt",
        {"prompt": [user("Why?")], "chosen": [assistant("So.")], "rejected": [assistant("No.")]},
        forms.MESSAGE_PAIRS,
        PAIR,
    ),
    (
        "TRL, implicit prompt",
        {"chosen": [user("Why?"), assistant("So.")], "rejected": [user("Why?"), assistant("No.")]},
        forms.MESSAGE_PAIRS,
        PAIR,
    ),
    (
        "UltraFeedback",
        {
            "prompt": "Why?",
            "prompt_id": "7",
            "chosen": [user("Why?"), assistant("So.")],
            "rejected": [user("Why?"), assistant("No.")],
            "messages": [user("Why?"), assistant("So.")],
            "score_chosen": 8.0,
        },
        forms.MESSAGE_PAIRS,
        PAIR,
    ),
    (
        "prompt of messages that the dialogues hold, too",
        {
            "prompt": [user("Why?")],
            "chosen": [user("Why?"), assistant("So.")],
            "rejected": [user("Why?"), assistant("No.")],
        },
        forms.MESSAGE_PAIRS,
        PAIR,
    ),
    (
        "messages, and answers as text",
        {"prompt": [user("Why?")], "chosen": "So.", "rejected": "No."},
        forms.MESSAGE_PAIRS,
        PAIR,
    ),
    (
        "ShareGPT with a preference",
        {"conversations": [says("human", "Why?")], "chosen": says("gpt", "So."), "rejected": says("gpt", "No.")},
        forms.MESSAGE_PAIRS,
        PAIR,
    ),
    ("SFT messages", {"messages": [user("Why?"), assistant("So.")]}, forms.DIALOGUES, LEARNED),
    (
        "ShareGPT",
        {
            "conversations": [
                says("system", "Be kind."),
                says("human", "Why?"),
                says("gpt", "So."),
                says("human", "And then?"),
                says("gpt", "That."),
            ]
        },
        forms.DIALOGUES,
        Row((SYSTEM, Q, A, Q2), A2, None, None),
    ),
    (
        "ShareGPT, `system` in a column",
        {"system": "Be kind.", "conversations": [says("human", "Why?"), says("gpt", "So.")]},
        forms.DIALOGUES,
        Row((SYSTEM, Q), A, None, None),
    ),
    (
        "ShareGPT with a tool",
        {
            "conversations": [
                says("human", "Why?"),
                says("function_call", "{}"),
                says("observation", "4"),
                says("gpt", "So."),
            ]
        },
        forms.DIALOGUES,
        Row((Q, Message("assistant", "{}"), Message("tool", "4")), A, None, None),
    ),
    (
        "Alpaca",
        {"instruction": "Add.", "input": "2 2", "output": "4"},
        forms.ALPACA,
        Row((Message("user", "Add.\n2 2"),), Message("assistant", "4"), None, None),
    ),
    (
        "Alpaca without input, with a history",
        {"instruction": "And then?", "input": "", "output": "That.", "history": [["Why?", "So."]]},
        forms.ALPACA,
        Row((Q, A, Q2), A2, None, None),
    ),
    (
        "Alpaca with a preference",
        {"instruction": "Why?", "input": "", "chosen": "So.", "rejected": "No."},
        forms.ALPACA_PAIRS,
        PAIR,
    ),
    ("Alpaca without output", {"instruction": "Why?", "input": ""}, forms.ALPACA_PROMPTS, ASKED),
    ("prompt and response", {"prompt": "p", "response": "s"}, forms.TEXT_ANSWERS, Row("p", "s", None, None)),
    ("prompt and completion", {"prompt": "p", "completion": "s"}, forms.TEXT_ANSWERS, Row("p", "s", None, None)),
    (
        "prompt and completion of messages",
        {"prompt": [user("Why?")], "completion": [assistant("So.")]},
        forms.MESSAGE_ANSWERS,
        LEARNED,
    ),
    ("prompts", {"prompt": "p", "source": "x"}, forms.TEXT_PROMPTS, Row("p", None, None, None)),
    ("prompts of messages", {"prompt": [user("Why?")]}, forms.MESSAGE_PROMPTS, ASKED),
    ("messages without an answer", {"messages": [user("Why?")]}, forms.PROMPTS_OF_DIALOGUES, ASKED),
    # A csv file holds lists as text, JSON's or Python's. `datasets` keeps some as fields of lists.
    ("JSON in csv", {"messages": json.dumps([user("Why?"), assistant("So.")])}, forms.DIALOGUES, LEARNED),
    ("Python in csv", {"messages": str([user("Why?"), assistant("So.")])}, forms.DIALOGUES, LEARNED),
    (
        "fields of lists",
        {"messages": {"role": ["user", "assistant"], "content": ["Why?", "So."]}},
        forms.DIALOGUES,
        LEARNED,
    ),
    # Columns of other forms that are null, as `datasets` fills them in.
    ("nulls", {"messages": [user("Why?"), assistant("So.")], "prompt": None, "chosen": None}, forms.DIALOGUES, LEARNED),
]


@pytest.mark.parametrize(("row", "form", "wanted"), [case[1:] for case in ACCEPTED], ids=[case[0] for case in ACCEPTED])
def test_a_form_is_recognised_and_made_a_row(row: dict[str, Any], form: Form, wanted: Row) -> None:
    assert forms.recognise([row]) is form
    assert forms.make(row, form) == (wanted, ())


def dialogue(*turns: dict[str, Any]) -> dict[str, Any]:
    return {"messages": list(turns)}


# What becomes of a row: the row that is made of it, or None where it is left out; and how it is
# counted.
COUNTED: list[tuple[str, dict[str, Any], Row | None, str]] = [
    (
        "text parts of a list are joined",
        dialogue(
            {"role": "user", "content": [{"type": "text", "text": "Wh"}, {"type": "text", "text": "y?"}]},
            assistant("So."),
        ),
        LEARNED,
        "",
    ),
    (
        "two user turns",
        dialogue(user("Why?"), user("Why not?"), assistant("So.")),
        Row((Message("user", "Why?\n\nWhy not?"),), A, None, None),
        "turns_joined",
    ),
    (
        "two answers",
        dialogue(user("Why?"), assistant("So."), assistant("That.")),
        Row((Q,), Message("assistant", "So.\n\nThat."), None, None),
        "turns_joined",
    ),
    ("assistant first", dialogue(assistant("Hi."), user("Why?"), assistant("So.")), LEARNED, "assistant_first"),
    (
        "assistant first behind the system",
        dialogue({"role": "system", "content": "Be kind."}, assistant("Hi."), user("Why?"), assistant("So.")),
        Row((SYSTEM, Q), A, None, None),
        "assistant_first",
    ),
    ("a question at the end", dialogue(user("Why?"), assistant("So."), user("Bye.")), LEARNED, "unanswered_end"),
    ("no answer", dialogue(user("Why?")), None, "no_answer"),
    ("an answer, then a question", dialogue(assistant("Hi."), user("Why?")), None, "no_answer"),
    ("no turn", dialogue(), None, "no_answer"),
    ("an answer alone", dialogue(assistant("So.")), None, "empty_prompt"),
    (
        "a pair without a question",
        {"prompt": [], "chosen": [assistant("So.")], "rejected": [assistant("No.")]},
        None,
        "empty_prompt",
    ),
    ("no question", {"prompt": [{"role": "system", "content": "Be kind."}]}, None, "empty_prompt"),
    (
        "other prompts",
        {"chosen": [user("Why?"), assistant("So.")], "rejected": [user("What?"), assistant("No.")]},
        None,
        "different_prompts",
    ),
    (
        "other prompts, as text",
        {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: c\n\nAssistant: d"},
        None,
        "different_prompts",
    ),
    (
        "dialogues that part before the last question",
        {"chosen": f"{HUMAN} So.", "rejected": "\n\nHuman: Hi\n\nAssistant: No.\n\nHuman: Bye\n\nAssistant: x"},
        None,
        "different_prompts",
    ),
    ("an answer that is not to be learned", {"prompt": "p", "completion": "s", "label": False}, None, "label_is_false"),
    (
        "a template that was rendered before",
        {"prompt": "<|im_start|>user\nWhy?<|im_end|>\n", "chosen": "c", "rejected": "r"},
        Row("<|im_start|>user\nWhy?<|im_end|>\n", "c", "c", "r"),
        "rendered_template",
    ),
    (
        "Llama 2's, in an answer",
        {"prompt": "p", "response": "[INST] b [/INST]"},
        Row("p", "[INST] b [/INST]", None, None),
        "rendered_template",
    ),
]


@pytest.mark.parametrize(
    ("row", "wanted", "counted"), [case[1:] for case in COUNTED], ids=[case[0] for case in COUNTED]
)
def test_a_row_is_changed_or_left_out_and_counted(row: dict[str, Any], wanted: Row | None, counted: str) -> None:
    form = forms.DIALOGUES if "messages" in row else forms.form_of(row)
    assert form is not None
    assert forms.make(row, form) == (wanted, (counted,) if counted else ())


KNOWN = "system, user, assistant and tool are, or ShareGPT's human and gpt"
REFUSED: list[tuple[str, dict[str, Any], str]] = [
    (
        "null",
        dialogue(user("Why?"), {"role": "assistant", "content": None}),
        "message 2: its content is null, not text",
    ),
    ("a number", dialogue({"role": "user", "content": 7}), "message 1: its content is 7, not text"),
    (
        "an image",
        dialogue({"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}),
        'message 1: a part of its content is "image_url": only text can be learned',
    ),
    ("an unknown role", dialogue(user("Why?"), says("critic", "x")), f'message 2: role "critic" is not known: {KNOWN}'),
    ("no role", dialogue({"content": "x"}), "message 1: it has no role; it has content"),
    ("a text", dialogue("x"), 'message 1: an object with role and content is wanted, not "x"'),  # type: ignore[arg-type]
    (
        "half a character",
        dialogue(user("a\udc80")),
        'message 1: "\\udc80" is half a character (a lone surrogate)',
    ),
]


@pytest.mark.parametrize(("row", "mistake"), [case[1:] for case in REFUSED], ids=[case[0] for case in REFUSED])
def test_a_row_is_refused_with_the_reason(row: dict[str, Any], mistake: str) -> None:
    with pytest.raises(BadRow) as caught:
        forms.make(row, forms.DIALOGUES)
    assert caught.value.args == (f"column `messages`, {mistake}",)


@pytest.mark.parametrize("history", ["Why?", ["So"], [["Why?"]], [["Why?", None]], [7]])
def test_a_history_that_is_no_list_of_pairs_is_refused(history: Any) -> None:
    with pytest.raises(BadRow) as caught:
        forms.make({"instruction": "And then?", "output": "That.", "history": history}, forms.ALPACA)
    assert caught.value.args == (f"column `history`: pairs of texts are wanted, not {json.dumps(history)}",)


def test_an_assistant_that_calls_a_tool_needs_no_content() -> None:
    calls = [{"type": "function", "function": {"name": "add", "arguments": {"a": 2}}}]
    made = forms.make(
        dialogue(
            user("Why?"),
            {"role": "assistant", "content": None, "tool_calls": calls},
            {"role": "tool", "content": "4"},
            assistant("So."),
        ),
        forms.DIALOGUES,
    )
    asked = (Q, Message("assistant", "", tuple(calls)), Message("tool", "4"))
    assert made == (Row(asked, A, None, None), ())
    assert not forms.is_blank(asked[1])


@pytest.mark.parametrize("columns", [["question", "response_j", "response_k"], ["prompt", "chosen"], ["text"], []])
def test_columns_of_no_form(columns: list[str]) -> None:
    assert forms.recognise([dict.fromkeys(columns, "x")]) is None


# --- from files -----------------------------------------------------------------------------------


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def refused(path: Path, **entry: Any) -> ToolkitError:
    with pytest.raises(ToolkitError) as caught:
        reading.read(DataSet(name=str(path), **entry), [Path.cwd()])
    assert caught.value.exit_code == ExitCode.USAGE
    return caught.value


def test_mixed_forms_are_refused_with_three_of_the_rows(tmp_path: Path) -> None:
    plain, chat = {"prompt": "p", "chosen": "c", "rejected": "r"}, dialogue(user("Why?"), assistant("So."))
    error = refused(write(tmp_path / "a.jsonl", [plain, *[chat] * 5]))
    assert error.what == f"bad rows in {tmp_path}/a.jsonl"
    assert error.why == (
        "lines 2, 3, 4 and 2 more, dialogues of messages, where the first rows are pairs of text: one file has one form"
    )
    held = tmp_path / "folder"
    held.mkdir()
    write(held / "train.jsonl", [plain])
    write(held / "test.jsonl", [chat])
    assert refused(held).why.startswith("line 1, dialogues of messages, where the first rows are pairs of text")


def test_rows_are_counted_and_the_first_may_be_one_that_is_left_out(tmp_path: Path) -> None:
    rows = [dialogue(user("Why?")), dialogue(user("Why?"), assistant("So.")), dialogue(user("Why?"), user("?"))]
    found, held_out = reading.read(DataSet(name=str(write(tmp_path / "a.jsonl", rows))), [tmp_path])
    assert ([*found.rows], found.read, held_out) == ([LEARNED], 3, None)
    assert found.counted == Counter(no_answer=2)
    error = refused(write(tmp_path / "b.jsonl", [{"messages": []}, {"messages": []}]))
    assert (error.what, error.why) == (f"all 2 rows in {tmp_path}/b.jsonl are left out", "empty_prompt 2")


def test_columns_are_renamed(tmp_path: Path) -> None:
    """lvwerra/stack-exchange-paired's columns."""
    file = write(tmp_path / "a.jsonl", [{"question": "p", "response_j": "c", "response_k": "r", "prompt": "other"}])
    names = {"prompt": "question", "chosen": "response_j", "rejected": "response_k"}
    found, _ = reading.read(DataSet(name=str(file), columns=names), [tmp_path])
    assert [*found.rows] == [Row("p", "c", "c", "r")]
    error = refused(file, columns=names | {"chosen": "best"})
    assert (error.what, error.why) == (
        f"{file}: no column `best`",
        "its columns: question, response_j, response_k, prompt",
    )
    write(file, [{"question": "p", "response_j": "c", "response_k": "r"}])
    error = refused(file)
    assert (error.what, error.why) == (
        f"{file}: no form that is known",
        "its columns: question, response_j, response_k",
    )
    assert "columns: {prompt: question}" in error.hint


def test_a_split_and_a_configuration_are_named(tmp_path: Path) -> None:
    for name in ("train_prefs", "test_prefs", "train_sft"):
        write(tmp_path / f"{name}.jsonl", [{"prompt": name, "chosen": "c", "rejected": "r"}])
    train, held_out = reading.read(DataSet(name=str(tmp_path), split="train_prefs"), [tmp_path])
    assert held_out is not None
    assert ([row.prompt for row in train.rows], [row.prompt for row in held_out.rows]) == (
        ["train_prefs"],
        ["test_prefs"],
    )
    assert reading.read(DataSet(name=str(tmp_path), split="train_sft"), [tmp_path])[1] is None
    error = refused(tmp_path, split="train_gen")
    assert (error.what, error.why) == (
        f"data set `{tmp_path}` has no split `train_gen`",
        "its splits: test_prefs, train_prefs, train_sft",
    )
    assert refused(tmp_path, config="en").what == f"data set `{tmp_path}` has no configuration `en`"
