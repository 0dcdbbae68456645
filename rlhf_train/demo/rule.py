"""Judge whether an answer is good, from the two texts alone: no model, no reward, no generator.

PPO is measured against this rule. It shares only the facts and words of `world.py` with the
generator. It finds the question in the prompt with patterns of its own and works out the right
answer again.

A good answer has three sentences and then ends: an opener that calls the user by name if (and only
if) the user gave one, the right answer to the last question, a closer. `judge` returns the first
fault:

    unended   the end token was not reached
    cut       the text stops inside a sentence
    rude      a rude sentence
    ramble    more than three sentences
    bare      fewer than three: no courtesy, or no answer
    opener    not a known opener, or it calls the user by a wrong name, or by none
    closer    not a known closer
    unclear   the prompt holds no known question, so no answer to it is good
    wrong     not the right answer to this question
"""

from __future__ import annotations

import re
from collections.abc import Callable

from rlhf_train.demo.world import CLOSERS, COLOUR_OF, ITEMS, MOMENTS, NAMES, NUMBER_AFTER, OPENERS, OPPOSITE_OF, RUDE

GOOD = "good"


def is_good(prompt: str, response: str, ended: bool) -> bool:
    """Return whether `response` is good; `ended`: its end token was sampled. Takes any text."""
    return judge(prompt, response, ended) == GOOD


def judge(prompt: str, response: str, ended: bool) -> str:
    """Return "good", or the first fault by the module's list.

    Special tokens around the prompt do not matter.
    """
    if not ended:
        return "unended"
    text = response.removeprefix(" ")
    if not text.endswith("."):
        return "cut"
    sentences = [f"{sentence}." for sentence in text[:-1].split(". ")]
    if any(sentence in RUDE for sentence in sentences):
        return "rude"
    if len(sentences) != 3:
        return "ramble" if len(sentences) > 3 else "bare"
    opener, content, closer = sentences
    question = last_turn(prompt)
    if opener not in _openers_for(user_in(question)):
        return "opener"
    if closer not in CLOSERS:
        return "closer"
    answer = right_answer(question)
    if answer is None:
        return "unclear"
    return GOOD if content == answer else "wrong"


def last_turn(prompt: str) -> str:
    """Return the last thing that the human said."""
    return prompt.rpartition("Human:")[2].partition("Assistant:")[0]


_NAME = "|".join(NAMES)
_USER = re.compile(rf"\b(?:I am|My name is|This is) ({_NAME})\.|\b({_NAME}) here\.")


def user_in(question: str) -> str | None:
    match = _USER.search(question)
    return (match[1] or match[2]) if match else None


def _openers_for(user: str | None) -> list[str]:
    return [f"{opener}, {user}." if user else f"{opener}." for opener in OPENERS]


def right_answer(question: str) -> str | None:
    """Return the one sentence that answers `question`; None if this world has no such question."""
    for pattern, answer in _TASKS:
        if match := pattern.search(question):
            return answer(match)
    return None


def _colour(match: re.Match[str]) -> str | None:
    colour = COLOUR_OF.get(match["thing"])
    return colour and f"The colour of {match['thing']} is {colour}."


def _opposite(match: re.Match[str]) -> str | None:
    opposite = OPPOSITE_OF.get(match["word"])
    return opposite and f"The word for the opposite of {match['word']} is {opposite}."


def _next_number(match: re.Match[str]) -> str | None:
    following = NUMBER_AFTER.get(match["number"])
    return following and f"After {match['number']} comes {following}."


def _shopping(match: re.Match[str]) -> str | None:
    return f"You need {match['item']}." if match["item"] in ITEMS else None


def _greeting(match: re.Match[str]) -> str | None:
    moments = [moment for moment in MOMENTS if re.search(rf"\b{moment}\b", match.string)]
    if len(moments) != 1 or match["friend"] not in NAMES:
        return None
    return f"I wish you a good {moments[0]}, my dear {match['friend']}."


_TASKS: tuple[tuple[re.Pattern[str], Callable[[re.Match[str]], str | None]], ...] = (
    (re.compile(r"\bcolour (?:is|of|has) (?P<thing>\w+)[.?]"), _colour),
    (re.compile(r"\bopposite of (?P<word>\w+)[.?]"), _opposite),
    (re.compile(r"\b(?:after|follows) (?P<number>\w+)[.?]"), _next_number),
    (re.compile(r"\b(?:I need|buy|Write down) (?P<item>\w+)(?:\.| for me\.)"), _shopping),
    (re.compile(r"\bfriend (?P<friend>\w+)\b"), _greeting),
)
