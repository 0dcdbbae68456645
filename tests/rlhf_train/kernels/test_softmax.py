"""Compare Triton's kernels of the log-probs with plain PyTorch, in Triton's interpreter on a CPU.

tests/conftest.py switches the interpreter on.
"""

import pytest
import torch

from rlhf_train.kernels import softmax
from rlhf_train.models import log_probs

pytestmark = pytest.mark.skipif(not softmax.HAS_TRITON, reason="no Triton 3, which is there for Linux only")


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_kernels_are_their_plain_twins(monkeypatch, dtype, temperature):
    """Four blocks, the last one not full."""
    monkeypatch.setattr(softmax, "BLOCK", 16)
    draw = torch.Generator().manual_seed(0)
    logits = (5 * torch.randn(6, 50, generator=draw)).to(dtype)
    labels = torch.randint(0, 50, (6,), generator=draw)
    expected = log_probs.softmax_numbers(logits, labels, temperature, True)
    for ours, theirs in zip(softmax.softmax_numbers(logits, labels, temperature, True), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    above, normalizers = torch.randn(6, generator=draw), expected[1]
    plain, kernel = logits.clone(), logits.clone()
    log_probs.to_gradient_(plain, labels, normalizers, above, temperature)
    softmax.to_gradient_(kernel, labels, normalizers, above, temperature)
    torch.testing.assert_close(kernel, plain)
