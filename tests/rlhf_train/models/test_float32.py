"""A 16-bit model that computes in float32, against transformers on the merged float32 file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from jobs.spec import Lora
from rlhf_train import compat
from rlhf_train.engine.deepspeed_engine import full_state
from rlhf_train.models.adapters import adapted_layers, add_lora, merge_lora
from rlhf_train.models.float32 import in_float32
from rlhf_train.models.networks import load_causal, train_tokenizer
from tests import tiny

IDS = torch.tensor([[2, 70, 80, 90, 60, 61, 62, 63]])
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 96}
NARROW = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 64,
    "max_position_embeddings": 96,
}
# Linear layers; Conv1D; a root of the width (5.6569) that bfloat16 rounds to 5.65625; weights that
# belong to no linear layer.
FAMILIES: dict[str, dict[str, Any]] = {"opt": tiny.OPT, "gpt2": GPT2, "gemma": NARROW, "mixtral": NARROW}


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_the_numbers_are_those_of_the_saved_model(tmp_path: Path, family: str) -> None:
    tokenizer, sizes = train_tokenizer(tiny.WORDS, 320), dict(FAMILIES[family])
    sizes.pop("model_type", None)
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, vocab_size=320, pad_token_id=1, eos_token_id=2, bos_token_id=2, **sizes)
    AutoModelForCausalLM.from_config(config).to(torch.bfloat16).save_pretrained(tmp_path / "start")
    model = load_causal(str(tmp_path / "start"), tokenizer, torch.bfloat16, 1)
    add_lora(model, Lora(rank=4, alpha=8.0), 1)
    for layer in adapted_layers(model).values():
        layer.lora_B["default"].weight.normal_(0, 1e-4)
    merged = merge_lora(full_state(model, keep=True), model)
    assert {value.dtype for value in merged.values()} == {torch.float32}
    model.save_pretrained(tmp_path / "merged", state_dict=merged)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", **compat.dtype_argument(torch.float32)).eval()

    before, parameters = model(IDS).logits, dict(model.named_parameters())
    with in_float32(model):
        found = model(IDS).logits
    expected = plain(IDS).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
    assert (before.float() - expected).abs().max() > 1e-3 * float(expected.abs().max())
    assert model(IDS).logits.equal(before)
    assert all(parameter is parameters[name] for name, parameter in model.named_parameters())


def test_an_error_inside_leaves_the_model_as_it_was() -> None:
    layer = torch.nn.Linear(2, 2, dtype=torch.bfloat16)
    with pytest.raises(RuntimeError), in_float32(layer):
        layer(torch.ones(1, 3))
    assert layer(torch.ones(1, 2, dtype=torch.bfloat16)).dtype == torch.bfloat16
    assert "forward" not in vars(layer)
