"""LoRA's adapters against PEFT itself: which layers, what they merge to, what is saved."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from jobs.errors import ToolkitError
from jobs.spec import Lora
from rlhf_train.disk import read_json
from rlhf_train.models.adapters import (
    add_lora,
    describe,
    layers_to_adapt,
    merge_lora,
    save_adapter,
)

SIZES: dict[str, dict[str, Any]] = {
    "opt": {
        "vocab_size": 300,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "ffn_dim": 64,
        "word_embed_proj_dim": 16,
        "do_layer_norm_before": False,
        "init_std": 0.2,
    },
    "llama": {
        "vocab_size": 300,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 64,
        "initializer_range": 0.2,
    },
    "gpt2": {"vocab_size": 300, "n_embd": 32, "n_layer": 2, "n_head": 4, "initializer_range": 0.2},
}
EACH_BLOCK = {
    "opt": {"self_attn.k_proj", "self_attn.v_proj", "self_attn.q_proj", "self_attn.out_proj", "fc1", "fc2"},
    "llama": {
        *(f"self_attn.{name}_proj" for name in "qkvo"),
        *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
    },
    "gpt2": {"attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"},
}
IDS = torch.arange(5, 25).reshape(2, 10)


def make(family: str, dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **SIZES[family])).to(dtype).eval()


def trained(model: Any, lora: Lora, std: float = 0.1) -> Any:
    """A copy with adapters that do something: PEFT starts them at 0."""
    adapted = add_lora(copy.deepcopy(model), lora, seed=0)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=std, generator=torch.Generator().manual_seed(len(name)))
    return adapted


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model(IDS).logits.float()


@pytest.mark.parametrize("family", SIZES)
def test_by_default_each_linear_layer_of_each_block_gets_one_and_nothing_else(family: str) -> None:
    model = make(family)
    adapted = layers_to_adapt(model, Lora())
    of_block = [{name.split(f".{block}.", 1)[1] for name in adapted if f".{block}." in name} for block in (0, 1)]
    assert of_block == [EACH_BLOCK[family]] * 2 and len(adapted) == 2 * len(EACH_BLOCK[family])
    with_adapters = add_lora(model, Lora(), seed=0)
    learns = {name for name, parameter in with_adapters.named_parameters() if parameter.requires_grad}
    assert learns == {f"{name}.lora_{side}.default.weight" for name in adapted for side in "AB"}
    assert describe(with_adapters).startswith(f"{len(adapted)} layers: ")


@pytest.mark.parametrize("family", SIZES)
def test_it_starts_at_the_model_itself_and_merges_to_what_it_computes(family: str) -> None:
    model, lora = make(family), Lora(rank=4, alpha=8.0)
    torch.testing.assert_close(logits(add_lora(copy.deepcopy(model), lora, seed=0)), logits(model))
    adapted, merged = trained(model, lora), copy.deepcopy(model)
    merged.load_state_dict(merge_lora(adapted.state_dict(), adapted))
    assert not torch.allclose(logits(adapted), logits(model), atol=1e-2)
    torch.testing.assert_close(logits(merged), logits(adapted), rtol=1e-5, atol=1e-5)


def test_a_square_conv1d_is_merged_the_right_way_round() -> None:
    """attn.c_proj is (32, 32): turned the wrong way it would fit, too."""
    model, lora = make("gpt2"), Lora(rank=4, target_modules=("attn.c_proj",))
    adapted, merged = trained(model, lora), copy.deepcopy(model)
    merged.load_state_dict(merge_lora(adapted.state_dict(), adapted))
    torch.testing.assert_close(logits(merged), logits(adapted), rtol=1e-5, atol=1e-5)


def test_a_name_that_matches_nothing_is_refused_with_those_that_are_there() -> None:
    with pytest.raises(ToolkitError) as caught:
        layers_to_adapt(make("llama"), Lora(target_modules=("q_proj", "query", "fc1")))
    assert "query, fc1 matches no linear layer" in caught.value.why
    assert "down_proj, gate_proj" in caught.value.hint
    with pytest.raises(ToolkitError, match="no layer of the model"):
        layers_to_adapt(make("opt"), Lora(target_modules=("embed_tokens",)))  # it is there, and not linear


def test_a_change_that_bfloat16_would_lose_is_saved_in_float32() -> None:
    """A weight of 0.2 has steps of 2^-10 in bfloat16: of smaller changes, little is left."""
    model, lora = make("llama", torch.bfloat16), Lora(rank=4, alpha=4.0)
    for std, expected in ((1e-4, torch.float32), (0.1, torch.bfloat16)):
        adapted = trained(model, lora, std)
        merged = merge_lora(adapted.state_dict(), adapted)
        assert {value.dtype for value in merged.values()} == {expected}
        name, before = "model.layers.0.self_attn.o_proj", model.model.layers[0].self_attn.o_proj.weight.float()
        layer = adapted.get_submodule(name)
        change = layer.lora_B["default"].weight.float() @ layer.lora_A["default"].weight.float()
        kept = float(((merged[f"{name}.weight"].float() - before) * change).sum() / change.square().sum())
        assert kept > 0.95
        in_bfloat16 = (before + change).to(torch.bfloat16).float() - before
        assert (float((in_bfloat16 * change).sum() / change.square().sum()) > 0.95) == (expected == torch.bfloat16)


# PEFT 0.13, of the pinned stack, fails at any field that it does not know; these it does.
PEFT_FIELDS = {
    "peft_type",
    "task_type",
    "base_model_name_or_path",
    "inference_mode",
    "r",
    "lora_alpha",
    "lora_dropout",
    "target_modules",
    "bias",
    "fan_in_fan_out",
}


@pytest.mark.parametrize("family", SIZES)
def test_the_adapters_folder_is_one_that_peft_loads(family: str, tmp_path: Path) -> None:
    from peft import PeftModel

    model, lora = make(family), Lora(rank=4, alpha=8.0)
    model.save_pretrained(tmp_path / "base")
    adapted = trained(model, lora)
    save_adapter(adapted.state_dict(), adapted, lora, str(tmp_path / "base"), tmp_path / "adapter")
    assert set(read_json(tmp_path / "adapter" / "adapter_config.json")) == PEFT_FIELDS
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval()
    loaded: Any = PeftModel.from_pretrained(base, str(tmp_path / "adapter"))
    torch.testing.assert_close(logits(loaded), logits(adapted), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logits(loaded.merge_and_unload()), logits(adapted), rtol=1e-4, atol=1e-4)
