"""Test sampling: its distribution, equal answers in any batch, log-probs as by a plain forward."""

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM

from jobs.errors import ToolkitError
from rlhf_train.generation import rollout
from rlhf_train.generation.decoder import Decoder, Sampling, draw
from rlhf_train.generation.rollout import Rollouts, draw_uniforms

pytestmark = pytest.mark.pinned

PAD, EOS, VOCABULARY = 1, 2, 40


@pytest.fixture(scope="module", params=["opt", "opt-post-norm", "llama"])
def model(request):
    torch.manual_seed(0)
    if request.param == "llama":
        config = LlamaConfig(
            vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            intermediate_size=64, max_position_embeddings=64, initializer_range=0.2,
            pad_token_id=PAD, bos_token_id=EOS, eos_token_id=EOS,
        )  # fmt: skip
        return LlamaForCausalLM(config).eval()
    shape = (
        {"do_layer_norm_before": False, "word_embed_proj_dim": 16}
        if request.param == "opt-post-norm"
        else {"word_embed_proj_dim": 32}
    )
    config = OPTConfig(
        vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, ffn_dim=64,
        max_position_embeddings=64, dropout=0.0, init_std=0.2,
        pad_token_id=PAD, bos_token_id=EOS, eos_token_id=EOS, **shape,
    )  # fmt: skip
    return OPTForCausalLM(config).eval()


def small_opt():
    """OPT of 2 layers and 32 units."""
    torch.manual_seed(0)
    config = OPTConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        word_embed_proj_dim=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        ffn_dim=64,
    )
    return OPTForCausalLM(config).eval()


def rollouts(model, *, batch=8, max_tokens=12, temperature=1.0, **others):
    return Rollouts(
        model,
        stop_ids=[EOS],
        pad_id=PAD,
        max_tokens=max_tokens,
        temperature=temperature,
        batch=batch,
        device=torch.device("cpu"),
        **others,
    )


def sample(logits, uniform, **limits):
    return draw(logits, uniform, Sampling(**limits))[0]


def some_prompts(count=7):
    rng = np.random.RandomState(0)
    return [np.concatenate([[EOS], rng.randint(3, VOCABULARY, rng.randint(1, 9))]) for _ in range(count)]


def test_answers_do_not_depend_on_company_batch_or_order(model):
    prompts, ids = some_prompts(), [3, 14, 15, 92, 6, 5, 35]
    together = rollouts(model, batch=8).generate(prompts, seed=7, row_ids=ids)
    assert len({len(p) for p in prompts}) > 2  # left padding is at work
    for batch in (1, 3):
        again = rollouts(model, batch=batch).generate(prompts, seed=7, row_ids=ids)
        assert all(np.array_equal(a, b) for a, b in zip(together.tokens, again.tokens, strict=True))
    backwards = rollouts(model).generate(prompts[::-1], seed=7, row_ids=ids[::-1])
    assert all(np.array_equal(a, b) for a, b in zip(together.tokens, backwards.tokens[::-1], strict=True))
    other = rollouts(model).generate(prompts, seed=8, row_ids=ids)
    assert any(not np.array_equal(a, b) for a, b in zip(together.tokens, other.tokens, strict=True))


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_log_probs_are_those_of_a_plain_forward(model, temperature):
    """Row by row, without padding or cache, through Hugging Face's own forward."""
    prompts = some_prompts()
    made = rollouts(model, temperature=temperature).generate(prompts, seed=1, row_ids=list(range(7)))
    for prompt, tokens, log_probs in zip(prompts, made.tokens, made.log_probs, strict=True):
        with torch.no_grad():
            logits = (
                model(torch.tensor(np.concatenate([prompt, tokens]))[None]).logits[0, len(prompt) - 1 : -1]
                / temperature
            )
        expected = logits.log_softmax(-1)[torch.arange(len(tokens)), torch.from_numpy(tokens)]
        np.testing.assert_allclose(log_probs, expected.numpy(), atol=1e-4)


def test_a_response_stops_at_its_first_eos_or_at_the_limit(model):
    made = rollouts(model, max_tokens=12).generate(some_prompts(40), seed=3, row_ids=list(range(40)))
    assert made.ended.any()
    assert not made.ended.all()
    for tokens, ended in zip(made.tokens, made.ended, strict=True):
        assert (tokens[-1] == EOS) == ended
        assert EOS not in tokens[:-1]
        assert ended or len(tokens) == 12
    assert list(made.lengths) == [len(tokens) for tokens in made.tokens]


def test_greedy_limit_is_hugging_faces_greedy_search(model):
    """Near temperature 0 any uniform samples the likeliest token, as generate(do_sample=False)."""
    prompts = some_prompts()
    made = rollouts(model, temperature=1e-4).generate(prompts, seed=0, row_ids=list(range(7)))
    for prompt, tokens in zip(prompts, made.tokens, strict=True):
        ids = torch.from_numpy(prompt)[None]
        expected = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=12,
            pad_token_id=PAD,
            eos_token_id=EOS,
        )
        assert tokens.tolist() == expected[0, len(prompt) :].tolist()


def test_training_mode_is_given_back(model):
    model.train()
    rollouts(model).generate(some_prompts(1), seed=0, row_ids=[0])
    assert model.training
    model.eval()


def test_sample_inverts_the_distribution():
    logits = torch.log(torch.tensor([[0.1, 0.2, 0.0, 0.7]])).repeat(7, 1)
    uniform = torch.tensor([0.0, 0.0999, 0.1001, 0.2999, 0.3001, 0.99, 1 - 2**-53], dtype=torch.float64)
    assert sample(logits, uniform).tolist() == [0, 0, 1, 1, 3, 3, 3]


def test_samples_follow_the_softmax():
    """Chi-square over 50,000 draws of 12 tokens stays below the 0.999 quantile of 11 degrees."""
    torch.manual_seed(0)
    logits, draws = torch.randn(12), 50_000
    numbers = draw_uniforms(5, range(draws), 1)[:, 0]
    counts = torch.bincount(sample(logits.expand(draws, -1), numbers), minlength=12).double()
    expected = logits.double().softmax(-1) * draws
    assert ((counts - expected).square() / expected).sum().item() < 31.26


def test_numbers_belong_to_seed_row_and_position():
    ours = draw_uniforms(7, [4, 9], 5)
    assert torch.equal(ours[1], draw_uniforms(7, [9], 5)[0])
    assert torch.equal(ours[:, :3], draw_uniforms(7, [4, 9], 3))
    assert not torch.equal(ours[0], ours[1])
    assert not torch.equal(ours, draw_uniforms(8, [4, 9], 5))
    assert ours.min() >= 0
    assert ours.max() < 1
    assert draw_uniforms(7, [], 5).shape == (0, 5)  # a rank without a prompt


class SmallGpu:
    """The model on a GPU with memory for `rows` concurrent rows."""

    def __init__(self, model, rows):
        self.model, self.rows = model, rows

    def __getattr__(self, name):
        return getattr(self.model, name)

    def base_model(self, input_ids, **others):
        if len(input_ids) > self.rows:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return self.model.base_model(input_ids=input_ids, **others)


def test_where_memory_runs_out_fewer_are_generated_at_once_with_the_same_answers(model):
    prompts, ids = some_prompts(), list(range(7))
    expected = rollouts(model, batch=8).generate(prompts, seed=7, row_ids=ids)
    small = rollouts(model, batch=8, is_static=False)
    small.model = SmallGpu(model, 2)
    found = small.generate(prompts, seed=7, row_ids=ids)
    assert small.batch == 1  # of 8, for 7 prompts: 3, then 1
    assert all(np.array_equal(a, b) for a, b in zip(expected.tokens, found.tokens, strict=True))
    assert expected.ended.tolist() == found.ended.tolist()


def test_a_rollout_that_ran_out_of_memory_leaves_the_next_one_its_room(monkeypatch):
    """20 GiB are free, training needs 5 of them, and the failed rollout's peak is the whole GPU."""
    model = small_opt()
    prompts, ids = some_prompts(), list(range(7))
    expected = rollouts(model).generate(prompts, seed=7, row_ids=ids)
    gib, peaks, made = 2**30, [65 * 2**30], []
    for name, number in (("mem_get_info", lambda _: (10 * gib, 80 * gib)), ("memory_reserved", lambda _: 70 * gib)):
        monkeypatch.setattr(torch.cuda, name, number)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: 60 * gib)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda _: peaks[-1])

    class Tight(Decoder):
        def __init__(self, *others, slots, **more):
            made.append(slots)
            super().__init__(*others, slots=slots, **more)

        def advance(self, count, width, steps):
            if count > 3:
                peaks.append(80 * gib)
                raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
            super().advance(count, width, steps)

    monkeypatch.setattr(rollout, "Decoder", Tight)
    tight = rollouts(model, warn=pytest.fail)
    tight.device = torch.device("cuda")
    found = tight.generate(prompts, seed=7, row_ids=ids)
    assert made == [7, 3] and tight.batch == 3
    assert all(np.array_equal(a, b) for a, b in zip(expected.tokens, found.tokens, strict=True))


def test_the_cache_is_made_of_what_training_leaves(monkeypatch):
    """Of 11 free GiB 1 is always left and training needs 4: 6 GiB are three caches of 2 GiB."""
    model = small_opt()
    slot_bytes = 2 * 2 * 32 * 64 * 4  # keys and values of 2 layers, 32 units, 64 tokens, 4 bytes
    unit, warnings = slot_bytes // 2, []
    for name, number in (
        ("mem_get_info", (3 * unit + rollout.SPARE_BYTES, 0)),
        ("memory_reserved", 30 * unit),
        ("memory_allocated", 23 * unit),
    ):
        monkeypatch.setattr(torch.cuda, name, lambda _, number=number: number)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda _: 27 * unit)
    few = rollouts(model, warn=warnings.append)
    few.device = torch.device("cuda")
    few.generate(some_prompts(), seed=7, row_ids=list(range(7)))
    assert warnings == ["the GPU has free memory for 3 concurrent answers, not for 7: rollouts are slower"]


def test_where_not_even_one_fits(model):
    small = rollouts(model, batch=4, is_static=False)
    small.model = SmallGpu(model, 0)
    with pytest.raises(ToolkitError, match="out of memory in a rollout with one prompt at a time"):
        small.generate(some_prompts(), seed=7, row_ids=list(range(7)))


def test_asked_to_stop_it_stops_within_a_token(model):
    tokens = []
    asked = rollouts(model, batch=1, beat=lambda: tokens.append(1), is_asked_to_stop=lambda: len(tokens) >= 3)
    asked.generate(some_prompts(), seed=7, row_ids=list(range(7)))
    assert len(tokens) == 3
