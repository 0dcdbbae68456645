"""Test the static decoder: its parts against plain formulas and slow twins, its slots, its kernels.

Triton's kernels run in their interpreter.
"""

import numpy as np
import pytest
import torch
from transformers import OPTConfig, OPTForCausalLM

from rlhf_train.generation import decoder as decoder_module
from rlhf_train.generation import rollout
from rlhf_train.generation.decoder import Decoder, Sampling, State, draw
from rlhf_train.generation.families.known import network_of
from rlhf_train.generation.rollout import FinishedSlots, Rollouts, Slots, draw_uniforms, fewer_slots
from rlhf_train.kernels import decode_step

pytestmark = pytest.mark.pinned

PAD, EOS, VOCABULARY = 1, 2, 70


def opt(**shape):
    torch.manual_seed(0)
    config = OPTConfig(
        vocab_size=VOCABULARY, num_hidden_layers=2, num_attention_heads=2, ffn_dim=64, max_position_embeddings=96,
        dropout=0.0, init_std=0.2, pad_token_id=PAD, bos_token_id=EOS, eos_token_id=EOS,
        **{"hidden_size": 32, "word_embed_proj_dim": 32} | shape,
    )  # fmt: skip
    model = OPTForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:  # biases and norms start at 0 and 1, which would hide a lost one
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))))
    return model


def some_prompts(count=7, longest=9):
    rng = np.random.RandomState(0)
    return [np.concatenate([[EOS], rng.randint(3, VOCABULARY, rng.randint(1, longest))]) for _ in range(count)]


def decoder(model, **others):
    arguments = {"slots": 3, "width": 48, "rows": 7, "limit": 12, "sampling": Sampling(), "stop_ids": [EOS]} | others
    return Decoder(network_of(model), **arguments)


def rollouts(model, *, batch=8, max_tokens=12, **others):
    return Rollouts(
        model,
        stop_ids=[EOS],
        pad_id=PAD,
        max_tokens=max_tokens,
        temperature=1.0,
        batch=batch,
        device=torch.device("cpu"),
        **others,
    )


def answers(model, prompts, *, limit=12, stop_ids=(EOS,), **others):
    """Answer all prompts in one batch, without a scheduler."""
    made = decoder(model, slots=len(prompts), rows=len(prompts), limit=limit, stop_ids=stop_ids, **others)
    made.begin(draw_uniforms(7, range(len(prompts)), limit))
    made.prefill(range(len(prompts)), range(len(prompts)), prompts)
    for step in range(limit - 1):
        made.advance(len(prompts), max(map(len, prompts)) + step + 1, 1)
    return made.state


def test_adjacent_weights_are_one_product(monkeypatch):
    """DeepSpeed lays them out so: all matrices in one flat buffer, all vectors in another."""
    model, prompts = opt(), some_prompts()
    apart = answers(model, prompts)
    assert network_of(model).layers[0].joined is None
    for is_matrix in (True, False):
        parts = [p for p in model.parameters() if (p.ndim == 2) == is_matrix]
        flat = torch.cat([p.data.flatten() for p in parts])
        for part, view in zip(parts, flat.split([p.numel() for p in parts]), strict=True):
            part.data = view.view(part.shape)
    joined = network_of(model).layers[0].joined
    assert joined.weight.shape == (96, 32)
    assert torch.equal(joined.weight[:32], model.model.decoder.layers[0].self_attn.k_proj.weight)
    assert torch.equal(joined.bias[64:], model.model.decoder.layers[0].self_attn.q_proj.bias)
    assert joined.weight.data_ptr() == model.model.decoder.layers[0].self_attn.k_proj.weight.data_ptr()
    assert torch.equal(answers(model, prompts).tokens, apart.tokens)


def test_it_generates_with_the_weights_of_the_moment():
    model, prompts = opt(), some_prompts()
    made = rollouts(model)
    before = made.generate(prompts, seed=1, row_ids=range(7))
    first = made._decoder
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.5)  # in place, as an optimizer does
    expected = rollouts(model, is_static=False).generate(prompts, seed=1, row_ids=range(7))
    after = made.generate(prompts, seed=1, row_ids=range(7))
    assert made._decoder is first
    assert any(not np.array_equal(a, b) for a, b in zip(before.tokens, after.tokens, strict=True))
    assert all(np.array_equal(a, b) for a, b in zip(expected.tokens, after.tokens, strict=True))
    weight = model.model.decoder.layers[1].fc1.weight
    weight.data = weight.data.clone()  # another place in memory
    again = made.generate(prompts, seed=1, row_ids=range(7))
    assert made._decoder is not first
    assert all(np.array_equal(a, b) for a, b in zip(expected.tokens, again.tokens, strict=True))


def test_a_prompt_does_not_wait_for_the_longest_answer():
    """3 slots serve 20 prompts: a finished answer's slot takes the next, and answers are equal."""
    model, prompts, fed = opt(), some_prompts(20), []
    made = rollouts(model, batch=3, beat=lambda: fed.append(1))
    together = made.generate(prompts, seed=3, row_ids=range(20))
    lengths = together.lengths
    assert lengths.min() < lengths.max() == 12
    assert len(fed) < sum(
        lengths[order].max() for order in np.array_split(np.argsort([len(p) for p in prompts], kind="stable"), 7)
    )
    for place in (0, 7, 19):
        alone = made.generate([prompts[place]], seed=3, row_ids=[place])
        assert np.array_equal(alone.tokens[0], together.tokens[place])


class Late(FinishedSlots):
    """As on a GPU: each look returns the result of the look before."""

    def check(self, count):
        self._asked.append((self.made, self._finished[:count].bool().tolist()))
        self.made += 1
        return self._asked.pop(0) if len(self._asked) > 1 else (-1, [])


@pytest.mark.parametrize(("slots", "limit"), [(3, 12), (20, 12), (40, 11), (6, 1)])
def test_answers_are_the_same_where_the_host_is_behind(slots, limit, monkeypatch):
    """With several tokens between late looks, slots are still filled again and answers moved."""
    model, prompts = opt(), some_prompts(40)
    common = {"max_tokens": limit, "batch": slots}
    expected = rollouts(model, **common, is_static=False).generate(prompts, seed=3, row_ids=range(40))
    monkeypatch.setitem(rollout.STEPS, "cpu", 3)
    monkeypatch.setattr(rollout, "FinishedSlots", Late)
    behind = rollouts(model, **common)
    for _ in range(2):  # nothing is left over from the first
        found = behind.generate(prompts, seed=3, row_ids=range(40))
        assert all(np.array_equal(a, b) for a, b in zip(expected.tokens, found.tokens, strict=True))
        assert expected.ended.tolist() == found.ended.tolist()


def test_no_prompts_no_answers():
    """A rank can have none."""
    made = rollouts(opt(), batch=3).generate([], seed=0, row_ids=[])
    assert (made.tokens, made.log_probs, list(made.ended)) == ([], [], [])


def test_slots_know_which_answers_a_look_was_about():
    slots = Slots(4, limit=20)
    slots.take([0, 1, 2], [5, 6, 7], looks=0)
    assert slots.grow(8) == 15
    assert (slots.free, slots.live, slots.width, slots.longest_left) == ([3], [0, 1, 2], 15, 11)
    slots.release(0, [True, False, False, True])
    assert slots.free == [0, 3]
    slots.take([0], [2], looks=2)  # look number 1 was asked before: it still tells of the old answer
    slots.release(1, [True, False, False, True])
    assert slots.live == [0, 1, 2]
    slots.release(2, [True, True, False, True])
    assert slots.live == [2]
    assert slots.shrink(2, looks=3) == ([2], [0])
    assert (slots.count, slots.live, slots.width) == (2, [0], 15)
    slots.release(2, [True, True])  # of the slots as they were before the move
    assert slots.live == [0]


def test_an_answer_at_its_limit_is_over_without_a_look():
    slots = Slots(2, limit=5)
    slots.take([0, 1], [3, 9], looks=0)
    assert slots.longest_left == 4
    assert slots.grow(3) == 12
    slots.take([1], [4], looks=0)
    assert slots.grow(1) == 7
    assert (slots.live, slots.longest_left) == ([1], 3)
    assert slots.grow(3) == 8
    assert not slots.live


def test_looks_on_a_cpu_are_of_now():
    done = torch.tensor([0, 1, 1], dtype=torch.int32)
    looks = FinishedSlots(done)
    assert looks.check(2) == (0, [False, True])
    done[0] = 1
    assert looks.check(3) == (1, [True, True, True])


@pytest.mark.parametrize(
    ("live", "count", "expected"),
    [(64, 64, 64), (63, 64, 64), (48, 64, 48), (33, 64, 48), (9, 64, 12), (1, 64, 8), (1, 4, 4), (513, 600, 600)],
)
def test_sizes_on_a_gpu_are_few(live, count, expected):
    assert fewer_slots(live, count, on_gpu=True) == expected


def test_sizes_on_a_cpu_follow_the_answers():
    assert [fewer_slots(live, 64, on_gpu=False) for live in (64, 49, 48, 1, 0)] == [64, 64, 48, 1, 1]


def test_top_k_and_top_p_leave_the_rest_out_of_the_draw():
    probabilities = torch.tensor([0.05, 0.4, 0.1, 0.3, 0.15])
    logits, uniform = probabilities.log().repeat(1000, 1), torch.arange(1000, dtype=torch.float64) / 1000
    for limits, kept in (
        ({"top_k": 2}, [1, 3]),
        ({"top_p": 0.71}, [1, 3, 4]),
        ({"top_p": 0.3}, [1]),
        ({"top_k": 3, "top_p": 0.5}, [1, 3]),
    ):
        tokens, log_probs = draw(logits, uniform, Sampling(**limits))
        counts = torch.bincount(tokens, minlength=5)
        expected = torch.zeros(5)
        expected[kept] = probabilities[kept] / probabilities[kept].sum() * 1000
        torch.testing.assert_close(counts.float(), expected, atol=1.01, rtol=0)
        # Log-probs are of the whole distribution, as the trainer computes them.
        torch.testing.assert_close(log_probs, probabilities.log()[tokens])


class NoStream:
    """As a GPU on which a capture fails."""

    def __init__(self, error):
        self.error = error

    def __call__(self):
        raise self.error


def test_a_failed_capture_falls_back_with_a_warning(monkeypatch):
    model, prompts, warnings = opt(), some_prompts(), []
    expected = answers(model, prompts)
    made = decoder(model, slots=7, warn=warnings.append)
    made.begin(draw_uniforms(7, range(7), 12))
    made.prefill(range(7), range(7), prompts)
    made._graphs = {}
    monkeypatch.setattr(
        torch.cuda, "Stream", NoStream(RuntimeError("operation not permitted when stream is capturing\nmore"))
    )
    for step in range(11):
        made.advance(7, 9 + step + 1, 1)
    assert torch.equal(made.state.tokens[:, :-1], expected.tokens[:, :-1])
    assert len(warnings) == 1
    assert warnings[0].endswith("runs without: operation not permitted when stream is capturing")
    made._graphs = {}
    monkeypatch.setattr(torch.cuda, "Stream", NoStream(torch.cuda.OutOfMemoryError("CUDA out of memory")))
    with pytest.raises(torch.cuda.OutOfMemoryError):  # fewer concurrent prompts would help there
        made.advance(7, 20, 1)


def test_heads_that_are_no_power_of_two_go_without_kernels():
    assert decode_step.network_supported(network_of(opt()))
    odd = opt(hidden_size=48, word_embed_proj_dim=48)  # heads of 24 numbers; OPT-2.7b's have 80
    assert not decode_step.network_supported(network_of(odd))


def test_a_step_changes_nothing_of_a_slot_that_is_done():
    """What a warm-up before a capture relies on."""
    made = decoder(opt(), slots=4, rows=4)
    made.begin(draw_uniforms(7, range(4), 12))
    made.prefill(range(4), range(4), some_prompts(4))
    made.state.finished.fill_(1)
    kept = {name: getattr(made.state, name).clone() for name in State.__dataclass_fields__}
    made.advance(4, 20, 3)
    for name, before in kept.items():
        now = getattr(made.state, name)
        assert torch.equal(
            now[:, :-1] if name in ("tokens", "log_probs") else now,
            before[:, :-1] if name in ("tokens", "log_probs") else before,
        ), name


def test_attention_of_a_step_is_plain_attention():
    """5 slots hold 1 to 9 tokens in a cache of 12.

    float64 takes the way of a GPU without kernels, float32 that of a CPU; both follow the formula.
    """
    numbers = torch.Generator().manual_seed(0)
    query, lengths = torch.randn(5, 3, 8, generator=numbers, dtype=torch.float64), torch.tensor([1, 9, 4, 2, 7])
    keys, values = (torch.randn(5, 3, 12, 8, generator=numbers, dtype=torch.float64) for _ in range(2))
    bias = torch.zeros(5, 1, 1, 9, dtype=torch.float64).masked_fill(
        torch.arange(9) >= lengths[:, None, None, None], -torch.inf
    )
    expected = torch.empty_like(query)
    for slot, length in enumerate(lengths):
        for head in range(3):
            weights = (keys[slot, head, :length] @ query[slot, head] / 8**0.5).softmax(0)
            expected[slot, head] = weights @ values[slot, head, :length]
    torch.testing.assert_close(decoder_module._attend(query, keys, values, bias), expected, rtol=1e-12, atol=1e-12)
    single = decoder_module._attend(*(tensor.float() for tensor in (query, keys, values, bias)))
    torch.testing.assert_close(single, expected.float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("slots", [[1, 2, 3], [3, 0, 2]])
def test_prompts_go_into_the_slots_that_are_named(slots):
    """Side by side or scattered, and others keep what they have."""
    model, prompts = opt(), some_prompts(3)
    expected = decoder(model, slots=3)
    made = decoder(model, slots=5)
    made.keys.fill_(7.0)
    for instance, places in ((expected, [0, 1, 2]), (made, slots)):
        instance.begin(draw_uniforms(7, range(3), 12))
        instance.prefill(places, range(3), prompts)
    for row, slot in enumerate(slots):
        length = len(prompts[row])
        for cache, wanted in ((made.keys, expected.keys), (made.values, expected.values)):
            torch.testing.assert_close(cache[:, slot, :, :length], wanted[:, row, :, :length])
    assert (made.keys[:, [slot for slot in range(5) if slot not in slots]] == 7.0).all()
    assert torch.equal(made.state.tokens[:, 0], expected.state.tokens[:, 0])
