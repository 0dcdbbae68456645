import io

import pytest
from rich.console import Console

from jobs.events import RawEvent
from jobs.steps import STEPS
from jobs.views.console import print_report
from tests.raw_events import BARE, END_1, END_2, END_3, PLAN, ROLLOUTS, event, sample, squeezed


def reported(events: list[RawEvent], width: int = 80) -> list[str]:
    stream = io.StringIO()
    print_report(events, Console(file=stream, width=width))
    return stream.getvalue().splitlines()


WHOLE_RUN = [
    END_1,
    END_2,
    PLAN,
    sample("before", "I do not \x1b[31mknow.", reward=-0.52, good=False),
    *ROLLOUTS,
    sample("after", "Hello!\nHow are you?", reward=1.9, good=True),
    END_3,
]


def test_report_of_a_whole_run() -> None:
    lines = reported(WHOLE_RUN)
    assert squeezed(lines) == [
        "step on held-out data before after",
        "─" * 61,
        "1 supervised fine-tuning perplexity 31.20 8.41",
        "2 reward model accuracy - 87.4%",
        "3 PPO good answers 48.0% 94.0%",
        "mean reward -0.52 1.93",
        "kl k3 0.000 0.410",
        "response length 20.3 30.1",
        "eos share 70.0% 99.1%",
        "step 1 It worked: the perplexity on held-out answers fell from 31.20 to 8.41,",
        "without an error, since the run recorded none.",
        "step 2 It worked: the accuracy is 87.4% on held-out pairs, without an error,",
        "since the run recorded none; chance is 50 %.",
        "step 3 It worked: good answers, by the rule, rose from 48.0% to 94.0%, without",
        "an error, since the run recorded none.",
        "step 1 1m02s runs/demo/step1/model",
        "step 2 38s runs/demo/step2/model",
        "step 3 1h02m runs/demo/step3/model",
        "total 1h03m",  # 62 + 38.4 + 3720 s = 63 min 40 s
        "perplexity: among how many equally likely tokens the model seems to choose, at",
        "each token of an answer; lower is better; 1 is the least",
        "accuracy: how often the chosen answer gets a higher score than the rejected one;",
        "higher is better; 50 % is chance",
        "good answers: the share that the job's own rule calls good; nothing learns from",
        "the rule; higher is better",
        "mean reward: the reward model's score: 0 is the mean, and 1 the spread, of",
        "answers before this step; higher is better, as long as answers do not get",
        "worse to read",
        "kl k3: how far the model has moved from the reference, where this step began,",
        "summed over an answer's tokens; a few units are usual; a large one may mean",
        "that the reward is being exploited",
        "response length: tokens of an answer; steady is good; longer and longer answers",
        "may exploit the reward",
        "eos share: the share of answers that end by themselves, not at the length limit;",
        "higher is better",
        "prompt 1",
        "Human: hi",
        "Assistant:",
        "before reward -0.52 bad",
        "I do not \\x1b[31mknow.",
        "after reward 1.90 good",
        "Hello!",
        "How are you?",
    ]
    assert max(map(len, lines)) <= 80 and lines == [line.rstrip() for line in lines]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"good_share_before": 0.5, "good_share_after": 0.25}, "It did not work"),
        (
            {"held_out_rows": 10, "good_share_before": 0.5, "good_share_after": 0.6},
            "It cannot be told from 10 rows whether it worked",
        ),
    ],
)
def test_a_step_that_did_not_work_says_so(changes: RawEvent, said: str) -> None:
    assert any(line.startswith(f"step 3 {said}: ") for line in squeezed(reported([END_3 | changes])))


def test_a_number_with_a_standard_error_says_it() -> None:
    errors = {f"perplexity_error_{when}": error for when, error in (("before", 1.5), ("after", 0.049))}
    assert "1 supervised fine-tuning perplexity 31.20 ± 1.50 8.41 ± 0.05" in squeezed(reported([END_1 | errors]))
    written = io.BytesIO()
    ascii_only = io.TextIOWrapper(written, encoding="ascii", newline="")
    print_report([END_1 | errors], Console(file=ascii_only, width=80))
    ascii_only.flush()
    shown = " ".join(written.getvalue().decode("ascii").split())
    assert "31.20 +- 1.50 | 8.41 +- 0.05" in shown and "+-: the standard error" in shown


@pytest.mark.parametrize("width", [20, 40, 79, 120])
def test_no_word_is_broken(width: int) -> None:
    """Every word of the sentences is there, whole, unless it alone is wider than the terminal."""
    end = END_3 | {"objective_before": -0.5, "objective_after": 1.9, "judge_score_after": 0.5}
    shown = " ".join(" ".join(reported([end], width)).split())
    sentences = [f"{each.label}: {each.meaning}; {each.good}" for each in STEPS[3].outcomes]
    assert [sentence for sentence in sentences if sentence not in shown] == []
    lines = reported([end], width)
    meanings = lines[next(place for place, line in enumerate(lines) if line.startswith("good answers:")) :]
    assert [line for line in meanings if "  " in line.strip()] == []  # one space between words


def test_report_names_models_of_ones_own() -> None:
    end = END_3 | {"own_models": {"actor.sft_model": "my/sft", "critic.reward_model": "my/rm"}}
    lines = reported([end])
    assert "step 3 started from actor.sft_model my/sft, critic.reward_model my/rm" in lines


def test_report_has_no_rows_for_what_was_not_measured_or_not_run() -> None:
    no_rule = {key: value for key, value in END_3.items() if not key.startswith("good")}
    lines = squeezed(reported([END_1, no_rule]))
    assert not any("good answers" in line or "2 reward model" in line or "step 2" in line for line in lines)
    assert "3 PPO mean reward -0.52 1.93" in lines and "total 1h03m" in lines


def test_events_with_missing_fields_break_no_report() -> None:
    assert "step 3 ? None" in squeezed(reported([raw for raw in BARE if raw["kind"] != "resumed"]))


def test_report_leaves_out_what_was_undone() -> None:
    late = sample("after", "New.", reward=2.0)
    assert reported([*WHOLE_RUN, event("resumed", 3, from_update=0), late]) == reported([END_1, END_2, late])


def test_report_takes_the_newest_of_a_sample_written_twice() -> None:
    lines = squeezed(reported([sample("after", "Old.", reward=1.0), sample("after", "New.", reward=2.0)]))
    assert "Old." not in lines and lines[-2:] == ["after reward 2.00", "New."]


def test_report_shows_three_prompts() -> None:
    lines = reported([sample("after", "x", reward=1.0, prompt=f"number {i}") for i in range(5)])
    assert [line.strip() for line in lines if "number" in line] == ["number 0", "number 1", "number 2"]


def test_report_folds_long_texts_and_loses_nothing() -> None:
    words, path = "word " * 100 + "x" * 200, "runs/" + "long/" * 30 + "model"
    lines = reported([END_1 | {"model": path}, sample("after", words, reward=1.0)])
    assert "".join("".join(lines[lines.index("after   reward 1.00") + 1 :]).split()) == "word" * 100 + "x" * 200
    assert any(line.endswith(path) for line in lines)  # whole, to be copied
    assert max(len(line) for line in lines if path not in line) <= 80


def test_report_of_nothing() -> None:
    assert reported([]) == ["no step has ended yet"]
