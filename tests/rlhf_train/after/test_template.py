"""Test what the model reads: templates, typed control tokens, and long conversations."""

from __future__ import annotations

import pytest

from jobs.errors import ToolkitError
from rlhf_train.after.template import fitted, label, stop_texts, template_of
from rlhf_train.data.chat import ChatTemplate, Message
from tests.rlhf_train.after import models

pytestmark = pytest.mark.pinned

TALK = [Message("user", "red cat"), Message("assistant", " red"), Message("user", "tall 🙂")]
SYSTEM = Message("system", "Be small.")
BOS = 2  # `</s>`, which the tokenizer puts in front


@pytest.fixture(scope="module")
def plain():
    return models.tokenizer()


@pytest.fixture(scope="module")
def own():
    return models.tokenizer(with_template=True)


def test_human_and_assistant_are_written_as_in_the_rows(plain):
    ids = ChatTemplate.human(plain).prompt(TALK)
    assert ids[0] == BOS and BOS not in ids[1:]
    assert plain.decode(ids[1:]) == "\n\nHuman: red cat\n\nAssistant: red\n\nHuman: tall 🙂\n\nAssistant:"
    assert ids == plain(plain.decode(ids[1:]))["input_ids"]
    assert plain.decode(ChatTemplate.human(plain).prompt([SYSTEM, *TALK])[1:]).startswith("Be small.\n\nHuman: red")


def test_the_tokenizers_own_template_is_used_where_it_has_one(own, plain):
    template = template_of(own)
    turns = [{"role": message.role, "content": message.content} for message in (SYSTEM, *TALK)]
    assert template.prompt([SYSTEM, *TALK]) == own.apply_chat_template(
        turns, tokenize=True, add_generation_prompt=True, return_dict=False
    )
    assert label(template) == "the tokenizer's own" and stop_texts(template) == ()
    for human in (template_of(plain), template_of(own, "human")):
        assert label(human) == "Human/Assistant" and stop_texts(human) == ("\n\nHuman:",)
    with pytest.raises(ToolkitError, match="has no chat template"):
        template_of(plain, "own")


def test_a_template_that_refuses_says_why():
    own = models.tokenizer(with_template=True)
    own.chat_template = "{{ raise_exception('Nobody may ask') }}"
    with pytest.raises(ToolkitError) as caught:
        template_of(own)
    assert caught.value.why == "Nobody may ask" and "--template human" in caught.value.hint
    own.chat_template = models.TEMPLATE.replace("{{ m", "{% if m.role == 'system' %}{{ 1 / 0 }}{% endif %}{{ m", 1)
    with pytest.raises(ToolkitError, match="refuses this conversation") as caught:
        fitted(template_of(own), [SYSTEM, *TALK], positions=None, answer=4)
    assert "division" in caught.value.why and "--template human" in caught.value.hint


def test_the_oldest_turns_are_left_out_and_the_system_text_stays(plain):
    template = ChatTemplate.human(plain)
    long = [SYSTEM, *TALK[:2] * 5, TALK[2]]
    whole = template.prompt(long)
    # One token too many for all of it: one turn goes.
    ids, dropped = fitted(template, long, positions=len(whole) + 9, answer=10)
    assert dropped == 1 and ids.tolist() == template.prompt([SYSTEM, *long[3:]])
    assert fitted(template, long, positions=len(whole) + 10, answer=10)[1] == 0
    assert fitted(template, long, positions=None, answer=10)[1] == 0


def test_an_answer_gets_half_of_the_positions_at_most(plain):
    """A config that allows 10,000 tokens does not push the whole conversation out."""
    template = ChatTemplate.human(plain)
    size = len(template.prompt(TALK))
    assert fitted(template, TALK, positions=2 * size, answer=10_000)[1] == 0
    assert fitted(template, TALK, positions=2 * size - 2, answer=10_000)[1] == 1


def test_a_message_that_is_too_long_by_itself_is_refused(plain):
    template, last = ChatTemplate.human(plain), TALK[2:]
    size = len(template.prompt(last))
    assert len(fitted(template, last, positions=size + 1, answer=50)[0]) == size
    with pytest.raises(ToolkitError, match="too long") as caught:
        fitted(template, TALK, positions=size, answer=50)
    assert f"{size} tokens" in caught.value.why
