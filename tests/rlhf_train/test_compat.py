"""Test what differs between library versions, on today's stack or the pinned one of the image."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from transformers import OPTConfig, OPTForCausalLM

from rlhf_train import compat
from tests import tiny

pytestmark = pytest.mark.pinned

IDS = torch.tensor([[2, 10, 11, 12], [2, 20, 21, 22], [2, 30, 31, 32]])


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(0)
    return OPTForCausalLM(
        OPTConfig(vocab_size=64, dropout=0.0, **{key: value for key, value in tiny.OPT.items() if key != "model_type"})
    ).eval()


def test_deepspeed_is_imported_where_there_is_a_gpu_and_no_nvcc(tmp_path: Any) -> None:
    """CUDA_HOME is a folder without nvcc, as in the image and on a rented box.

    DeepSpeed 0.15 would run nvcc at import. The import must not bring in the compiler either, which
    takes 2 s, when DeepSpeed's ZeRO then imports Muon (0.19; 0.15 has none).
    """
    script = """
import sys, torch
torch.cuda.is_available = lambda: True
import rlhf_train.engine.deepspeed_engine
assert torch.cuda.is_available() and torch.compile.__module__ == "torch"
try:
    import deepspeed.runtime.zero.muon.muon_optimizer
except ImportError:
    pass
assert "torch._inductor.compile_fx" not in sys.modules
"""
    environment = os.environ | {
        "CUDA_HOME": str(tmp_path),
        "DS_ACCELERATOR": "cuda",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


def test_the_dtype_is_the_one_asked_for_whatever_the_file_has(model: Any, tmp_path: Any) -> None:
    """transformers 4 reads as float32 by default, transformers 5 as the file is."""
    model.to(torch.bfloat16).save_pretrained(tmp_path)
    model.to(torch.float32)
    for dtype in (torch.float32, torch.bfloat16):
        loaded = OPTForCausalLM.from_pretrained(tmp_path, **compat.dtype_argument(dtype))
        assert {parameter.dtype for parameter in loaded.parameters()} == {dtype}
        assert {
            parameter.dtype
            for parameter in OPTForCausalLM._from_config(model.config, **compat.dtype_argument(dtype)).parameters()
        } == {dtype}


def test_rows_that_leave_the_cache(model: Any) -> None:
    """The next logits of the rows that stay are those that they have without a cache."""
    with torch.no_grad():
        cache = model(input_ids=IDS[:, :3], use_cache=True).past_key_values
        cache = compat.keep_rows(cache, torch.tensor([2, 0]))
        left = model(
            input_ids=IDS[[2, 0], 3:],
            past_key_values=cache,
            attention_mask=torch.ones(2, 4, dtype=torch.long),
            use_cache=True,
        )
        expected = model(input_ids=IDS).logits[[2, 0], 3]
    torch.testing.assert_close(left.logits[:, -1], expected, rtol=1e-5, atol=1e-5)


def test_positions_are_given_only_where_the_model_takes_them(model: Any) -> None:
    """A row padded on the left has the logits that it has alone.

    OPT counts real tokens itself in transformers 4, and is given positions in 5.
    """
    padded = torch.tensor([[1, 1, 2, 10, 11]])
    mask = (padded != 1).long()
    extra = {"position_ids": (mask.cumsum(1) - 1).clamp(min=0)} if compat.takes_position_ids(model) else {}
    with torch.no_grad():
        found = model(input_ids=padded, attention_mask=mask, **extra).logits[0, -1]
        alone = model(input_ids=padded[:, 2:]).logits[0, -1]
    torch.testing.assert_close(found, alone, rtol=1e-5, atol=1e-5)


def test_checkpoints_change_no_gradient(model: Any) -> None:
    def gradients() -> list[torch.Tensor]:
        model.zero_grad()
        model(input_ids=IDS, labels=IDS).loss.backward()
        return [parameter.grad.clone() for parameter in model.parameters()]

    plain = gradients()
    model.train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=compat.checkpointing_arguments())
    checkpointed = gradients()
    model.gradient_checkpointing_disable()
    model.eval()
    for one, other in zip(plain, checkpointed, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-6, atol=1e-7)


def test_cudnn_attention_is_off_where_there_is_one() -> None:
    compat.without_cudnn_attention()
    assert not getattr(torch.backends.cuda, "cudnn_sdp_enabled", bool)()
