"""oneDNN's products against PyTorch's own, on any CPU; and where they are taken."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import OPTConfig, OPTForCausalLM

from jobs.spec import Lora, Scratch
from rlhf_train import compat, host
from rlhf_train.generation.families.known import network_of
from rlhf_train.kernels import cpu_matmul
from rlhf_train.models.adapters import add_lora
from rlhf_train.models.log_probs import label_log_probs
from rlhf_train.models.networks import load_causal, load_scorer, train_tokenizer
from tests import tiny

AMD = "vendor_id\t: AuthenticAMD\nmodel name\t: AMD EPYC\nflags\t\t: fpu sse2 avx2"


@pytest.fixture
def calls(monkeypatch):
    """As on a CPU where oneDNN is quicker: the shapes that it was called with."""
    made, run = [], compat.onednn_linear
    monkeypatch.setattr(cpu_matmul, "is_quicker_by_onednn", lambda: True)
    monkeypatch.setattr(
        compat, "onednn_linear", lambda x, weight, bias: made.append((*x.shape, len(weight))) or run(x, weight, bias)
    )
    return made


def numbers(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("frozen", [(), ("weight",), ("x",)])
def test_a_layer_and_its_gradients(with_bias, frozen, calls):
    def run(linear):
        tensors = {"x": numbers(2, 100, 96), "weight": numbers(64, 96, seed=1)} | (
            {"bias": numbers(64, seed=2)} if with_bias else {}
        )
        for name, tensor in tensors.items():
            tensor.requires_grad_(name not in frozen)
        y = linear(tensors["x"], tensors["weight"], tensors.get("bias"))
        y.transpose(1, 2).backward(numbers(2, 64, 100, seed=3))  # a gradient that is not contiguous
        return [y.detach(), *(tensor.grad for tensor in tensors.values())]

    for found, expected in zip(run(cpu_matmul.linear), run(F.linear), strict=True):
        assert (found is None) == (expected is None)
        if expected is not None:
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)
    assert calls == [
        shape
        for name, shape in (("", (200, 96, 64)), ("x", (200, 64, 96)), ("weight", (64, 200, 96)))
        if name not in frozen
    ]


def test_a_product_of_what_lies_in_any_order(calls):
    a, b = numbers(96, 128), numbers(96, 256, seed=1)
    torch.testing.assert_close(cpu_matmul.product(a.T, b.T), a.T @ b, rtol=1e-5, atol=1e-4)
    turned = cpu_matmul.product(b.T, a.T)
    torch.testing.assert_close(turned, b.T @ a, rtol=1e-5, atol=1e-4)
    assert turned.is_contiguous() and calls == [(128, 96, 256)] * 2  # the larger one is not copied


@pytest.mark.parametrize("frozen", ["x", "weight"])
def test_what_is_frozen_keeps_nothing_for_the_backward_pass(frozen, calls):
    tensors = {"x": numbers(200, 96), "weight": numbers(64, 96, seed=1)}
    tensors["weight" if frozen == "x" else "x"].requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: kept.append(tensor.shape) or tensor, lambda tensor: tensor
    ):
        cpu_matmul.linear(tensors["x"], tensors["weight"], None)
    assert kept == [tensors[frozen].shape] and len(calls) == 1


def test_small_products_and_other_numbers_are_pytorchs_own(calls):
    small, large = numbers(15, 256), numbers(256, 256, seed=1)
    assert cpu_matmul.product(small, large).equal(small @ large.T)
    assert cpu_matmul.linear(large.bfloat16(), large.bfloat16(), None).equal(
        F.linear(large.bfloat16(), large.bfloat16())
    )
    partitioned = nn.Parameter(large.clone())
    partitioned.ds_id = 0  # as ZeRO-3 marks what it takes away
    assert cpu_matmul.linear(large, partitioned, None).equal(F.linear(large, partitioned))
    assert calls == []


@pytest.mark.pinned
@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (f"{AMD} avx512f", True),
        (AMD, False),
        (f"{AMD} avx512f".replace("AuthenticAMD", "GenuineIntel"), False),
        ("", False),
    ],
)
def test_it_is_taken_on_amds_cpus_with_avx512_alone(text, expected, monkeypatch):
    monkeypatch.setattr(host, "cpu_text", lambda: text)
    assert cpu_matmul.is_quicker_by_onednn.__wrapped__() == (expected and compat.has_onednn_linear())


@pytest.mark.parametrize("with_adapter", [False, True])
def test_all_of_a_model_but_its_head(with_adapter, calls):
    torch.manual_seed(0)
    shape = {
        "hidden_size": 64,
        "word_embed_proj_dim": 64,
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "ffn_dim": 128,
    }
    plain = OPTForCausalLM(OPTConfig(vocab_size=70, max_position_embeddings=96, dropout=0.0, init_std=0.2, **shape))
    taken = cpu_matmul.use_in(copy.deepcopy(plain))
    assert type(taken.lm_head) is nn.Linear and type(plain.model.decoder.layers[0].fc1) is nn.Linear
    assert list(taken.state_dict()) == list(plain.state_dict())
    if with_adapter:
        for model in (plain, taken):
            add_lora(model, Lora(rank=4), seed=0)
    ids = torch.randint(3, 70, (6, 90), generator=torch.Generator().manual_seed(0))
    for model in (plain, copy.deepcopy(taken)):
        model(input_ids=ids, labels=ids).loss.backward()
        if model is plain:
            assert calls == []
            expected = {
                name: parameter.grad for name, parameter in plain.named_parameters() if parameter.grad is not None
            }
    assert len(calls) > 2 * 6  # six products a layer forward, and those of the backward pass
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(parameter.grad, expected.pop(name), rtol=1e-4, atol=1e-5)
    assert not expected


@pytest.mark.parametrize("load", [load_causal, load_scorer])
def test_every_network_is_loaded_so(load, calls):
    model = load(Scratch(config=tiny.OPT), train_tokenizer(tiny.WORDS, 320), torch.float32, 0)
    assert {type(module) for module in model.base_model.modules() if isinstance(module, nn.Linear)} == {
        cpu_matmul.CpuLinear
    }


def test_the_head_and_rollouts_take_it_too(calls):
    head, states = nn.Linear(128, 256, bias=False), numbers(64, 128).requires_grad_()
    label_log_probs(states, torch.arange(64), head, 256)[0].sum().backward()
    # Logits, and the gradients of states and weight.
    assert sorted(calls) == [(64, 128, 256), (64, 256, 128), (128, 64, 256)]
    calls.clear()
    network = network_of(
        OPTForCausalLM(
            OPTConfig(
                vocab_size=256,
                hidden_size=128,
                word_embed_proj_dim=128,
                num_hidden_layers=1,
                num_attention_heads=4,
                ffn_dim=128,
            )
        )
    )
    with torch.no_grad():
        network.head(states)
    assert calls == [(64, 128, 256)]
