"""Compare the GPU's fused layers with plain layers, on a CPU.

Triton's kernels run in their interpreter; PyTorch's own epilogue stands for cuBLAS's.
"""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

from rlhf_train.data.sequences import Sequences
from rlhf_train.kernels import fused_layers, layer_gradients
from rlhf_train.models.networks import ActorForward, padding
from tests.rlhf_train.generation.test_decoder import opt, some_prompts

pytestmark = pytest.mark.skipif(not layer_gradients.HAS_TRITON, reason="no Triton 3, which is there for Linux only")


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    monkeypatch.setattr(fused_layers, "_by_kernels", lambda x: True)
    monkeypatch.setattr(fused_layers, "_by_cublas", lambda x: True)


# With a residual, frozen, dtype. Triton's interpreter rounds to float16, but cuts to bfloat16.
RMS_CASES = [
    (True, False, torch.float32),
    (False, True, torch.float32),
    (True, True, torch.float16),
    (False, False, torch.float16),
]


def numbers(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("asked", ["both", "sum", "norm"])
@pytest.mark.parametrize("with_residual", [True, False])
@pytest.mark.parametrize("is_frozen", [True, False])
def test_a_sum_and_its_norm(with_residual, asked, is_frozen, as_on_a_gpu):
    norm = nn.LayerNorm(40)
    with torch.no_grad():
        norm.weight.copy_(numbers(40, seed=5))
    norm.requires_grad_(not is_frozen)
    plain = copy.deepcopy(norm)
    inputs = [numbers(11, 40, seed=seed).requires_grad_() for seed in range(1 + with_residual)]
    twins = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    found = fused_layers.add_norm(inputs[0], inputs[1] if with_residual else None, norm)
    total = twins[0] + twins[1] if with_residual else twins[0]
    expected = (total, plain(total))
    of_sum, of_norm = (numbers(11, 40, seed=seed) for seed in (7, 8))
    for sums, normed in (found, expected):
        torch.autograd.backward(
            *{"both": ([sums, normed], [of_sum, of_norm]), "sum": ([sums], [of_sum]), "norm": ([normed], [of_norm])}[
                asked
            ]
        )
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs)
    for ours, theirs in zip([*inputs, *norm.parameters()], [*twins, *plain.parameters()], strict=True):
        assert (ours.grad is None) == (theirs.grad is None)
        if theirs.grad is not None:
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("by_kernels", [True, False])
@pytest.mark.parametrize("asked", ["both", "sum", "norm"])
@pytest.mark.parametrize(("with_residual", "is_frozen", "dtype"), RMS_CASES)
def test_a_sum_and_its_root_mean_square_norm(with_residual, is_frozen, dtype, asked, by_kernels, monkeypatch):
    """Held to transformers' module: to the last bit in 16 bits, and its gradients nearly."""
    monkeypatch.setattr(fused_layers, "_by_kernels", lambda x: by_kernels)
    norm = LlamaRMSNorm(40, eps=1e-2).to(dtype)
    with torch.no_grad():
        norm.weight.copy_(numbers(40, seed=5))
    norm.requires_grad_(not is_frozen)
    plain = copy.deepcopy(norm)
    inputs = [numbers(11, 40, seed=seed).to(dtype).requires_grad_() for seed in range(1 + with_residual)]
    twins = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    found = fused_layers.add_norm(inputs[0], inputs[1] if with_residual else None, norm)
    total = twins[0] + twins[1] if with_residual else twins[0]
    expected = (total, plain(total))
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, **({"rtol": 0, "atol": 0} if dtype == torch.float16 else {}))
    above = [numbers(11, 40, seed=seed).to(dtype) for seed in (7, 8)]
    places = {"both": [0, 1], "sum": [0], "norm": [1]}[asked]
    for pair in (found, expected):
        torch.autograd.backward([pair[place] for place in places], [above[place] for place in places])
    near = {"rtol": 2e-2, "atol": 4e-2} if dtype == torch.float16 else {"rtol": 1e-4, "atol": 1e-5}
    for ours, theirs in zip([*inputs, norm.weight], [*twins, plain.weight], strict=True):
        assert (ours.grad is None) == (theirs.grad is None)
        if theirs.grad is not None:
            torch.testing.assert_close(ours.grad, theirs.grad, **near)


@pytest.mark.parametrize("by_kernels", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("bias", [True, False])
def test_a_gated_layer(dtype, bias, by_kernels, monkeypatch):
    monkeypatch.setattr(fused_layers, "_by_kernels", lambda x: by_kernels)
    torch.manual_seed(0)
    mlp = LlamaMLP(LlamaConfig(hidden_size=32, intermediate_size=50, mlp_bias=bias)).to(dtype)
    with torch.no_grad():
        for parameter in mlp.parameters():
            parameter.mul_(20)  # the gates' slopes differ
    plain = copy.deepcopy(mlp)
    inputs = [numbers(30, 32).to(dtype).requires_grad_() for _ in range(2)]
    found, expected = fused_layers.gated(mlp, inputs[0]), plain(inputs[1])
    assert torch.equal(found, expected) if dtype == torch.float16 else torch.allclose(found, expected, rtol=1e-5)
    for y in (found, expected):
        y.backward(numbers(30, 32, seed=3).to(dtype))
    pairs = [(inputs[0], inputs[1]), *zip(mlp.parameters(), plain.parameters(), strict=True)]
    for ours, theirs in pairs:
        difference = (ours.grad - theirs.grad).float().norm() / theirs.grad.float().norm()
        assert difference < (1e-2 if dtype == torch.float16 else 1e-5)


@pytest.mark.parametrize("frozen", [(), ("weight", "bias"), ("x",)])
@pytest.mark.parametrize("kernels_run", [True, False])
def test_a_product_with_its_relu(frozen, kernels_run, as_on_a_gpu, monkeypatch):
    monkeypatch.setattr(fused_layers, "_by_kernels", lambda x: kernels_run)

    def run(linear_relu):
        tensors = {"x": numbers(2, 10, 24), "weight": numbers(40, 24, seed=1), "bias": numbers(40, seed=2)}
        for name, tensor in tensors.items():
            tensor.requires_grad_(name not in frozen)
        y = linear_relu(*tensors.values())
        y.backward(numbers(2, 10, 40, seed=3))
        return [y.detach(), *(tensor.grad for tensor in tensors.values())]

    plain = run(lambda x, weight, bias: F.relu(F.linear(x, weight, bias)))
    assert (
        "LinearRelu"
        in type(
            fused_layers.linear_relu(numbers(3, 24).requires_grad_(), numbers(40, 24), numbers(40)).grad_fn
        ).__name__
    )
    for found, expected in zip(run(fused_layers.linear_relu), plain, strict=True):
        assert (found is None) == (expected is None)
        if expected is not None:
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_what_zero_3_takes_away_goes_through_its_module(as_on_a_gpu):
    norm, called = nn.LayerNorm(16), []
    norm.register_forward_hook(lambda *_: called.append(1))
    norm.weight.ds_id = 0
    fused_layers.add_norm(numbers(3, 16), None, norm)
    assert called == [1]
    weight = nn.Parameter(numbers(8, 16))
    weight.ds_id = 0
    y = fused_layers.linear_relu(numbers(3, 16), weight, numbers(8))
    assert "LinearRelu" not in type(y.grad_fn).__name__ and y.min() == 0


@pytest.mark.parametrize(
    "shape", [{}, {"do_layer_norm_before": False, "word_embed_proj_dim": 16}], ids=["opt", "opt-350m"]
)
def test_a_model_that_takes_packed_rows(shape, as_on_a_gpu, monkeypatch):
    plain = opt(**shape)
    quick = copy.deepcopy(plain)
    for model in (plain, quick):
        assert padding(None, model) is None
    assert all(
        isinstance(layer.fc1, fused_layers.LinearRelu) and isinstance(layer.activation_fn, nn.Identity)
        for layer in quick.model.decoder.layers
    )
    texts = [np.array(text) for text in some_prompts(6)]
    packed = Sequences.of(texts[:3], texts[3:], None, torch.device("cpu"))
    made = []
    for name in ("norm_gradient", "relu_gradient"):
        kernel = getattr(layer_gradients, name)
        monkeypatch.setattr(
            layer_gradients, name, lambda *tensors, kernel=kernel: made.append(kernel.__name__) or kernel(*tensors)
        )

    def run(model):
        log_probs = ActorForward(model)(packed)[0]
        (torch.arange(1.0, len(log_probs) + 1) * log_probs).sum().backward()
        return log_probs.detach(), {name: parameter.grad for name, parameter in model.named_parameters()}

    found, gradients = run(quick)
    layer_count = len(quick.model.decoder.layers)
    assert [made.count(name) for name in ("norm_gradient", "relu_gradient")] == [2 * layer_count, layer_count]
    monkeypatch.undo()
    expected, wanted = run(plain)
    assert len(made) == 3 * layer_count
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    for name, gradient in wanted.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-4, atol=1e-5)
