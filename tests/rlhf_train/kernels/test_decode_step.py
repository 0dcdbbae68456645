"""Compare Triton's kernels of the decode step with plain PyTorch, in Triton's interpreter on a CPU.

tests/conftest.py switches the interpreter on.
"""

import pytest
import torch

from rlhf_train.generation.decoder import Sampling
from rlhf_train.generation.families.opt import network_of
from rlhf_train.generation.rollout import draw_uniforms
from rlhf_train.kernels import decode_step
from tests.rlhf_train.generation.test_decoder import answers, decoder, opt, some_prompts

pytestmark = pytest.mark.skipif(not decode_step.HAS_TRITON, reason="no Triton 3, which is there for Linux only")


@pytest.mark.parametrize(
    ("shape", "sampling"),
    [
        ({}, Sampling()),
        ({"do_layer_norm_before": False, "word_embed_proj_dim": 16}, Sampling(temperature=0.7)),
        ({}, Sampling(top_k=1)),
    ],
    ids=["plain", "post-norm, cooler", "greedy"],
)
def test_the_kernels_draw_what_plain_torch_draws(shape, sampling, monkeypatch):
    monkeypatch.setattr(decode_step, "VOCABULARY_BLOCK", 32)  # three blocks, the last one not full
    model, prompts = opt(**shape), some_prompts(3)
    plain = answers(model, prompts, limit=5, sampling=sampling, use_kernels=False)
    triton = answers(model, prompts, limit=5, sampling=sampling, use_kernels=True)
    written = plain.tokens[:, :-1] != 0
    assert torch.equal(plain.tokens[:, :-1], triton.tokens[:, :-1])
    assert (plain.finished == 1).all()
    assert torch.equal(plain.finished, triton.finished)
    assert torch.equal(plain.length, triton.length)
    torch.testing.assert_close(
        plain.log_probs[:, :-1] * written, triton.log_probs[:, :-1] * written, atol=1e-5, rtol=1e-5
    )


def test_the_kernel_reads_no_more_of_the_cache_than_is_live():
    """NaN lies beyond each length, and in the finished slot."""
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 3, 32).unbind(0)
    keys, values = torch.randn(2, 3, 2, 24, 16).unbind(0)
    length, done = torch.tensor([5, 0, 20]), torch.tensor([0, 0, 1], dtype=torch.int32)
    for row, live in enumerate([5, 0, 0]):
        keys[row, :, live:] = values[row, :, live:] = torch.nan
    out = decode_step.attend(query, key, value, keys, values, length, done, block=8, warps=1, stages=1).view(3, 2, 16)
    for row, live in enumerate([5, 0]):
        seen_keys = torch.cat([keys[row, :, :live], key[row].view(2, 1, 16)], dim=1)
        seen_values = torch.cat([values[row, :, :live], value[row].view(2, 1, 16)], dim=1)
        weights = (seen_keys @ query[row].view(2, 16, 1) / 4).softmax(1)
        torch.testing.assert_close(out[row], (weights * seen_values).sum(1))
        assert torch.equal(keys[row, :, live], key[row].view(2, 16))
        assert torch.equal(values[row, :, live], value[row].view(2, 16))
    assert torch.isfinite(out).all()


def test_the_kernel_of_sums_and_norms():
    x, residual = torch.randn(2, 5, 24, generator=torch.Generator().manual_seed(0)).unbind(0)
    norm = network_of(opt(hidden_size=24, word_embed_proj_dim=24)).layers[0].after_attention
    total, normed = decode_step.add_norm(x, residual, norm)
    assert torch.equal(total, x + residual)
    expected = (total - total.mean(1, keepdim=True)) / (
        total.var(1, unbiased=False, keepdim=True) + 1e-5
    ).sqrt() * norm.weight + norm.bias
    torch.testing.assert_close(normed, expected)


def test_a_gpu_feeds_prompts_by_the_kernel_of_sum_and_norm(monkeypatch):
    model, prompts, rows = opt(), some_prompts(3), []
    plain = decoder(model)
    add_norm = decode_step.add_norm
    monkeypatch.setattr(decode_step, "add_norm", lambda x, *others: rows.append(len(x)) or add_norm(x, *others))
    quick = decoder(model, use_kernels=True)
    for instance in (plain, quick):
        instance.begin(draw_uniforms(7, range(3), 12))
        instance.prefill(range(3), range(3), prompts)
    assert rows == [3 * max(map(len, prompts))] * 2 + [3, 3]  # of the last layer, the last tokens alone
    torch.testing.assert_close(quick.keys, plain.keys)
    assert torch.equal(quick.state.tokens, plain.state.tokens)
