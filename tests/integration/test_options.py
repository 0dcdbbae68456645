"""Test the options that the other runs leave out: LoRA, and all options of PPO together."""

from __future__ import annotations

import dataclasses
import math
import re
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from jobs.events import End, Event, Metrics
from tests import tiny
from tests.tiny import Trained, train

pytestmark = pytest.mark.pinned

LORA = "{rank: 4, alpha: 8.0}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("options")


LORA_JOB = [
    f"actor.lora={LORA}",
    "hardware.gradient_checkpointing=true",
    "ppo.rollout_batch=8",
    "ppo.max_updates=4",
    "ppo.critic_warmup_updates=1",
    "ppo.normalize_rewards=false",
]


@pytest.fixture(scope="module")
def lora(folder: Path) -> Trained:
    """Make one update a rollout, so that all training data was sampled by the current policy."""
    return train(folder, "lora", LORA_JOB)


@pytest.fixture(scope="module")
def everything(folder: Path) -> Trained:
    """Three rollouts of 2 epochs of 2 updates each."""
    settings = ["hardware.gradient_checkpointing=true", "sft.loss_on_prompt=true"]
    settings += ["reward.loss=per_token", "reward.lm_coef=0.5", "reward.learning_rate=5.0e-3", "reward.max_updates=8"]
    ppo = {
        "ppo_epochs": 2,
        "max_updates": 12,
        "temperature": 0.7,
        "missing_eos_penalty": 2.0,
        "whiten_rewards": "true",
        "ema_decay": 0.8,
    }
    ppo |= {
        "kl_coef": 0.2,
        "kl_target": 0.5,
        "kl_horizon": 100,
        "reward_clip": 1.5,
        "clip_range": 0.1,
        "value_clip_range": 0.5,
    }
    ppo |= {"gamma": 0.99, "lam": 0.9, "rule": "rlhf_train.demo.rule:is_good"}
    return train(folder, "everything", settings + [f"ppo.{field}={value}" for field, value in ppo.items()])


def check_finite(run: Trained) -> None:
    numbers = [
        value
        for step in (1, 2, 3)
        for kind in ("metrics", "end")
        for event in run.events(kind, step)
        for value in event.values()
    ]
    assert len(numbers) > 100
    assert all(math.isfinite(value) for value in numbers if isinstance(value, float))


def missing(run: Trained, kind: type[Event]) -> set[str]:
    """Fields of a kind of event that no step fills in all of its events; those of a GPU apart."""
    filled = [set.intersection(*(set(event) for event in run.events(kind.kind, step))) for step in (1, 2, 3)]
    return {field.name for field in dataclasses.fields(kind) if not field.name.startswith("gpu_")} - set().union(
        *filled
    )


def test_every_number_is_there_and_finite(lora: Trained, everything: Trained) -> None:
    for run in (lora, everything):
        check_finite(run)
    parts = ("before", "after", "error_before", "error_after", "change_error")
    no_judge = {f"judge_score_{part}" for part in parts}  # the run with models of one's own has one
    assert missing(everything, End) == {"own_models"} | no_judge and missing(everything, Metrics) == {"judge_score"}
    no_rule = {f"good_share_{part}" for part in ("before", "after", "both")}
    assert missing(lora, End) == {"own_models"} | no_judge | no_rule
    assert missing(lora, Metrics) == {"lm_loss", "judge_score"}


def test_before_the_first_update_ratio_is_1_and_kl_is_0(lora: Trained, everything: Trained) -> None:
    lines = lora.events("metrics", 3)
    assert [line["update"] for line in lines] == [1, 2, 3, 4]
    assert lines[0]["kl"] == pytest.approx(0, abs=1e-6)
    assert lines[2]["kl"] != pytest.approx(0, abs=1e-6)
    for line in lines:  # one update a rollout: always the first
        assert line["ratio"] == pytest.approx(1, abs=1e-6)
        assert line["clip_fraction"] == line["value_clip_fraction"] == 0
    assert everything.events("metrics", 3)[0]["kl"] == pytest.approx(0, abs=1e-6)  # also at temperature 0.7
    for run in (lora, everything):
        assert run.end(3)["kl_before"] == pytest.approx(0, abs=1e-6)


def test_in_its_warm_up_the_critic_learns_alone(lora: Trained) -> None:
    first, second = lora.events("metrics", 3)[:2]
    assert (first["learning_rate"], first["grad_norm"]) == (0.0, 0.0) and first["critic_grad_norm"] > 0
    assert second["kl"] == pytest.approx(0, abs=1e-6)  # the actor has not moved
    # A cosine over the critic's 4 updates, and over the actor's 3, which begin here.
    ppo = tiny.job(lora.dir.path)["ppo"]
    assert second["learning_rate"] == pytest.approx(ppo["actor_learning_rate"]) and second["grad_norm"] > 0
    quarter = 0.5 * (1 + math.cos(math.pi / 4))
    assert first["critic_learning_rate"] == pytest.approx(ppo["critic_learning_rate"])
    assert second["critic_learning_rate"] == pytest.approx(ppo["critic_learning_rate"] * quarter)


def test_lora_learns_and_leaves_whole_weights(lora: Trained) -> None:
    assert lora.end(1)["perplexity_after"] < lora.end(1)["perplexity_before"]
    first, last = lora.weights(1), lora.weights(3)
    assert not any("lora" in name for name in last)
    changed = {name for name, value in first.items() if not value.equal(last[name])}
    assert changed == {name for name in first if re.search(r"\.(q_proj|k_proj|v_proj|out_proj|fc1|fc2)\.weight$", name)}


def test_models_of_ones_own_give_step_3_what_the_steps_before_give_it(folder: Path, lora: Trained) -> None:
    sft, reward_model = (str(lora.dir.step(step).model) for step in (1, 2))
    flags = ["--actor-model", sft, "--reward-model", reward_model]
    words = ["--job", str(folder / "job.yaml"), "--run", "own", "--step", "3", *flags]
    # The reward model is the judge, too: nothing learns from that, and the scores are the same.
    own = tiny.run(folder, words, [*LORA_JOB, f"ppo.judge_model={reward_model}"])
    assert own.weights(3).keys() == lora.weights(3).keys()
    assert all(value.equal(lora.weights(3)[name]) for name, value in own.weights(3).items())
    named = {"actor.sft_model": sft, "critic.reward_model": reward_model}
    assert own.end(3)["own_models"] == own.events("plan", 3)[0]["own_models"] == named
    assert not own.dir.step(1).path.exists() and not own.dir.step(2).path.exists()
    end, rollouts, samples = own.end(3), own.events("metrics", 3), own.events("sample", 3)
    for part in ("before", "after", "error_before", "error_after", "change_error"):
        assert end[f"judge_score_{part}"] == pytest.approx(end[f"mean_reward_{part}"], rel=1e-5)
    assert [line["judge_score"] for line in rollouts] == pytest.approx([line["mean_reward"] for line in rollouts])
    assert [each["judge_score"] for each in samples] == pytest.approx([each["reward"] for each in samples])
    assert {each["when"] for each in samples} == {"before", "during", "after"}
    assert "judge_score" not in lora.events("metrics", 3)[0] and "judge_score_before" not in lora.end(3)
    assert f"Made by rlhf-box from {sft}, " in (own.dir.step(3).model / "README.md").read_text(encoding="utf-8")


def test_several_epochs_over_several_updates_a_rollout(everything: Trained) -> None:
    lines = everything.events("metrics", 3)
    assert [line["update"] for line in lines] == [4, 8, 12]
    for line in lines:  # the second to fourth update of a rollout leave the policy that sampled
        assert line["ratio"] != pytest.approx(1, abs=1e-6)
    assert lines[0]["clip_fraction"] > 0 and lines[0]["value_clip_fraction"] > 0
    assert everything.end(3)["kl"] > 0.05


def test_the_kl_coefficient_adapts(everything: Trained) -> None:
    lines = everything.events("metrics", 3)
    expected = 0.2
    for line in lines:
        assert line["kl_coef"] == pytest.approx(expected, rel=1e-9)
        error = line["kl"] / 0.5 - 1
        expected *= 1 + max(-0.2, min(0.2, error)) * 16 / 100  # 16 samples a rollout, of a horizon of 100
    assert len({line["kl_coef"] for line in lines}) == 3


def test_the_reward_model_keeps_reading(everything: Trained) -> None:
    losses = [line["lm_loss"] for line in everything.events("metrics", 2)]
    assert losses[0] < math.log(320)
    assert losses[-1] < losses[0] - 0.8  # without the coefficient it falls by 0.2, by chance


def test_the_average_lies_beside_the_model(everything: Trained) -> None:
    """Between where step 3 started and where it ended, and of the same form."""
    start, average, last = everything.weights(1), everything.weights(3, "model_ema"), everything.weights(3)
    assert average.keys() == last.keys()
    moved = torch.cat([(last[name] - start[name]).flatten() for name in start])
    averaged = torch.cat([(average[name] - start[name]).flatten() for name in start])
    assert 0.3 < float(averaged @ moved / (moved @ moved)) < 0.95
    folder = everything.dir.step(3).model_ema
    assert (folder / "README.md").exists()
    assert AutoModelForCausalLM.from_pretrained(folder).generation_config.temperature == 0.7
