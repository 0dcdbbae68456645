from __future__ import annotations

import json
import re
from collections import Counter

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from rlhf_train.demo import generator
from rlhf_train.demo.generator import DATA, DEMONSTRATION_WEIGHTS, PAIR_WEIGHTS, Draw, Row
from rlhf_train.demo.rule import judge

# The verdicts that each kind of bad answer may get: its fault and no other.
VERDICTS = {
    "wrong": {"wrong"},
    "rude": {"rude"},
    "ramble": {"ramble"},
    "cut": {"cut"},
    "name": {"opener"},
    "cold": {"bare"},
    "off": {"wrong"},
    "empty": {"bare"},
    "garbled": {"wrong"},
}


def read(name: str) -> list[Row]:
    return [json.loads(line) for line in (DATA / name).read_text(encoding="utf-8").splitlines()]


TRAIN, TEST = read("train.jsonl"), read("test.jsonl")
BOTH = pytest.mark.parametrize("rows", [TRAIN, TEST], ids=["train", "test"])


def tokens(text: str) -> int:
    """Count tokens as the demo's BPE does: words, punctuation and line feeds (tested below)."""
    return len(re.findall(r"\w+|[^\w\s]|\n", text))


def combination(row: Row) -> tuple[str, str]:
    """(user's name, right sentence): the right sentence tells the task and its arguments."""
    opener, content, _ = row["chosen"].split(". ")
    return opener.partition(", ")[2], content


@pytest.mark.parametrize("name", ["train.jsonl", "test.jsonl"])
def test_the_shipped_bytes_are_what_the_generator_makes(name: str) -> None:
    assert generator.content_of(name) == (DATA / name).read_bytes()


@BOTH
def test_columns(rows: list[Row]) -> None:
    for row in rows:
        assert list(row) == ["prompt", "response", "chosen", "rejected"]
        assert row["prompt"].startswith("\n\nHuman: ")
        assert row["prompt"].endswith("\n\nAssistant:")
        assert all(re.match(r" \S", row[column]) for column in ("response", "chosen", "rejected"))


def test_sizes() -> None:
    assert len(TRAIN) == 20_000
    assert len(TEST) == len({row["prompt"] for row in TEST}) == 512
    assert len({row["prompt"] for row in TRAIN}) > 14_000
    assert (DATA / "train.jsonl").stat().st_size < 7_000_000


@BOTH
def test_chosen_is_good_and_rejected_is_bad(rows: list[Row]) -> None:
    assert {judge(row["prompt"], row["chosen"], True) for row in rows} == {"good"}
    assert {judge(row["prompt"], row["rejected"], True) for row in rows} == set().union(*VERDICTS.values())


@BOTH
def test_half_of_the_demonstrations_are_good(rows: list[Row]) -> None:
    verdicts = Counter(judge(row["prompt"], row["response"], True) for row in rows)
    assert 0.46 < verdicts["good"] / len(rows) < 0.54
    assert set(verdicts) == {"good"}.union(*VERDICTS.values())


def test_held_out_combinations_do_not_occur_in_train() -> None:
    train, test = {combination(row) for row in TRAIN}, {combination(row) for row in TEST}
    assert not train & test
    assert len(test) > 50
    assert {content for _, content in test} <= {content for _, content in train}  # each fact is known, with other names


def test_most_pairs_differ_in_the_fault_only() -> None:
    kept = [row for row in TRAIN if judge(row["prompt"], row["rejected"], True) == "wrong"]
    same = [row for row in kept if row["chosen"].split(". ")[0::2] == row["rejected"].split(". ")[0::2]]
    assert 0.78 < len(same) / len(kept) < 0.84  # 80 %, and one in 25 of the others by chance


def test_a_bpe_of_512_entries_holds_every_word_as_one_token() -> None:
    texts = [text for row in TRAIN for text in row.values()]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=512, show_progress=False))
    assert bpe.get_vocab_size() < 512 - 4  # it stopped early, with room for the special tokens
    for row in TRAIN[:1000] + TEST:
        for text in row.values():
            assert len(bpe.encode(text).ids) == tokens(text)


def test_pairs_show_the_faults_that_ppo_finds() -> None:
    """Pairs swap the two names, and answer the right task with a true sentence on another thing."""
    greeting = re.compile(r"(?:, (\w+))?\. I wish you a good \w+, my dear (\w+)\. ")
    greetings = [(greeting.search(row["chosen"]), greeting.search(row["rejected"])) for row in TRAIN]
    swapped = [
        bad[1] == bad[2]
        for good, bad in greetings
        if good and good[1] and bad and bad[1] and good.groups() != bad.groups()
    ]
    assert sum(swapped) > 0.25 * len(swapped) > 100
    number = re.compile(r"After (\w+) comes (\w+)\. ")
    numbers = [(number.search(row["chosen"]), number.search(row["rejected"])) for row in TRAIN]
    others = [bad[1] != good[1] for good, bad in numbers if good and bad and good.groups() != bad.groups()]
    assert sum(others) > 0.08 * len(others) > 50


def test_prompts_and_answers_have_many_lengths() -> None:
    prompts, answers = [tokens(row["prompt"]) for row in TRAIN], [tokens(row["chosen"]) for row in TRAIN]
    assert (min(prompts), max(prompts)) == (12, 46)
    assert set(range(12, 43)) <= set(prompts)
    assert set(answers) == set(range(10, 22))
    assert max(Counter(prompts).values()) < 0.1 * len(TRAIN)
    assert max(Counter(answers).values()) < 0.2 * len(TRAIN)
    assert max(tokens(row[column]) for row in TRAIN + TEST for column in ("response", "rejected")) <= 34


@BOTH
def test_length_does_not_tell_good_from_bad(rows: list[Row]) -> None:
    longer = [
        (tokens(row["chosen"]) > tokens(row["rejected"])) - (tokens(row["chosen"]) < tokens(row["rejected"]))
        for row in rows
    ]
    assert longer.count(0) / len(rows) > 0.4
    assert max(longer.count(1), longer.count(-1)) / len(rows) < 0.35


@pytest.mark.parametrize("kind", VERDICTS)
def test_each_kind_of_bad_answer_has_its_fault_and_no_other(kind: str) -> None:
    draw = Draw(seed=3)
    assert list(VERDICTS) == list(DEMONSTRATION_WEIGHTS) == list(PAIR_WEIGHTS)
    for _ in range(2000):
        dialogue = generator.new_dialogue(draw, held_out=draw.chance(0.5))
        if kind != "name" or dialogue.user:
            answer = generator.bad_answer(draw, kind, dialogue, generator.any_courtesy(draw))
            assert judge(dialogue.prompt, answer, True) in VERDICTS[kind], (dialogue.prompt, answer)


def test_without_a_name_there_is_no_wrong_name() -> None:
    draw = Draw(seed=4)
    unnamed = [
        dialogue
        for dialogue in (generator.new_dialogue(draw, held_out=False) for _ in range(1000))
        if dialogue.user is None
    ]
    kinds = Counter(generator.bad_kind(draw, dialogue, PAIR_WEIGHTS) for dialogue in unnamed)
    assert kinds.keys() == VERDICTS.keys() - {"name"}


def test_earlier_turns_and_small_talk_occur() -> None:
    turns = Counter(row["prompt"].count("\n\nHuman: ") for row in TRAIN)
    assert turns.keys() == {1, 2}
    assert 0.15 < turns[2] / len(TRAIN) < 0.25
