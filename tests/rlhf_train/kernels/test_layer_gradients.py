"""Compare Triton's kernels of the backward pass with PyTorch's gradients, in Triton's interpreter.

tests/conftest.py switches the interpreter on.
"""

import pytest
import torch
import torch.nn.functional as F

from rlhf_train.kernels import layer_gradients

pytestmark = pytest.mark.skipif(not layer_gradients.HAS_TRITON, reason="no Triton 3, which is there for Linux only")

DTYPES = pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)], ids=str)


def numbers(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@DTYPES
@pytest.mark.parametrize("adds", [True, False])
def test_the_gradient_of_a_norm(dtype, tolerance, adds, monkeypatch):
    """Three programs for eleven rows, of a length that is no power of two.

    The reference is PyTorch's, in float64.
    """
    monkeypatch.setattr(layer_gradients, "PROGRAMS", 3)
    x, of_normed, more = (3 * numbers(11, 40, seed=seed, dtype=dtype) + 1 for seed in range(3))
    weight, bias = numbers(40, seed=3, dtype=dtype), numbers(40, seed=4, dtype=dtype)
    exact = [tensor.double().requires_grad_() for tensor in (x, weight, bias)]
    F.layer_norm(exact[0], (40,), *exact[1:], eps=1e-5).backward(of_normed.double())
    expected = [exact[0].grad + (more.double() if adds else 0), exact[1].grad, exact[2].grad]
    for found, wanted in zip(
        layer_gradients.norm_gradient(x, weight, more if adds else None, of_normed, 1e-5), expected, strict=True
    ):
        assert found.dtype == dtype
        torch.testing.assert_close(found.double(), wanted, rtol=tolerance, atol=tolerance)


@DTYPES
def test_the_gradient_of_a_relu_and_its_bias(dtype, tolerance, monkeypatch):
    """Two programs for three tiles of rows, and as many of columns; the last ones are not full."""
    for name, value in {"ROWS": 4, "COLUMNS": 16, "PARTS": 2}.items():
        monkeypatch.setattr(layer_gradients, name, value)
    y, above = numbers(11, 40, dtype=dtype).relu(), numbers(40, 11, seed=1, dtype=dtype).T  # not contiguous
    found, of_bias = layer_gradients.relu_gradient(above, y)
    expected = torch.ops.aten.threshold_backward(above, y, 0)
    assert torch.equal(found, expected)
    assert torch.equal(layer_gradients.relu_gradient(above, y * torch.nan)[0], above)  # a NaN is not hidden
    torch.testing.assert_close(of_bias.double(), expected.double().sum(0), rtol=tolerance, atol=tolerance)
