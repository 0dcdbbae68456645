from typing import Any

import pytest

from jobs.views.report.history import RunHistory
from jobs.views.report.verdict import verdict_of_run, verdict_of_step
from tests.raw_events import event


def run(*ends: dict[str, Any]) -> RunHistory:
    history = RunHistory("a")
    for number, numbers in enumerate(ends, start=4 - len(ends)):
        history.feed(event("end", number, **numbers))
    return history


def rewards(before: float, after: float, error: float | None = 0.05) -> dict[str, Any]:
    errors = {} if error is None else {"mean_reward_error_before": error, "mean_reward_error_after": error}
    return {"held_out_rows": 100, "mean_reward_before": before, "mean_reward_after": after, **errors}


def shares(before: float, after: float, rows: int = 100) -> dict[str, Any]:
    return {"held_out_rows": rows, "good_share_before": before, "good_share_after": after}


# By hand: 1.96 √(0.05² + 0.05²) = 0.139.
@pytest.mark.parametrize(
    ("after", "tone", "sentence"),
    [
        (0.3, "good", "It worked: the mean reward on 100 held-out prompts rose from 0.10 to 0.30 "
                      "(+0.20, 95 % interval +0.06 to +0.34)."),
        (0.2, "unsure", "It cannot be told from 100 rows whether it worked: the mean reward on 100 held-out prompts "
                        "rose from 0.10 to 0.20 (+0.10, 95 % interval -0.04 to +0.24, which includes no change)."),
        (-0.2, "bad", "It did not work: the mean reward on 100 held-out prompts fell from 0.10 to -0.20 "
                      "(-0.30, 95 % interval -0.44 to -0.16)."),
    ],
)  # fmt: skip
def test_the_reward_decides_with_its_error(after: float, tone: str, sentence: str) -> None:
    verdict = verdict_of_run(run(rewards(0.1, after)), "done")
    assert (verdict.tone, verdict.sentence) == (tone, sentence)


# By hand: 1.96 √(1.5² + 0.5²) = 3.10; of 10 times these errors, 31.0.
@pytest.mark.parametrize(
    ("errors", "after", "tone", "sentence"),
    [
        ((1.5, 0.5), 8.41, "good", "It worked: the perplexity on 64 held-out answers fell from 31.20 to 8.41 "
                                   "(-22.79, 95 % interval -25.89 to -19.69)."),
        ((15.0, 5.0), 8.41, "unsure", "It cannot be told from 64 rows whether it worked: the perplexity on 64 "
                                      "held-out answers fell from 31.20 to 8.41 (-22.79, 95 % interval -53.78 to "
                                      "+8.20, which includes no change)."),
        ((1.5, 0.5), 41.2, "bad", "It did not work: the perplexity on 64 held-out answers rose from 31.20 to 41.20 "
                                  "(+10.00, 95 % interval +6.90 to +13.10)."),
    ],
)  # fmt: skip
def test_the_perplexity_decides_with_its_error(
    errors: tuple[float, float], after: float, tone: str, sentence: str
) -> None:
    numbers = {"held_out_rows": 64, "perplexity_before": 31.2, "perplexity_after": after}
    verdict = verdict_of_run(
        run(numbers | {"perplexity_error_before": errors[0], "perplexity_error_after": errors[1]}), "done"
    )
    assert (verdict.tone, verdict.sentence) == (tone, sentence)


def test_the_change_of_the_same_rows_has_an_error_of_its_own() -> None:
    """Two samples with these errors would say nothing: 1.96 √(15² + 5²) = 31; 1.96 · 1 = 1.96."""
    numbers = {"held_out_rows": 64, "perplexity_before": 31.2, "perplexity_after": 28.2}
    errors = {"perplexity_error_before": 15.0, "perplexity_error_after": 5.0, "perplexity_change_error": 1.0}
    assert verdict_of_run(run(numbers | errors), "done").sentence == (
        "It worked: the perplexity on 64 held-out answers fell from 31.20 to 28.20 "
        "(-3.00, 95 % interval -4.96 to -1.04)."
    )


# By hand: of 100, φ = (1000 - 50) / 2000 = 0.475 and (234 - 34 - 50) / 872 = 0.172. Wilson's bounds
# are 71.1 to 86.7 of 80 %, 40.4 to 59.6 of 50 %, 88.8 to 97.8 of 95 %.
@pytest.mark.parametrize(
    ("before", "both", "tone", "change"),
    [
        (0.5, 0.5, "good", "rose from 50.0% (+30.0 points, 95 % interval +20.5 to +38.7)"),
        (0.95, 0.78, "bad", "fell from 95.0% (-15.0 points, 95 % interval -23.8 to -6.7)"),
    ],
)
def test_the_accuracy_is_better_than_chance_and_than_before(before: float, both: float, tone: str, change: str) -> None:
    end = {"held_out_rows": 100, "reward_accuracy_before": before, "reward_accuracy": 0.8, "reward_accuracy_both": both}
    verdict = verdict_of_step(event("end", 2, **end))
    assert verdict is not None and verdict.tone == tone
    assert verdict.reason.endswith(f"; chance is 50 %), and {change}")


@pytest.mark.parametrize(
    ("judge", "tone", "sentence"),
    [
        (1.5, "good", "It worked: the judge score on 100 held-out prompts rose from 1.00 to 1.50 "
                      "(+0.50, 95 % interval +0.30 to +0.70)."),
        (0.5, "bad", "It did not work: the mean reward rose by 0.20, but the judge score on 100 held-out prompts "
                     "fell from 1.00 to 0.50 (-0.50, 95 % interval -0.70 to -0.30)."),
    ],
)  # fmt: skip
def test_where_there_is_a_judge_it_decides(judge: float, tone: str, sentence: str) -> None:
    """Also where the reward model is no better than chance."""
    scores = {"judge_score_before": 1.0, "judge_score_after": judge, "judge_score_error_before": 0.5}
    scores |= {"judge_score_error_after": 0.5, "judge_score_change_error": 0.1}
    chance = {"held_out_rows": 100, "reward_accuracy": 0.5}
    verdict = verdict_of_run(run(chance, rewards(0.1, 0.3) | scores), "done")
    assert (verdict.tone, verdict.sentence) == (tone, sentence)


def test_a_first_step_that_is_not_clear_takes_nothing_from_the_reward() -> None:
    """It does not give the reward; step 2's model does."""
    unclear = {"held_out_rows": 64, "perplexity_before": 9.0, "perplexity_after": 9.0}
    assert (
        verdict_of_run(run(unclear, {"held_out_rows": 100, "reward_accuracy": 0.9}, rewards(0.1, 0.3)), "done").tone
        == "good"
    )


def test_where_there_is_a_rule_it_decides() -> None:
    verdict = verdict_of_run(run(rewards(0.1, 0.3) | shares(0.3, 0.9, rows=10)), "done")
    assert verdict.sentence == (  # Newcombe's bounds, as in test_intervals.py
        "It worked: good answers, by the rule, rose from 30.0% to 90.0% of 10 held-out prompts "
        "(+60.0 points, 95 % interval +17.1 to +80.9)."
    )


def test_a_reward_that_rises_while_answers_get_worse_is_named() -> None:
    verdict = verdict_of_run(run(rewards(0.1, 0.9) | shares(0.9, 0.3)), "done")
    assert verdict.tone == "bad"
    assert verdict.reason.startswith("the mean reward rose by 0.80, but good answers, by the rule, fell from 90.0%")


def test_the_reward_of_a_reward_model_at_chance_proves_nothing() -> None:
    at_chance = {"held_out_rows": 100, "reward_accuracy": 0.55}  # Wilson: 45.2 to 64.4 %
    verdict = verdict_of_run(run(at_chance, rewards(0.1, 0.9)), "done")
    assert verdict.tone == "unsure"
    assert "but the accuracy is 55.0% on 100 held-out pairs (95 % interval 45.2% to" in verdict.reason


def test_without_errors_it_says_so() -> None:
    verdict = verdict_of_run(run(rewards(0.1, 0.3, error=None)), "done")
    assert verdict.sentence.endswith("rose from 0.10 to 0.30, without an error, since the run recorded none.")


def test_a_run_that_failed_or_is_not_at_its_end() -> None:
    history = RunHistory("a")
    history.feed(event("end", 1, perplexity_before=31.2, perplexity_after=8.41))
    history.feed(event("plan", 2, updates=4))
    told = "step 1 is complete, the perplexity on held-out answers fell from 31.20 to 8.41, "
    told += "without an error, since the run recorded none."
    opening = "It is too early to say whether it works: step 2 "
    assert verdict_of_run(history, "running").sentence == f"{opening}is being trained; {told}"
    assert verdict_of_run(history, "lost").sentence == f"{opening}was stopped; {told}"
    history.feed(event("error", 2, what="out of memory", exit_code=4))
    assert verdict_of_run(history, "failed").sentence == "It did not work: it failed in step 2, out of memory."


def test_a_run_whose_steps_are_not_known_is_not_judged() -> None:
    assert verdict_of_run(RunHistory("a"), "done").sentence.endswith(": the events tell of no complete step.")


def test_numbers_that_are_not_finite_are_no_numbers() -> None:
    assert verdict_of_run(run({"mean_reward_before": 0.1, "mean_reward_after": "nan"}), "done").tone == "unsure"


@pytest.mark.parametrize(
    "numbers", [{}, {"mean_reward_before": 0.1, "mean_reward_after": "nan"}, rewards(float("nan"), 0.3)]
)
def test_an_earlier_step_does_not_speak_for_a_last_one_without_numbers(numbers: dict[str, Any]) -> None:
    history = run({"reward_accuracy": 0.9}, numbers)
    told = "step 3 is complete, but has no finite held-out numbers; step 2: the accuracy is 90.0% on held-out pairs, "
    told += "without an error, since the run recorded none; chance is 50 %."
    assert verdict_of_run(history, "done").sentence == f"It cannot be told whether it worked: {told}"
    assert verdict_of_run(history, "running").sentence.endswith(f"the next step begins; {told}")
