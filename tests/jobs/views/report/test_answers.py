from typing import Any

from jobs.events import RawEvent
from jobs.views.report.answers import MOST_SHOWN, chosen
from tests.raw_events import event


def sample(prompt: str, when: str, reward: float | str, **fields: Any) -> RawEvent:
    return event("sample", 3, prompt=prompt, when=when, reward=reward, response=f"{when} of {prompt}", **fields)


def test_the_best_the_worst_and_a_random_one_by_their_newest_answer() -> None:
    samples = [
        *(sample(prompt, "before", 0.0) for prompt in "abcd"),
        sample("a", "during", 9.0, update=4),
        *(sample(prompt, "after", reward) for prompt, reward in zip("abcd", (0.5, 2.0, -1.0, "nan"), strict=True)),
        sample("a", "during", 8.0, update=2),
    ]
    found = chosen(samples)
    assert [(each.mark, each.prompt) for each in found] == [("best", "b"), ("worst", "c"), ("random", "a"), ("", "d")]
    assert [each.get("update") or each["when"] for each in found[2].answers] == ["before", 2, 4, "after"]


def test_an_answer_that_was_written_twice_is_shown_once() -> None:
    (only,) = chosen([sample("a", "before", 1.0), sample("a", "before", 2.0)])
    assert only.score == 2.0 and only.mark == "best"


def test_a_page_shows_no_more_than_so_many() -> None:
    assert len(chosen([sample(str(number), "after", float(number)) for number in range(100)])) == MOST_SHOWN
    assert chosen([]) == []


def test_a_few_answers_from_during_training_stay_evenly_spread() -> None:
    during = [sample("a", "during", 1.0, update=update) for update in range(10, 110, 10)]
    (only,) = chosen([sample("a", "before", 0.0), *during, sample("a", "after", 2.0)])
    assert [each.get("update") or each["when"] for each in only.answers] == ["before", 10, 40, 70, 100, "after"]
    assert (only.left_out, only.score) == (6, 2.0)
    (only,) = chosen(during[:5])  # the newest one gives the score
    assert [each["update"] for each in only.answers] == [10, 20, 40, 50] and only.left_out == 1
    (only,) = chosen(during[:4])
    assert len(only.answers) == 4 and only.left_out == 0
