"""Compare Triton's kernels of the decode step with plain PyTorch, in Triton's interpreter on a CPU.

tests/conftest.py switches the interpreter on.
"""

import pytest
import torch
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from rlhf_train.generation.decoder import Sampling
from rlhf_train.generation.families.known import network_of
from rlhf_train.generation.rollout import draw_uniforms
from rlhf_train.kernels import decode_step
from rlhf_train.kernels.decoder_weights import Norm
from tests.rlhf_train.generation.families import test_llama_like as llama_like
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
    query, key, value = torch.randn(3, 3, 2, 16).unbind(0)
    keys, values = torch.randn(2, 3, 2, 24, 16).unbind(0)
    length, done = torch.tensor([5, 0, 20]), torch.tensor([0, 0, 1], dtype=torch.int32)
    for row, live in enumerate([5, 0, 0]):
        keys[row, :, live:] = values[row, :, live:] = torch.nan
    tiles = {"scale": 0.25, "block": 8, "warps": 1, "stages": 1}
    out = decode_step.attend(query, key, value, keys, values, length, done, **tiles).view(3, 2, 16)
    for row, live in enumerate([5, 0]):
        seen_keys = torch.cat([keys[row, :, :live], key[row].view(2, 1, 16)], dim=1)
        seen_values = torch.cat([values[row, :, :live], value[row].view(2, 1, 16)], dim=1)
        weights = (seen_keys @ query[row].view(2, 16, 1) / 4).softmax(1)
        torch.testing.assert_close(out[row], (weights * seen_values).sum(1))
        assert torch.equal(keys[row, :, live], key[row].view(2, 16))
        assert torch.equal(values[row, :, live], value[row].view(2, 16))
    assert torch.isfinite(out).all()


def formula(query, key, value, keys, values, lengths, window):
    """Attention of one new token a slot, slot by slot and head by head, in float64."""
    out = torch.zeros(query.shape, dtype=torch.float64)
    groups = query.shape[1] // key.shape[1]
    for slot, length in enumerate(lengths):
        for head in range(query.shape[1]):
            shared = head // groups
            seen = [(keys[slot, shared, t], values[slot, shared, t]) for t in range(length)]
            seen = [*seen, (key[slot, shared], value[slot, shared])][-window if window else 0 :]
            k, v = (torch.stack(part).double() for part in zip(*seen, strict=True))
            out[slot, head] = (k @ query[slot, head].double() * 0.2).softmax(0) @ v
    return out.float()


# Heads, heads of keys, numbers of a head; as of SmolLM2 (9 on 3), Qwen2.5-0.5B (14 on 2), -1.5B (12
# on 2), Qwen3 (2 on 1) and Llama-3.2 (32 on 8).
SHAPES = [(2, 2, 128), (2, 1, 128), (8, 2, 64), (6, 2, 64), (12, 2, 128), (7, 1, 64), (8, 1, 64), (20, 1, 16)]


@pytest.mark.parametrize("parts", [1, 4])
@pytest.mark.parametrize(("heads", "key_heads", "size"), SHAPES)
def test_heads_that_share_keys(heads, key_heads, size, parts):
    """With tokens shared between programs, of which some have none."""
    torch.manual_seed(0)
    joined = torch.randn(3, (heads + 2 * key_heads) * size)  # rows lie apart, as in one product of all three
    query, key, value = (
        part.view(3, -1, size) for part in joined.split([heads * size, key_heads * size, key_heads * size], dim=1)
    )
    keys, values = torch.randn(2, 3, key_heads, 40, size).unbind(0)
    lengths, done = torch.tensor([33, 0, 6]), torch.tensor([0, 0, 0], dtype=torch.int32)
    kept = keys.clone()
    for window in (None, 7):
        expected = formula(query, key, value, keys, values, lengths.tolist(), window)
        out = decode_step.attend(
            query, key, value, keys, values, lengths, done,
            scale=0.2, block=16, warps=1, stages=1, parts=parts, window=window,
        )  # fmt: skip
        torch.testing.assert_close(out.view(expected.shape), expected, atol=1e-5, rtol=1e-5)
    for slot, length in enumerate(lengths):
        assert torch.equal(keys[slot, :, length], key[slot])
        assert torch.equal(values[slot, :, length], value[slot])
        kept[slot, :, length] = key[slot]
    assert torch.equal(keys, kept)


@pytest.mark.parametrize(("heads", "key_heads"), [(2, 2), (6, 2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_heads_are_normed_and_rotated_as_the_model_does(heads, key_heads, dtype):
    """Against transformers' own functions, with and without a norm; a slot has no earlier token.

    Its answer is then the value; what is compared is the key that is written, and the query by the
    answer of a slot with earlier tokens. In 16 bit with float16: the interpreter does not round
    bfloat16.
    """
    modeling = pytest.importorskip("transformers.models.llama.modeling_llama")
    torch.manual_seed(1)
    query, key, value = (torch.randn(2, n, 16).to(dtype) for n in (heads, key_heads, key_heads))
    keys, values = torch.randn(2, 2, key_heads, 8, 16).to(dtype).unbind(0)
    lengths, done = torch.tensor([0, 3]), torch.zeros(2, dtype=torch.int32)
    angles = torch.tensor([[5.0], [9.0]]) / 10 ** torch.linspace(0, 2, 8)
    cosine, sine = (torch.cat([part, part], -1).to(dtype) for part in (angles.cos(), angles.sin()))
    rotation = (cosine[:, None], torch.cat([-sine[:, :8], sine[:, 8:]], -1)[:, None])
    own = [modeling.LlamaRMSNorm(16, 1e-5).to(dtype) for _ in range(2)]
    for norm in own:
        norm.weight.data = torch.randn(16).to(dtype)
    norms = [Norm(norm.weight.data, None, 1e-5) for norm in own]
    for with_norms in (False, True):
        q, k = (own[0](query), own[1](key)) if with_norms else (query, key)
        q, k = modeling.apply_rotary_pos_emb(q, k, cosine, sine, unsqueeze_dim=1)
        expected = formula(q.detach(), k.detach(), value, keys, values, [0, 3], None)
        out = decode_step.attend(
            query, key, value, keys, values, lengths, done, scale=0.2, block=16, warps=1, stages=1,
            rotation=rotation, norms=norms if with_norms else None,
        )  # fmt: skip
        exact, limit = (1e-6, 1e-5) if dtype == torch.float32 else (0, 2e-2)
        torch.testing.assert_close(keys[[0, 1], :, lengths], k.detach(), atol=exact, rtol=exact)
        torch.testing.assert_close(out.view(expected.shape).float(), expected, atol=limit, rtol=limit)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_kernel_of_rms_norms_rounds_as_llama(dtype):
    modeling = pytest.importorskip("transformers.models.llama.modeling_llama")
    torch.manual_seed(2)
    x, residual, weight = (torch.randn(*shape).to(dtype) for shape in ((5, 40), (5, 40), (40,)))
    own = modeling.LlamaRMSNorm(40, 1e-5)
    own.weight.data = weight
    total, normed = decode_step.add_norm(x, residual, Norm(weight, None, 1e-5))
    assert torch.equal(total, x + residual)
    exact = {"atol": 0, "rtol": 0} if dtype == torch.float16 else {"atol": 1e-6, "rtol": 1e-6}
    torch.testing.assert_close(normed, own(x + residual).detach(), **exact)
    same, alone = decode_step.add_norm(x, None, Norm(weight, None, 1e-5))
    assert same is x
    torch.testing.assert_close(alone, own(x).detach(), **exact)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_kernel_of_gates(dtype):
    joined = torch.randn(3, 2 * 1500, generator=torch.Generator().manual_seed(0)).to(dtype)
    gate, up = joined.chunk(2, dim=-1)
    out = decode_step.silu_times(gate, up)
    exact = {"atol": 1e-4, "rtol": 1e-3} if dtype == torch.float16 else {"atol": 1e-6, "rtol": 1e-6}
    torch.testing.assert_close(out, torch.nn.functional.silu(gate) * up, **exact)


@pytest.mark.parametrize("name", ["groups of 3", "norms, wide heads", "no positions", "factors"])
def test_the_kernels_draw_what_plain_torch_draws_of_llama_like_models(name, monkeypatch):
    family, more = llama_like.MODELS[name]
    if family not in CONFIG_MAPPING:
        pytest.skip(f"this transformers has no {family}")
    monkeypatch.setattr(decode_step, "VOCABULARY_BLOCK", 32)
    model, prompts = (
        llama_like.make(family, **more | {"head_dim": 16, "num_hidden_layers": 2}),
        llama_like.some_prompts(2),
    )
    how = {"limit": 4, "stop_ids": [llama_like.EOS, llama_like.STOP, 40, 41, 42]}
    plain, triton = (answers(model, prompts, **how, use_kernels=use) for use in (False, True))
    assert torch.equal(plain.tokens[:, :-1], triton.tokens[:, :-1])
    assert torch.equal(plain.length, triton.length)
    written = plain.tokens[:, :-1] != 0
    close = {"atol": 1e-5, "rtol": 1e-5}
    torch.testing.assert_close(plain.log_probs[:, :-1] * written, triton.log_probs[:, :-1] * written, **close)


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
    # The first norm, two of the first layer, and of the last layer the last tokens alone.
    assert rows == [3 * max(map(len, prompts))] * 3 + [3, 3]
    torch.testing.assert_close(quick.keys, plain.keys)
    assert torch.equal(quick.state.tokens, plain.state.tokens)
