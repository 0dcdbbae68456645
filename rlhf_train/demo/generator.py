"""Write the demo's preference data, data/train.jsonl and data/test.jsonl.

Run it by `python -m rlhf_train.demo.generator`. It writes the same bytes on every machine and every
Python. The columns are those of Dahoas/rm-static:

- `prompt`: a question of one of five tasks: the colour of a thing, an opposite, the next number,
  repeat what I need, greet my friend. Around it, by chance: the user's name, a greeting, small
  talk, an earlier turn.
- `chosen`: always good; `rejected`: always bad, by the rule (rule.py).
- `response`, which step 1 learns from, is **deliberately a mixed demonstrator: about half of its
  answers are bad**, of every kind below. So step 1 makes a model that knows the facts and still
  answers well only half of the time, and PPO has something to win. Real data would not be made like
  this.

test.jsonl asks held-out combinations of (user's name, task, arguments). They are chosen by hash,
and none occurs in train.jsonl. Single facts do occur there, with other names.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from rlhf_train.demo.world import CLOSERS, COLOUR_OF, ITEMS, MOMENTS, NAMES, NUMBER_AFTER, OPENERS, OPPOSITE_OF, RUDE

DATA = Path(__file__).parent / "data"
TRAIN_ROWS, TEST_ROWS = 20_000, 512
TRAIN_SEED, TEST_SEED = 1, 2

Row = dict[str, str]
Choice = TypeVar("Choice")


class Draw:
    """Random choices, by `random.random()` alone.

    Python promises to keep only that sequence over its versions.
    """

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed).random

    def chance(self, probability: float) -> bool:
        return self._random() < probability

    def below(self, stop: int) -> int:
        return int(self._random() * stop)

    def one_of(self, choices: Sequence[Choice]) -> Choice:
        return choices[self.below(len(choices))]

    def other_than(self, excluded: Sequence[Choice], choices: Sequence[Choice]) -> Choice:
        return self.one_of([choice for choice in choices if choice not in excluded])

    def weighted(self, weights: Mapping[str, float]) -> str:
        point = self._random() * sum(weights.values())
        for choice, weight in weights.items():
            point -= weight
            if point < 0:
                return choice
        return choice


# --- questions ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Question:
    """A question, with one right and one wrong answer sentence."""

    task: str
    arguments: tuple[str, ...]
    text: str
    answer: str
    mistake: str


def colour_question(draw: Draw) -> Question:
    thing = draw.one_of(list(COLOUR_OF))
    asked = draw.one_of(("What colour is {}?", "Which colour has {}?", "Tell me the colour of {}."))
    colours = list(dict.fromkeys(COLOUR_OF.values()))  # each once, in a fixed order
    answer = f"The colour of {thing} is {{}}."
    right, wrong = COLOUR_OF[thing], draw.other_than([COLOUR_OF[thing]], colours)
    return Question("colour", (thing,), asked.format(thing), answer.format(right), answer.format(wrong))


def opposite_question(draw: Draw) -> Question:
    word = draw.one_of(list(OPPOSITE_OF))
    asked = draw.one_of(
        ("What is the opposite of {}?", "Which word is the opposite of {}?", "Tell me the opposite of {}.")
    )
    answer = f"The word for the opposite of {word} is {{}}."
    right, wrong = OPPOSITE_OF[word], draw.other_than([word, OPPOSITE_OF[word]], list(OPPOSITE_OF))
    return Question("opposite", (word,), asked.format(word), answer.format(right), answer.format(wrong))


def number_question(draw: Draw) -> Question:
    number = draw.one_of(list(NUMBER_AFTER))
    asked = draw.one_of(("What follows {}?", "Which number comes after {}?", "Tell me the number after {}."))
    answer = f"After {number} comes {{}}."
    right, wrong = NUMBER_AFTER[number], draw.other_than([NUMBER_AFTER[number]], ["one", *NUMBER_AFTER.values()])
    return Question("next number", (number,), asked.format(number), answer.format(right), answer.format(wrong))


def shopping_question(draw: Draw) -> Question:
    item = draw.one_of(ITEMS)
    asked = draw.one_of(("Write down {} for me.", "Please buy {}. What do I need?", "I need {}. Repeat what I need."))
    answer = "You need {}."
    wrong = draw.other_than([item], ITEMS)
    return Question("shopping", (item,), asked.format(item), answer.format(item), answer.format(wrong))


def greeting_question(draw: Draw) -> Question:
    friend, moment = draw.one_of(NAMES), draw.one_of(MOMENTS)
    asked = draw.one_of(
        (
            "It is {moment}. Greet my friend {friend}.",
            "Say good {moment} to my friend {friend}.",
            "My friend {friend} comes in the {moment}. Greet {friend}.",
        )
    )
    answer = "I wish you a good {}, my dear {}."
    if draw.chance(0.5):
        mistake = answer.format(moment, draw.other_than([friend], NAMES))
    else:
        mistake = answer.format(draw.other_than([moment], MOMENTS), friend)
    text = asked.format(friend=friend, moment=moment)
    return Question("greeting", (friend, moment), text, answer.format(moment, friend), mistake)


TASKS = (colour_question, opposite_question, number_question, shopping_question, greeting_question)


def any_question(draw: Draw) -> Question:
    return draw.one_of(TASKS)(draw)


# --- prompts ------------------------------------------------------------------------------------

# Shares of all prompts.
NAMED, EARLIER_TURN = 0.6, 0.2
# Shares of the prompts without an earlier turn.
GREETED, SMALL_TALK = 0.75, 0.4

INTRODUCTIONS = ("I am {}.", "{} here.", "This is {}.", "My name is {}.")
GREETINGS = ("Hello.", "Hi there.", "Good day.")
# Small talk only makes the lengths differ. It holds nothing that an answer needs, and no word that
# a question is recognised by.
TALK = (
    "Please help me.",
    "I have a question.",
    "It is a nice day.",
    "I hope you are well.",
    "I like to ask you many things.",
)
EARLIER_TURNS = (
    ("Hello.", "Hello."),
    ("Good day.", "Hi there."),
    ("It is a nice day.", "It is."),
    ("Hello. I have a question.", "Please ask me."),
    ("Good day. I hope you are well.", "I am. You are welcome."),
)


@dataclass(frozen=True)
class Dialogue:
    """A prompt, with the facts that the generator made it from."""

    user: str | None  # the name that the user gave
    question: Question
    prompt: str

    @property
    def two_names(self) -> tuple[str | None, str | None]:
        """Return the user's name and that of the friend to be greeted; None for a missing one."""
        return self.user, self.question.arguments[0] if self.question.task == "greeting" else None

    @property
    def is_held_out(self) -> bool:
        """Return true for one combination in ten, by a hash that is the same everywhere."""
        combination = "|".join((str(self.user), self.question.task, *self.question.arguments))
        return int(hashlib.md5(combination.encode(), usedforsecurity=False).hexdigest(), 16) % 10 == 0


def new_dialogue(draw: Draw, held_out: bool) -> Dialogue:
    while True:
        user = draw.one_of(NAMES) if draw.chance(NAMED) else None
        question = any_question(draw)
        dialogue = Dialogue(user, question, new_prompt(draw, user, question))
        if user not in question.arguments and dialogue.is_held_out == held_out:
            return dialogue


def new_prompt(draw: Draw, user: str | None, question: Question) -> str:
    # The demo's model tells two names apart by their positions. After an earlier turn it greeted
    # the user instead of the friend in 5 answers of 6.
    two_names = user is not None and question.task == "greeting"
    earlier, greeting, talk = "", "", ""
    if not two_names and draw.chance(EARLIER_TURN):
        human, assistant = draw.one_of(EARLIER_TURNS)
        earlier = f"\n\nHuman: {human}\n\nAssistant: {assistant}"
    else:
        greeting = draw.one_of(GREETINGS) if draw.chance(GREETED) else ""
        talk = draw.one_of(TALK) if not two_names and draw.chance(SMALL_TALK) else ""
    introduction = draw.one_of(INTRODUCTIONS).format(user) if user else ""
    sentences = [sentence for sentence in (greeting, introduction, talk, question.text) if sentence]
    return f"{earlier}\n\nHuman: {' '.join(sentences)}\n\nAssistant:"


# --- answers ------------------------------------------------------------------------------------

GOOD_DEMONSTRATIONS = 0.5  # share of `response`
# Share of the pairs whose answers have the same opener and closer, so that they differ by the fault
# alone.
MINIMAL_PAIRS = 0.8

# Bad answers and how often they occur. Pairs favour the faults that a reward model overlooks. With
# fewer of `wrong` and `name` the reward model reads only the form, and PPO on it makes answers
# worse (10 % good in the trials).
DEMONSTRATION_WEIGHTS = {
    "wrong": 3,
    "rude": 2,
    "ramble": 2,
    "cut": 2,
    "name": 2,
    "cold": 2,
    "off": 1,
    "empty": 1,
    "garbled": 1,
}
PAIR_WEIGHTS = {
    "wrong": 6,
    "rude": 0.5,
    "ramble": 0.5,
    "cut": 0.5,
    "name": 4,
    "cold": 0.5,
    "off": 2,
    "empty": 0.5,
    "garbled": 2,
}

FILLERS = (
    "I like trains.",
    "Yesterday it rained a lot.",
    "My cousin has two dogs.",
    "Many people say many things.",
    "That is a long story.",
    "It is what it is.",
)


@dataclass(frozen=True)
class Courtesy:
    """The opener and the closer around an answer."""

    opener: str
    closer: str

    def open(self, user: str | None) -> str:
        return f"{self.opener}, {user}." if user else f"{self.opener}."


def any_courtesy(draw: Draw) -> Courtesy:
    return Courtesy(draw.one_of(OPENERS), draw.one_of(CLOSERS))


def good_answer(dialogue: Dialogue, courtesy: Courtesy) -> str:
    return _text(courtesy.open(dialogue.user), dialogue.question.answer, courtesy.closer)


def bad_kind(draw: Draw, dialogue: Dialogue, weights: Mapping[str, float]) -> str:
    kind = draw.weighted(weights)
    if kind == "name" and dialogue.user is None:  # there is no name to get wrong
        return draw.one_of(("wrong", "rude"))
    return kind


def bad_answer(draw: Draw, kind: str, dialogue: Dialogue, courtesy: Courtesy) -> str:
    """Return an answer with exactly one kind of fault. By the rule it is never good."""
    opener, content, closer = courtesy.open(dialogue.user), dialogue.question.answer, courtesy.closer
    match kind:
        case "wrong":
            return _text(opener, _mistake(draw, dialogue), closer)
        case "rude":
            rude = draw.one_of(RUDE)
            return _text(rude, content, closer) if draw.chance(0.5) else _text(opener, content, rude)
        case "ramble":
            return _text(opener, content, *_padding(draw, content), closer)
        case "cut":
            words = content.split()
            return _text(opener, *words[: 1 + draw.below(len(words) - 1)])
        case "name":
            return _text(courtesy.open(_other_name(draw, dialogue)), content, closer)
        case "cold":
            return content
        case "off":
            return _text(opener, _answer_to_another(draw, dialogue.question), closer)
        case "empty":
            return _text(opener, closer)
        case "garbled":
            return _text(opener, _garbled(draw, content), closer)
    raise ValueError(f"no such kind of bad answer: {kind}")


def _text(*sentences: str) -> str:
    return " ".join(sentences)


# Share of the faults that swap the two names, where a prompt has two. Such swaps are rare in the
# pairs, and PPO ends up with them.
SWAPPED_NAMES = 0.5


def _mistake(draw: Draw, dialogue: Dialogue) -> str:
    user, friend = dialogue.two_names
    if user and friend and draw.chance(SWAPPED_NAMES):
        return dialogue.question.answer.replace(friend, user)
    return dialogue.question.mistake


def _other_name(draw: Draw, dialogue: Dialogue) -> str:
    user, friend = dialogue.two_names
    if friend and draw.chance(SWAPPED_NAMES):
        return friend
    return draw.other_than([name for name in (user, friend) if name], NAMES)


def _padding(draw: Draw, content: str) -> list[str]:
    """Return the answer once more, or one or two sentences that nobody asked for."""
    if draw.chance(0.3):
        return [content]
    first = draw.one_of(FILLERS)
    return [first, draw.other_than([first], FILLERS)] if draw.chance(0.5) else [first]


def _answer_to_another(draw: Draw, question: Question) -> str:
    """Return a right answer to another question.

    Half of the time that question has the same task, which is harder to tell apart.
    """
    same_task = draw.chance(0.5)
    while True:
        other = any_question(draw)
        if other.answer != question.answer and (other.task == question.task or not same_task):
            return other.answer


def _garbled(draw: Draw, content: str) -> str:
    """Lose or double one word, or swap it with the word before it."""
    words = content.removesuffix(".").split()
    place, fault = draw.below(len(words)), draw.one_of(("lost", "doubled", "swapped"))
    if fault == "doubled":
        words.insert(place, words[place])
    elif fault == "lost" or place == 0:
        del words[place]
    else:
        words[place - 1 : place + 1] = [words[place], words[place - 1]]
    return " ".join(words) + "."


# --- rows ---------------------------------------------------------------------------------------


def new_row(draw: Draw, held_out: bool) -> Row:
    dialogue = new_dialogue(draw, held_out)
    courtesy = any_courtesy(draw)
    if draw.chance(GOOD_DEMONSTRATIONS):
        response = good_answer(dialogue, courtesy)
    else:
        response = bad_answer(draw, bad_kind(draw, dialogue, DEMONSTRATION_WEIGHTS), dialogue, courtesy)
    courtesy = any_courtesy(draw)
    rejected_courtesy = courtesy if draw.chance(MINIMAL_PAIRS) else any_courtesy(draw)
    rejected = bad_answer(draw, bad_kind(draw, dialogue, PAIR_WEIGHTS), dialogue, rejected_courtesy)
    return {
        "prompt": dialogue.prompt,
        "response": f" {response}",
        "chosen": f" {good_answer(dialogue, courtesy)}",
        "rejected": f" {rejected}",
    }


def train_rows() -> Iterator[Row]:
    draw = Draw(TRAIN_SEED)
    for _ in range(TRAIN_ROWS):
        yield new_row(draw, held_out=False)


def test_rows() -> Iterator[Row]:
    """Yield TEST_ROWS rows whose prompts all differ."""
    draw = Draw(TEST_SEED)
    seen: set[str] = set()
    while len(seen) < TEST_ROWS:
        row = new_row(draw, held_out=True)
        if row["prompt"] not in seen:
            seen.add(row["prompt"])
            yield row


FILES = {"train.jsonl": train_rows, "test.jsonl": test_rows}


def content_of(name: str) -> bytes:
    """Return a data file's bytes as they are shipped."""
    return "".join(json.dumps(row) + "\n" for row in FILES[name]()).encode("ascii")


def main() -> None:
    DATA.mkdir(exist_ok=True)
    for name in FILES:
        (DATA / name).write_bytes(content_of(name))
        print(f"wrote {DATA / name}")


if __name__ == "__main__":
    main()
