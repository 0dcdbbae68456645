"""Test what a card says of a model's origin, and that a hub can read it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType, SimpleNamespace
from typing import Any

import pytest
from huggingface_hub import ModelCard

from jobs.spec import Job
from rlhf_train.data.dataset import Example
from rlhf_train.steps.model_card import model_card
from tests import tiny

LICENSED = "---\nlicense: other\nlicense_name: my-terms\nbase_model: some/base\nlicense_link: LICENSE\n---\n# Mine\n"


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model's folder with a card."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "README.md").write_text(LICENSED, encoding="utf-8")
    return folder


PLAIN = Example("Human: hi\n\nAssistant:", " Hello.")


def card(
    step: int,
    actor: object = "./mine",
    critic: object = "actor",
    template: str | None = "{{ messages }}",
    scores: Mapping[str, float] = MappingProxyType({}),
    example: Example = PLAIN,
    **more: Any,
) -> ModelCard:
    """Make a card, read as the hub's own library reads it."""
    fields = tiny.job(Path("rows")) | {"actor": {"model": actor} | more, "critic": {"model": critic}}
    tokenizer = SimpleNamespace(eos_token="</s>", chat_template=template)
    job = Job.model_validate(fields)
    return ModelCard(model_card(job, step, tokenizer, scores=scores, example=example))


@pytest.mark.parametrize("step", [1, 2, 3])
def test_base_model_and_licence_are_those_of_the_source(source: Path, step: int) -> None:
    data = card(step).data
    assert (data.base_model, data.license) == ("some/base", "other")
    assert (data.license_name, data.license_link) == ("my-terms", "LICENSE")
    assert data.library_name == "transformers"
    assert data.pipeline_tag == ("text-classification" if step == 2 else "text-generation")
    assert data.tags == (["rlhf", "reward-model"] if step == 2 else ["rlhf"])


def test_a_config_may_know_them(source: Path) -> None:
    (source / "README.md").write_text("no front matter", encoding="utf-8")
    config = {"_name_or_path": "some/base", "license": "mit"}
    (source / "config.json").write_text(json.dumps(config), encoding="utf-8")
    assert (card(1).data.base_model, card(1).data.license) == ("some/base", "mit")


@pytest.mark.parametrize("path", ["/home/me/base", "./base", "runs/x/step1/model", "base"])
def test_a_path_is_no_base_model(source: Path, path: str) -> None:
    (source / "README.md").write_text(f"---\nbase_model: {path}\n---\n", encoding="utf-8")
    (source / "config.json").write_text(json.dumps({"_name_or_path": path}), encoding="utf-8")
    assert card(1).data.base_model is None


def test_the_sources_card_knows_better_than_its_config(source: Path) -> None:
    config = {"_name_or_path": "another/base", "license": "mit"}
    (source / "config.json").write_text(json.dumps(config), encoding="utf-8")
    assert (card(1).data.base_model, card(1).data.license) == ("some/base", "other")


def test_a_model_may_be_merged_from_several(source: Path) -> None:
    (source / "README.md").write_text("---\nbase_model: [some/one, some/two]\n---\n", encoding="utf-8")
    assert card(1).data.base_model == ["some/one", "some/two"]


def test_a_model_that_is_not_here_has_no_known_licence(source: Path) -> None:
    data = card(1, actor="some/model").data
    assert data.base_model is None and data.license is None


@pytest.mark.parametrize("text", ["---\n: [\n---\n", "---\njust words\n---\n", ""])
def test_a_card_that_cannot_be_read_says_nothing(source: Path, text: str) -> None:
    (source / "README.md").write_text(text, encoding="utf-8")
    data = card(1).data
    assert data.base_model is None and data.license is None


def test_random_weights_have_no_base(source: Path) -> None:
    made = card(1, actor={"config": tiny.OPT})
    assert made.data.base_model is None and "Made by rlhf-box from random weights, " in made.text


def test_each_step_names_what_it_began_from(source: Path) -> None:
    assert "Made by rlhf-box from ./mine, on rows." in card(1).text
    assert "Made by rlhf-box from this run's step 1, " in card(2).text
    assert "Made by rlhf-box from ./other, " in card(2, critic="./other").text
    assert "Made by rlhf-box from this run's step 1, " in card(3).text
    assert "Made by rlhf-box from ./sft, " in card(3, sft_model="./sft").text


def test_the_prompt_format_is_that_of_the_data(source: Path) -> None:
    text = card(1).text
    assert 'prompt = "Human: hi\\n\\nAssistant:"\n' in text and "ends with\n`</s>`." in text
    assert "The tokenizer's chat template was not used." in text
    assert "chat template" not in card(1, template=None).text


def test_the_prompt_format_of_messages_is_that_of_the_template(source: Path) -> None:
    example = Example("<s>[INST] hi [/INST]", " Hello.</s>", is_chat=True)
    actor, reward = (card(step, example=example).text for step in (1, 2))
    assert "apply_chat_template" in actor and "template was not used" not in actor
    # The texts hold all control tokens.
    assert 'ids = tokenizer(prompt, add_special_tokens=False, return_tensors="pt").input_ids' in actor
    assert 'ids = tokenizer(prompt + answer, add_special_tokens=False, return_tensors="pt").input_ids' in reward


def test_a_card_shows_how_to_use_what_was_trained(source: Path) -> None:
    actor, reward = card(1).text, card(2).text
    assert "AutoModelForCausalLM.from_pretrained(folder)" in actor and "logit" not in actor
    assert "AutoModelForSequenceClassification.from_pretrained(folder)" in reward
    assert 'answer = " Hello."\n' in reward and "only differences count." in reward


def test_a_card_holds_the_scores_and_the_fields_of_its_step(source: Path) -> None:
    text = card(1, scores={"perplexity_after": 12.3456789, "kl": -2.89418e-08}).text
    assert "| on held-out data | |\n| --- | --- |\n| perplexity_after | 12.3457 |\n| kl | -2.89418e-08 |\n" in text
    assert "held-out" not in card(1).text
    assert "\nsft.global_batch: 8\n" in text and "\nppo." not in text
    assert "\nppo.rollout_batch: 16\n" in card(3).text
