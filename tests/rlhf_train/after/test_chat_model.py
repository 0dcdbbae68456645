"""Test answers of whole models in folders, against plain transformers; settings and stops."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from jobs.errors import ToolkitError
from rlhf_train.after.chat_model import ChatModel, Wishes, not_applied, sampling_of
from rlhf_train.after.room import Room
from rlhf_train.after.sources import Source
from rlhf_train.generation.decoder import Sampling
from tests.rlhf_train.after import models

pytestmark = pytest.mark.pinned

CPU = Room(torch.device("cpu"), torch.float32)
ASK = [{"role": "user", "content": "red 🙂"}]


def load(folder, **wishes):
    return ChatModel.load(Source("it", str(folder)), CPU, Wishes(**wishes))


@pytest.mark.parametrize(("family", "with_template"), [("opt", False), ("llama", True)])
def test_an_answer_is_that_of_transformers(tmp_path, family, with_template):
    folder = models.save(tmp_path / "model", family=family, with_template=with_template)
    model = load(folder)
    reply = model.reply(ASK)
    shown = "".join(reply)
    words = models.tokenizer(with_template=with_template)
    text = "<|user|>red 🙂</s><|assistant|>" if with_template else "</s>\n\nHuman: red 🙂\n\nAssistant:"
    prompt = words(text, add_special_tokens=False)["input_ids"]
    expected = models.greedy(folder, prompt, [2], 12)
    assert reply.prompt.tolist() == prompt and reply.tokens.tolist() == expected
    assert shown == reply.text == words.decode([token for token in expected if token != 2])


def test_each_stop_of_the_generation_config_ends_an_answer(tmp_path):
    free = load(models.save(tmp_path / "free"))
    reply = free.reply(ASK)
    list(reply)
    tokens = reply.tokens.tolist()
    third = next(token for token in tokens[2:] if token not in tokens[:2])
    stopped = load(models.save(tmp_path / "stopped", eos_token_id=[2, third]))
    assert stopped.stop_ids == {2, third}
    reply = stopped.reply(ASK)
    text = "".join(reply)
    assert reply.tokens.tolist() == tokens[: tokens.index(third) + 1]
    assert text == models.tokenizer().decode(tokens[: tokens.index(third)])


def test_the_next_human_ends_an_answer(tmp_path):
    """A model that writes the user's next words too."""
    model = load(models.save(tmp_path / "model"))
    said = model.tokenizer(" red.\n\nHuman: more", add_special_tokens=False)["input_ids"]
    model._stream = SimpleNamespace(device="cpu", tokens=lambda *_: iter(said))
    reply = model.reply(ASK)
    assert "".join(reply) == " red." == reply.text
    assert model.tokenizer.decode(reply.tokens) == " red."


@pytest.mark.parametrize("stop", [" dog", ["cat", " dog"]])
def test_the_stop_strings_of_the_generation_config_end_an_answer(tmp_path, stop):
    model = load(models.save(tmp_path / "model", stop_strings=stop))
    said = model.tokenizer(" red dog tall", add_special_tokens=False)["input_ids"]
    model._stream = SimpleNamespace(device="cpu", tokens=lambda *_: iter(said))
    reply = model.reply(ASK)
    assert "".join(reply) == " red" == reply.text


def test_a_seed_gives_the_same_answers_again(tmp_path):
    folder = models.save(tmp_path / "model", do_sample=True, temperature=1.5, top_k=0)
    first, again, other = (["".join(model.reply(ASK)) for _ in range(3)] for model in
                           (load(folder, seed=1), load(folder, seed=1), load(folder, seed=2)))  # fmt: skip
    assert first == again != other and len({*first}) > 1


def test_an_answer_ends_at_the_models_last_position(tmp_path):
    model = load(models.save(tmp_path / "model", positions=32, eos_token_id=None, max_new_tokens=500))
    model.stop_ids = set()
    reply = model.reply(ASK)
    list(reply)
    assert len(reply.prompt) + len(reply.tokens) == 32


@pytest.mark.parametrize(
    ("config", "wishes", "expected"),
    [
        ({"do_sample": False}, {}, Sampling(top_k=1)),
        ({"do_sample": True, "temperature": 0.7, "top_k": 20, "top_p": 0.8}, {}, Sampling(0.7, 20, 0.8)),
        ({"do_sample": True, "temperature": 0.7, "top_k": 0, "top_p": 1.0}, {}, Sampling(0.7)),
        ({"do_sample": True, "temperature": 0.7}, {}, Sampling(0.7, 50)),  # 50 is transformers' own
        ({"do_sample": True, "temperature": 0.7, "top_k": 20}, {"temperature": 0.0}, Sampling(top_k=1)),
        ({"do_sample": True, "temperature": 0.7, "top_k": 20}, {"top_k": 0, "top_p": 0.5}, Sampling(0.7, None, 0.5)),
        ({"do_sample": False, "top_k": 50}, {"temperature": 0.9}, Sampling(0.9)),
        ({"do_sample": False, "temperature": 0.7}, {"top_k": 5}, Sampling(1.0, 5)),
        ({"do_sample": False, "top_k": 50}, {"top_p": 0.9}, Sampling(1.0, None, 0.9)),
        ({"do_sample": False}, {"top_k": 0}, Sampling(1.0)),
        ({"do_sample": False}, {"temperature": 0.0, "top_p": 0.9}, Sampling(top_k=1)),
        ({"do_sample": False}, {"max_tokens": 5, "seed": 3, "template": "human"}, Sampling(top_k=1)),
    ],
)  # fmt: skip
def test_sampling_is_the_configs_unless_told_otherwise(config, wishes, expected):
    full = SimpleNamespace(**{"temperature": None, "top_k": None, "top_p": None, **config})
    assert sampling_of(full, Wishes(**wishes)) == expected


def test_what_is_not_applied_is_named():
    config = SimpleNamespace(repetition_penalty=1.1, no_repeat_ngram_size=0, min_p=None)
    assert not_applied(config) == ["repetition_penalty 1.1"]


def test_a_folder_without_a_tokenizer_is_refused(tmp_path):
    folder = models.save(tmp_path / "model")
    for file in folder.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(ToolkitError) as caught:
        load(folder)
    assert "no tokenizer" in caught.value.what or "tokenizer" in caught.value.why
