"""What ends an answer is in the weights: held to what transformers itself says and generates."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from benchmarks import work
from benchmarks.work import EOS, PAD, SIZES

TINY = SIZES["tiny"]
LLAMA = replace(TINY, actor=work.llama_like("llama", 64, 2, "4/2/16", 96, 256))
QWEN = replace(TINY, actor=work.llama_like("qwen2", 64, 2, "4/2/16", 96, 256))


def generated(model, prompts: work.Prompts, most: int) -> list[list[int]]:
    """Transformers' own generate, left-padded. -> answers, each with its EOS if it has one"""
    width = max(map(len, prompts.ids))
    ids = torch.tensor([[PAD] * (width - len(row)) + row for row in prompts.ids])
    torch.manual_seed(0)
    made = model.generate(
        ids,
        attention_mask=(ids != PAD).long(),
        do_sample=True,
        top_k=0,
        max_new_tokens=most,
        pad_token_id=PAD,
        eos_token_id=EOS,
    )
    answers = made[:, width:].tolist()
    return [row[: row.index(EOS) + 1] if EOS in row else row for row in answers]


@pytest.mark.parametrize("size", [TINY, LLAMA, QWEN])
def test_without_an_end_no_special_token_has_any_probability(size: work.Size) -> None:
    model = work.actor_of(size.actor, 0)
    logits = model(torch.randint(4, 256, (8, 20))).logits.double()
    assert logits.softmax(-1)[..., : len(work.SPECIAL)].max() < 1e-30


@pytest.mark.parametrize("size", [TINY, LLAMA, QWEN])
def test_a_countdown_says_as_many_tokens_as_the_last_word_asks_for(size: work.Size) -> None:
    model = work.actor_of(size.actor, 0, countdown=size.real_response_tokens)
    prompts = work.prompts_of(size, 3, real_lengths=True, count=40)
    answers = generated(model, prompts, size.real_response_tokens)
    assert [len(answer) for answer in answers] == prompts.answers and len(set(prompts.answers)) > 5
    assert all(answer[-1] == EOS for answer in answers)


@pytest.mark.parametrize("share", [0.02, 0.5])
def test_an_end_has_the_chosen_probability_at_every_token(share: float) -> None:
    model = work.actor_of(TINY.actor, 0, end_probability=share)
    ends = model(torch.randint(4, 256, (8, 20))).logits.double().softmax(-1)[..., EOS]
    torch.testing.assert_close(ends, torch.full_like(ends, share), rtol=1e-4, atol=0)


def test_lengths_are_drawn_after_the_real_ones() -> None:
    prompts = work.prompts_of(SIZES["small"], 1, real_lengths=True, count=4000)
    assert np.mean([len(row) for row in prompts.ids]) == pytest.approx(130, abs=3) and max(map(len, prompts.ids)) <= 256
    assert np.mean(prompts.answers) == pytest.approx(50, abs=2) and max(prompts.answers) <= 256
    assert prompts.ids[0][-1] == 3 + prompts.answers[0]  # token 4 is the last but the EOS


@pytest.mark.parametrize("size", [TINY, LLAMA, QWEN])
def test_a_word_is_a_token(size: work.Size, tmp_path: Path) -> None:
    """Also as the class that transformers takes for the family."""
    tokenizer = AutoTokenizer.from_pretrained(work.write_model(work.critic_of(size.actor, 0), 256, tmp_path))
    assert len(tokenizer) == 256 and tokenizer(work.text([4, 255, 17])).input_ids == [4, 255, 17]


def test_weights_that_a_token_is_multiplied_with() -> None:
    # By hand: a layer of width 64 has 4 x 64^2 + 2 x 64 x 256 = 49,152; two of them, and 64 x 256
    # for the head.
    assert work.matmul_parameters(TINY.actor, with_head=False) == 98_304
    assert work.matmul_parameters(TINY.actor, with_head=True) == 98_304 + 16_384
    # A layer of the LLaMA: 64 x 64 for queries and for outputs, 64 x 32 for keys and for values,
    # and 3 x 64 x 96.
    assert work.matmul_parameters(LLAMA.actor, with_head=False) == 2 * (2 * 4096 + 2 * 2048 + 18_432)
    # reference measurements count 1.311e9 for OPT-1.3b and 0.303e9 for OPT-350m
    assert work.matmul_parameters(SIZES["opt-1.3b"].actor, with_head=True) == pytest.approx(1.311e9, rel=1e-3)
    assert work.matmul_parameters(SIZES["opt-1.3b"].critic, with_head=False) == pytest.approx(0.303e9, rel=1e-3)
