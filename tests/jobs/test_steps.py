from dataclasses import fields, replace

import pytest

from jobs.events import SHOWN, End, Metrics
from jobs.spec import Job
from jobs.steps import PPO, STEPS, Step, label_of


def test_the_steps_are_one_two_and_three() -> None:
    assert [(number, step.number, step.section) for number, step in STEPS.items()] == [
        (1, 1, "sft"),
        (2, 2, "reward"),
        (3, 3, "ppo"),
    ]


@pytest.mark.parametrize("step", STEPS.values(), ids=lambda step: step.section)
def test_what_a_step_names_is_there(step: Step) -> None:
    metrics, outcomes = ({field.name for field in fields(event)} for event in (Metrics, End))
    assert {*step.line, *step.panel} <= metrics
    assert {name for outcome in step.outcomes for name in (outcome.before, outcome.after)} <= outcomes
    errors = {name for outcome in step.outcomes for name in (outcome.error_before, outcome.error_after)}
    assert errors <= {*outcomes, ""}
    assert {step.section, *step.networks, *step.depends_on} <= set(Job.model_fields)
    assert step.section in step.depends_on and all(number < step.number for number in step.starts_from)


def test_step_3_depends_on_all_that_a_job_says_about_learning() -> None:
    others = ("name", "flavours", "hardware", "checkpoint", "track")
    assert PPO.depends_on == tuple(name for name in Job.model_fields if name not in others)


@pytest.mark.parametrize("field", ["line", "panel"])
@pytest.mark.parametrize("name", ["tokens_lost", "ratio"])  # no metric, and one that says that it is not shown
def test_a_step_shows_nothing_that_cannot_be_written(field: str, name: str) -> None:
    with pytest.raises(ValueError, match=f"step 3 shows {name}"):
        replace(PPO, **{field: ("kl_k3", name)})


def test_curves_of_a_run_here_and_on_another_machine() -> None:
    here, far = ([list(step.curves(far=far)) for step in STEPS.values()] for far in (False, True))
    assert here == [["loss"], ["loss", "accuracy"], ["mean_reward", "kl_k3"]]
    assert far == [["loss"], ["loss", "accuracy"], ["mean_reward", "kl_k3", "policy_loss"]]


def test_a_number_is_called_by_the_words_of_its_field_and_always_the_same() -> None:
    """`kl` of a rollout and `kl_before` of held-out answers are one number, with one label."""
    others = {"tokens_per_s": "tok/s", "good_share": "good answers", "reward_accuracy": "accuracy"}
    assert {name: each.label for name, each in SHOWN.items()} == {
        name: others.get(name, name.replace("_", " ")) for name in SHOWN
    }
    for outcome in (outcome for step in STEPS.values() for outcome in step.outcomes):
        name = outcome.after.removesuffix("_after")
        assert outcome.label == label_of(name) == label_of(outcome.after) == others.get(name, name.replace("_", " "))
        assert outcome.label in {each.label for each in SHOWN.values()} | {"perplexity", "good answers"}
