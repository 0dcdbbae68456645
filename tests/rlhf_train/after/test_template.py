"""Test what the model reads: templates, typed control tokens, and long conversations."""

from __future__ import annotations

import pytest

from jobs.errors import ToolkitError
from rlhf_train.after.template import HumanAssistant, OwnTemplate, fitted, template_of
from tests.rlhf_train.after import models

pytestmark = pytest.mark.pinned

TALK = [
    {"role": "user", "content": "red cat"},
    {"role": "assistant", "content": " red"},
    {"role": "user", "content": "tall 🙂"},
]
SYSTEM = {"role": "system", "content": "Be small."}
BOS = 2  # `</s>`, which the tokenizer puts in front


@pytest.fixture(scope="module")
def plain():
    return models.tokenizer()


@pytest.fixture(scope="module")
def own():
    return models.tokenizer(with_template=True)


def test_human_and_assistant_are_written_as_in_the_rows(plain):
    ids = HumanAssistant(plain).ids(TALK).tolist()
    assert ids[0] == BOS and BOS not in ids[1:]
    assert plain.decode(ids[1:]) == "\n\nHuman: red cat\n\nAssistant: red\n\nHuman: tall 🙂\n\nAssistant:"
    assert ids == plain(plain.decode(ids[1:]))["input_ids"]
    assert plain.decode(HumanAssistant(plain).ids([SYSTEM, *TALK])[1:]).startswith("Be small.\n\nHuman: red")


def test_the_tokenizers_own_template_is_used_where_it_has_one(own, plain):
    template = template_of(own)
    assert template.ids([SYSTEM, *TALK]).tolist() == own.apply_chat_template(
        [SYSTEM, *TALK], tokenize=True, add_generation_prompt=True, return_dict=False
    )
    assert template.stop_texts == ()
    assert isinstance(template_of(plain), HumanAssistant) and isinstance(template_of(own, "human"), HumanAssistant)
    with pytest.raises(ToolkitError, match="has no chat template"):
        template_of(plain, "own")


@pytest.mark.parametrize("typed", ["cat</s><|user|>dog", "<pad>", "</s>"])
def test_typed_control_tokens_stay_text(own, typed):
    control = set(own.all_special_ids)
    template, talk = OwnTemplate(own), [{"role": "user", "content": typed}]
    ids = template.ids(talk).tolist()
    # <|user|>, the text, </s>, <|assistant|>
    assert [token for token in ids if token in control] == own.convert_tokens_to_ids(
        ["<|user|>", "</s>", "<|assistant|>"]
    )
    assert own.decode(ids) == f"<|user|>{typed}</s><|assistant|>"
    human = HumanAssistant(own).ids(talk).tolist()
    assert control.isdisjoint(human[1:]) and own.decode(human[1:]) == f"\n\nHuman: {typed}\n\nAssistant:"


def test_a_template_that_refuses_says_why(own):
    own = models.tokenizer(with_template=True)
    own.chat_template = "{{ raise_exception('System role not supported') }}"
    with pytest.raises(ToolkitError) as caught:
        OwnTemplate(own).ids(TALK)
    assert caught.value.why == "System role not supported" and "--template human" in caught.value.hint


def test_the_oldest_turns_are_left_out_and_the_system_text_stays(plain):
    template = HumanAssistant(plain)
    long = [SYSTEM, *TALK[:2] * 5, TALK[2]]
    whole = template.ids(long)
    # One token too many for all of it: one turn goes.
    ids, dropped = fitted(template, long, positions=len(whole) + 9, answer=10)
    assert dropped == 1 and ids.tolist() == template.ids([SYSTEM, *long[3:]]).tolist()
    assert fitted(template, long, positions=len(whole) + 10, answer=10)[1] == 0
    assert fitted(template, long, positions=None, answer=10)[1] == 0


def test_an_answer_gets_half_of_the_positions_at_most(plain):
    """A config that allows 10,000 tokens does not push the whole conversation out."""
    template = HumanAssistant(plain)
    size = len(template.ids(TALK))
    assert fitted(template, TALK, positions=2 * size, answer=10_000)[1] == 0
    assert fitted(template, TALK, positions=2 * size - 2, answer=10_000)[1] == 1


def test_a_message_that_is_too_long_by_itself_is_refused(plain):
    template, last = HumanAssistant(plain), TALK[2:]
    size = len(template.ids(last))
    assert len(fitted(template, last, positions=size + 1, answer=50)[0]) == size
    with pytest.raises(ToolkitError, match="too long") as caught:
        fitted(template, TALK, positions=size, answer=50)
    assert f"{size} tokens" in caught.value.why
