"""Test what is said of models that will not do, before anything trains: tiny ones, on disk."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BlenderbotConfig,
    GraniteConfig,
    OPTConfig,
)

from jobs.errors import ExitCode, ToolkitError
from jobs.run_dir import RunDir
from jobs.spec import Job
from rlhf_train.models.networks import train_tokenizer
from rlhf_train.plan.model_checks import check_models
from tests import tiny

CONFIG = {key: value for key, value in tiny.OPT.items() if key != "model_type"} | {"vocab_size": 320}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models, each fit for something: `sft`, `rm`, and those that are named by what is wrong."""
    folder = tmp_path_factory.mktemp("models")
    tokenizer = train_tokenizer([f"\n\nHuman: {word}\n\nAssistant: {word}" for word in tiny.WORDS], 300)
    other = train_tokenizer([f"{word} in other words" for word in tiny.WORDS], 300)
    causal, score = AutoModelForCausalLM, AutoModelForSequenceClassification
    kinds: dict[str, tuple[Any, dict[str, Any], Any]] = {
        "sft": (causal, {}, tokenizer),
        "rm": (score, {"num_labels": 1}, tokenizer),
        "two-labels": (score, {"num_labels": 2}, tokenizer),
        "short": (score, {"num_labels": 1, "max_position_embeddings": 40}, tokenizer),
        "short-sft": (causal, {"max_position_embeddings": 40}, tokenizer),
        "untied": (causal, {"tie_word_embeddings": False}, tokenizer),
        "untied-rm": (score, {"num_labels": 1, "tie_word_embeddings": False}, tokenizer),
        "other-words": (score, {"num_labels": 1}, other),
    }
    for name, (kind, fields, reader) in kinds.items():
        kind.from_config(OPTConfig(**CONFIG | fields)).save_pretrained(folder / name)
        reader.save_pretrained(str(folder / name))
    # In several files, and in a file of another kind.
    model = score.from_config(OPTConfig(**CONFIG, num_labels=1))
    for name, size in (("rm-in-parts", "50KB"), ("rm-as-bin", "1GB")):
        model.save_pretrained(folder / name, max_shard_size=size)
        tokenizer.save_pretrained(str(folder / name))
    (folder / "rm-as-bin/model.safetensors").rename(folder / "rm-as-bin/pytorch_model.bin")
    causal.from_config(OPTConfig(**CONFIG)).save_pretrained(folder / "sft-as-bin")
    tokenizer.save_pretrained(str(folder / "sft-as-bin"))
    (folder / "sft-as-bin/model.safetensors").rename(folder / "sft-as-bin/pytorch_model.bin")
    # A classifier by its config, whose head was never saved.
    model = score.from_config(OPTConfig(**CONFIG, num_labels=1))
    state = {name: value for name, value in model.state_dict().items() if name != "score.weight"}
    for name, size in (("lost-head", "1GB"), ("lost-head-in-parts", "50KB")):
        model.save_pretrained(folder / name, state_dict=dict(state), max_shard_size=size)
    BlenderbotConfig(d_model=8, encoder_layers=1, decoder_layers=1).save_pretrained(folder / "no-classifier")
    GraniteConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1).save_pretrained(folder / "only-causal")
    for name in ("lost-head", "lost-head-in-parts", "no-classifier", "only-causal"):
        tokenizer.save_pretrained(str(folder / name))
    return folder


def job(models: Path, actor: str | None, reward_model: str | None, *, base: str = "sft") -> Job:
    fields = copy.deepcopy(tiny.job(models / "rows"))
    fields["actor"] = {"model": str(models / base), "sft_model": actor and str(models / actor)}
    fields["critic"] = {"model": "actor", "reward_model": reward_model and str(models / reward_model)}
    return Job.model_validate(fields)


def test_models_that_fit_are_let_through(models: Path, tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    check_models(job(models, "sft", "rm"), run, [3])
    check_models(job(models, None, "rm"), run, [1, 3])
    check_models(job(models, None, None), run, [1, 2, 3])


@pytest.mark.parametrize("name", ["rm-in-parts", "rm-as-bin"])
def test_a_head_is_found_in_any_kind_of_file(models: Path, tmp_path: Path, name: str) -> None:
    assert (models / "rm-in-parts/model.safetensors.index.json").is_file()
    check_models(job(models, "sft", name), RunDir(tmp_path), [3])


def test_a_folder_may_be_below_home(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(models))
    fields = job(models, "sft", None).dump()
    fields["critic"]["reward_model"] = "~/lost-head"
    with pytest.raises(ToolkitError, match="lost-head is no reward model"):
        check_models(Job.model_validate(fields), RunDir(tmp_path), [3])


@pytest.mark.parametrize(("critic", "is_own", "is_fit"), [("untied", False, False), ("untied-rm", True, True)])
def test_a_language_loss_needs_tied_embeddings_where_it_is_learned(
    models: Path, tmp_path: Path, critic: str, is_own: bool, is_fit: bool
) -> None:
    fields = job(models, "sft", None).dump()
    fields["critic"] = {"model": "actor"} | {"reward_model" if is_own else "model": str(models / critic)}
    fields["reward"]["lm_coef"] = 1.0
    checked, run, steps = Job.model_validate(fields), RunDir(tmp_path), [3] if is_own else [2, 3]
    if is_fit:
        check_models(checked, run, steps)
    else:
        with pytest.raises(ToolkitError, match="needs a model whose input and output embeddings are one"):
            check_models(checked, run, steps)


def test_the_actors_tokenizer_is_that_of_ones_own_model_or_of_the_run(models: Path, tmp_path: Path) -> None:
    run, other = RunDir(tmp_path), train_tokenizer(tiny.WORDS, 280)
    other.save_pretrained(str(run.step(1).model))
    check_models(job(models, "sft", "rm"), run, [3])  # what step 1 made has no part in it
    with pytest.raises(ToolkitError, match="different tokenizers"):
        check_models(job(models, None, "rm"), run, [3])


@pytest.mark.parametrize(("base", "what"), [("rm", "rm is no language model"), ("short-sft", "do not fit the model")])
def test_what_step_1_starts_from_is_looked_at(models: Path, tmp_path: Path, base: str, what: str) -> None:
    with pytest.raises(ToolkitError, match=what):
        check_models(job(models, None, None, base=base), RunDir(tmp_path), [1])


def test_a_reward_model_of_another_tokenizer_is_refused_in_step_1_already(models: Path, tmp_path: Path) -> None:
    with pytest.raises(ToolkitError, match="different tokenizers"):
        check_models(job(models, None, "other-words"), RunDir(tmp_path), [1])


@pytest.mark.parametrize(
    ("actor", "reward_model", "what", "why"),
    [
        ("sft", "two-labels", "two-labels is no reward model", "it is a classifier with 2 labels, and a reward is one"),
        ("sft", "sft", "sft is no reward model", "it has no head: its weights lack `score.weight`"),
        ("sft", "sft-as-bin", "sft-as-bin is no reward model", "it has no head: its weights lack `score.weight`"),
        ("short-sft", "rm", "prompts of 64 and responses of 12 tokens do not fit", "40 positions"),
        ("sft", "lost-head", "lost-head is no reward model", "it has no head: its weights lack `score.weight`"),
        ("sft", "lost-head-in-parts", "lost-head-in-parts is no reward model", "its weights lack `score.weight`"),
        ("sft", "no-classifier", "no-classifier", "transformers has no sequence classification for blenderbot"),
        ("sft", "other-words", "the actor and the reward model use different tokenizers", ""),
        ("sft", "short", "prompts of 64 and responses of 12 tokens do not fit", "40 positions"),
        ("rm", "rm", "rm is no language model", "it is OPTForSequenceClassification, which gives no next token"),
        ("nowhere", "rm", "there is no folder", "not there"),
    ],
)
@pytest.mark.parametrize("steps", [[3], [1, 3]])
def test_a_model_that_will_not_do_is_refused_with_the_true_reason(
    models: Path, tmp_path: Path, actor: str, reward_model: str, what: str, why: str, steps: list[int]
) -> None:
    with pytest.raises(ToolkitError) as caught:
        check_models(job(models, actor, reward_model), RunDir(tmp_path), steps)
    assert what in caught.value.what and why in caught.value.why
    assert caught.value.exit_code == ExitCode.USAGE


@pytest.mark.parametrize(
    ("judge", "what"),
    [
        ("two-labels", "two-labels is no reward model"),
        ("sft", "sft is no reward model"),
        ("short", "prompts of 64 and responses of 12 tokens do not fit"),
        ("other-words", "the actor and the judge use different tokenizers"),
    ],
)
@pytest.mark.parametrize("steps", [[1], [3]])
def test_a_judge_is_a_reward_model_that_reads_as_the_actor(
    models: Path, tmp_path: Path, judge: str, what: str, steps: list[int]
) -> None:
    fields = job(models, "sft", "rm").dump()
    fields["ppo"]["judge_model"] = str(models / judge)
    with pytest.raises(ToolkitError, match=what):
        check_models(Job.model_validate(fields), RunDir(tmp_path), steps)
    fields["ppo"]["judge_model"] = str(models / "rm")
    check_models(Job.model_validate(fields), RunDir(tmp_path), steps)


@pytest.mark.parametrize("steps", [[1], [1, 2, 3], [2], [2, 3]])
def test_what_step_2_starts_from_is_looked_at_before_step_1(models: Path, tmp_path: Path, steps: list[int]) -> None:
    fields = job(models, None, None).dump()
    fields["critic"]["model"] = str(models / "two-labels")
    with pytest.raises(ToolkitError, match="two-labels is no reward model"):
        check_models(Job.model_validate(fields), RunDir(tmp_path), steps)
    check_models(Job.model_validate(fields), RunDir(tmp_path), [3])  # it has step 2's result by then


def test_a_language_model_that_makes_no_reward_model_may_do_step_1(models: Path, tmp_path: Path) -> None:
    granite = job(models, None, None, base="only-causal")
    check_models(granite, RunDir(tmp_path), [1])
    with pytest.raises(ToolkitError, match=r"a reward model cannot be made from .*only-causal"):
        check_models(granite, RunDir(tmp_path), [1, 2])


def test_the_reward_model_is_compared_with_what_the_runs_actor_reads_with(models: Path, tmp_path: Path) -> None:
    """The actor began from a config: its tokenizer was trained in the run."""
    fields = job(models, None, "other-words").dump()
    fields["actor"]["model"] = {"config": tiny.OPT}
    mixed, run = Job.model_validate(fields), RunDir(tmp_path)
    check_models(mixed, run, [1, 3])  # still to be trained: step 1 compares it
    train_tokenizer(tiny.WORDS, 280).save_pretrained(str(run.tokenizer))
    with pytest.raises(ToolkitError, match="different tokenizers"):
        check_models(mixed, run, [3])
