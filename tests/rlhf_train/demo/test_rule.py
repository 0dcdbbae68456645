"""Verdicts by hand: no text here comes from the generator."""

from __future__ import annotations

import random

import pytest

from rlhf_train.demo.rule import is_good, judge

COLOUR = "\n\nHuman: What colour is snow?\n\nAssistant:"
OPPOSITE = "\n\nHuman: Hi there. I am Ben. Which word is the opposite of hot?\n\nAssistant:"
NUMBER = "\n\nHuman: This is Maria. I have a question. What follows ten?\n\nAssistant:"
SHOPPING = "\n\nHuman: I need rice. Repeat what I need.\n\nAssistant:"
GREETING = "\n\nHuman: Leo here. My friend Anna comes in the evening. Greet Anna.\n\nAssistant:"
AFTER_A_TURN = (
    "\n\nHuman: I am Emma. What colour is coal?\n\nAssistant: Sure, Emma. Black."
    "\n\nHuman: Tell me the colour of leaf.\n\nAssistant:"
)

ALL_PHRASINGS = [
    ("What colour is banana?", "The colour of banana is yellow."),
    ("Which colour has tomato?", "The colour of tomato is red."),
    ("Tell me the colour of night.", "The colour of night is black."),
    ("What is the opposite of wet?", "The word for the opposite of wet is dry."),
    ("Which word is the opposite of small?", "The word for the opposite of small is big."),
    ("Tell me the opposite of dark.", "The word for the opposite of dark is light."),
    ("What follows one?", "After one comes two."),
    ("Which number comes after nine?", "After nine comes ten."),
    ("Tell me the number after four.", "After four comes five."),
    ("Write down honey for me.", "You need honey."),
    ("Please buy eggs. What do I need?", "You need eggs."),
    ("I need tea. Repeat what I need.", "You need tea."),
    ("It is morning. Greet my friend Clara.", "I wish you a good morning, my dear Clara."),
    ("Say good afternoon to my friend David.", "I wish you a good afternoon, my dear David."),
    ("My friend Grace comes in the evening. Greet Grace.", "I wish you a good evening, my dear Grace."),
]

CASES = [
    # good, one of each task
    (COLOUR, "Sure. The colour of snow is white. You are welcome.", "good"),
    (OPPOSITE, "Of course, Ben. The word for the opposite of hot is cold. Have a nice day.", "good"),
    (NUMBER, "Certainly, Maria. After ten comes eleven. Please ask me again.", "good"),
    (SHOPPING, "With pleasure. You need rice. All the best.", "good"),
    (GREETING, "Gladly, Leo. I wish you a good evening, my dear Anna. I hope this helps.", "good"),
    (AFTER_A_TURN, "Sure. The colour of leaf is green. You are welcome.", "good"),
    # wrong: not the fact, or not what stands in the prompt
    (COLOUR, "Sure. The colour of snow is black. You are welcome.", "wrong"),
    (OPPOSITE, "Sure, Ben. The word for the opposite of hot is dry. You are welcome.", "wrong"),
    (NUMBER, "Sure, Maria. After ten comes nine. You are welcome.", "wrong"),
    (SHOPPING, "Sure. You need tea. You are welcome.", "wrong"),
    (GREETING, "Sure, Leo. I wish you a good morning, my dear Anna. You are welcome.", "wrong"),
    (GREETING, "Sure, Leo. I wish you a good evening, my dear Leo. You are welcome.", "wrong"),
    # off: a right answer to another question
    (COLOUR, "Sure. The colour of coal is black. You are welcome.", "wrong"),
    (AFTER_A_TURN, "Sure. The colour of coal is black. You are welcome.", "wrong"),
    (COLOUR, "Sure. You need rice. You are welcome.", "wrong"),
    # garbled: a word lost, doubled, swapped
    (COLOUR, "Sure. The colour snow is white. You are welcome.", "wrong"),
    (NUMBER, "Sure, Maria. After ten comes comes eleven. You are welcome.", "wrong"),
    (SHOPPING, "Sure. Need you rice. You are welcome.", "wrong"),
    # rude
    (COLOUR, "What a silly question. The colour of snow is white. You are welcome.", "rude"),
    (COLOUR, "Sure. The colour of snow is white. Leave me alone.", "rude"),
    # ramble
    (COLOUR, "Sure. The colour of snow is white. The colour of snow is white. You are welcome.", "ramble"),
    (SHOPPING, "With pleasure. You need rice. My cousin has two dogs. All the best.", "ramble"),
    # cut
    (COLOUR, "Sure. The colour of", "cut"),
    (COLOUR, "Sure. The colour of snow is white. You are welcome", "cut"),
    (COLOUR, "", "cut"),
    # cold (no courtesy) and empty (no answer)
    (COLOUR, "The colour of snow is white.", "bare"),
    (GREETING, "I wish you a good evening, my dear Anna.", "bare"),
    (SHOPPING, "With pleasure. All the best.", "bare"),
    # name
    (OPPOSITE, "Of course, Leo. The word for the opposite of hot is cold. You are welcome.", "opener"),
    (OPPOSITE, "Of course. The word for the opposite of hot is cold. You are welcome.", "opener"),
    (COLOUR, "Sure, Anna. The colour of snow is white. You are welcome.", "opener"),
    (GREETING, "Gladly, Anna. I wish you a good evening, my dear Anna. You are welcome.", "opener"),
    (AFTER_A_TURN, "Sure, Emma. The colour of leaf is green. You are welcome.", "opener"),
    # other forms that a model may find
    (COLOUR, "sure. The colour of snow is white. You are welcome.", "opener"),
    (COLOUR, "You are welcome. The colour of snow is white. Sure.", "opener"),
    (COLOUR, "Sure.  The colour of snow is white. You are welcome.", "wrong"),
    (COLOUR, "Sure. The colour of snow is white. Sure.", "closer"),
    (COLOUR, "Sure. The colour of snow is white. You are welcome. ", "cut"),
    (COLOUR, "Sure. The colour of snow is white.\n\nHuman: What colour is coal. You are welcome.", "wrong"),
    # no question of this world
    (
        "\n\nHuman: What colour is Monday?\n\nAssistant:",
        "Sure. The colour of Monday is blue. You are welcome.",
        "unclear",
    ),
    ("\n\nHuman: I have a question.\n\nAssistant:", "Sure. You need rice. You are welcome.", "unclear"),
    ("\n\nHuman: Write down sand for me.\n\nAssistant:", "Sure. You need sand. You are welcome.", "unclear"),
    (
        "\n\nHuman: Greet my friend Anna.\n\nAssistant:",
        "Sure. I wish you a good morning, my dear Anna. You are welcome.",
        "unclear",
    ),
    (
        "\n\nHuman: It is morning. Greet my friend Zoe.\n\nAssistant:",
        "Sure. I wish you a good morning, my dear Zoe. You are welcome.",
        "unclear",
    ),
    (
        "\n\nHuman: Hello.\n\nAssistant: What colour is snow?",
        "Sure. The colour of snow is white. You are welcome.",
        "unclear",
    ),
    ("", "Sure. You need rice. You are welcome.", "unclear"),
]


@pytest.mark.parametrize(("prompt", "answer", "verdict"), CASES)
def test_verdict(prompt: str, answer: str, verdict: str) -> None:
    assert judge(prompt, answer, True) == verdict
    assert is_good(prompt, answer, True) is (verdict == "good")


@pytest.mark.parametrize(("question", "answer"), ALL_PHRASINGS)
def test_every_phrasing_has_its_answer(question: str, answer: str) -> None:
    verdicts = [
        judge(f"\n\nHuman: {question}\n\nAssistant:", f" Sure. {offered} You are welcome.", True)
        for _, offered in ALL_PHRASINGS
    ]
    assert verdicts == ["good" if offered == answer else "wrong" for _, offered in ALL_PHRASINGS]


@pytest.mark.parametrize("introduction", ["I am Henry.", "Henry here.", "This is Henry.", "My name is Henry."])
def test_every_introduction_gives_a_name(introduction: str) -> None:
    prompt = f"\n\nHuman: Good day. {introduction} I have a question. What colour is snow?\n\nAssistant:"
    assert judge(prompt, "Sure, Henry. The colour of snow is white. You are welcome.", True) == "good"
    assert judge(prompt, "Sure. The colour of snow is white. You are welcome.", True) == "opener"


@pytest.mark.parametrize("before", ["", "</s>", "<pad><pad></s>", "<pad> </s> "])
@pytest.mark.parametrize("after", ["", "</s>", " "])
@pytest.mark.parametrize("space", ["", " "])
def test_special_tokens_around_the_prompt_and_a_leading_space_do_not_matter(
    before: str, after: str, space: str
) -> None:
    answer = "Of course, Ben. The word for the opposite of hot is cold. Have a nice day."
    for prompt in (OPPOSITE, OPPOSITE.strip()):
        assert judge(f"{before}{prompt}{after}", space + answer, True) == "good"


def test_a_good_text_that_does_not_end_is_not_good() -> None:
    assert judge(COLOUR, "Sure. The colour of snow is white. You are welcome.", False) == "unended"
    assert not is_good(COLOUR, "Sure. The colour of snow is white. You are welcome.", False)


def test_takes_any_text() -> None:
    pieces = ["\n\nHuman:", "\n\nAssistant:", " Sure.", "Sure,", " Anna.", " You are welcome.", "</s>"]
    pieces += ["", ".", ". ", "?", "\\", "(", "[a-", "\x00", "\udcff", "é", "😀", "\n"]
    pieces += [" friend", " Anna", " evening", " morning", " opposite of", " hot", " colour is", " snow"]
    pieces += [" I need", " tea.", " after", " ten?", " eleven?", " sixteen."]
    draw = random.Random(0)
    for _ in range(20_000):
        prompt, answer = ("".join(draw.choice(pieces) for _ in range(draw.randrange(9))) for _ in range(2))
        assert judge(prompt, answer, True) != "good"
        assert judge(prompt, "Sure. It is what it is. You are welcome.", True) in ("opener", "unclear", "wrong")
