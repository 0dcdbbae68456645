"""Compare log-probs over a vocabulary with log_softmax in float64: values, gradients and memory."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from rlhf_train.models import log_probs
from rlhf_train.models.head import LogitTransform
from rlhf_train.models.log_probs import is_plain, label_log_probs

pytestmark = pytest.mark.pinned

TOKENS, WIDTH, VOCABULARY = 14, 8, 50


def case(dtype=torch.float32):
    """Hidden states, places, labels, a head and the gradient that comes from above."""
    draw = torch.Generator().manual_seed(0)
    head = nn.Linear(WIDTH, VOCABULARY, bias=False)
    head.weight.data.normal_(generator=draw)
    hidden = torch.randn(TOKENS, WIDTH, generator=draw).to(dtype).requires_grad_()
    index = torch.tensor([0, 1, 2, 5, 6, 9, 13])
    labels = torch.randint(0, VOCABULARY, (len(index),), generator=draw)
    return hidden, index, labels, head.to(dtype), torch.randn(len(index), generator=draw)


def twin(hidden, index, labels, head, above, temperature):
    """Return values, entropies, and gradients of hidden states and weight, in float64."""
    states, weight = (tensor.detach().double().requires_grad_() for tensor in (hidden, head.weight))
    every = F.log_softmax(states @ weight.T / temperature, dim=-1)[index]
    values = every[torch.arange(len(labels)), labels]
    (values * above).sum().backward()
    return values.detach(), -(every.exp() * every).sum(-1).detach(), states.grad, weight.grad


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("kept", ["all logits kept", "made again"])
@pytest.mark.parametrize("rows", [1, 3, 100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_values_and_gradients_are_those_of_log_softmax(monkeypatch, dtype, rows, kept, temperature):
    hidden, index, labels, head, above = case(dtype)
    monkeypatch.setattr(log_probs, "FLOAT32_BYTES", rows * 4 * VOCABULARY)
    if kept == "made again":
        monkeypatch.setattr(log_probs, "KEPT_BYTES", 2 * head.weight.element_size() * VOCABULARY)  # two rows
    assert is_plain(head, hidden)
    found, entropies = label_log_probs(hidden[index], labels, head, VOCABULARY, temperature, with_entropy=True)
    (found * above).sum().backward()
    assert found.dtype == entropies.dtype == torch.float32
    assert not entropies.requires_grad
    # bfloat16 has 8 bits: a logit of 8 is off by up to 1/32 nat, before it is divided by the
    # temperature.
    close = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 0.02, "atol": 0.05}
    for ours, theirs in zip(
        (found, entropies, hidden.grad, head.weight.grad),
        twin(hidden, index, labels, head, above, temperature),
        strict=True,
    ):
        torch.testing.assert_close(ours.double(), theirs, **close)


@pytest.mark.parametrize("scale", [0.25, 3.0])
def test_a_scale_of_the_logits_is_a_temperature_upside_down(scale):
    hidden, index, labels, head, above = case()
    transform = LogitTransform(scale)
    found, entropies = label_log_probs(hidden[index], labels, head, VOCABULARY, 0.7, True, transform)
    (found * above).sum().backward()
    every = F.log_softmax(scale * (hidden[index] @ head.weight.T).double() / 0.7, dim=-1)
    expected = every[torch.arange(len(labels)), labels]
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(entropies.double(), -(every.exp() * every).sum(-1), rtol=1e-5, atol=1e-5)
    of_hidden, of_weight = torch.autograd.grad((expected * above).sum(), (hidden, head.weight))
    torch.testing.assert_close(hidden.grad, of_hidden, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(head.weight.grad, of_weight, rtol=1e-4, atol=1e-5)


def test_a_head_that_is_more_than_its_weight_is_called():
    hidden, index, labels, head, above = case()
    wrapped = nn.Sequential(head)  # as an adapter's layer, it has the weight inside
    assert not is_plain(wrapped, hidden)
    assert not is_plain(nn.Linear(WIDTH, VOCABULARY), hidden)
    expected = twin(hidden, index, labels, head, above, 0.7)
    for module_bytes in (4 * VOCABULARY, 2**20):
        hidden.grad = head.weight.grad = None
        log_probs.MODULE_BYTES, whole = module_bytes, log_probs.MODULE_BYTES
        found, entropies = label_log_probs(hidden[index], labels, wrapped, VOCABULARY, 0.7, with_entropy=True)
        (found * above).sum().backward()
        log_probs.MODULE_BYTES = whole
        for ours, theirs in zip((found, entropies, hidden.grad, head.weight.grad), expected, strict=True):
            torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-5)


def test_only_what_is_trained_gets_a_gradient():
    hidden, index, labels, head, _ = case()
    head.weight.requires_grad_(False)
    label_log_probs(hidden[index], labels, head, VOCABULARY)[0].sum().backward()
    assert head.weight.grad is None
    assert hidden.grad.abs().sum() > 0
    with torch.no_grad():
        assert not label_log_probs(hidden[index], labels, head, VOCABULARY)[0].requires_grad


class Largest(TorchDispatchMode):
    """The most numbers that a float32 tensor had."""

    def __init__(self):
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        found = [
            tensor.numel()
            for tensor in tree_flatten(out)[0]
            if isinstance(tensor, torch.Tensor) and tensor.dtype == torch.float32
        ]
        self.numbers = max([self.numbers, *found])
        return out


def test_no_float32_tensor_holds_the_logits(monkeypatch):
    hidden, index, labels, head, above = case(torch.bfloat16)
    monkeypatch.setattr(log_probs, "FLOAT32_BYTES", 2 * 4 * VOCABULARY)
    with Largest() as largest:
        values, _ = label_log_probs(hidden[index], labels, head, VOCABULARY, 0.7, with_entropy=True)
        (values * above).sum().backward()
    assert largest.numbers == 2 * VOCABULARY
    with Largest() as naive:
        (
            F.log_softmax((hidden[index] @ head.weight.T).float(), -1).gather(1, labels[:, None])[:, 0] * above
        ).sum().backward()
    assert naive.numbers == len(index) * VOCABULARY
