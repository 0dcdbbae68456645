import pytest

from jobs.events import RawEvent
from jobs.views.report.alarms import checks_of, ends_of_curve, repeated_share
from jobs.views.report.history import RunHistory
from tests.raw_events import event


def results(*events: RawEvent) -> dict[str, str]:
    history = RunHistory("a")
    for each in events:
        history.feed(each)
    return {check.name: check.result for check in checks_of(history)}


def rollouts(name: str, *values: object) -> list[RawEvent]:
    return [event("metrics", 3, update=place, updates=9, **{name: value}) for place, value in enumerate(values, 1)]


def test_nothing_is_known_of_a_run_that_has_not_begun() -> None:
    assert set(results().values()) == {"not known"}


@pytest.mark.parametrize(
    ("events", "name", "result"),
    [
        (rollouts("response_length", 10.0, 12.0, 19.9), "response length", "fine"),
        (rollouts("response_length", 10.0, 12.0, 20.0), "response length", "alarm"),
        (rollouts("response_length", 10.0, 12.0, 5.0), "response length", "alarm"),
        (rollouts("eos_share", 1.0, 0.5), "eos share", "fine"),
        (rollouts("eos_share", 1.0, 0.49), "eos share", "alarm"),
        (rollouts("kl_k3", 0.0, 25.0), "kl k3", "fine"),
        (rollouts("kl_k3", 0.0, 25.5), "kl k3", "alarm"),
        (rollouts("policy_loss", 0.5, 0.25), "numbers", "fine"),
        (rollouts("policy_loss", 0.5, "nan"), "numbers", "alarm"),
        ([event("end", 2, reward_accuracy=0.55, held_out_rows=100)], "accuracy against chance", "alarm"),
        ([event("end", 2, reward_accuracy=0.62, held_out_rows=100)], "accuracy against chance", "fine"),
    ],
)
def test_thresholds(events: list[RawEvent], name: str, result: str) -> None:
    assert results(*events)[name] == result


def test_the_mean_of_the_last_tenth_is_said_to_be_that() -> None:
    """Of 20 values the last two: (0.2 + 0.4) / 2, and (30 + 40) / 2."""
    history = RunHistory("a")
    for each in rollouts("eos_share", *[1.0] * 18, 0.2, 0.4) + rollouts("kl_k3", *[1.0] * 18, 30.0, 40.0):
        history.feed(each)
    seen = {check.name: check.seen for check in checks_of(history)}
    assert (seen["eos share"], seen["kl k3"]) == ("30.0% over the last tenth", "35.00 nats over the last tenth")


@pytest.mark.parametrize(
    ("good_after", "result"), [(0.2, "alarm"), (0.45, "fine"), (0.7, "fine"), ("nan", "not known")]
)
def test_a_reward_that_rises_while_good_answers_get_fewer(good_after: object, result: str) -> None:
    # 50 to 45 of 100 is within the error: Newcombe's interval is about ±14 points.
    end = event("end", 3, mean_reward_before=0.0, mean_reward_after=1.0, good_share_before=0.5,
                good_share_after=good_after, held_out_rows=100)  # fmt: skip
    assert results(end)["mean reward against good answers"] == result


@pytest.mark.parametrize(
    ("judge_after", "result"), [(0.7, "alarm"), (0.9, "fine"), (1.4, "fine"), ("nan", "not known")]
)
def test_a_reward_that_rises_while_the_judge_s_score_falls(judge_after: object, result: str) -> None:
    # A change of the same prompts has an error of 0.1: 1.0 to 0.9 is within 1.96 of them.
    end = event("end", 3, mean_reward_before=0.0, mean_reward_after=1.0, judge_score_before=1.0,
                judge_score_after=judge_after, judge_score_error_before=0.5, judge_score_error_after=0.5,
                judge_score_change_error=0.1)  # fmt: skip
    assert results(end)["mean reward against judge score"] == result


@pytest.mark.parametrize(
    ("rewards", "scores", "result"),
    [
        (range(20), [2.0 - 0.1 * place for place in range(20)], "alarm"),
        (range(20), [2.0 + 0.1 * place for place in range(20)], "fine"),
        (range(20, 0, -1), [2.0 - 0.1 * place for place in range(20)], "fine"),
        (range(20), [2.0, 1.0] * 10, "fine"),  # it scatters: no fall
        (range(9), [2.0 - place for place in range(9)], "fine"),  # too few to tell
        (range(20), [], "not known"),
    ],
)
def test_the_judge_is_watched_while_the_step_trains(rewards: range, scores: list[float], result: str) -> None:
    """The metrics of a run that has not ended."""
    judged: list[dict[str, float]] = [{"judge_score": score} for score in scores] or [{}] * len(rewards)
    lines = [
        event("metrics", 3, update=place, updates=99, mean_reward=float(reward), **judge)
        for place, (reward, judge) in enumerate(zip(rewards, judged, strict=True), 1)
    ]
    assert results(*lines)["mean reward against judge score"] == result


def test_repetition() -> None:
    # Six groups of four words: abab baba abab baba abab baba, of which two are distinct.
    assert repeated_share("a b a b a b a b a") == pytest.approx(4 / 6)
    assert repeated_share("one two three four five six") == 0 and repeated_share("no no") == 0
    loops, plain = (event("sample", 3, when="after", response=text) for text in ("a b " * 9, "all is well here today"))
    assert results(loops, plain, plain, plain)["repetition"] == "alarm"
    assert results(loops, plain, plain, plain, plain)["repetition"] == "fine"
    assert results(event("sample", 3, when="before", response="a b " * 9))["repetition"] == "not known"


def test_the_first_and_the_last_tenth_of_the_finite_values() -> None:
    assert ends_of_curve([*range(19), float("nan"), 99]) == (0.5, 58.5)  # 20 finite: (0 + 1) / 2, (18 + 99) / 2
