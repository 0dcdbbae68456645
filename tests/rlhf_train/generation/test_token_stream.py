"""Test answers token by token: against transformers' greedy search, and against rollouts."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM

from rlhf_train.generation.decoder import Sampling
from rlhf_train.generation.rollout import Rollouts, draw_uniforms
from rlhf_train.generation.token_stream import TokenStream

pytestmark = pytest.mark.pinned

PAD, EOS, VOCABULARY = 1, 2, 60
GREEDY = Sampling(top_k=1)


@pytest.fixture(scope="module", params=["opt", "llama"])
def model(request):
    torch.manual_seed(3)
    ids = {"pad_token_id": PAD, "bos_token_id": EOS, "eos_token_id": EOS}
    if request.param == "llama":
        config = LlamaConfig(
            vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            intermediate_size=64, max_position_embeddings=512, initializer_range=0.2, **ids,
        )  # fmt: skip
        return LlamaForCausalLM(config).eval()
    config = OPTConfig(
        vocab_size=VOCABULARY, hidden_size=32, word_embed_proj_dim=32, num_hidden_layers=2, num_attention_heads=4,
        ffn_dim=64, max_position_embeddings=512, dropout=0.0, init_std=0.2, **ids,
    )  # fmt: skip
    return OPTForCausalLM(config).eval()


def prompt(length=7, seed=0):
    return np.random.RandomState(seed).randint(3, VOCABULARY, length)


def greedy(model, prompt, limit):
    """What plain transformers says, without an EOS."""
    made = model.generate(
        torch.from_numpy(prompt)[None], attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
        do_sample=False, max_new_tokens=limit, eos_token_id=None, pad_token_id=PAD,
    )  # fmt: skip
    return made[0, len(prompt) :].tolist()


def stream(model, prompt, limit, stop_ids=frozenset(), sampling=GREEDY, seed=5, **how):
    return list(TokenStream(model, sampling, **how).tokens(prompt, draw_uniforms(seed, [0], limit)[0], stop_ids))


@pytest.mark.parametrize("is_static", [True, False])
def test_the_likeliest_tokens_are_those_of_transformers(model, is_static):
    assert stream(model, prompt(), 20, is_static=is_static) == greedy(model, prompt(), 20)


def test_any_stop_token_ends_an_answer_and_is_its_last(model):
    whole = greedy(model, prompt(), 20)
    first, later = whole[2], next(token for token in whole[3:] if token not in whole[:3])
    assert stream(model, prompt(), 20, {later}) == whole[: whole.index(later) + 1]
    assert stream(model, prompt(), 20, {later, first}) == whole[: whole.index(first) + 1]


def test_the_same_uniforms_sample_what_a_rollout_samples(model):
    rollouts = Rollouts(
        model, stop_ids=[EOS], pad_id=PAD, max_tokens=20, temperature=0.8, top_k=30, top_p=0.9, batch=1,
        device=torch.device("cpu"), is_static=False,
    )  # fmt: skip
    made = rollouts.generate([prompt()], seed=5, row_ids=[0])
    assert stream(model, prompt(), 20, {EOS}, Sampling(0.8, 30, 0.9)) == made.tokens[0].tolist()


def test_one_stream_answers_again_after_an_answer_that_was_left(model):
    """Shorter, longer than the first cache, and after a reader who went away in the middle."""
    made = TokenStream(model, Sampling(top_k=1))
    left = made.tokens(prompt(), draw_uniforms(5, [0], 20)[0], set())
    next(left), next(left)
    for length, limit in ((3, 8), (300, 12), (5, 30), (7, 4)):
        tokens = made.tokens(prompt(length, 1), draw_uniforms(5, [0], limit)[0], set())
        assert list(tokens) == greedy(model, prompt(length, 1), limit), (length, limit)


def test_two_answers_of_one_model_in_turn(model):
    made = TokenStream(model, GREEDY)
    prompts, limits = [prompt(7, 1), prompt(9, 2)], [20, 12]
    streams = [
        made.tokens(each, draw_uniforms(5, [0], limit)[0], set()) for each, limit in zip(prompts, limits, strict=True)
    ]
    answers = [[], []]
    for _ in range(20):
        for answer, tokens in zip(answers, streams, strict=True):
            answer += [token for token in [next(tokens, None)] if token is not None]
    assert answers == [greedy(model, each, limit) for each, limit in zip(prompts, limits, strict=True)]
